"""The training loop: stage -> rows -> step -> record -> evaluate -> save -> stop?

Every rank runs it in lockstep. What differs between ranks is explicit: the rows of a data-parallel rank, and the sinks
and the log, which only rank 0 has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
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
    """How `Training.train` ended.

    Attributes:
        finished: every stage is done and evaluated; False = stopped on request, resume to go on.
        progress: where it ended; a checkpoint of it has been published.
        reason: "finished", "mesh" (the next stage wants another one), "stop_after_steps", the name of the signal or
            the deadline that was near.
    """

    finished: bool
    progress: Progress
    reason: str


class Training:
    """What one process does of a run.

    Args:
        engine: holds the weights that belong to `start`.
        schedule: with what `start` says was decided. It gets shorter when a stage decides.
        stage_data: stage index -> its rows; called when the stage begins.
        evaluators: see `evaluate_step` for their order.
        sinks, log: empty and silent on every rank but 0.
        stopping: who may ask for a stop; it is honoured after the current step, and agreed over all ranks.
    """

    def __init__(
        self,
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
        stopping: Stopping,
    ) -> None:
        self._engine, self._schedule, self._start = engine, schedule, start
        self._run, self._checkpoint = run, checkpoint
        self._evaluators, self._records = evaluators, Records(sinks)
        self._store, self._meter, self._log, self._stopping = store, meter, log, stopping
        self._stage = CurrentStage(engine, stage_data, log)
        self._bad_steps = BadSteps(run.max_bad_steps, start.bad_steps, start.bad_steps_total)

    def train(self, until_step: int, *, hindrance: str = "") -> TrainOutcome:
        """Train to step `until_step`, or until asked to stop.

        A stop leaves an evaluation that is due to whoever goes on: that begins with it, in the stage of its step.

        Args:
            until_step: where the stages end that run on this mesh, if none decides to end earlier.
            hindrance: why nothing at all is to be done: too little time, or "mesh", where this is not the stage's.

        Raises:
            TrainingDiverged: `run.max_bad_steps` steps in a row were not finite; the state was saved first.
            CheckpointError: a checkpoint could not be written.
            UserError: metrics could not be written; the state was saved first.
        """
        done = self._start
        reason = "finished" if until_step == self._schedule.total_steps else "mesh"
        reason = hindrance if hindrance and not self._is_over(done) else reason
        while not hindrance and (done.step < until_step or not done.evaluated):
            is_new_step = done.evaluated
            done, record, agreed = self._step(done) if is_new_step else self._go_back(done)
            evaluation, agreed = self._evaluate(done, agreed)
            done = evaluation.progress
            until_step -= self._shorten(done)
            self._write(record, evaluation, is_new_step=is_new_step)
            if agreed.save_failed:
                self._store.finish()

            is_stage_end = self._schedule.place(done.step - 1).is_stage_end
            planned_stop = 0 < self._run.stop_after_steps <= done.step - self._start.step
            ending = agreed.stop or planned_stop or (is_new_step and self._bad_steps.too_many)
            is_due = is_new_step and self._checkpoint.every_steps and done.step % self._checkpoint.every_steps == 0
            if ending or is_stage_end or is_due:
                self._save(done, stage_end=is_stage_end)
            if ending:
                reason = reason if self._is_over(done) else self._reason(agreed)
                break
            self._stopping.step_done()
        return self._end(done, reason)

    def _is_over(self, done: Progress) -> bool:
        return done.evaluated and done.step == self._schedule.total_steps

    def _step(self, done: Progress) -> tuple[Progress, dict[str, Any], Wishes]:
        """The step after `done`: where the run stands with it, its record, what any rank wishes."""
        schedule, step = self._schedule, done.step
        data, place = self._stage.enter(schedule, step), schedule.place(step)
        look_inside = (step + 1) % max(1, self._run.log_every) == 0 or place.is_stage_end
        this = run_step(self._engine, schedule, step, data, self._meter, self._wishes, self._log, look_inside)
        self._tell(self._bad_steps.note(this.record, schedule.sample_ids(step)))
        counts = (this.record["tokens"], self._bad_steps.in_a_row, self._bad_steps.total)
        return done.advanced(place.stage_index, place.step_in_stage + 1, *counts), this.record, this.wishes

    def _go_back(self, done: Progress) -> tuple[Progress, dict[str, Any], Wishes]:
        """To the stage of the last step, which an earlier process has left without its evaluation."""
        self._log.line(f"first the evaluation of step {done.step}, before which the run was stopped")
        self._stage.reenter(self._schedule, done.step)
        return done, position_record(self._schedule, done), Wishes()

    def _wishes(self) -> Wishes:
        """This rank's after a step."""
        stop = self._stopping.wish(self._store.save_time_s, self._store.in_flight_s)
        return Wishes(stop=bool(stop) or self._records.failed, save_failed=self._store.has_failed)

    def _evaluate(self, done: Progress, agreed: Wishes) -> tuple[Evaluated, Wishes]:
        """What is due after the last step, and what any rank wishes then."""
        if agreed.stop or agreed.save_failed:
            # What is left of the run's time may be shorter than an evaluation.
            is_due = is_evaluation_due(self._evaluators, self._schedule, done.step)
            return Evaluated({}, replace(done, evaluated=not is_due)), agreed
        evaluation = evaluate_step(self._engine, self._evaluators, self._schedule, done)
        if evaluation.record:  # which may have taken longer than the step: no signal waits for another one
            stop = self._stopping.wish_now(self._store.save_time_s, self._store.in_flight_s)
            agreed = self._meter.agree_on(Wishes(stop=bool(stop)))
        return evaluation, agreed

    def _shorten(self, done: Progress) -> int:
        """Take over where stages end by now; the steps that the run has become shorter by."""
        longer, self._schedule = self._schedule, self._schedule.with_decided(done.decided)
        self._log.total_steps(self._schedule.total_steps)
        return longer.total_steps - self._schedule.total_steps

    def _write(self, record: dict[str, Any], evaluation: Evaluated, *, is_new_step: bool) -> None:
        if is_new_step:
            self._records.write(record | evaluation.record | self._store.figures())
        elif evaluation.record:
            self._records.amend(record | evaluation.record)
        self._tell((*evaluation.lines, *self._store.news(), *self._records.news()))

    def _save(self, done: Progress, *, stage_end: bool) -> None:
        """Metrics reach the disk before the checkpoint that they lead up to is published."""
        self._records.flush()
        self._engine.topology.watch.begin(f"saving step {done.step}", limit="save")
        self._store.save(self._engine, done, stage_end=stage_end)

    def _reason(self, agreed: Wishes) -> str:
        """Why the run is stopped. A signal reaches the ranks at different times: the first rank's that has one."""
        reasons = [reason for reason in ranks.gather_all(self._stopping.reason) if reason]
        return reasons[0] if agreed.stop and reasons else "stop_after_steps"

    def _end(self, done: Progress, reason: str) -> TrainOutcome:
        """All that was saved is published, what went wrong is raised, and the rest is told."""
        self._engine.topology.watch.begin("waiting for the last save", limit="save")
        self._store.finish()
        self._tell((*self._store.news(), *self._records.news()))
        ranks.from_rank_0(self._records.raise_failure)
        self._bad_steps.raise_if_too_many()
        how = "finished" if reason == "finished" else f"stopped ({reason})"
        left = "" if done.evaluated else "; its evaluation takes place when the run goes on"
        self._log.line(f"{how} after step {done.step}/{self._schedule.total_steps}{left}")
        return TrainOutcome(self._is_over(done), done, reason)

    def _tell(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._log.line(line)
