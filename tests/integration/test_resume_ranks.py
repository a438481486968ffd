"""Stopping and resuming with several data-parallel ranks: who stops when, who draws which rows, who gives up."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from moba_train.config.schema import CheckpointConfig, EngineConfig, OptimizerConfig, ParallelConfig, RunSection
from moba_train.data.row import Row
from moba_train.engine.megatron import build_engine
from moba_train.errors import TrainingDiverged
from moba_train.parallel.topology import close_topology
from moba_train.train.checkpoint import CheckpointStore, list_checkpoints, read_state
from moba_train.train.console import SilentLog
from moba_train.train.loop import Training, TrainOutcome
from moba_train.train.metrics import JsonlWriter, read_metrics
from moba_train.train.progress import Identity, model_fingerprint
from moba_train.train.record import Meter
from moba_train.train.resume import begin
from moba_train.train.schedule import build_schedule
from moba_train.train.signals import StopSignals
from moba_train.train.stopping import Stopping
from tests.distributed import run_ranks
from tests.integration.test_resume import MODEL, OPTIMIZER, SEED, STAGES, Copying


@dataclass
class Asked:
    """The rows of a stage; remembers which were drawn."""

    stage_index: int
    ids: list[int] = field(default_factory=list)

    def row(self, index: int) -> Row:
        self.ids.append(index)
        return Copying(self.stage_index).row(index)


@dataclass(frozen=True)
class Seen:
    """What one rank tells about its part of a run."""

    outcome: TrainOutcome | None
    drawn: dict[int, list[int]]
    diverged: str = ""


@dataclass(frozen=True)
class Interrupt:
    """An evaluator without numbers; this rank may get a signal in it."""

    is_signalled: bool

    def is_due(self, step: int, is_stage_end: bool) -> bool:
        return False

    def __call__(self, step: int, stage_name: str, is_stage_end: bool) -> Mapping[str, Any]:
        if step == 2 and self.is_signalled:
            os.kill(os.getpid(), signal.SIGUSR1)
        return {}


def data_parallel_part(
    rank: int, n: int, run_dir: Path, signalled_rank: int, optimizer: OptimizerConfig = OPTIMIZER
) -> Seen:
    """Train on n data-parallel ranks; `signalled_rank` gets SIGUSR1 while step 2 is evaluated (-1: nobody does)."""
    gc.freeze()  # Megatron collects garbage at every save
    engine = build_engine(MODEL, STAGES, EngineConfig(device="cpu"), optimizer, ParallelConfig(), seed=SEED)
    identity = Identity(model_fingerprint(MODEL), "ab" * 32, SEED, {"tp": 1, "cp": 1, "pp": 1, "dp": n}, {})
    schedule = build_schedule(STAGES, optimizer)
    start = begin(run_dir, "auto", engine, identity, schedule)
    rows: dict[int, Asked] = {}
    outcome, diverged = None, ""

    sinks = [JsonlWriter(run_dir / "metrics.jsonl", resume_step=start.progress.step)] if rank == 0 else []
    with StopSignals() as signals:
        try:
            outcome = Training(
                engine,
                schedule=schedule,
                start=start.progress,
                run=RunSection(log_every=1, max_bad_steps=2),
                checkpoint=CheckpointConfig(every_steps=0),
                stage_data=lambda index: rows.setdefault(index, Asked(index)),
                evaluators=(Interrupt(rank == signalled_rank),),
                store=CheckpointStore(run_dir, identity, "", STAGES, keep_last=9),
                meter=Meter(MODEL, False, n, 1, engine.topology.device, None),
                sinks=sinks,
                log=SilentLog(),
                stopping=Stopping(signals),
            ).train(schedule.total_steps)
        except TrainingDiverged as error:
            diverged = error.message()
    close_topology(keep_process_group=True)
    return Seen(outcome, {index: asked.ids for index, asked in rows.items()}, diverged)


def test_a_signal_to_one_rank_stops_all_and_no_row_is_lost_or_repeated(tmp_path: Path) -> None:
    first, second = run_ranks(data_parallel_part, 2, tmp_path, 1)
    assert first.outcome is not None and second.outcome is not None
    assert first.outcome.progress == second.outcome.progress and first.outcome.progress.step == 3
    assert (first.outcome.reason, second.outcome.reason) == ("SIGUSR1", "SIGUSR1")
    assert not first.outcome.finished
    (alone,) = run_ranks(data_parallel_part, 1, tmp_path, -1)  # the mesh shrinks from two ranks to one
    assert alone.outcome is not None and alone.outcome.finished
    assert sorted(first.drawn[0] + second.drawn[0]) == list(range(6)) and set(alone.drawn) == {1}
    assert alone.drawn[1] == list(range(6))
    seen = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in seen] == [1, 2, 3, 4, 5, 6]
    assert [row["tokens"] for row in seen] == [128, 256, 384, 640, 896, 1152]


def test_metrics_do_not_depend_on_the_number_of_data_parallel_ranks(tmp_path: Path) -> None:
    for n in (1, 2):
        run_ranks(data_parallel_part, n, tmp_path / str(n), -1)
    one, two = (read_metrics(tmp_path / str(n) / "metrics.jsonl") for n in (1, 2))
    for key in ("train/loss_tokens", "train/density", "train/lr", "tokens"):
        assert [row[key] for row in one] == [row[key] for row in two]
    assert [row["train/loss"] for row in one] == pytest.approx([row["train/loss"] for row in two], rel=1e-4)
    assert all(row["perf/tokens_per_s_per_rank"] == pytest.approx(row["perf/tokens_per_s"] / 2) for row in two)


def test_a_run_that_diverges_saves_and_names_step_and_rows_on_every_rank(tmp_path: Path) -> None:
    absurd = replace(OPTIMIZER, lr=1e30, warmup_tokens=0, clip_grad=0.0)
    first, second = run_ranks(data_parallel_part, 2, tmp_path, -1, absurd)
    assert first.diverged == second.diverged
    assert "step 2: rows 2..3 of stage 'moba'; step 3: rows 4..5 of stage 'moba'" in first.diverged
    (*_, newest) = list_checkpoints(tmp_path)
    assert (read_state(newest)["step"], read_state(newest)["bad_steps"]) == (3, 2)
    assert [row.get("train/bad", False) for row in read_metrics(tmp_path / "metrics.jsonl")] == [False, True, True]
