"""What a transport is: how keys and values of a sharded row reach the queries that attend to them.

A transport sees local shards and the routing, and gives the local output; everything between (what is sent, when it is
waited for, what is merged) is its own affair and stands in a file of its own.

Shape letters: S tokens of the shard, H query heads, K key/value heads, D head dim, Dv value dim, N ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from moba_kernels import AttentionSpec, Pack, PairTally, Partial, Routing

from .shard import Layout, longest_shard


@dataclass(frozen=True)
class ShardedCall:
    """The arguments of one attention call over a sharded row that every transport shares."""

    spec: AttentionSpec
    pack: Pack
    """Documents of the whole row."""
    layout: Layout
    group: dist.ProcessGroup
    positions_S: Tensor
    """[S] int64: global token indices of the shard."""
    routing: Routing | None
    """Of the local queries; None under Full."""
    softmax_scale: float | None
    backend: str

    @property
    def num_ranks(self) -> int:
        return int(self.group.size())

    @property
    def longest(self) -> int:
        """Tokens of the longest shard: the length that collectives pad to."""
        return longest_shard(self.pack.num_tokens, self.num_ranks, self.layout)

    def routing_of_kv_heads(self, first: int, stop: int, num_kv_heads: int) -> Routing | None:
        """The routing of the query heads that read KV heads first .. stop - 1."""
        if self.routing is None:
            return None
        return self.routing.of_kv_heads(first, stop, num_kv_heads)


class Transport(Protocol):
    """Both methods are collective over `call.group` and free of autograd; results are fp32 (fp64 for fp64 inputs)."""

    def forward(self, q_SHD: Tensor, k_SKD: Tensor, v_SKD: Tensor, call: ShardedCall, tally: PairTally) -> Partial:
        """Attention of the local queries over the whole row: out [S,H,Dv], lse [S,H]."""
        ...

    def backward(
        self,
        dout_SHD: Tensor,
        q_SHD: Tensor,
        k_SKD: Tensor,
        v_SKD: Tensor,
        lse_SH: Tensor,
        delta_SH: Tensor,
        call: ShardedCall,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq [S,H,D], dk [S,K,D], dv [S,K,Dv]) of the local shard, given delta = rowsum(dout * out)."""
        ...
