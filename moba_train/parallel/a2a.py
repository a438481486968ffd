"""Transport "a2a": ranks swap tokens of all heads for all tokens of some heads (DeepSpeed Ulysses, arXiv 2309.14509).

    forward    all-to-all q, k, v; all-to-all picks    S tokens of H heads -> T tokens of H/N heads
               attend_partial over the whole row       (each rank its own heads: nothing is merged)
               all-to-all out and lse                  T tokens of H/N heads -> S tokens of H heads
    backward   all-to-all dout and delta               q, k, v and lse were kept as they had arrived
               attend_partial_backward over the whole row
               all-to-all dq, dk, dv

Where there are more ranks than KV heads, a KV head is copied to N/K ranks, and its owner adds up their dk and dv.
Shards have any length: tokens travel as they are, without padding. Bytes a rank sends, and receives with S and T - S
in each other's place; h = H/N query heads and x = max(1, K/N) KV heads a rank, e bytes an element of q, a bytes of a
partial sum (4; 8 for fp64), z = e where K >= N, else a:

    forward/qkv      (N-1) * S * (h*D + x*(D+Dv)) * e
    forward/picks    (N-1) * S * (h, or x under select="group") * P * 2     P stored picks; 4 bytes from 65535 chunks on
    forward/out      (T-S) * h * (Dv*e + a)                                 a: lse
    backward/dout    (N-1) * S * h * (Dv*e' + a)                            e': of dout; a: delta
    backward/dqkv    (T-S) * (h*D*e + x*(D+Dv)*z)

"Received" reads (T-S) for (N-1)*S and the reverse. Output rows and dq are complete where they are computed, so they
travel in the dtype of q; so do dk and dv of a KV head that one rank has alone.

Shape letters: T tokens that the ranks of an exchange hold together, S tokens of the shard, H query heads, K key/value
heads, D head dim, Dv value dim, P stored picks, N ranks, W units of a message's row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moba_kernels import PairTally, Routing, attend_partial, attend_partial_backward

from .cut import Cut
from .transport import Sent, ShardedCall
from .wire import Pending, Wire


class Kept(NamedTuple):
    """What the backward pass needs besides tensors."""

    routing: Routing | None
    """Of the queries that arrived."""
    num_kv_heads: int
    """K, before the exchange."""


@dataclass(frozen=True)
class AllToAll:
    """See the module."""

    name: str = "a2a"

    def forward(self, q_SHD: Tensor, k_SKD: Tensor, v_SKD: Tensor, call: ShardedCall, tally: PairTally) -> Sent:
        """See `Transport.forward`."""
        exchange = HeadExchange(call.wire, call.cut)
        q, k, v, routing = swap_inputs(exchange, q_SHD, k_SKD, v_SKD, call, None)
        partial = attend_partial(
            q,
            k,
            v,
            call.spec,
            pack=call.pack,
            routing=routing,
            softmax_scale=call.softmax_scale,
            backend=call.backend,
            tally=tally,
        )
        out_SHD, lse_SH = swap_output_back(exchange, partial.out.to(q.dtype), partial.lse)
        return Sent(out_SHD, lse_SH, (q, k, v, partial.lse), Kept(routing, k_SKD.shape[1]))

    def backward(
        self, dout_SHD: Tensor, delta_SH: Tensor, saved: tuple[Tensor, ...], kept: Any, call: ShardedCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transport.backward`."""
        q, k, v, lse = saved
        exchange = HeadExchange(call.wire, call.cut)
        dout, delta = swap_gradient(exchange, dout_SHD, delta_SH)
        grads = attend_partial_backward(
            dout,
            q,
            k,
            v,
            lse,
            delta,
            call.spec,
            pack=call.pack,
            routing=kept.routing,
            softmax_scale=call.softmax_scale,
            backend=call.backend,
        )
        return swap_gradients_back(exchange, grads, q.dtype, kept.num_kv_heads)


