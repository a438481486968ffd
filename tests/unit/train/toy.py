"""A model small enough to follow by hand: it learns the mean token of its rows with momentum, on one rank.

It keeps its state as Megatron ShardedTensors, so that checkpoints of it are real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from moba_train.config.load import to_toml
from moba_train.config.schema import (
    CheckpointConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    RunSection,
    StageConfig,
)
from moba_train.data.row import Row
from moba_train.engine.base import AttentionMode, RowScores, StepResult
from moba_train.engine.phases import OnPhase, Phase
from moba_train.parallel.topology import Topology
from moba_train.train.checkpoint import CheckpointStore
from moba_train.train.loop import Training, TrainOutcome
from moba_train.train.metrics import JsonlWriter
from moba_train.train.progress import Identity, model_fingerprint
from moba_train.train.record import Meter
from moba_train.train.resume import begin
from moba_train.train.schedule import build_schedule
from moba_train.train.signals import StopSignals
from moba_train.train.stopping import Stopping

SEQ_LEN = 8
MODEL = ModelConfig(num_layers=2, hidden_size=8, ffn_hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=4)
OPTIMIZER = OptimizerConfig(lr=0.5, min_lr_ratio=0.1)
STAGES = (
    StageConfig(name="short", tokens=64, tokens_per_step=16, seq_len=SEQ_LEN, chunk_size=2, topk=2),
    StageConfig(name="long", tokens=48, tokens_per_step=16, seq_len=SEQ_LEN, attention="full", lr=0.25),
)
TOTAL_STEPS = 7


class ToyEngine:
    """weight <- weight - lr * momentum; loss = (weight - mean token)^2. Rows with a negative token give NaN."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.weight = torch.zeros(2, dtype=torch.float64)
        self.momentum = torch.zeros(2, dtype=torch.float64)
        self.stages_seen: list[int] = []
        self.routing_steps = 0

    @property
    def num_parameters(self) -> int:
        return self.weight.numel()

    def set_stage(self, index: int, *, documents: Sequence[tuple[int, ...]] = ()) -> tuple[str, ...]:
        self.stages_seen.append(index)
        return ()

    def train_step(
        self,
        rows: Sequence[Row],
        *,
        lr: float,
        step: int = 1,
        collect_routing: bool = False,
        measure_memory: bool = False,
        on_phase: OnPhase | None = None,
    ) -> StepResult:
        self.routing_steps += collect_routing
        tokens = np.concatenate([row.tokens_S for row in rows])
        if (tokens < 0).any():
            return StepResult(float("nan"), tokens.size, float("nan"), True)
        gap = self.weight - float(tokens.mean())
        self.momentum = 0.9 * self.momentum + 2.0 * gap
        self.weight = self.weight - 0.1 * lr * self.momentum
        routing = {"entropy": 0.5} if collect_routing else {}
        return StepResult(float((gap**2).mean()), tokens.size, float(gap.norm()), False, routing)

    def score(self, row: Row, *, attention: AttentionMode = "stage", query_positions: Sequence[int] = ()) -> RowScores:
        return RowScores(np.zeros(row.tokens_S.size, np.float32), np.zeros(row.tokens_S.size, np.int64))

    def sharded_state_dict(self, *, is_loading: bool) -> dict[str, Any]:
        return {
            "model": {"weight": ShardedTensor.from_rank_offsets("weight", self.weight)},
            "optimizer": {"momentum": ShardedTensor.from_rank_offsets("momentum", self.momentum)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight, self.momentum = state["model"]["weight"].clone(), state["optimizer"]["momentum"].clone()


@dataclass
class ToyRows:
    """Row i of a stage, a pure function of (stage, i); remembers which rows were asked for."""

    stage_index: int
    poisoned: frozenset[int] = frozenset()
    asked: list[int] = field(default_factory=list)

    def row(self, index: int) -> Row:
        self.asked.append(index)
        rng = np.random.default_rng([self.stage_index, index])
        tokens = rng.integers(0, 9, SEQ_LEN)
        if index in self.poisoned:
            tokens[3] = -1
        return Row(tokens, np.roll(tokens, -1), np.ones(SEQ_LEN, np.float32), (0, 5, SEQ_LEN), sample_id=index)


class Lines:
    """A log that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def phase(self, phase: Phase) -> None:
        pass

    def total_steps(self, steps: int) -> None:
        self.total = steps


Evaluate = Callable[[int, str, bool], Mapping[str, Any]]


@dataclass(frozen=True)
class ToyEvaluator:
    """A function that is asked every `every_steps` steps and at ends of stages."""

    evaluate: Evaluate
    every_steps: int = 1

    def is_due(self, step: int, is_stage_end: bool) -> bool:
        return is_stage_end or step % self.every_steps == 0

    def __call__(self, step: int, stage_name: str, is_stage_end: bool) -> Mapping[str, Any]:
        return self.evaluate(step, stage_name, is_stage_end) if self.is_due(step, is_stage_end) else {}


class AskedToStop(Stopping):
    """A signal is there after so many steps of this process."""

    def __init__(self, signals: StopSignals, steps: int) -> None:
        super().__init__(signals)
        self._steps = steps

    def wish(self, save_time_s: float, in_flight_s: float | None = None) -> str:
        self._steps -= 1
        self.reason = "SIGTERM" if self._steps == 0 else self.reason
        return super().wish(save_time_s, in_flight_s)


def identity(**changes: Any) -> Identity:
    """The identity of toy runs, with changes."""
    usual: dict[str, Any] = {
        "model": model_fingerprint(MODEL),
        "tokenizer": "ab" * 32,
        "seed": 7,
        "mesh": {"tp": 1, "cp": 1, "pp": 1, "dp": 1},
        "versions": {"moba-train": "0"},
    }
    return Identity(**(usual | changes))


@dataclass
class ToyRun:
    """One process of a toy run in a run folder: what the command line would put together."""

    run_dir: Path
    topology: Topology
    stop_after_steps: int = 0
    signal_after_steps: int = 0
    too_late: str = ""
    resume: str = "auto"
    every_steps: int = 2
    keep_last: int = 2
    keep_every: int = 0
    asynchronous: bool = True
    max_bad_steps: int = 2
    poisoned: frozenset[int] = frozenset()
    stages: tuple[StageConfig, ...] = STAGES
    evaluators: tuple[Evaluate, ...] = ()
    eval_every_steps: int = 1
    optimizer: OptimizerConfig = OPTIMIZER
    signals: StopSignals = field(default_factory=StopSignals)

    def go(self) -> TrainOutcome:
        """Begin or resume, train, close the files."""
        self.engine, self.log, self.data = ToyEngine(self.topology), Lines(), {}
        asked, ranks = self.signal_after_steps, self.topology.world_size
        fixed = build_schedule(self.stages, self.optimizer)
        start = begin(self.run_dir, self.resume, self.engine, identity(), fixed)
        schedule = fixed.with_decided(start.progress.decided)
        self.notes = start.notes
        path, step = self.run_dir / "metrics.jsonl", start.progress.step
        sinks = [JsonlWriter(path, resume_step=step)] if self.topology.rank == 0 else []
        store = CheckpointStore(
            self.run_dir,
            identity(),
            to_toml(RunConfig(stages=self.stages)),
            self.stages,
            self.keep_last,
            keep_every=self.keep_every,
            asynchronous=self.asynchronous,
        )
        try:
            with store:
                training = Training(
                    self.engine,
                    schedule=schedule,
                    start=start.progress,
                    run=RunSection(
                        log_every=2, max_bad_steps=self.max_bad_steps, stop_after_steps=self.stop_after_steps
                    ),
                    checkpoint=CheckpointConfig(every_steps=self.every_steps, keep_last=self.keep_last),
                    stage_data=lambda index: self.data.setdefault(index, ToyRows(index, self.poisoned)),
                    evaluators=[ToyEvaluator(evaluate, self.eval_every_steps) for evaluate in self.evaluators],
                    store=store,
                    meter=Meter(MODEL, False, ranks, ranks, torch.device("cpu"), None),
                    sinks=sinks,
                    log=self.log,
                    stopping=AskedToStop(self.signals, asked) if asked else Stopping(self.signals),
                )
                return training.train(schedule.total_steps, hindrance=self.too_late)
        finally:
            for sink in sinks:
                sink.close()

    def asked(self) -> list[tuple[int, int]]:
        """(stage, row) in the order in which this process trained on them."""
        return [(stage, index) for stage, rows in sorted(self.data.items()) for index in rows.asked]
