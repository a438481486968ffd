"""The training loop: stage -> rows -> step -> record -> evaluate -> save -> stop?

Every rank runs it in lockstep. What differs between ranks is explicit: the rows of a data-parallel rank, and the sinks
and the log, which only rank 0 has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moba_train.config.schema import CheckpointConfig, RunSection
from moba_train.engine.base import Engine
from moba_train.parallel import ranks
from moba_train.train.bad_steps import BadSteps
from moba_train.train.checkpoint import CheckpointStore
from moba_train.train.console import Log
from moba_train.train.metrics import MetricSink, Records
from moba_train.train.progress import Progress
from moba_train.train.record import Meter, Wishes
from moba_train.train.schedule import Schedule
from moba_train.train.step import RowSource, begin_stage, run_step
from moba_train.train.stopping import Stopping

Evaluator = Callable[[int, str, bool], Mapping[str, Any]]
"""(finished steps, stage name, end of a stage?) -> `eval/*` numbers, {} when it is not due. Collective."""


@dataclass(frozen=True)
class TrainOutcome:
    """How `train` ended.

    Attributes:
        finished: every stage is done; False = stopped on request, resume to go on.
        progress: where it ended; a checkpoint of it has been published.
        reason: "finished", "mesh" (the next stage wants another one), "stop_after_steps", the name of the signal or
            the deadline that was near.
    """

    finished: bool
    progress: Progress
    reason: str


def train(
    engine: Engine,
    *,
    schedule: Schedule,
    start: Progress,
    until_step: int,
    too_late: str = "",
    run: RunSection,
    checkpoint: CheckpointConfig,
    stage_data: Callable[[int], RowSource],
    evaluators: Sequence[Evaluator],
    store: CheckpointStore,
    meter: Meter,
    sinks: Sequence[MetricSink],
    log: Log,
    stopping: Stopping,
) -> TrainOutcome:
    """Train from `start` to step `until_step`, or until asked to stop.

    Args:
        engine: holds the weights that belong to `start`.
        until_step: where the stages end that run on this mesh: the end of the schedule, if all do.
        too_late: why no step is to be begun, where `until_step` is that of `start` for want of time.
        stage_data: stage index -> its rows; called when the stage begins.
        store: where checkpoints go.
        sinks, log: empty and silent on every rank but 0.
        stopping: who may ask for a stop; it is honoured after the current step, and agreed over all ranks.

    Raises:
        TrainingDiverged: `run.max_bad_steps` steps in a row were not finite; the state was saved first.
        CheckpointError: a checkpoint could not be written.
        UserError: metrics could not be written; the state was saved first.
    """
    done, bad_steps = start, BadSteps(run.max_bad_steps, start.bad_steps, start.bad_steps_total)
    records = Records(sinks)
    stage_index, data, reason = -1, None, "finished" if until_step == schedule.total_steps else too_late or "mesh"

    def wishes() -> Wishes:
        stop = stopping.wish(store.save_time_s, store.in_flight_s)
        return Wishes(stop=bool(stop) or records.failed, save_failed=store.has_failed)

    for step in range(start.step, until_step):
        place = schedule.place(step)
        stage = schedule.stages[place.stage_index]
        if data is None or place.stage_index != stage_index:
            engine.topology.watch.begin(f"opening the data of stage '{stage.name}'", limit="start")
            stage_index, data = place.stage_index, stage_data(place.stage_index)
            begin_stage(engine, schedule, step, data, log)

        look_inside = (step + 1) % max(1, run.log_every) == 0 or place.is_stage_end
        this = run_step(engine, schedule, step, data, meter, wishes, log, look_inside)
        record, agreed = this.record, this.wishes
        for line in bad_steps.note(record, schedule.sample_ids(step)):
            log.line(line)
        counts = (bad_steps.in_a_row, bad_steps.total)
        done = Progress(step + 1, stage_index, place.step_in_stage + 1, record["tokens"], *counts)

        # When a run ends before its time, what is left of that may be shorter than an evaluation.
        if not (agreed.stop or agreed.save_failed):
            evaluated: dict[str, Any] = {}
            for evaluate in evaluators:
                engine.topology.watch.begin(f"evaluation after step {done.step}", limit="step")
                evaluated |= evaluate(done.step, stage.name, place.is_stage_end)
            if evaluated:  # which may have taken longer than the step: no signal waits for another one
                agreed = meter.agree_on(Wishes(stop=bool(stopping.signalled())))
            record |= evaluated
        record |= store.figures()
        records.write(record)
        _tell(store, records, log)
        if agreed.save_failed:
            store.finish()

        planned_stop = 0 < run.stop_after_steps <= done.step - start.step
        ending = agreed.stop or planned_stop or bad_steps.too_many
        if ending or place.is_stage_end or (checkpoint.every_steps and done.step % checkpoint.every_steps == 0):
            _save(store, engine, done, stage_end=place.is_stage_end, records=records)
        if ending:
            if done.step < schedule.total_steps:
                # A signal reaches the ranks at different times; the reason is the first rank's that has one.
                reasons = [reason for reason in ranks.gather_all(stopping.reason) if reason]
                reason = reasons[0] if agreed.stop and reasons else "stop_after_steps"
            break
        stopping.step_done()

    engine.topology.watch.begin("waiting for the last save", limit="save")
    store.finish()
    _tell(store, records, log)
    ranks.from_rank_0(records.raise_failure)
    bad_steps.raise_if_too_many()
    how = "finished" if reason == "finished" else f"stopped ({reason})"
    log.line(f"{how} after step {done.step}/{schedule.total_steps}")
    return TrainOutcome(done.step == schedule.total_steps, done, reason)


def _save(store: CheckpointStore, engine: Engine, progress: Progress, *, stage_end: bool, records: Records) -> None:
    """Metrics reach the disk before the checkpoint that they lead up to is published."""
    records.flush()
    engine.topology.watch.begin(f"saving step {progress.step}", limit="save")
    store.save(engine, progress, stage_end=stage_end)


def _tell(store: CheckpointStore, records: Records, log: Log) -> None:
    for line in (*store.news(), *records.news()):
        log.line(line)
