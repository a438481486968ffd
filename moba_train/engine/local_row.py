"""A global row -> what this rank puts into its part of the model.

A shard is padded at its end to a multiple of the tensor-parallel degree, because tensor-parallel ranks share its tokens
between the projections, and to one token where it has none. Padding has token id 0, counts in no loss, and ends in the
core attention (`moba_train.model.attention`): no other token, statistic or score sees it.

Legend: S tokens of this rank's shard, L the same with padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moba_kernels.pack import device_copy
from moba_train.config.schema import RopeConfig
from moba_train.data.row import Row
from moba_train.model.plan import AttentionSpec
from moba_train.model.row_context import RandomPicks, RowContext, row_context
from moba_train.parallel.rules import LayerTransports
from moba_train.parallel.shard import Layout
from moba_train.parallel.topology import Topology
from moba_train.parallel.traffic import Traffic

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class LocalRow:
    """This rank's shard of a row: tokens and labels int64 [1,L], loss mask fp32 [1,L], and the row's context."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    context: RowContext


@dataclass(frozen=True)
class RowPlan:
    """How rows are sharded and attended to at present; what changes with a stage or an evaluation mode."""

    specs: tuple[AttentionSpec, ...]
    rope: RopeConfig
    head_dim: int
    layout: Layout
    transports: LayerTransports
    node_ranks: int
    backend: str

    def local_row(
        self,
        row: Row,
        topology: Topology,
        *,
        keep_routing: bool,
        random_picks: RandomPicks | None = None,
        traffic: Traffic | None = None,
    ) -> LocalRow:
        """Shard `row` for this rank. `traffic` counts what its layers exchange."""
        context = row_context(
            row.cu_seqlens,
            self.specs,
            self.rope,
            head_dim=self.head_dim,
            layout=self.layout,
            cp_group=topology.cp_group,
            device=topology.device,
            transports=self.transports,
            node_ranks=self.node_ranks,
            traffic=traffic,
            backend=self.backend,
            watch=topology.watch,
            random_picks=random_picks,
            keep_routing=keep_routing,
        )
        tokens, labels, mask = (
            device_copy(_padded(array[context.held], topology.tp), topology.device)[None]
            for array in (row.tokens_S, row.labels_S, row.loss_mask_S)
        )
        return LocalRow(tokens, labels, mask, context)


def padded_length(num_tokens: int, tp: int) -> int:
    """L: the least positive multiple of tp that holds a shard of S tokens."""
    return max(1, -(-num_tokens // tp)) * tp


def _padded(array: NDArray[Scalar], tp: int) -> NDArray[Scalar]:
    """[S] -> [L], zeros at the end."""
    return np.pad(array, (0, padded_length(len(array), tp) - len(array)))


__all__ = ["LocalRow", "RowPlan", "padded_length"]
