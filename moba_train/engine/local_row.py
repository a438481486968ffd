"""A global row -> what this rank puts into its part of the model.

Legend: S tokens of this rank's shard.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moba_train.config.schema import RopeConfig
from moba_train.data.row import Row
from moba_train.errors import ConfigError
from moba_train.model.plan import AttentionSpec
from moba_train.model.row_context import RandomPicks, RowContext, row_context
from moba_train.parallel.shard import Layout
from moba_train.parallel.topology import Topology


@dataclass(frozen=True)
class LocalRow:
    """This rank's shard of a row: tokens and labels int64 [1,S], loss mask fp32 [1,S], and the row's context."""

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
    transport: str
    backend: str

    def local_row(
        self, row: Row, topology: Topology, *, keep_routing: bool, random_picks: RandomPicks | None = None
    ) -> LocalRow:
        """Shard `row` for this rank. ConfigError when it has fewer tokens than there are context-parallel ranks."""
        if row.tokens_S.size < topology.cp:  # a rank would hold nothing, which Megatron's layers cannot run
            raise ConfigError(
                "a row has fewer tokens than ranks share it",
                where="parallel.cp",
                got=f"{row.tokens_S.size} tokens, cp = {topology.cp}",
                allowed="at least one token for each rank",
                fix="lower parallel.cp, or use longer rows",
            )
        context = row_context(
            row.cu_seqlens,
            self.specs,
            self.rope,
            head_dim=self.head_dim,
            layout=self.layout,
            cp_group=topology.cp_group,
            device=topology.device,
            transport=self.transport,
            backend=self.backend,
            random_picks=random_picks,
            keep_routing=keep_routing,
        )
        tokens, labels, mask = (
            torch.from_numpy(array[context.held])[None].to(topology.device)
            for array in (row.tokens_S, row.labels_S, row.loss_mask_S)
        )
        return LocalRow(tokens, labels, mask, context)


__all__ = ["LocalRow", "RowPlan"]