@dataclass(frozen=True)
class Arriving:
    """An exchange of several tensors under way."""

    pending: Pending
    unpack: Callable[[Tensor], tuple[Tensor, ...]]

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors in the order in which they were given."""
        return self.unpack(self.pending.wait())


@dataclass(frozen=True)
class HeadExchange:
    """Swaps tokens for heads among the ranks of a wire, several tensors of any dtypes in one message.

    A row of a message holds what one token sends to one rank, as bits: bf16 gradients and fp32 sums go side by side,
    and on the wire all are bytes, which every backend of torch.distributed carries.
    """

    wire: Wire
    cut: Cut
    """The tokens of each rank of the wire: together all of the row, or the part of it that a node holds."""

    @property
    def lengths(self) -> list[int]:
        """[N]: tokens of each rank."""
        return [self.cut.length(rank) for rank in range(self.cut.num_ranks)]

    def to_heads(self, tensors: Sequence[Tensor], *, phase: str) -> Arriving:
        """[S, heads, dim] each, of the local tokens -> [T, max(1, heads/N), dim] each, in token order.

        Heads go to ranks in order; where they are fewer than ranks, each is copied to N/heads consecutive ranks.
        """
        num_ranks, num_local, unit = self.wire.size, tensors[0].shape[0], _unit(tensors)
        units = [x.contiguous().view(unit) for x in tensors]
        heads = [max(1, x.shape[1] // num_ranks) for x in tensors]
        widths = [n * x.shape[2] for n, x in zip(heads, units, strict=True)]
        forms = [(x.dtype, n, x.shape[2]) for n, x in zip(heads, tensors, strict=True)]
        sent_NSW = units[0].new_empty((num_ranks, num_local, sum(widths)))
        for x, n, columns in zip(units, heads, torch.split(sent_NSW, widths, 2), strict=True):
            copies = max(1, num_ranks // x.shape[1])
            parts, dim = num_ranks // copies, x.shape[2]
            target = columns.view(parts, copies, num_local, n, dim)
            target.copy_(x.view(num_local, parts, n, dim).transpose(0, 1)[:, None])

        def unpack(received: Tensor) -> tuple[Tensor, ...]:
            columns = torch.split(received.view(unit), widths, 1)
            return tuple(_as_heads(self._in_token_order(x), *form) for x, form in zip(columns, forms, strict=True))

        rows = sent_NSW.flatten(0, 1).view(torch.uint8)
        return Arriving(self.wire.all_to_all(rows, [num_local] * num_ranks, self.lengths, phase=phase), unpack)

    def to_tokens(self, tensors: Sequence[Tensor], *, phase: str) -> Arriving:
        """[T, heads, dim] each, in token order -> [S, N*heads, dim] each, of the local tokens: heads of all ranks."""
        num_ranks, num_local, unit = self.wire.size, self.lengths[self.wire.rank], _unit(tensors)
        units = [x.contiguous().view(unit).flatten(1) for x in tensors]
        widths = [x.shape[1] for x in units]
        forms = [(x.dtype, num_ranks * x.shape[1], x.shape[2]) for x in tensors]
        sent_TW = units[0].new_empty((units[0].shape[0], sum(widths)))
        for x, columns in zip(units, torch.split(sent_TW, widths, 1), strict=True):
            torch.cat(self._in_rank_order(x), out=columns)

        def unpack(received: Tensor) -> tuple[Tensor, ...]:
            columns = torch.split(received.view(unit).view(num_ranks, num_local, sum(widths)), widths, 2)
            return tuple(_as_heads(torch.cat(x.unbind(0), 1), *form) for x, form in zip(columns, forms, strict=True))

        rows = sent_TW.view(torch.uint8)
        return Arriving(self.wire.all_to_all(rows, self.lengths, [num_local] * num_ranks, phase=phase), unpack)

    def _in_token_order(self, rows: Tensor) -> Tensor:
        """A copy of [T, ...], rank after rank, in token order."""
        lengths, order = self._pieces()
        pieces = torch.split(rows, lengths)
        return torch.cat([pieces[i] for i in order])

    def _in_rank_order(self, rows: Tensor) -> list[Tensor]:
        """Views of [T, ...], in token order, that come rank after rank."""
        lengths, order = self._pieces()
        views = dict(zip(order, torch.split(rows, [lengths[i] for i in order]), strict=True))
        return [views[i] for i in range(len(lengths))]

    def _pieces(self) -> tuple[list[int], list[int]]:
        """Lengths of the pieces of all ranks, rank after rank; and their indices in token order."""
        pieces = [piece for of_rank in self.cut.pieces for piece in of_rank]
        return [stop - start for start, stop in pieces], sorted(range(len(pieces)), key=pieces.__getitem__)


def swap_inputs(
    exchange: HeadExchange, q: Tensor, k: Tensor, v: Tensor, call: ShardedCall, positions_T: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Routing | None]:
    """q [T,h,D], k [T,x,D], v [T,x,Dv] and the routing of these queries, from the local shards and their routing.

    positions_T: where the tokens of the exchange stand in the row; None = they are the row.
    """
    arriving = exchange.to_heads((q, k, v), phase="forward/qkv")
    routing, picks = call.routing, None
    if routing is not None and routing.stored.shape[2]:
        picks = exchange.to_heads((routing.bits,), phase="forward/picks")
    q, k, v = arriving.wait()
    if routing is None:
        return q, k, v, None
    if picks is None:
        routed = routing.spec.routed_heads(q.shape[1], k.shape[1])
        picked = Routing.unwritten(q.shape[0], routed, 0, routing.spec, call.pack, q.device)
    else:
        (picked,) = picks.wait()
    return q, k, v, Routing.of_bits(picked, routing.spec, call.pack, positions_T, complete=routing.complete).trusted()


def swap_output_back(exchange: HeadExchange, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """out [S,H,Dv] and lse [S,H] of the local queries, from [T,h,Dv] and [T,h]."""
    out, lse = exchange.to_tokens((out, lse[:, :, None]), phase="forward/out").wait()
    return out, lse[:, :, 0]


def swap_gradient(exchange: HeadExchange, dout: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """dout [T,h,Dv] and delta [T,h], from [S,H,Dv] and [S,H]."""
    dout, delta = exchange.to_heads((dout, delta[:, :, None]), phase="backward/dout").wait()
    return dout, delta[:, :, 0]


def swap_gradients_back(
    exchange: HeadExchange, grads: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [S,H,D], dk [S,K,D], dv [S,K,Dv] of the local shard, from those of the exchanged heads (fp32 or fp64).

    dtype: of q, k and v. dk and dv of KV heads that were copied are parts: they travel and are added up as they are.
    """
    dq, dk, dv = grads
    copied = num_kv_heads < exchange.wire.size
    dk, dv = (x if copied else x.to(dtype) for x in (dk, dv))
    dq, dk, dv = exchange.to_tokens((dq.to(dtype), dk, dv), phase="backward/dqkv").wait()
    if copied:
        copies = exchange.wire.size // num_kv_heads
        dk, dv = (x.view(x.shape[0], num_kv_heads, copies, x.shape[2]).sum(2) for x in (dk, dv))
    return dq, dk, dv


def _unit(tensors: Sequence[Tensor]) -> torch.dtype:
    """The widest integer that all tensors are made of: they are moved as such, bit by bit."""
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[min(x.element_size() for x in tensors)]


def _as_heads(rows: Tensor, dtype: torch.dtype, heads: int, dim: int) -> Tensor:
    """[n, heads, dim] in its dtype again, from contiguous [n, units]."""
    return rows.view(dtype).view(rows.shape[0], heads, dim)


__all__ = [
    "AllToAll",
    "HeadExchange",
    "swap_gradient",
    "swap_gradients_back",
    "swap_inputs",
    "swap_output_back",
]
