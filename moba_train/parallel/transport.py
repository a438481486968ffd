"""What a transport is: how keys and values of a sharded row reach the queries that attend to them, or the other way.

A transport sees local shards and the routing, and gives the local output; everything between (what is sent, when it is
waited for, what is merged) is its own affair and stands in a file of its own.

Shape letters: S tokens of the shard, H query heads, K key/value heads, D head dim, Dv value dim, N ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moba_kernels import AttentionSpec, Pack, PairTally, Routing
from moba_kernels.pack import device_copy

from .cut import Cut, IntArray, Layout, cut_row
from .wire import Wire


@dataclass(frozen=True)
class ShardedCall:
    """The arguments of one attention call over a sharded row that every transport shares."""

    spec: AttentionSpec
    pack: Pack
    """Documents of the whole row."""
    cut: Cut
    """Which rank holds which tokens."""
    rank: int
    """This rank's index in `cut`."""
    wire: Wire
    """Joins the ranks of `cut`, in that order."""
    positions_S: Tensor
    """[S] int64: global token indices of the shard."""
    routing: Routing | None
    """Of the local queries; None under Full."""
    softmax_scale: float | None
    backend: str
    node_ranks: int = 1
    """At most so many consecutive ranks share a node."""

    @property
    def num_ranks(self) -> int:
        return self.cut.num_ranks

    def routing_of_kv_heads(self, first: int, stop: int, num_kv_heads: int) -> Routing | None:
        """The routing of the query heads that read KV heads first .. stop - 1."""
        if self.routing is None:
            return None
        return self.routing.of_kv_heads(first, stop, num_kv_heads)


class Sent(NamedTuple):
    """What a forward pass gives.

    out [S,H,Dv] and lse [S,H] of the local queries over the whole row, fp32 (fp64 for fp64 inputs). `saved` are the
    tensors that the backward pass needs (kept by autograd, so that its hooks see them), `kept` is what else it needs.
    """

    out: Tensor
    lse: Tensor
    saved: tuple[Tensor, ...]
    kept: Any = None


class Transport(Protocol):
    """Both methods are collective over `call.wire`'s ranks and free of autograd."""

    @property
    def name(self) -> str: ...

    def forward(self, q_SHD: Tensor, k_SKD: Tensor, v_SKD: Tensor, call: ShardedCall, tally: PairTally) -> Sent:
        """Attention of the local queries over the whole row."""
        ...

    def backward(
        self, dout_SHD: Tensor, delta_SH: Tensor, saved: tuple[Tensor, ...], kept: Any, call: ShardedCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq [S,H,D], dk [S,K,D], dv [S,K,Dv]) of the local shard; delta = rowsum(dout * out), in lse's dtype.

        Gradients are fp32 (fp64 for fp64 inputs) wherever parts of several ranks are added up.
        """
        ...


@dataclass(frozen=True)
class HostCopy:
    """A copy of a device tensor on its way to the host."""

    host: Tensor
    done: torch.cuda.Event | None

    @staticmethod
    def start(x: Tensor) -> HostCopy:
        """Queue the copy; what is queued after it does not delay it."""
        if x.device.type == "cpu":
            return HostCopy(x, None)
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        host.copy_(x, non_blocking=True)
        return HostCopy(host, torch.cuda.current_stream(x.device).record_event())

    def wait(self) -> IntArray:
        """The host waits."""
        if self.done is not None:
            self.done.synchronize()
        values: IntArray = self.host.numpy()
        return values


def row_cut(pack: Pack, num_ranks: int, layout: Layout) -> Cut:
    """The cut of a row, made once per row."""
    return pack.derived(("cut", num_ranks, layout), lambda: cut_row(pack.num_tokens, num_ranks, layout))


def device_positions(pack: Pack, cut: Cut, rank: int, device: torch.device) -> Tensor:
    """[S] int64: global token indices of a rank's shard on `device`; copied once per row, so that no layer waits."""
    key = ("positions", cut.pieces[rank], device)
    return pack.derived(key, lambda: device_copy(cut.positions(rank), device))


__all__ = ["HostCopy", "Sent", "ShardedCall", "Transport", "device_positions", "row_cut"]
