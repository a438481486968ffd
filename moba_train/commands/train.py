"""`moba-train train`: build every part from its piece of the configuration, then hand over to the loop."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from moba_train import last_words
from moba_train.commands.evaluators import build_evaluators
from moba_train.commands.inputs import training_data_errors
from moba_train.commands.parts import (
    build_engine,
    identity_of,
    initial_weights,
    joined_ranks,
    on_mesh_of_next_stage,
)
from moba_train.config.engine_rules import describe_engine
from moba_train.config.load import to_toml
from moba_train.config.mesh import describe_mesh, parallel_of_stage, stages_on_mesh
from moba_train.config.schema import RunConfig
from moba_train.data.stage_data import StageData, source_facts
from moba_train.data.tokenizer import Tokenizer, load_tokenizer
from moba_train.engine.base import Engine
from moba_train.errors import EXIT_MESH
from moba_train.parallel import ranks
from moba_train.parallel.topology import Topology
from moba_train.train.checkpoint import CheckpointStore
from moba_train.train.console import ConsoleLogger, Log, SilentLog
from moba_train.train.flops import peak_tflops
from moba_train.train.loop import Training, TrainOutcome
from moba_train.train.manifest import replace_text
from moba_train.train.metrics import MetricSink, open_sinks
from moba_train.train.preflight import Report, run_preflight
from moba_train.train.progress import Identity, Progress
from moba_train.train.record import Meter
from moba_train.train.resume import begin
from moba_train.train.run_lock import run_lock
from moba_train.train.schedule import Schedule, build_schedule
from moba_train.train.signals import StopSignals
from moba_train.train.stopping import Stopping, deadlines, first_save_s
from moba_train.train.summary import RunSummary

OUTCOME = "outcome.json"

SourcesOf = Callable[[int], Mapping[str, Any]]
"""Stage index -> what its sources hold and how they are drawn, by name (`source_facts`)."""


def run_train(config: RunConfig, *, resume: str) -> int:
    """Train as configured; returns the exit code: 0, also for a planned stop, or EXIT_MESH.

    A run of one process has looked at its files before (`moba_train.commands.inputs.check_training_inputs`).

    Args:
        resume: "auto", "never" or a path; see `moba_train.train.resume`.

    Raises:
        UserError: anything that the user can mend, on every rank.
    """
    # Until all ranks are there, a signal ends the process: there is nothing to save. From then on it stops after the
    # current step, the first one included.
    run_dir = Path(config.run.dir)
    here = on_mesh_of_next_stage(config, resume)
    with (
        joined_ranks(here, run_dir=run_dir) as topology,
        StopSignals(say=_say if topology.is_first_rank else None) as signals,
        nullcontext(_preflight(config, topology)) as checked,
        run_lock(run_dir, say=_say) as (check_lock, lock_notes),
    ):
        ranks.from_rank_0(lambda: (run_dir / OUTCOME).unlink(missing_ok=True))  # that of an earlier job
        ends = deadlines(config.run.stop_after)
        tokenizer = load_tokenizer(config.data.tokenizer)
        identity = identity_of(config, tokenizer, topology)
        fill = initial_weights(config, topology, identity, resume=resume)
        engine = build_engine(here, topology, fill=fill)
        evaluators = build_evaluators(config, engine, tokenizer)
        sources_of = _sources_of(config)
        planned = build_schedule(config.stages, config.optimizer)
        start = begin(run_dir, resume, engine, identity, planned, sources_of=sources_of)
        schedule = build_schedule(config.stages, config.optimizer, start.progress.decided)
        ranks.from_rank_0(lambda: replace_text(run_dir / "config.toml", to_toml(config)))
        summary = RunSummary(config.stages)
        log, sinks = _outputs(config, topology, start.progress, schedule, summary)
        stopping = Stopping(signals, ends, first_save_s=first_save_s(engine.num_parameters))
        origin = (*start.notes, *(fill.notes if fill else ()))
        greeting = (*checked.lines(), *_greeting(config, engine, schedule, start.progress), *lock_notes, *origin)
        where = (config, here, schedule, start.progress)
        hindrance = ranks.from_rank_0(stopping.too_late) or _wrong_mesh(*where)
        for line in (*greeting, *stopping.announce()):
            log.line(line)
        try:
            with _told_store(config, identity, sources_of, check_lock, log) as store:
                training = Training(
                    engine,
                    schedule=schedule,
                    start=start.progress,
                    run=config.run,
                    checkpoint=config.checkpoint,
                    stage_data=_StageRows(config, tokenizer, topology, sources_of, log),
                    evaluators=evaluators,
                    store=store,
                    meter=_meter(config, topology),
                    sinks=sinks,
                    log=log,
                    stopping=stopping,
                )
                outcome = training.train(_until_step(*where), hindrance=hindrance)
        finally:
            for sink in sinks:
                with suppress(OSError):  # what a disk has refused is known already
                    sink.close()
        ranks.from_rank_0(lambda: replace_text(run_dir / OUTCOME, _outcome_text(outcome)))
        for line in (*summary.lines(), _farewell(outcome, config)):
            log.line(line)
    if outcome.reason != "mesh":
        return 0
    last_words.leave("the next stage runs on another mesh", step=outcome.progress.step, code=EXIT_MESH)
    return EXIT_MESH


def _until_step(config: RunConfig, here: RunConfig, schedule: Schedule, done: Progress) -> int:
    """Where the stages end that run on the mesh of `here`, from `done` on: there already, if this is the wrong mesh."""
    if _wrong_mesh(config, here, schedule, done):
        return done.step
    index = schedule.stage_of_next_step(done)
    return schedule.first_steps[stages_on_mesh(config.parallel, config.stages, index)]


def _wrong_mesh(config: RunConfig, here: RunConfig, schedule: Schedule, done: Progress) -> str:
    """ "mesh" where the run goes on in a stage of another mesh than that of `here`, else "".

    So it is where the newest checkpoint turned out to be damaged. It has been set aside: the next start knows better.
    """
    stage = config.stages[schedule.stage_of_next_step(done)]
    return "" if parallel_of_stage(config.parallel, stage) == here.parallel else "mesh"


@contextmanager
def _told_store(
    config: RunConfig, identity: Identity, sources_of: SourcesOf, check_lock: Callable[[], None], log: Log
) -> Iterator[CheckpointStore]:
    """The store, whose news reach the log also when training breaks off."""
    store = CheckpointStore(
        Path(config.run.dir),
        identity,
        to_toml(config),
        config.stages,
        config.checkpoint.keep_last,
        sources_of=sources_of,
        keep_every=config.checkpoint.keep_every,
        asynchronous=config.checkpoint.asynchronous,
        check_lock=check_lock,
    )
    gc.collect()
    gc.freeze()  # Megatron collects garbage in every save: what lives as long as the run need not be looked at again
    try:
        with store:
            yield store
    finally:
        for line in store.news():
            log.line(line)


def _sources_of(config: RunConfig) -> SourcesOf:
    """Each stage is looked at once: every save asks for it."""
    return cache(lambda index: source_facts(config.data, config.stages[index]))


def _say(line: str) -> None:
    """Before there is a log."""
    print(line, flush=True)


def _preflight(config: RunConfig, topology: Topology) -> Report:
    """What was checked; PreflightFailed on every rank where something is wrong on any."""
    data_errors = partial(training_data_errors, config) if topology.world_size > 1 else None
    report = run_preflight(config, topology, find_data_errors=data_errors)
    report.raise_if_failed()
    return report


def _outputs(
    config: RunConfig, topology: Topology, start: Progress, schedule: Schedule, summary: RunSummary
) -> tuple[Log, tuple[MetricSink, ...]]:
    """Log and metric sinks: rank 0 has them all, the others none."""
    if topology.rank != 0:
        return SilentLog(), ()
    console = ConsoleLogger(log_every=config.run.log_every, total_steps=schedule.total_steps, resume_step=start.step)
    return console, (*open_sinks(Path(config.run.dir), resume_step=start.step, console=console), summary)


class _StageRows:
    """Stage index -> rows; rank 0 goes first and leaves the index in the cache for the others."""

    def __init__(
        self, config: RunConfig, tokenizer: Tokenizer, topology: Topology, sources_of: SourcesOf, log: Log
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._topology = topology
        self._sources_of = sources_of
        self._log = log

    def __call__(self, index: int) -> StageData:
        ranks.from_rank_0(lambda: self._go_first(index), self._topology.start_group)
        data = self._open(index)
        shares = ", ".join(f"{name} {rows:,}" for name, rows in data.rows_by_source.items())
        self._log.line(f"data: {len(data):,} rows ({shares}), {100 * data.cut_share:.1f} % of the documents are cut")
        for line in data.length_lines:
            self._log.line(f"data: {line}")
        return data

    def _go_first(self, index: int) -> None:
        """Data that is replaced later, while the stage runs, is not what its checkpoints should tell of."""
        self._sources_of(index)
        self._open(index)

    def _open(self, index: int) -> StageData:
        return StageData(
            self._config.data,
            self._config.stages[index],
            stage_index=index,
            seed=self._config.run.seed,
            cache_dir=Path(self._config.run.dir) / "cache",
            eod_id=self._tokenizer.eod_id,
            pad_id=self._tokenizer.pad_id,
        )


def _meter(config: RunConfig, topology: Topology) -> Meter:
    import torch

    name = torch.cuda.get_device_name(topology.device) if topology.device.type == "cuda" else "CPU"
    return Meter(
        model=config.model,
        full_recompute=config.engine.recompute == "full",
        world_size=topology.world_size,
        replicas=topology.tp * topology.cp * topology.pp,
        device=topology.device,
        peak_tflops=peak_tflops(name, config.engine.precision),
    )


def _greeting(config: RunConfig, engine: Engine, schedule: Schedule, progress: Progress) -> tuple[str, ...]:
    topology = engine.topology
    length = "at most " if schedule.undecided(progress.step) else ""
    return (
        f"{engine.num_parameters:,} parameters on {topology.world_size} rank(s) of {topology.device.type}: tp "
        f"{topology.tp}, cp {topology.cp}, pp {topology.pp}, dp {topology.dp}; "
        f"{describe_engine(config.engine)}, {config.engine.precision}",
        f"{length}{schedule.total_tokens:,} tokens in {schedule.total_steps:,} steps and {len(config.stages)} "
        f"stage(s); run folder {config.run.dir}",
    )


def _outcome_text(outcome: TrainOutcome) -> str:
    """For launch/slurm.sbatch, which decides by it whether the job goes on: one key a line."""
    told = {"finished": outcome.finished, "reason": outcome.reason, "step": outcome.progress.step}
    return json.dumps(told, indent=2) + "\n"


def _farewell(outcome: TrainOutcome, config: RunConfig) -> str:
    if outcome.finished:
        return f"next: moba-train eval niah {config.run.dir}; moba-train report {config.run.dir}"
    if outcome.reason == "mesh":
        schedule = build_schedule(config.stages, config.optimizer, outcome.progress.decided)
        stage = config.stages[schedule.stage_of_next_step(outcome.progress)]
        mesh = describe_mesh(parallel_of_stage(config.parallel, stage))
        return f"stage '{stage.name}' runs on {mesh}: start again to go on (launch/torchrun.sh does by itself)"
    return f"to go on: the same command with --resume auto (run folder {config.run.dir})"
