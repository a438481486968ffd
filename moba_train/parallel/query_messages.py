"""What a query carries to the rank that holds its keys: the messages of transport "route_queries" (route_queries.py).

    forward    its rows of q, head * T + position, its picks
    backward   its rows of dout, and its lse and delta over all keys

Several fields of different dtypes travel as one message of bytes. Messages hold queries by destination, head, token.

Shape letters: as in route_queries.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moba_kernels import Routing

from .query_plan import SentQueries, Stride, routing_of
from .transport import ShardedCall
from .wire import Pending


class Arrived(NamedTuple):
    """Queries of one stride at the rank that holds their keys, by head, then token; tensors that autograd can keep."""

    q_QGD: Tensor
    position_Q: Tensor
    """int64 global token indices: ascending within a head, because a query comes from one rank."""
    picks_QP: Tensor
    """`Routing.bits`."""
    order_Q: Tensor
    """int64: where each stood in the message."""


def send_queries(q_SHD: Tensor, stride: Stride, sent: SentQueries, call: ShardedCall) -> Pending:
    """To each rank its queries: q, head * T + position (which the owner sorts by and which gives both), picks."""
    routing = routing_of(call)
    token_Q, head_Q = _token_and_head(sent, routing)
    key_Q = head_Q * call.pack.num_tokens + call.positions_S[token_Q]
    message = _pack_fields(
        _of_queries(q_SHD, sent, routing),
        key_Q.to(_key_dtype(routing)).unsqueeze(1),
        routing.bits[token_Q, head_Q],
    )
    return call.wire.all_to_all(message, stride.sent, stride.received, phase="forward/queries")


def sort_arrived(message: Tensor, q_SHD: Tensor, call: ShardedCall) -> Arrived:
    """The queries of a message by head, then token."""
    routing = routing_of(call)
    group, dim, picks = q_SHD.shape[1] // routing.num_routed_heads, q_SHD.shape[2], routing.bits
    widths = (q_SHD.dtype, group * dim), (_key_dtype(routing), 1), (picks.dtype, picks.shape[2])
    q_Q, key_Q, picks_Q = split_fields(message, widths)
    sorted_Q, order_Q = key_Q.read().squeeze(1).long().sort()
    q_QGD = q_Q.read(order_Q).view(-1, group, dim)
    return Arrived(q_QGD, sorted_Q % call.pack.num_tokens, picks_Q.read(order_Q), order_Q)


def send_gradients(
    dout_SHD: Tensor, lse_SH: Tensor, delta_SH: Tensor, stride: Stride, sent: SentQueries, call: ShardedCall
) -> Pending:
    """To each rank what the gradients of its queries' parts need: dout, and lse and delta over all keys."""
    message = _pack_fields(*(_of_queries(x, sent, routing_of(call)) for x in (dout_SHD, lse_SH, delta_SH)))
    return call.wire.all_to_all(message, stride.sent, stride.received, phase="backward/dout")


def _of_queries(x_SHD: Tensor, sent: SentQueries, routing: Routing) -> Tensor:
    """[Q, G*...]: what `x` [S,H,...] holds for each query to send."""
    token_Q, head_Q = _token_and_head(sent, routing)
    routed = routing.num_routed_heads
    of_query = x_SHD.view(x_SHD.shape[0], routed, x_SHD.shape[1] // routed, *x_SHD.shape[2:])
    return of_query[token_Q, head_Q].flatten(1)


def _token_and_head(sent: SentQueries, routing: Routing) -> tuple[Tensor, Tensor]:
    routed = routing.num_routed_heads
    return sent.index_Q // routed, sent.index_Q % routed


def _key_dtype(routing: Routing) -> torch.dtype:
    """Of head * T + position, R heads."""
    wide = routing.num_routed_heads * routing.pack.num_tokens >= 2**31
    return torch.int64 if wide else torch.int32


def _pack_fields(*fields: Tensor) -> Tensor:
    """uint8 [Q, bytes]: fields [Q, ...] of 2-, 4- or 8-byte numbers side by side, to travel as one message."""
    return torch.cat([x.contiguous().view(torch.int16) for x in fields if x.shape[1]], 1).view(torch.uint8)


class _Field(NamedTuple):
    """One of the fields of a message, where it lies in it."""

    halves: Tensor
    """int16 [Q, width * bytes / 2]"""
    dtype: torch.dtype

    def read(self, order_Q: Tensor | None = None) -> Tensor:
        """A copy [Q, width], in the order of the message or in that of `order_Q`."""
        halves = self.halves.clone(memory_format=torch.contiguous_format) if order_Q is None else self.halves[order_Q]
        return halves.view(self.dtype) if halves.shape[1] else halves.to(self.dtype)


def split_fields(message: Tensor, widths: Sequence[tuple[torch.dtype, int]]) -> list[_Field]:
    """The fields of `_pack_fields`, given the dtype and width of each."""
    sizes = [width * dtype.itemsize // 2 for dtype, width in widths]
    parts = torch.split(message.view(torch.int16), sizes, 1)
    return [_Field(part, dtype) for part, (dtype, _) in zip(parts, widths, strict=True)]


__all__ = ["Arrived", "send_gradients", "send_queries", "sort_arrived", "split_fields"]
