"""Transport "route_queries" (MoBA only): queries go to the keys. Keys, values, dK and dV never leave their rank.

    forward    tell every rank how many queries come              (N-1) * 4*R bytes
               queries go to the ranks that hold their chunks     G*D*e + 4 + 2*P bytes a query
               attend_partial there; partials come back           G*(Dv+1)*4            and are merged
    backward   dout, and the global lse and delta, go out         G*(Dv*e + 8)
               attend_partial_backward there; dQ comes back       G*D*4                 and is added; dK, dV stay

As MoE dispatch: a query goes to a rank once, however many of its chunks lie there (query_plan.py). Bytes are sent per
rank and layer (from R*T = 2^31 on 8 in place of 4; from 65535 chunks on 4*P; 8-byte sums for fp64 inputs).

Picks uniform over the row send S*R*d queries, d = (N-1) * (1 - (1 - 1/N)^(topk-1)) ranks met: bytes fall with N where
an all-gather's do not. Causality lowers that, as early queries have little to choose from. Exactly, in one document of
whole chunks that shards do not cut: a query in chunk c picks p = min(topk-1, c) of the c chunks before it, m_r of them
on rank r, so d is the sum over the other ranks r of 1 - binom(c - m_r, p) / binom(c, p). It also makes the load uneven:
early chunks are picked by all that follow. The rank that holds most of them receives (largest / mean, 8 to 128 ranks)
2 to 5 times the mean under "contiguous", 1.3 to 2.8 times under "zigzag" (`query_plan.queries_received`).

Every (query, key) pair is computed once, where the key lives. Partials and dQ travel in fp32 (bf16 would spoil
gradients) and are added in rank order, so results do not depend on arrival. Local keys are attended to while the
host reads the counts and queries travel. Routing heads go in strides, one computed while the next one's queries arrive.

Memory: two strides are in flight; received queries, their picks and the index lists are kept for the backward pass,
D*e*G + 2*P + 32 bytes a query. A rank can receive more than is expected, N*S*R queries at worst.

Shape letters: S tokens of the shard, H query heads, K key/value heads, R routing heads (H under select="head", K under
"group"), G = H/R query heads of a query, D head dim, Dv value dim, P picks, N ranks, Q queries in a message.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moba_kernels import MoBA, PairTally, Partial, Routing, attend_partial, attend_partial_backward, merge_partials
from moba_kernels.attend.call import accumulate_dtype

from .query_messages import Arrived, send_gradients, send_queries, sort_arrived, split_fields
from .query_plan import (
    PLAN_BYTES,
    SentQueries,
    Stride,
    expected_destinations,
    list_queries,
    routing_of,
    start_count,
)
from .transport import Sent, ShardedCall
from .volume import QUERY_STRIDE_BYTES
from .wire import Pending


@dataclass(frozen=True)
class RouteQueries:
    """See the module. `stride_bytes` bounds the expected messages of one stride of routing heads."""

    stride_bytes: int = QUERY_STRIDE_BYTES
    name: str = "route_queries"

    def forward(self, q_SHD: Tensor, k_SKD: Tensor, v_SKD: Tensor, call: ShardedCall, tally: PairTally) -> Sent:
        """See `Transport.forward`."""
        routing = routing_of(call)
        wait_for_count = start_count(call, self.heads(q_SHD, v_SKD, call))
        half = q_SHD.shape[0] // 2
        halves = [
            _Part.of(q_SHD[part], call.positions_S[part], routing.bits[part], call)
            for part in (slice(0, half), slice(half, None))
        ]
        first_half = halves[0].attend(k_SKD, v_SKD, call, tally)  # while the host reads counts
        strides = wait_for_count()
        sent = [list_queries(call, strides[0])]
        coming: Pending | None = send_queries(q_SHD, strides[0], sent[0], call)
        second_half = halves[1].attend(k_SKD, v_SKD, call, tally)  # while queries travel
        merged = Partial(*(torch.cat(parts) for parts in zip(first_half, second_half, strict=True)))
        del first_half, second_half
        saved: list[Tensor] = []
        returning: _Return | None = None
        for i, stride in enumerate(strides):
            assert coming is not None
            arrived = sort_arrived(coming.wait(), q_SHD, call)
            coming = None  # its buffer goes before the next one comes
            if i + 1 < len(strides):
                sent.append(list_queries(call, strides[i + 1]))
                coming = send_queries(q_SHD, strides[i + 1], sent[i + 1], call)
            answer_QX = _answer(arrived, k_SKD, v_SKD, stride, call, tally)
            if returning is not None:
                returning.merge_into(merged)
            returning = _Return.start(answer_QX, stride, sent[i], call, "forward/out")
            saved += [*sent[i], *arrived]
            del answer_QX, arrived
        assert returning is not None  # there is at least one head
        returning.merge_into(merged)
        return Sent(merged.out, merged.lse, (q_SHD, k_SKD, v_SKD, merged.lse, *saved), strides)

    def backward(
        self, dout_SHD: Tensor, delta_SH: Tensor, saved: tuple[Tensor, ...], kept: Any, call: ShardedCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transport.backward`."""
        q_SHD, k_SKD, v_SKD, lse_SH, *lists = saved
        strides: tuple[Stride, ...] = kept
        count = len(SentQueries._fields) + len(Arrived._fields)
        of_strides = [lists[i : i + count] for i in range(0, len(lists), count)]
        sent = [SentQueries(*of_stride[: len(SentQueries._fields)]) for of_stride in of_strides]
        coming: Pending | None = send_gradients(dout_SHD, lse_SH, delta_SH, strides[0], sent[0], call)
        local = _Part(q_SHD, call.positions_S, routing_of(call))
        grads = local.gradients(dout_SHD, lse_SH, delta_SH, k_SKD, v_SKD, call)  # while gradients travel
        dq_SHD, dk_SKD, dv_SKD = grads
        dq_SHD = dq_SHD.contiguous()
        returning: _Return | None = None
        for i, stride in enumerate(strides):
            assert coming is not None
            message = coming.wait()
            coming = None
            if i + 1 < len(strides):
                coming = send_gradients(dout_SHD, lse_SH, delta_SH, strides[i + 1], sent[i + 1], call)
            arrived = Arrived(*of_strides[i][len(SentQueries._fields) :])
            dq_QX = _answer_backward(arrived, message, (k_SKD, v_SKD), (dk_SKD, dv_SKD), dout_SHD.dtype, stride, call)
            if returning is not None:
                returning.add_into(dq_SHD)
            returning = _Return.start(dq_QX, stride, sent[i], call, "backward/dq")
            del message, arrived, dq_QX
        assert returning is not None
        returning.add_into(dq_SHD)
        return dq_SHD, dk_SKD, dv_SKD

    def heads(self, q_SHD: Tensor, v_SKD: Tensor, call: ShardedCall) -> list[tuple[int, int]]:
        """(first, stop) of every stride of routing heads; from what is alike on all ranks, never from the picks."""
        assert isinstance(call.spec, MoBA)
        (_, num_heads, dim), (_, num_kv_heads, value_dim) = q_SHD.shape, v_SKD.shape
        routed = call.spec.routed_heads(num_heads, num_kv_heads)
        bytes_of_query = num_heads // routed * (dim * q_SHD.element_size() + (value_dim + 1) * 4)
        bytes_of_token = expected_destinations(call.spec, call.cut) * bytes_of_query + call.num_ranks * PLAN_BYTES
        stride = max(1, min(routed, int(self.stride_bytes / (max(1, call.cut.longest) * bytes_of_token))))
        return [(first, min(first + stride, routed)) for first in range(0, routed, stride)]


