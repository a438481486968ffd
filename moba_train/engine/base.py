"""What the training loop and the evaluations ask of an engine.

An engine owns the model shards, the optimizer and the process groups. It gets rows (global, identical on all ranks of
a context-parallel group) and does the sharding, the steps and the reductions itself; what it returns is the same on
every rank.

Legend: S tokens of a row, Q queried positions, H query heads, K key/value heads, D head dim, C chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from moba_train.data.row import Row
from moba_train.engine.phases import OnPhase
from moba_train.parallel.topology import Topology

AttentionMode = Literal["stage", "moba", "full", "random"]
"""stage = as the stage says; moba / full = every layer that full_layers does not name runs MoBA (with the stage's
chunk_size and topk, also in a full stage) / full attention; random = moba with uniformly random picks, the control."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        loss: mean over all counted tokens of the step (over data- and context-parallel ranks).
        num_loss_tokens: tokens that counted.
        grad_norm: global L2 norm before clipping.
        skipped: the loss or the gradient norm was not finite, so that the weights were left as they were.
        routing: `moba/*` numbers of the step when `collect_routing` was asked for: "entropy" (share of the largest
            possible), "top_chunk_share", "distance_1", "distance_2_4", ... (share of picks by distance in chunks).
        memory: component -> GiB of the rank that needs most, when `measure_memory` was asked for; see `memory`.
        peak_memory_gib: the most that a rank has held at once so far.
        comm: `comm/*` numbers, where a row is shared by several ranks: see `step_traffic`.
        waited_s: seconds that computing stood still for their exchanges, on the rank that waited longest; None where
            nobody timed it (on CUDA: when `measure_memory` was not asked for).
    """

    loss: float
    num_loss_tokens: int
    grad_norm: float
    skipped: bool
    routing: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    peak_memory_gib: float = 0.0
    comm: dict[str, float | str] = field(default_factory=dict)
    waited_s: float | None = None


@dataclass(frozen=True)
class RowScores:
    """Teacher-forced scores of one row, gathered over context-parallel ranks into global token order.

    Attributes:
        log_prob_S: float32 [S], natural log-probability of each label.
        argmax_S: int64 [S], the most probable next token at each position.
        picks: layer (from 0, global) -> int32 [Q, H, topk] chunk ids that the queries at `query_positions` attended to
            (slot 0 the own chunk, -1 none; [Q, K, topk] for group selection); MoBA layers only.
    """

    log_prob_S: NDArray[np.float32]
    argmax_S: NDArray[np.int64]
    picks: dict[int, NDArray[np.int32]] = field(default_factory=dict)


class Engine(Protocol):
    """The protocol; `MegatronEngine` and `DeepSpeedEngine` implement it, by what `GptEngine` does for both."""

    topology: Topology

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, over all ranks."""
        ...

    def set_stage(self, index: int, *, documents: Sequence[tuple[int, ...]] = ()) -> tuple[str, ...]:
        """Switch attention plan, transports and RoPE table to stage `index`; weights and optimizer state stay.

        Collective. `documents`: cumulative document lengths of typical rows, by which transports are chosen; () = every
        row is one document. Returns lines for the log.
        """
        ...

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
        """Accumulate gradients over this data-parallel rank's rows, then step once with learning rate `lr`.

        `on_phase` is told where the step is. Raises ConfigError where ranks disagree on what they are about to compute
        (`step`, counted from 1, among it), and ExchangeError where they lose each other.
        """
        ...

    def score(self, row: Row, *, attention: AttentionMode = "stage", query_positions: Sequence[int] = ()) -> RowScores:
        """Evaluate one row without gradients. Collective over the context-parallel group.

        Under ZeRO-3 over all ranks, each with a row of its own: data-parallel ranks call it equally often.
        """
        ...

    def sharded_state_dict(self, *, is_loading: bool) -> dict[str, Any]:
        """Model and optimizer state in the form of `megatron.core.dist_checkpointing`."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `megatron.core.dist_checkpointing.load` returned for `sharded_state_dict(is_loading=True)`."""
        ...
