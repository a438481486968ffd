"""The training loop: stage -> rows -> step -> record -> evaluate -> save -> stop?

Every rank runs it in lockstep. What differs between ranks is explicit: the rows of a data-parallel rank, and the sinks
and the log, which only rank 0 has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from moba_train.config.schema import CheckpointConfig, RunSection, StageConfig
from moba_train.data.row import Row
from moba_train.data.sampler import rows_of_step
from moba_train.engine.base import Engine, StepResult
from moba_train.train.bad_steps import BadSteps
from moba_train.train.checkpoint import CheckpointStore
from moba_train.train.console import Log
from moba_train.train.metrics import MetricSink
from moba_train.train.progress import Progress
from moba_train.train.record import Meter, step_record
from moba_train.train.schedule import Schedule
from moba_train.train.signals import StopSignals

# Rows that are looked at to learn how long a stage's documents are.
TYPICAL_ROWS = 8

Evaluator = Callable[[int, str, bool], Mapping[str, Any]]
"""(finished steps, stage name, end of a stage?) -> `eval/*` numbers, {} when it is not due. Collective."""


class RowSource(Protocol):
    """The rows of one stage; `moba_train.data.stage_data.StageData` is one."""

    def row(self, index: int) -> Row: ...


@dataclass(frozen=True)
class TrainOutcome:
    """How `train` ended.

    Attributes:
        finished: every stage is done; False = stopped on request, resume to go on.
        progress: where it ended; a checkpoint of it has been published.
        reason: "finished", "stop_after_steps" or the name of the signal.
    """

    finished: bool
    progress: Progress
    reason: str


def train(
    engine: Engine,
    *,
    schedule: Schedule,
    start: Progress,
    run: RunSection,
    checkpoint: CheckpointConfig,
    stage_data: Callable[[int], RowSource],
    evaluators: Sequence[Evaluator],
    store: CheckpointStore,
    meter: Meter,
    sinks: Sequence[MetricSink],
    log: Log,
    signals: StopSignals,
) -> TrainOutcome:
    """Train from `start` to the end of the schedule, or until asked to stop.

    Args:
        engine: holds the weights that belong to `start`.
        stage_data: stage index -> its rows; called when the stage begins.
        store: where checkpoints go.
        sinks, log: empty and silent on every rank but 0.
        signals: open handlers; a stop is honoured after the current step, and agreed over all ranks.

    Raises:
        TrainingDiverged: `run.max_bad_steps` steps in a row were not finite; the state was saved first.
        CheckpointError: a checkpoint could not be written.
    """
    done, bad_steps = start, BadSteps(run.max_bad_steps, start.bad_steps)
    stage_index, data, reason = -1, None, "finished"
    for step in range(start.step, schedule.total_steps):
        place = schedule.place(step)
        stage = schedule.stages[place.stage_index]
        if data is None or place.stage_index != stage_index:
            stage_index, data = place.stage_index, stage_data(place.stage_index)
            _begin_stage(engine, schedule, step, data, log)

        look_inside = (step + 1) % max(1, run.log_every) == 0 or place.is_stage_end
        result, record, stop_signal = _step(engine, schedule, step, data, meter, signals, log, look_inside)
        bad_steps.note(step + 1, stage.name, schedule.sample_ids(step), skipped=result.skipped)
        done = Progress(step + 1, stage_index, place.step_in_stage + 1, record["tokens"], bad_steps.in_a_row)

        if not stop_signal:  # the grace of a signal may be shorter than an evaluation
            for evaluate in evaluators:
                record |= evaluate(done.step, stage.name, place.is_stage_end)
        for sink in sinks:
            sink.write(record)

        planned_stop = 0 < run.stop_after_steps <= done.step - start.step
        stopping = stop_signal or planned_stop or bad_steps.too_many
        if stopping or place.is_stage_end or (checkpoint.every_steps and done.step % checkpoint.every_steps == 0):
            _save(store, engine, done, stage_end=place.is_stage_end, sinks=sinks, log=log)
        bad_steps.raise_if_too_many()
        if stopping and done.step < schedule.total_steps:
            reason = (signals.requested or "signal on another rank") if stop_signal else "stop_after_steps"
            break
    how = "finished" if reason == "finished" else f"stopped ({reason})"
    log.line(f"{how} after step {done.step}/{schedule.total_steps}")
    return TrainOutcome(reason == "finished", done, reason)


def _begin_stage(engine: Engine, schedule: Schedule, step: int, data: RowSource, log: Log) -> None:
    """Switch the engine to the stage of step `step` (counted from 0), and announce it."""
    index = schedule.place(step).stage_index
    # The documents decide on transports, which move nothing where a row is not shared.
    documents = typical_documents(data, schedule.stages[index]) if engine.topology.cp > 1 else ()
    notes = engine.set_stage(index, documents=documents)
    for line in (describe_stage(schedule, step), *notes):
        log.line(line)


def _step(
    engine: Engine,
    schedule: Schedule,
    step: int,
    data: RowSource,
    meter: Meter,
    signals: StopSignals,
    log: Log,
    look_inside: bool,
) -> tuple[StepResult, dict[str, Any], bool]:
    """Draw this rank's rows, train on them, agree with the others: (result, record, does any rank wish to stop)."""
    started_s = time.perf_counter()
    place, topology = schedule.place(step), engine.topology
    stage = schedule.stages[place.stage_index]
    sample_ids = rows_of_step(place.step_in_stage, rows_per_step=place.rows, dp_rank=topology.dp_rank, dp=topology.dp)
    topology.watch.begin(f"step {step + 1}, reading rows")
    rows = [data.row(index) for index in sample_ids]
    lr = schedule.lr(step)
    result = engine.train_step(
        rows,
        lr=lr,
        step=step + 1,
        collect_routing=look_inside,
        measure_memory=look_inside,
        on_phase=log.phase,
    )
    topology.watch.begin(f"what follows step {step + 1}")
    stop_signal, pairs = meter.agree(bool(signals.requested), stage, rows)
    step_time_s = time.perf_counter() - started_s
    position = step_record(
        step=step + 1,
        stage=stage,
        stage_index=place.stage_index,
        tokens=schedule.tokens_after(step + 1),
        lr=lr,
        result=result,
    )
    performance = meter.performance(step_time_s=step_time_s, num_tokens=stage.tokens_per_step, pairs=pairs)
    return result, position | performance, stop_signal