@dataclass(frozen=True)
class _Return:
    """What the owners of keys worked out for the queries of one stride is on its way back: [Q, X] per query."""

    pending: Pending
    stride: Stride
    sent: SentQueries
    num_routed: int

    @classmethod
    def start(cls, answer_QX: Tensor, stride: Stride, sent: SentQueries, call: ShardedCall, phase: str) -> _Return:
        """Send each answer to where its query came from."""
        pending = call.wire.all_to_all(answer_QX, stride.received, stride.sent, phase=phase)
        return cls(pending, stride, sent, routing_of(call).num_routed_heads)

    def turns(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(token * R + head, answers) of the queries at their first destination, second, ...; see `SentQueries`."""
        received_QX = self.pending.wait()
        for turn in torch.split(self.sent.by_turn_Q, list(self.stride.with_destination)):
            yield self.sent.index_Q[turn], received_QX[turn]

    def merge_into(self, merged: Partial) -> None:
        """Wait, then merge the partials [out, lse] into those of the shard, in place."""
        num_tokens, num_heads, value_dim = merged.out.shape
        group = num_heads // self.num_routed
        out_RGD = merged.out.view(num_tokens * self.num_routed, group, value_dim)
        lse_RG = merged.lse.view(num_tokens * self.num_routed, group)
        for index, partial in self.turns():
            out, lse = torch.split(partial, [group * value_dim, group], 1)
            both = merge_partials(out_RGD[index], lse_RG[index], out.view(-1, group, value_dim), lse)
            out_RGD.index_copy_(0, index, both.out)
            lse_RG.index_copy_(0, index, both.lse)

    def add_into(self, dq_SHD: Tensor) -> None:
        """Wait, then add to the shard's gradient, in place."""
        num_tokens, num_heads, dim = dq_SHD.shape
        dq_RX = dq_SHD.view(num_tokens * self.num_routed, num_heads // self.num_routed * dim)
        for index, part in self.turns():
            dq_RX.index_add_(0, index, part)  # no index stands twice: one addition each


class _Part(NamedTuple):
    """Queries that are attended in one call: [n,...] tokens, under some query heads."""

    q: Tensor
    positions: Tensor
    routing: Routing

    @classmethod
    def of(cls, q: Tensor, positions: Tensor, picks: Tensor, call: ShardedCall) -> _Part:
        routing = routing_of(call)
        mine = Routing.of_bits(picks, routing.spec, call.pack, positions, complete=routing.complete)
        return cls(q, positions, mine.trusted())

    def attend(self, k: Tensor, v: Tensor, call: ShardedCall, tally: PairTally) -> Partial:
        """Over keys of this rank."""
        return attend_partial(
            self.q,
            k,
            v,
            call.spec,
            pack=call.pack,
            q_positions=self.positions,
            k_positions=call.positions_S,
            routing=self.routing,
            softmax_scale=call.softmax_scale,
            backend=call.backend,
            tally=tally,
        )

    def gradients(
        self, dout: Tensor, lse: Tensor, delta: Tensor, k: Tensor, v: Tensor, call: ShardedCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of this part over keys of this rank."""
        return attend_partial_backward(
            dout,
            self.q,
            k,
            v,
            lse,
            delta,
            call.spec,
            pack=call.pack,
            q_positions=self.positions,
            k_positions=call.positions_S,
            routing=self.routing,
            softmax_scale=call.softmax_scale,
            backend=call.backend,
        )


def _answer(
    arrived: Arrived, k_SKD: Tensor, v_SKD: Tensor, stride: Stride, call: ShardedCall, tally: PairTally
) -> Tensor:
    """[Q, G*(Dv+1)]: partial out and lse of each query over this rank's keys, as the queries stood in the message."""
    num_queries, group, _ = arrived.q_QGD.shape
    answer_QX = arrived.q_QGD.new_empty((num_queries, group * (v_SKD.shape[2] + 1)), dtype=accumulate_dtype(k_SKD))
    for where, kv, part in _by_head(arrived, k_SKD.shape[1], stride, call):
        out_QGD, lse_QG = part.attend(k_SKD[:, kv], v_SKD[:, kv], call, tally)
        answer_QX.index_copy_(0, arrived.order_Q[where], torch.cat([out_QGD.flatten(1), lse_QG], 1))
    return answer_QX


def _answer_backward(
    arrived: Arrived,
    message: Tensor,
    keys: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
    dout_dtype: torch.dtype,
    stride: Stride,
    call: ShardedCall,
) -> Tensor:
    """[Q, G*D]: dq of this rank's part, as the queries stood in the message; adds dk and dv to `grads`, in place."""
    (k_SKD, v_SKD), (dk_SKD, dv_SKD) = keys, grads
    num_queries, group, dim = arrived.q_QGD.shape
    value_dim, accumulated = v_SKD.shape[2], dk_SKD.dtype
    widths = (dout_dtype, group * value_dim), (accumulated, group), (accumulated, group)
    dout_Q, lse_Q, delta_Q = (field.read(arrived.order_Q) for field in split_fields(message, widths))
    answer_QX = dk_SKD.new_empty((num_queries, group * dim))
    for where, kv, part in _by_head(arrived, k_SKD.shape[1], stride, call):
        dout_QGD = dout_Q[where].view(-1, group, value_dim)
        dq_QGD, dk_SD, dv_SD = part.gradients(dout_QGD, lse_Q[where], delta_Q[where], k_SKD[:, kv], v_SKD[:, kv], call)
        answer_QX.index_copy_(0, arrived.order_Q[where], dq_QGD.flatten(1))
        dk_SKD[:, kv] += dk_SD
        dv_SKD[:, kv] += dv_SD
    return answer_QX


def _by_head(
    arrived: Arrived, num_kv_heads: int, stride: Stride, call: ShardedCall
) -> Iterator[tuple[slice, slice, _Part]]:
    """(where they stand in `arrived`, their KV head, the queries) of every routing head that queries arrived for."""
    heads_of_kv, stop = routing_of(call).num_routed_heads // num_kv_heads, 0
    for head, count in enumerate(stride.received_of_head, stride.first):
        where, kv, stop = slice(stop, stop + count), head // heads_of_kv, stop + count
        if count:
            picks = arrived.picks_QP[where].unsqueeze(1)
            yield where, slice(kv, kv + 1), _Part.of(arrived.q_QGD[where], arrived.position_Q[where], picks, call)
