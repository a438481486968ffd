"""`moba-train train`: build every part from its piece of the configuration, then hand over to the loop."""

from __future__ import annotations

from pathlib import Path

from moba_train.commands.evaluators import build_evaluators
from moba_train.commands.parts import build_engine, identity_of, joined_ranks, make_folder
from moba_train.config.load import to_toml
from moba_train.config.schema import RunConfig
from moba_train.data.stage_data import StageData
from moba_train.data.tokenizer import Tokenizer, load_tokenizer
from moba_train.engine.base import Engine
from moba_train.parallel import ranks
from moba_train.parallel.topology import Topology
from moba_train.plan_view import build_plan
from moba_train.train.checkpoint import CheckpointStore
from moba_train.train.console import ConsoleLogger, Log, SilentLog
from moba_train.train.flops import peak_tflops
from moba_train.train.loop import TrainOutcome, train
from moba_train.train.manifest import replace_text
from moba_train.train.metrics import MetricSink, open_sinks
from moba_train.train.progress import Progress
from moba_train.train.record import Meter
from moba_train.train.resume import begin
from moba_train.train.schedule import Schedule, build_schedule
from moba_train.train.signals import StopSignals
from moba_train.train.stopping import Stopping
from moba_train.train.summary import RunSummary


def run_train(config: RunConfig, *, resume: str) -> int:
    """Train as configured; returns the exit code (0 also for a planned stop).

    `moba_train.commands.inputs.check_training_inputs` has looked at the files before.

    Args:
        resume: "auto", "never" or a path; see `moba_train.train.resume`.

    Raises:
        UserError: anything that the user can mend, on every rank.
    """
    # Until all ranks are there, a signal ends the process: there is nothing to save. From then on it stops after the
    # current step, the first one included.
    with joined_ranks(config) as topology, StopSignals() as signals:
        run_dir = Path(config.run.dir)
        schedule = build_schedule(config.stages, config.optimizer)
        tokenizer = load_tokenizer(config.data.tokenizer)
        identity = identity_of(config, tokenizer, topology)
        engine = build_engine(config, topology)
        evaluators = build_evaluators(config, engine, tokenizer)
        start = begin(run_dir, resume, engine, identity, schedule)
        make_folder(run_dir, where="run.dir")  # it is this run's own, now that nothing speaks against it any more
        ranks.from_rank_0(lambda: replace_text(run_dir / "config.toml", to_toml(config)))
        summary = RunSummary(config.stages)
        log, sinks = _outputs(config, topology, start.progress, schedule, summary)
        for line in (*_greeting(config, engine), *start.notes):
            log.line(line)
        try:
            outcome = train(
                engine,
                schedule=schedule,
                start=start.progress,
                until_step=schedule.total_steps,
                run=config.run,
                checkpoint=config.checkpoint,
                stage_data=_StageRows(config, tokenizer, run_dir / "cache", log),
                evaluators=evaluators,
                store=CheckpointStore(run_dir, identity, to_toml(config), config.stages, config.checkpoint.keep_last),
                meter=_meter(config, topology),
                sinks=sinks,
                log=log,
                stopping=Stopping(signals),
            )
        finally:
            for sink in sinks:
                sink.close()
        for line in (*summary.lines(), _farewell(outcome, run_dir)):
            log.line(line)
    return 0


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

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, cache_dir: Path, log: Log) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._cache_dir = cache_dir
        self._log = log

    def __call__(self, index: int) -> StageData:
        ranks.from_rank_0(lambda: self._open(index).cut_share)
        data = self._open(index)
        shares = ", ".join(f"{name} {rows:,}" for name, rows in data.rows_by_source.items())
        self._log.line(f"data: {len(data):,} rows ({shares}), {100 * data.cut_share:.1f} % of the documents are cut")
        return data

    def _open(self, index: int) -> StageData:
        return StageData(
            self._config.data,
            self._config.stages[index],
            stage_index=index,
            seed=self._config.run.seed,
            cache_dir=self._cache_dir,
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


def _greeting(config: RunConfig, engine: Engine) -> tuple[str, ...]:
    topology = engine.topology
    plan = build_plan(config)
    return (
        f"{engine.num_parameters:,} parameters on {topology.world_size} rank(s) of {topology.device.type}: tp "
        f"{topology.tp}, cp {topology.cp}, pp {topology.pp}, dp {topology.dp}; {config.engine.precision}",
        f"{plan.total_tokens:,} tokens in {plan.total_steps:,} steps and {len(plan.stages)} stage(s); run folder "
        f"{config.run.dir}",
    )


def _farewell(outcome: TrainOutcome, run_dir: Path) -> str:
    if outcome.finished:
        return f"next: moba-train eval niah {run_dir}; moba-train report {run_dir}"
    return f"to go on: the same command with --resume auto (run folder {run_dir})"
