"""Transport "all_gather": every rank gathers keys and values, a few KV heads at a time.

    forward    for each stride of KV heads:   all-gather K, V       -> attend_partial over the whole row
    backward   for each stride of KV heads:   all-gather K, V again -> attend_partial_backward
                                              reduce-scatter dK, dV in fp32

The gather of the next stride is under way while this one is computed. Bytes received per rank and layer, with L tokens
in the longest shard: forward (N-1)*L*K*(D+Dv)*e, backward the same plus (N-1)*L*K*(D+Dv)*4: flat in N. At most two
strides are held at a time: the one being computed and the one that arrives.

Shape letters: T tokens of the row, S tokens of the shard, L tokens of the longest shard, H query heads, K key/value
heads (of a stride, inside the helpers), D head dim, Dv value dim, N ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moba_kernels import PairTally, attend_partial, attend_partial_backward

from .shard import join_shards, pad_rows, take_pieces
from .transport import Sent, ShardedCall
from .volume import STRIDE_BYTES
from .wire import Pending


@dataclass(frozen=True)
class AllGather:
    """See the module. `stride_bytes` bounds the gathered keys and values of one stride of KV heads."""

    stride_bytes: int = STRIDE_BYTES
    name: str = "all_gather"

    def forward(self, q_SHD: Tensor, k_SKD: Tensor, v_SKD: Tensor, call: ShardedCall, tally: PairTally) -> Sent:
        """See `Transport.forward`."""
        heads_of_kv = q_SHD.shape[1] // k_SKD.shape[1]
        outs, lses = [], []
        for first, stop, k_TKD, v_TKD in self._gathered(k_SKD, v_SKD, call, "forward/kv"):
            partial = attend_partial(
                q_SHD[:, first * heads_of_kv : stop * heads_of_kv],
                k_TKD,
                v_TKD,
                call.spec,
                pack=call.pack,
                q_positions=call.positions_S,
                routing=call.routing_of_kv_heads(first, stop, k_SKD.shape[1]),
                softmax_scale=call.softmax_scale,
                backend=call.backend,
                tally=tally,
            )
            outs.append(partial.out)
            lses.append(partial.lse)
            del k_TKD, v_TKD, partial  # before the next stride takes its place
        lse_SH = torch.cat(lses, 1)
        return Sent(torch.cat(outs, 1), lse_SH, (q_SHD, k_SKD, v_SKD, lse_SH))

    def backward(
        self, dout_SHD: Tensor, delta_SH: Tensor, saved: tuple[Tensor, ...], kept: Any, call: ShardedCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transport.backward`."""
        q_SHD, k_SKD, v_SKD, lse_SH = saved
        heads_of_kv = q_SHD.shape[1] // k_SKD.shape[1]
        dqs: list[Tensor] = []
        dks: list[Tensor] = []
        dvs: list[Tensor] = []
        going: _ReduceScatter | None = None
        for first, stop, k_TKD, v_TKD in self._gathered(k_SKD, v_SKD, call, "backward/kv"):
            heads = slice(first * heads_of_kv, stop * heads_of_kv)
            dq, dk_TKD, dv_TKD = attend_partial_backward(
                dout_SHD[:, heads],
                q_SHD[:, heads],
                k_TKD,
                v_TKD,
                lse_SH[:, heads],
                delta_SH[:, heads],
                call.spec,
                pack=call.pack,
                q_positions=call.positions_S,
                routing=call.routing_of_kv_heads(first, stop, k_SKD.shape[1]),
                softmax_scale=call.softmax_scale,
                backend=call.backend,
            )
            del k_TKD, v_TKD  # before the message of their gradients takes as much again
            dqs.append(dq)
            if going is not None:
                going.finish(dks, dvs)
            going = _start_reduce_scatter(dk_TKD, dv_TKD, k_SKD.shape[0], call)
            del dq, dk_TKD, dv_TKD
        assert going is not None  # there is at least one KV head
        going.finish(dks, dvs)
        return torch.cat(dqs, 1), torch.cat(dks, 1), torch.cat(dvs, 1)

    def stride(self, num_tokens: int, k: Tensor, v: Tensor) -> int:
        """KV heads gathered at a time; alike on all ranks, because it depends on the row alone."""
        bytes_of_head = num_tokens * (k.shape[2] * k.element_size() + v.shape[2] * v.element_size())
        return max(1, min(k.shape[1], self.stride_bytes // max(1, bytes_of_head)))

    def _gathered(
        self, k_SKD: Tensor, v_SKD: Tensor, call: ShardedCall, phase: str
    ) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """(first, stop, k [T,stop-first,D], v [T,stop-first,Dv]) for every stride of KV heads.

        The tensors belong to whoever gets them: nothing here holds on to them.
        """
        num_kv_heads = k_SKD.shape[1]
        stride = self.stride(call.pack.num_tokens, k_SKD, v_SKD)
        strides = [(first, min(first + stride, num_kv_heads)) for first in range(0, num_kv_heads, stride)]
        coming = [_start_gather(k_SKD, v_SKD, *strides[0], call, phase)]
        for (first, stop), following in zip(strides, [*strides[1:], None], strict=True):
            arrived = [coming.pop().finish()]  # its buffer goes before the next one comes
            if following is not None:
                coming.append(_start_gather(k_SKD, v_SKD, *following, call, phase))
            yield first, stop, *arrived.pop()


@dataclass(frozen=True)
class _Gather:
    """An all-gather under way of [N, elements of one rank's K then V], both padded to L tokens."""

    pending: Pending
    k_shape: tuple[int, ...]
    v_shape: tuple[int, ...]
    call: ShardedCall

    def finish(self) -> tuple[Tensor, Tensor]:
        """Wait, then (k [T,K,D], v [T,K,Dv]) in token order."""
        received = self.pending.wait()
        elements = _numel(self.k_shape)
        parts = (received[:, :elements], self.k_shape), (received[:, elements:], self.v_shape)
        k, v = (join_shards([of_rank.view(shape) for of_rank in x], 0, self.call.cut) for x, shape in parts)
        return k, v


def _start_gather(k_SKD: Tensor, v_SKD: Tensor, first: int, stop: int, call: ShardedCall, phase: str) -> _Gather:
    """Send KV heads first .. stop - 1 of this shard to all ranks: one message, K and V one after the other."""
    k_LKD, v_LKD = (pad_rows(x[:, first:stop], call.cut.longest) for x in (k_SKD, v_SKD))
    sent = torch.cat([k_LKD.flatten(), v_LKD.flatten()])
    return _Gather(call.wire.all_gather(sent, phase=phase), tuple(k_LKD.shape), tuple(v_LKD.shape), call)


@dataclass(frozen=True)
class _ReduceScatter:
    """A reduce-scatter of dK and dV under way."""

    pending: Pending
    k_shape: tuple[int, ...]
    v_shape: tuple[int, ...]
    num_local: int

    def finish(self, dks: list[Tensor], dvs: list[Tensor]) -> None:
        """Wait, then append this rank's dk [S,K,D] and dv [S,K,Dv], summed over all ranks' queries."""
        received = self.pending.wait()
        elements = _numel(self.k_shape)
        dks.append(received[:elements].view(self.k_shape)[: self.num_local])
        dvs.append(received[elements:].view(self.v_shape)[: self.num_local])


def _start_reduce_scatter(dk_TKD: Tensor, dv_TKD: Tensor, num_local: int, call: ShardedCall) -> _ReduceScatter:
    """Send every rank its part of dK and dV, added up in the accumulation dtype (fp32) on the way."""
    longest = call.cut.longest
    k_shape, v_shape = (longest, *dk_TKD.shape[1:]), (longest, *dv_TKD.shape[1:])
    elements = _numel(k_shape)
    sent = dk_TKD.new_zeros((call.num_ranks, elements + _numel(v_shape)))
    for rank in range(call.num_ranks):
        for x, part in ((dk_TKD, sent[rank, :elements]), (dv_TKD, sent[rank, elements:])):
            mine = take_pieces(x, 0, call.cut.pieces[rank])
            part[: mine.numel()] = mine.flatten()
    return _ReduceScatter(call.wire.reduce_scatter(sent, phase="backward/dkv"), k_shape, v_shape, num_local)


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
