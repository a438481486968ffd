"""One step of the loop: draw this rank's rows, train on them, agree with the other ranks, make the record, evaluate."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from moba_train.config.schema import StageConfig
from moba_train.config.until_rules import decides
from moba_train.data.row import Row
from moba_train.data.sampler import rows_of_step
from moba_train.engine.base import Engine, StepResult
from moba_train.parallel import ranks
from moba_train.train.console import Log
from moba_train.train.progress import Progress
from moba_train.train.record import Meter, Wishes, step_record
from moba_train.train.schedule import Schedule
from moba_train.train.until import decide, describe_rule

# Rows that are looked at to learn how long a stage's documents are.
TYPICAL_ROWS = 8


class RowSource(Protocol):
    """The rows of one stage; `moba_train.data.stage_data.StageData` is one."""

    def row(self, index: int) -> Row: ...


class Evaluator(Protocol):
    """An evaluation inside the loop."""

    def is_due(self, step: int, is_stage_end: bool) -> bool:
        """After `step` finished steps, the last of which may end its stage?"""
        ...

    def __call__(self, step: int, stage_name: str, is_stage_end: bool) -> Mapping[str, Any]:
        """`eval/*` numbers, {} when it is not due. Collective."""
        ...


@dataclass(frozen=True)
class Step:
    """What a step came to, the same on every rank.

    Attributes:
        record: its numbers for metrics.jsonl.
        wishes: what any rank wishes.
    """

    result: StepResult
    record: dict[str, Any]
    wishes: Wishes


@dataclass(frozen=True)
class Evaluated:
    """What the evaluations after a step came to, the same on every rank.

    Attributes:
        record: their numbers, for the record of the step; empty = none took place.
        progress: with what they decide, and whether they are still to come.
        lines: for the log.
    """

    record: dict[str, Any]
    progress: Progress
    lines: tuple[str, ...] = ()


class CurrentStage:
    """The stage that the engine is in, and its rows.

    Args:
        stage_data: stage index -> its rows; called when the stage begins.
    """

    def __init__(self, engine: Engine, stage_data: Callable[[int], RowSource], log: Log) -> None:
        self._engine = engine
        self._stage_data = stage_data
        self._log = log
        self._open: tuple[int, RowSource] | None = None

    def enter(self, schedule: Schedule, step: int) -> RowSource:
        """Rows of the stage of step `step` (counted from 0); the engine is switched to it, which is announced."""
        index = schedule.place(step).stage_index
        if self._open is None or self._open[0] != index:
            doing = f"opening the data of stage '{schedule.stages[index].name}'"
            self._engine.topology.watch.begin(doing, limit="start")
            self._open = (index, self._stage_data(index))
            begin_stage(self._engine, schedule, step, self._open[1], self._log)
        return self._open[1]

    def reenter(self, schedule: Schedule, step: int) -> None:
        """The stage of the last of `step` finished steps, in which it is evaluated."""
        self.enter(schedule, step - 1 if schedule.place(step - 1).is_stage_end else step)


def begin_stage(engine: Engine, schedule: Schedule, step: int, data: RowSource, log: Log) -> None:
    """Switch the engine to the stage of step `step` (counted from 0), and announce it."""
    index = schedule.place(step).stage_index
    # The documents decide on transports, which move nothing where a row is not shared.
    documents = typical_documents(data, schedule.stages[index]) if engine.topology.cp > 1 else ()
    notes = engine.set_stage(index, documents=documents)
    stage = schedule.stages[index]
    rule = (f"stage '{stage.name}' {describe_rule(stage.until)}",) if decides(stage) else ()
    for line in (describe_stage(schedule, step), *rule, *notes):
        log.line(line)


def is_evaluation_due(evaluators: Sequence[Evaluator], schedule: Schedule, step: int) -> bool:
    """After `step` finished steps?"""
    is_stage_end = schedule.place(step - 1).is_stage_end
    return any(evaluate.is_due(step, is_stage_end) for evaluate in evaluators)


def evaluate_step(engine: Engine, evaluators: Sequence[Evaluator], schedule: Schedule, done: Progress) -> Evaluated:
    """Evaluate what is due after the last finished step, and see whether that ends the stage; collective.

    The evaluator that gives the numbers of `until` comes first: those behind it learn that the stage ends here. Rank 0
    decides, so that ranks whose numbers differ by rounding do not part.
    """
    place = schedule.place(done.step - 1)
    stage = schedule.stages[place.stage_index]
    record: dict[str, Any] = {}
    lines: list[str] = []
    for evaluate in evaluators:
        is_end = place.is_stage_end or place.stage_index in done.decided
        engine.topology.watch.begin(f"evaluation after step {done.step}", limit="step")
        numbers = evaluate(done.step, stage.name, is_end)
        record |= numbers
        if numbers and decides(stage):
            decision = ranks.from_rank_0(partial(decide, stage, done, numbers, is_end=is_end))
            done = decision.progress
            record |= decision.record
            lines += decision.lines
    return Evaluated(record, replace(done, evaluated=True), tuple(lines))


def run_step(
    engine: Engine,
    schedule: Schedule,
    step: int,
    data: RowSource,
    meter: Meter,
    wishes: Callable[[], Wishes],
    log: Log,
    look_inside: bool,
) -> Step:
    """Step `step`, counted from 0. `wishes` is asked for this rank's once the step is done."""
    started_s = time.perf_counter()
    place, topology = schedule.place(step), engine.topology
    stage = schedule.stages[place.stage_index]
    sample_ids = rows_of_step(place.step_in_stage, rows_per_step=place.rows, dp_rank=topology.dp_rank, dp=topology.dp)
    topology.watch.begin(f"step {step + 1}, reading rows", limit="step")
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
    agreed, pairs = meter.agree(wishes(), stage, rows)
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
    return Step(result, position | performance, agreed)


def position_record(schedule: Schedule, done: Progress) -> dict[str, Any]:
    """What tells to which step further numbers belong."""
    stage = schedule.stages[done.stage_index]
    return {"step": done.step, "stage": stage.name, "stage_index": done.stage_index, "tokens": done.tokens}


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
