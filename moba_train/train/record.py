"""From a finished step to its record: the numbers of metrics.jsonl, computed once and in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moba_train.config.schema import ModelConfig, StageConfig
from moba_train.data.row import Row
from moba_train.engine.base import StepResult
from moba_train.parallel import ranks
from moba_train.train.flops import PairCounts, row_pairs, step_flops


@dataclass(frozen=True)
class Wishes:
    """What a rank, or any rank, wishes after a step.

    Attributes:
        stop: to stop, for a signal or a deadline.
        save_failed: to end, since a checkpoint could not be written.
    """

    stop: bool = False
    save_failed: bool = False


@dataclass(frozen=True)
class Meter:
    """What it takes to turn a step's time and rows into throughput, FLOPs and density.

    Attributes:
        model: shape of the model.
        full_recompute: engine.recompute == "full".
        world_size: ranks of the job.
        replicas: ranks that hold one and the same row (tp * cp * pp).
        device: of this rank.
        peak_tflops: peak of one device; None = unknown, MFU is left out.
    """

    model: ModelConfig
    full_recompute: bool
    world_size: int
    replicas: int
    device: torch.device
    peak_tflops: float | None

    def agree(self, wishes: Wishes, stage: StageConfig, rows: Sequence[Row]) -> tuple[Wishes, PairCounts]:
        """One collective: what any rank wishes, and the step's attention work.

        Args:
            wishes: this rank's.
            rows: this data-parallel rank's rows of the step.
        """
        mine = PairCounts()
        for row in rows:
            mine = mine + row_pairs(self.model, stage, row.cu_seqlens)
        values = [*_numbers(wishes), mine.attended, mine.causal, mine.gate, mine.gate_group]
        stop, save_failed, *pairs = ranks.sum_over_ranks(values, self.device)
        return Wishes(stop > 0, save_failed > 0), PairCounts(*(value / self.replicas for value in pairs))

    def agree_on(self, wishes: Wishes) -> Wishes:
        """One collective: what any rank wishes."""
        stop, save_failed = ranks.sum_over_ranks(_numbers(wishes), self.device)
        return Wishes(stop > 0, save_failed > 0)

    def performance(self, *, step_time_s: float, num_tokens: int, pairs: PairCounts) -> dict[str, float]:
        """The `perf/*` numbers and `train/density` of a step; TFLOP/s are per rank."""
        flops = step_flops(self.model, num_tokens=num_tokens, pairs=pairs, full_recompute=self.full_recompute)
        rank_seconds = step_time_s * self.world_size
        tera = 1e12 * rank_seconds
        numbers = {
            "perf/step_time_s": step_time_s,
            "perf/tokens_per_s": num_tokens / step_time_s,
            "perf/tokens_per_s_per_rank": num_tokens / rank_seconds,
            "perf/tflops": flops.model / tera,
            "perf/tflops_gate": flops.gate / tera,
            "perf/tflops_with_recompute": flops.with_recompute / tera,
            "perf/tflops_dense_equivalent": flops.dense_equivalent / tera,
            "train/density": pairs.density,
        }
        if self.peak_tflops is not None:
            numbers["perf/mfu"] = numbers["perf/tflops"] / self.peak_tflops
        return numbers


def _numbers(wishes: Wishes) -> list[float]:
    return [float(wishes.stop), float(wishes.save_failed)]


def step_record(
    *, step: int, stage: StageConfig, stage_index: int, tokens: int, lr: float, result: StepResult
) -> dict[str, Any]:
    """Position, loss, learning rate, routing, memory and bytes of a step; `step` counts finished steps with this."""
    record: dict[str, Any] = {
        "step": step,
        "stage": stage.name,
        "stage_index": stage_index,
        "tokens": tokens,
        "train/loss": result.loss,
        "train/lr": lr,
        "train/grad_norm": result.grad_norm,
        "train/loss_tokens": result.num_loss_tokens,
        "memory/peak_gib": result.peak_memory_gib,
    }
    if result.skipped:
        record["train/bad" if result.num_loss_tokens else "train/empty"] = True
    record |= {f"memory/{name}_gib": value for name, value in result.memory.items()}
    record |= {f"comm/{name}": value for name, value in result.comm.items()}
    if result.waited_s is not None:
        record["perf/comm_waited_s"] = result.waited_s
    return record | {f"moba/{name}": value for name, value in result.routing.items()}
