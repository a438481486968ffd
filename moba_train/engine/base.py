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
    """

    loss: float
    num_loss_tokens: int
    grad_norm: float
    skipped: bool
    routing: dict[str, float] = field(default_factory=dict)


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
    """The protocol; `moba_train.engine.megatron.MegatronEngine` implements it."""

    topology: Topology

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, over all ranks."""
        ...

    def set_stage(self, index: int) -> None:
        """Switch attention plan and RoPE table to stage `index`; weights and optimizer state stay."""
        ...

    def train_step(self, rows: Sequence[Row], *, lr: float, collect_routing: bool = False) -> StepResult:
        """Accumulate gradients over this data-parallel rank's rows, then step once with learning rate `lr`."""
        ...

    def score(self, row: Row, *, attention: AttentionMode = "stage", query_positions: Sequence[int] = ()) -> RowScores:
        """Evaluate one row without gradients. Collective over the context-parallel group."""
        ...

    def sharded_state_dict(self, *, is_loading: bool) -> dict[str, Any]:
        """Model and optimizer state in the form of `megatron.core.dist_checkpointing`."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `megatron.core.dist_checkpointing.load` returned for `sharded_state_dict(is_loading=True)`."""
        ...
