"""Transport "a2a+all_gather": heads are exchanged inside a node, keys and values are gathered across nodes.

Ranks are a grid of M = N/U nodes of U consecutive ranks; U as `rules.inner_ranks` has it.

              rank in node   0    1
    node 0                   0    1     <- swap heads: each holds its node's tokens of half of the heads (a2a.py)
    node 1                   2    3
                             ^----- gather keys and values of these heads from the other nodes (all_gather.py)

    forward    swap q, k, v and picks in the node -> all_gather's forward across nodes -> swap out, lse back
    backward   swap dout, delta in the node       -> all_gather's backward             -> swap dq, dk, dv back

Bytes of a rank: those of a2a.py with U for N and the tokens of the node for T; and those of all_gather.py with M for N,
the longest node's tokens for L and the max(1, K/U) KV heads that a rank holds for K. dk and dv that come from other
nodes are complete for the node's tokens. U = 1 is all_gather, U = N is a2a.

Shape letters: S tokens of the shard, H query heads, K key/value heads, D head dim, N ranks, U ranks of a node.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moba_kernels import PairTally

from .a2a import AllToAll, HeadExchange, swap_gradient, swap_gradients_back, swap_inputs, swap_output_back
from .all_gather import AllGather
from .cut import Cut
from .rules import inner_ranks
from .transport import Sent, ShardedCall, Transport, device_positions


@dataclass(frozen=True)
class AllToAllAllGather:
    """See the module."""

    name: str = "a2a+all_gather"

    def forward(self, q_SHD: Tensor, k_SKD: Tensor, v_SKD: Tensor, call: ShardedCall, tally: PairTally) -> Sent:
        """See `Transport.forward`."""
        served = _of_shape(inner_ranks(q_SHD.shape[1], k_SKD.shape[1], call.num_ranks, call.node_ranks), call)
        sent = served.forward(q_SHD, k_SKD, v_SKD, call, tally)
        return sent._replace(kept=(served, sent.kept))

    def backward(
        self, dout_SHD: Tensor, delta_SH: Tensor, saved: tuple[Tensor, ...], kept: Any, call: ShardedCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transport.backward`."""
        served, kept_of_served = kept
        grads: tuple[Tensor, Tensor, Tensor] = served.backward(dout_SHD, delta_SH, saved, kept_of_served, call)
        return grads


class _Kept(NamedTuple):
    """What the backward pass needs besides tensors."""

    nodes: ShardedCall
    """The call across nodes, with the routing of the queries that arrived."""
    of_nodes: Any
    """What the transport across nodes keeps."""
    num_kv_heads: int
    """K, before the exchange."""
    dtype: torch.dtype
    """Of q, k and v."""


@dataclass(frozen=True)
class _Grid:
    """More than one node, and more than one rank in each."""

    ranks_of_node: int
    across: AllGather = field(default_factory=AllGather)
    name: str = "a2a+all_gather"

    def forward(self, q_SHD: Tensor, k_SKD: Tensor, v_SKD: Tensor, call: ShardedCall, tally: PairTally) -> Sent:
        exchange, nodes = self._exchange(call), self._nodes(call)
        q, k, v, routing = swap_inputs(exchange, q_SHD, k_SKD, v_SKD, call, nodes.positions_S)
        nodes = replace(nodes, routing=routing)
        sent = self.across.forward(q, k, v, nodes, tally)
        out_SHD, lse_SH = swap_output_back(exchange, sent.out.to(q.dtype), sent.lse)
        return Sent(out_SHD, lse_SH, sent.saved, _Kept(nodes, sent.kept, k_SKD.shape[1], q.dtype))

    def backward(
        self, dout_SHD: Tensor, delta_SH: Tensor, saved: tuple[Tensor, ...], kept: Any, call: ShardedCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        exchange = self._exchange(call)
        dout, delta = swap_gradient(exchange, dout_SHD, delta_SH)
        grads = self.across.backward(dout, delta, saved, kept.of_nodes, kept.nodes)
        return swap_gradients_back(exchange, grads, kept.dtype, kept.num_kv_heads)

    def _exchange(self, call: ShardedCall) -> HeadExchange:
        """Among the ranks of this node."""
        first = call.rank - call.rank % self.ranks_of_node
        node = slice(first, first + self.ranks_of_node)
        return HeadExchange(call.wire.among(call.wire.ranks[node]), Cut(call.cut.num_tokens, call.cut.pieces[node]))

    def _nodes(self, call: ShardedCall) -> ShardedCall:
        """The call as the ranks of the same place in all nodes make it: each node holds one shard."""
        node, place = divmod(call.rank, self.ranks_of_node)
        cut = call.cut.joined(self.ranks_of_node)
        positions = device_positions(call.pack, cut, node, call.positions_S.device)
        wire = call.wire.among(call.wire.ranks[place :: self.ranks_of_node])
        return replace(call, cut=cut, rank=node, wire=wire, positions_S=positions, node_ranks=1)


def _of_shape(ranks_of_node: int, call: ShardedCall) -> Transport:
    """What the grid comes to: nodes of one rank, one node, or both dimensions."""
    if ranks_of_node == 1:
        return AllGather()
    return AllToAll() if ranks_of_node == call.num_ranks else _Grid(ranks_of_node)


__all__ = ["AllToAllAllGather"]
