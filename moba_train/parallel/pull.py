"""Transport "pull": every rank pulls just the keys and values that its queries attend to and that it does not hold.

    forward    who wants what (pull_plan.py); its sizes
               are on their way to the host           | meanwhile the first half of the queries attends to local keys
               rows of K and V, first stride of heads | meanwhile the second half does
               next stride                            | meanwhile each KV head of this one attends, and is merged
    backward   rows of K and V again                  | meanwhile the backward pass over local keys
               next stride; dK, dV rows go back, fp32 | meanwhile the backward pass of each KV head

Under full attention, and where no query picks anything, what is wanted follows from the row and its cut: nobody asks,
and the host waits for nothing. Otherwise it waits once a layer, for the sizes of what travels.

Bytes received per rank and layer, R rows pulled (a row = one token of one KV head), e bytes an element:

    forward    (N-1) * ceil(K * parts held here / 8) of requests (a part: parts.py) + R * (D + Dv) * e
    backward   R * (D + Dv) * e + 4 * (D + Dv) for every row that others pulled from here

R is at most what the all-gather moves. Full attention: what lies elsewhere of the documents at hand, before this rank's
last token in them. MoBA under uniform routing, expected (`parts.pulled_tokens`): a part that lies elsewhere is pulled
for certain where a later token of the same chunk is here; else, as part of chunk i of its document, with probability

    1 - prod over chunks c > i of (1 - min(topk - 1, c) / c) ^ (G * n_c)

where n_c counts the queries of chunk c that are here, and G the heads of a KV head that pick on their own (H/K under
"head", 1 under "group"). Long shards and few chunks: nearly all that lies before. Skewed routing pulls less.

At most two strides of pulled rows are held at a time, and the rows that leave in turn.

Shape letters: S tokens of the shard, H query heads, K key/value heads, D head dim, Dv value dim, W = D + Dv, N ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moba_kernels import PairTally, Routing, attend_partial, attend_partial_backward, merge_partials
from moba_kernels.attend.call import accumulate_dtype

from .pull_plan import PullPlan, ask, known_plan
from .transport import Sent, ShardedCall
from .volume import STRIDE_BYTES


@dataclass(frozen=True)
class Pull:
    """See the module. `stride_bytes` bounds the pulled keys and values of one stride of KV heads."""

    stride_bytes: int = STRIDE_BYTES
    name: str = "pull"

    def forward(self, q_SHD: Tensor, k_SKD: Tensor, v_SKD: Tensor, call: ShardedCall, tally: PairTally) -> Sent:
        """See `Transport.forward`."""
        num_kv_heads = k_SKD.shape[1]
        dtype = accumulate_dtype(q_SHD)
        out_SHD = q_SHD.new_empty((*q_SHD.shape[:2], v_SKD.shape[2]), dtype=dtype)
        lse_SH = q_SHD.new_empty(q_SHD.shape[:2], dtype=dtype)
        half, num_tokens = 0, q_SHD.shape[0]
        plan = known_plan(call, num_kv_heads, q_SHD.device)
        if plan is None:
            asking = ask(call, num_kv_heads, q_SHD.device)
            half = num_tokens // 2
            _attend_locally(out_SHD, lse_SH, 0, half, q_SHD, k_SKD, v_SKD, call, tally)
            plan = asking.plan()
        pulling = self._pull(k_SKD, v_SKD, plan, call, "forward/kv")
        _attend_locally(out_SHD, lse_SH, half, num_tokens, q_SHD, k_SKD, v_SKD, call, tally)
        for pulled in pulling:
            _merge_pulled(out_SHD, lse_SH, pulled, q_SHD, call, tally)
            del pulled  # before the next one comes
        return Sent(out_SHD, lse_SH, (q_SHD, k_SKD, v_SKD, lse_SH), plan)

    def backward(
        self, dout_SHD: Tensor, delta_SH: Tensor, saved: tuple[Tensor, ...], kept: Any, call: ShardedCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transport.backward`."""
        q_SHD, k_SKD, v_SKD, lse_SH = saved
        pulling = self._pull(k_SKD, v_SKD, kept, call, "backward/kv")
        dq_SHD, dk_SKD, dv_SKD = attend_partial_backward(
            dout_SHD,
            q_SHD,
            k_SKD,
            v_SKD,
            lse_SH,
            delta_SH,
            call.spec,
            pack=call.pack,
            q_positions=call.positions_S,
            k_positions=call.positions_S,
            routing=call.routing,
            softmax_scale=call.softmax_scale,
            backend=call.backend,
        )
        dk_SKD, dv_SKD = dk_SKD.contiguous(), dv_SKD.contiguous()  # they may have the strides of k and v
        going: Callable[[], None] | None = None
        for pulled in pulling:
            grad_RW = _gradients_of_pulled(dq_SHD, pulled, dout_SHD, q_SHD, lse_SH, delta_SH, call)
            if going is not None:
                going()
            going = _start_return(grad_RW, pulled, call, dk_SKD, dv_SKD)
            del pulled, grad_RW
        assert going is not None  # there is at least one KV head
        going()
        return dq_SHD, dk_SKD, dv_SKD

    def strides(self, k: Tensor, v: Tensor, call: ShardedCall) -> list[tuple[int, int]]:
        """(first, stop) KV heads pulled at a time; alike on all ranks, because it depends on the row alone.

        A piece of the cut lacks less than the document that its first token lies in.
        """
        longest_document = int(np.diff(call.pack.bounds).max())
        most_pieces = max(len(pieces) for pieces in call.cut.pieces)
        most_tokens = min(call.pack.num_tokens, most_pieces * longest_document)
        bytes_of_head = most_tokens * (k.shape[2] + v.shape[2]) * k.element_size()
        num_kv_heads = k.shape[1]
        stride = max(1, min(num_kv_heads, self.stride_bytes // bytes_of_head))
        return [(first, min(first + stride, num_kv_heads)) for first in range(0, num_kv_heads, stride)]

    def _pull(self, k_SKD: Tensor, v_SKD: Tensor, plan: PullPlan, call: ShardedCall, phase: str) -> Iterator[_Pulled]:
        """Start with the first stride at once; the iterator gives them as they arrive, the next one under way."""
        # Key and value of a token and KV head side by side, so that they travel in one message.
        row_RW = torch.cat([k_SKD, v_SKD], 2).flatten(0, 1)

        def start(first: int, stop: int) -> Callable[[], _Pulled]:
            index = plan.sent_index(first, stop)
            pending = call.wire.all_to_all(row_RW[index], *plan.splits(first, stop), phase=phase)
            return lambda: _Pulled(pending.wait(), plan, first, stop, k_SKD.shape[2], index)

        strides = self.strides(k_SKD, v_SKD, call)
        return _arriving(start(*strides[0]), strides[1:], start)


@dataclass(frozen=True)
class _Pulled:
    """Rows of K and V of KV heads first .. stop - 1, by owner, KV head and token."""

    row_RW: Tensor
    plan: PullPlan
    first: int
    stop: int
    dim: int
    sent_index: Tensor
    """What left this rank in turn: rows of the shard's [S*K]."""

    def heads(self) -> Iterator[_Head]:
        """The KV heads that pulled anything, one after the other."""
        places = self.plan.received_places(self.first, self.stop)
        for head in range(self.first, self.stop):
            if self.plan.wanted_NK[:, head].any():
                index, positions = self.plan.pulled_index(head, places[head - self.first])
                k, v = (x.index_select(0, index)[:, None] for x in self.row_RW.tensor_split([self.dim], 1))
                yield _Head(head, k, v, positions, index)


@dataclass(frozen=True)
class _Head:
    """Pulled keys and values of one KV head, in token order: k [n,1,D], v [n,1,Dv]."""

    head: int
    k: Tensor
    v: Tensor
    positions: Tensor
    """[n] global token indices."""
    index: Tensor
    """[n]: where they stand among the rows received."""

    def query_heads(self, num_heads: int, num_kv_heads: int) -> slice:
        """The query heads that read this KV head."""
        heads_of_kv = num_heads // num_kv_heads
        return slice(self.head * heads_of_kv, (self.head + 1) * heads_of_kv)


def _arriving(
    coming: Callable[[], _Pulled] | None,
    strides: Sequence[tuple[int, int]],
    start: Callable[[int, int], Callable[[], _Pulled]],
) -> Iterator[_Pulled]:
    for stride in [*strides, None]:
        assert coming is not None
        pulled, coming = coming(), None  # its buffers go before the next ones come
        if stride is not None:
            coming = start(*stride)
        yield pulled
        del pulled


def _attend_locally(
    out_SHD: Tensor,
    lse_SH: Tensor,
    start: int,
    stop: int,
    q_SHD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    call: ShardedCall,
    tally: PairTally,
) -> None:
    """Write out and lse of local queries start .. stop - 1 over the local keys up to them."""
    positions, routing = call.positions_S[start:stop], call.routing
    if routing is not None:
        bits, complete = routing.bits[start:stop], routing.complete
        routing = Routing.of_bits(bits, routing.spec, routing.pack, positions, complete=complete).trusted()
    out_SHD[start:stop], lse_SH[start:stop] = attend_partial(
        q_SHD[start:stop],
        k_SKD[:stop],
        v_SKD[:stop],
        call.spec,
        pack=call.pack,
        q_positions=positions,
        k_positions=call.positions_S[:stop],
        routing=routing,
        softmax_scale=call.softmax_scale,
        backend=call.backend,
        tally=tally,
    )


def _merge_pulled(
    out_SHD: Tensor, lse_SH: Tensor, pulled: _Pulled, q_SHD: Tensor, call: ShardedCall, tally: PairTally
) -> None:
    """Attend to pulled keys, KV head by KV head, and merge into out and lse."""
    num_kv_heads = pulled.plan.num_kv_heads
    for of in pulled.heads():
        heads = of.query_heads(q_SHD.shape[1], num_kv_heads)
        partial = attend_partial(
            q_SHD[:, heads],
            of.k,
            of.v,
            call.spec,
            pack=call.pack,
            q_positions=call.positions_S,
            k_positions=of.positions,
            routing=call.routing_of_kv_heads(of.head, of.head + 1, num_kv_heads),
            softmax_scale=call.softmax_scale,
            backend=call.backend,
            tally=tally,
        )
        merged = merge_partials(out_SHD[:, heads], lse_SH[:, heads], partial.out, partial.lse)
        out_SHD[:, heads], lse_SH[:, heads] = merged.out, merged.lse


def _gradients_of_pulled(
    dq_SHD: Tensor,
    pulled: _Pulled,
    dout_SHD: Tensor,
    q_SHD: Tensor,
    lse_SH: Tensor,
    delta_SH: Tensor,
    call: ShardedCall,
) -> Tensor:
    """[R,W]: dK and dV of the pulled rows, side by side; adds to dq."""
    num_kv_heads = pulled.plan.num_kv_heads
    grad_RW = pulled.row_RW.new_empty(pulled.row_RW.shape, dtype=dq_SHD.dtype)
    for of in pulled.heads():
        heads = of.query_heads(q_SHD.shape[1], num_kv_heads)
        dq, dk, dv = attend_partial_backward(
            dout_SHD[:, heads],
            q_SHD[:, heads],
            of.k,
            of.v,
            lse_SH[:, heads],
            delta_SH[:, heads],
            call.spec,
            pack=call.pack,
            q_positions=call.positions_S,
            k_positions=of.positions,
            routing=call.routing_of_kv_heads(of.head, of.head + 1, num_kv_heads),
            softmax_scale=call.softmax_scale,
            backend=call.backend,
        )
        dq_SHD[:, heads] += dq
        grad_RW.index_copy_(0, of.index, torch.cat([dk, dv], 2).squeeze(1))
    return grad_RW


def _start_return(
    grad_RW: Tensor, pulled: _Pulled, call: ShardedCall, dk_SKD: Tensor, dv_SKD: Tensor
) -> Callable[[], None]:
    """Send dK and dV of pulled rows back to their owners; the function returned adds those that come here."""
    asked, wanted = pulled.plan.splits(pulled.first, pulled.stop)
    pending = call.wire.all_to_all(grad_RW, wanted, asked, phase="backward/dkv")

    def finish() -> None:
        # Rank by rank, none of which sends a row twice: the order of additions is the same on every run.
        for index, of_rank in zip(*(torch.split(x, asked) for x in (pulled.sent_index, pending.wait())), strict=True):
            if index.numel():
                for into, grad in zip((dk_SKD, dv_SKD), of_rank.tensor_split([pulled.dim], 1), strict=True):
                    into.view(-1, into.shape[2]).index_add_(0, index, grad)

    return finish
