"""One step of the loop: draw this rank's rows, train on them, agree with the other ranks, make the record."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from moba_train.config.schema import StageConfig
from moba_train.data.row import Row
from moba_train.data.sampler import rows_of_step
from moba_train.engine.base import Engine, StepResult
from moba_train.train.console import Log
from moba_train.train.record import Meter, Wishes, step_record
from moba_train.train.schedule import Schedule

# Rows that are looked at to learn how long a stage's documents are.
TYPICAL_ROWS = 8


class RowSource(Protocol):
    """The rows of one stage; `moba_train.data.stage_data.StageData` is one."""

    def row(self, index: int) -> Row: ...


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


def begin_stage(engine: Engine, schedule: Schedule, step: int, data: RowSource, log: Log) -> None:
    """Switch the engine to the stage of step `step` (counted from 0), and announce it."""
    index = schedule.place(step).stage_index
    # The documents decide on transports, which move nothing where a row is not shared.
    documents = typical_documents(data, schedule.stages[index]) if engine.topology.cp > 1 else ()
    notes = engine.set_stage(index, documents=documents)
    for line in (describe_stage(schedule, step), *notes):
        log.line(line)


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
