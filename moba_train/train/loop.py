"""The training loop: stage -> rows -> step -> record -> evaluate -> save -> stop?

Every rank runs it in lockstep. What differs between ranks is explicit: the rows of a data-parallel rank, and the sinks
and the log, which only rank 0 has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

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
from moba_train.train.step import (
    CurrentStage,
    Evaluated,
    Evaluator,
    RowSource,
    evaluate_step,
    is_evaluation_due,
    position_record,
    run_step,
)
from moba_train.train.stopping import Stopping


@dataclass(frozen=True)
class TrainOutcome:
    """How `train` ended.

    Attributes:
        finished: every stage is done and evaluated; False = stopped on request, resume to go on.
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
    hindrance: str = "",
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

    An evaluation that is due when the run is asked to stop is left to whoever goes on: the state remembers it, and the
    run begins with it, in the stage of its step, before anything else is trained.

    Args:
        engine: holds the weights that belong to `start`.
        schedule: with what `start` says was decided. It gets shorter when a stage decides, and `until_step` with it.
        until_step: where the stages end that run on this mesh: the end of the schedule, if all do.
        hindrance: why nothing at all is to be done: too little time is left, or "mesh", where it is not the stage's.
        stage_data: stage index -> its rows; called when the stage begins.
        evaluators: see `evaluate_step` for their order.
        store: where checkpoints go.
        sinks, log: empty and silent on every rank but 0.
        stopping: who may ask for a stop; it is honoured after the current step, and agreed over all ranks.

    Raises:
        TrainingDiverged: `run.max_bad_steps` steps in a row were not finite; the state was saved first.
        CheckpointError: a checkpoint could not be written.
        UserError: metrics could not be written; the state was saved first.
    """
    done, bad_steps = start, BadSteps(run.max_bad_steps, start.bad_steps, start.bad_steps_total)
    records, current = Records(sinks), CurrentStage(engine, stage_data, log)
    is_over = start.evaluated and start.step == schedule.total_steps
    reason = "finished" if until_step == schedule.total_steps else "mesh"
    reason = hindrance if hindrance and not is_over else reason

    def wishes() -> Wishes:
        stop = stopping.wish(store.save_time_s, store.in_flight_s)
        return Wishes(stop=bool(stop) or records.failed, save_failed=store.has_failed)

    while not hindrance and (done.step < until_step or not done.evaluated):
        is_new_step = done.evaluated
        if is_new_step:
            data, place = current.enter(schedule, done.step), schedule.place(done.step)
            look_inside = (done.step + 1) % max(1, run.log_every) == 0 or place.is_stage_end
            this = run_step(engine, schedule, done.step, data, meter, wishes, log, look_inside)
            record, agreed = this.record, this.wishes
            _tell(bad_steps.note(record, schedule.sample_ids(done.step)), log)
            counts = (record["tokens"], bad_steps.in_a_row, bad_steps.total)
            done = done.advanced(place.stage_index, place.step_in_stage + 1, *counts)
        else:
            log.line(f"first the evaluation of step {done.step}, before which the run was stopped")
            current.reenter(schedule, done.step)
            record, agreed = position_record(schedule, done), Wishes()

        # When a run ends before its time, what is left of that may be shorter than an evaluation.
        evaluation = Evaluated({}, replace(done, evaluated=not is_evaluation_due(evaluators, schedule, done.step)))
        if not (agreed.stop or agreed.save_failed):
            evaluation = evaluate_step(engine, evaluators, schedule, done)
            if evaluation.record:  # which may have taken longer than the step: no signal waits for another one
                agreed = meter.agree_on(Wishes(stop=bool(stopping.signalled())))
        done, longer = evaluation.progress, schedule
        schedule = schedule.with_decided(done.decided)
        until_step -= longer.total_steps - schedule.total_steps
        log.total_steps(schedule.total_steps)
        if is_new_step:
            records.write(record | evaluation.record | store.figures())
        elif evaluation.record:
            records.amend(record | evaluation.record)
        _tell((*evaluation.lines, *store.news(), *records.news()), log)
        if agreed.save_failed:
            store.finish()

        is_stage_end = schedule.place(done.step - 1).is_stage_end
        planned_stop = 0 < run.stop_after_steps <= done.step - start.step
        ending = agreed.stop or planned_stop or (is_new_step and bad_steps.too_many)
        is_due = is_new_step and checkpoint.every_steps and done.step % checkpoint.every_steps == 0
        if ending or is_stage_end or is_due:
            _save(store, engine, done, stage_end=is_stage_end, records=records)
        if ending:
            if done.step < schedule.total_steps or not done.evaluated:
                # A signal reaches the ranks at different times; the reason is the first rank's that has one.
                reasons = [reason for reason in ranks.gather_all(stopping.reason) if reason]
                reason = reasons[0] if agreed.stop and reasons else "stop_after_steps"
            break
        stopping.step_done()

    engine.topology.watch.begin("waiting for the last save", limit="save")
    store.finish()
    _tell((*store.news(), *records.news()), log)
    ranks.from_rank_0(records.raise_failure)
    bad_steps.raise_if_too_many()
    how = "finished" if reason == "finished" else f"stopped ({reason})"
    left = "" if done.evaluated else "; its evaluation takes place when the run goes on"
    log.line(f"{how} after step {done.step}/{schedule.total_steps}{left}")
    return TrainOutcome(done.evaluated and done.step == schedule.total_steps, done, reason)


def _save(store: CheckpointStore, engine: Engine, progress: Progress, *, stage_end: bool, records: Records) -> None:
    """Metrics reach the disk before the checkpoint that they lead up to is published."""
    records.flush()
    engine.topology.watch.begin(f"saving step {progress.step}", limit="save")
    store.save(engine, progress, stage_end=stage_end)


def _tell(lines: Iterable[str], log: Log) -> None:
    for line in lines:
        log.line(line)