def typical_documents(data: RowSource, stage: StageConfig) -> list[tuple[int, ...]]:
    """Cumulative document lengths of a stage's first rows; the same on every rank, and after a resume."""
    rows = min(TYPICAL_ROWS, stage.tokens // stage.seq_len)
    return [tuple(data.row(index).cu_seqlens) for index in range(rows)]


def describe_stage(schedule: Schedule, step: int) -> str:
    """The line that announces the stage of step `step` (counted from 0)."""
    place = schedule.place(step)
    stage = schedule.stages[place.stage_index]
    attention = "full" if stage.attention == "full" else f"MoBA {stage.chunk_size}/{stage.topk}"
    return (
        f"stage {place.stage_index + 1}/{len(schedule.stages)} '{stage.name}' from step {step + 1}: {attention} "
        f"attention, seq_len {stage.seq_len}, {place.rows} rows a step"
    )


def _save(
    store: CheckpointStore,
    engine: Engine,
    progress: Progress,
    *,
    stage_end: bool,
    sinks: Sequence[MetricSink],
    log: Log,
) -> None:
    """Metrics reach the disk before the checkpoint that they lead up to is published."""
    for sink in sinks:
        sink.flush()
    started_s = time.perf_counter()
    engine.topology.watch.begin(f"saving step {progress.step}")
    path = store.save(engine, progress, stage_end=stage_end)
    log.line(f"saved {path} in {time.perf_counter() - started_s:.1f}s")
