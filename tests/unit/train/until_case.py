"""A toy run whose first stage decides where it ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moba_train.config.schema import OptimizerConfig, StageConfig, UntilConfig
from moba_train.train.loop import TrainOutcome
from moba_train.train.metrics import read_metrics
from tests.unit.train import toy

UNTIL = UntilConfig(trailing_gap=0.05, evaluations=2)
STAGES = (
    StageConfig(name="moba", tokens=320, tokens_per_step=16, seq_len=8, chunk_size=2, topk=2, until=UNTIL),
    StageConfig(name="full", tokens=48, tokens_per_step=16, seq_len=8, attention="full"),
)
OPTIMIZER = OptimizerConfig(lr=0.5, schedule="wsd", warmup_tokens=32, decay_tokens=32)
DECIDED = 12
"""Gaps of 1/2, 1/4, 1/6, ... every other step: from step 8 to step 12 the gap falls by 1/8 - 1/12 < 0.05."""
TOTAL = DECIDED + 3


class Killed(Exception):
    """The process dies."""


@dataclass
class UntilRun(toy.ToyRun):
    """A toy run with held-out losses that tell of its weights, and a needle evaluation at ends of stages.

    killed: (moment, step): "evaluated" = between the two evaluations, "saving" = before the checkpoint is begun.
    """

    stages: tuple[StageConfig, ...] = STAGES
    optimizer: OptimizerConfig = OPTIMIZER
    every_steps: int = 5
    keep_last: int = 9
    eval_every_steps: int = 2
    killed: tuple[str, int] = ("", 0)

    def go(self) -> TrainOutcome:
        self.evaluators = (self.held_out, self.needle)
        return super().go()

    def held_out(self, step: int, stage: str, is_stage_end: bool) -> Mapping[str, Any]:
        full = float(self.engine.weight[0])
        return {
            "eval/loss_moba": 2.0 + full,
            "eval/loss_full": 1.0 + full,
            "eval/trailing_loss_moba": full + 1.0 / step,
            "eval/trailing_loss_full": full,
            "eval/in_stage": self.engine.stages_seen[-1],
        }

    def needle(self, step: int, stage: str, is_stage_end: bool) -> Mapping[str, Any]:
        self.die("evaluated", step)
        return {"eval/niah_moba": 1.0} if is_stage_end else {}

    def die(self, moment: str, step: int) -> None:
        if self.killed == (moment, step):
            raise Killed


def records(run_dir: Path) -> list[dict[str, Any]]:
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("perf/", "memory/"))} for row in rows]
