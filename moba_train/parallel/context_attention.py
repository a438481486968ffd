"""Attention over a row that several ranks hold: the sharded form of `moba_kernels.attend`.

    1. MoBA: ranks exchange pooled chunk keys; every local query picks among all chunks of its document (pooled_keys.py)
    2. a transport brings keys and values to the queries, or queries to the keys; partial outputs are merged in fp32
       (one file each: all_gather.py, a2a.py, a2a_all_gather.py, pull.py, route_queries.py)
    3. backward: delta = rowsum(dout * out) and the global log-sum-exp make every part's gradient independent of the
       others; dK and dV are reduced in fp32 and end where their keys live

N ranks give what one rank gives: the same picks, and outputs and gradients up to the order of fp32 additions.

Shape letters: T tokens of the row, S tokens of the shard, H query heads, K key/value heads, D head dim, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moba_kernels import (
    AttendResult,
    AttentionSpec,
    ExecutionReport,
    MoBA,
    Pack,
    PairTally,
    Routing,
    attend,
)
from moba_kernels.checks import check_routing
from moba_kernels.derivative import refuse_second_derivative
from moba_kernels.dispatch import resolve
from moba_kernels.pack import planned_pairs_of_lengths
from moba_kernels.ranges import row_dot

from .all_gather import AllGather
from .collectives import all_reduce
from .cut import Layout, shard_length, shard_pieces
from .pooled_keys import route_over
from .rules import refusals
from .traffic import Traffic
from .transport import ShardedCall, Transport, device_positions, row_cut
from .wire import Group, Wire

TRANSPORTS: Mapping[str, Transport] = MappingProxyType({"all_gather": AllGather()})
# GPUs of a node in the machines that people train on; `context_attend` may be told otherwise.
NODE_RANKS = 8


def context_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    *,
    layout: Layout,
    group: Group | None,
    transport: str = "auto",
    cu_seqlens: Pack | Sequence[int] | Tensor | None = None,
    softmax_scale: float | None = None,
    routing: Routing | None = None,
    backend: str = "auto",
    node_ranks: int = NODE_RANKS,
    layer: int | None = None,
    traffic: Traffic | None = None,
) -> AttendResult:
    """Causal attention, full or MoBA, of this rank's shard over the whole row. Collective over `group`.

    Args:
        q: [S,H,D]; k: [S,K,D]; v: [S,K,Dv]: this rank's shard, keys after RoPE; S may be 0.
        spec: Full() or MoBA(chunk_size, topk, select).
        layout: how the row is cut (shard.py), any T and any number of ranks.
        group: context-parallel group; None or one rank is `moba_kernels.attend`.
        transport: "auto", or one of `rules.TRANSPORT_NAMES`.
        cu_seqlens: documents of the *whole* row: a Pack (built once a row), their cumulative lengths, or None = one
            document (the slow form: ranks add up their lengths first).
        softmax_scale: None = 1/sqrt(D).
        routing: frozen routing of the local queries (activation recompute, controls) in place of the gate's; then no
            keys are pooled or exchanged.
        backend: backend of `moba_kernels`.
        node_ranks: at most so many consecutive ranks share a node; "a2a+all_gather" exchanges heads among them.
        layer: named if an exchange breaks off.
        traffic: counts the bytes that this call exchanges, and its backward pass when it runs.
    Returns:
        AttendResult of the local queries: out [S,H,Dv] in q's dtype, differentiable in q, k, v; lse [S,H] fp32, over
        the whole row; routing always (None under Full); report: pairs planned for the queries of this rank, and pairs
        computed on this rank, which are equal in the sum over ranks (some transports compute where the keys are).
    Raises ValueError when the shard does not have the length that the row, the layout and the rank call for, for an
    unknown layout, and for a transport that is unknown or cannot serve; ExchangeError when an exchange breaks off.
    """
    num_ranks = 1 if group is None else group.size()
    chosen = _transport(transport, spec, q.shape[1], k.shape[1], num_ranks)
    pack = _whole_row(cu_seqlens, q, group)
    if group is None or num_ranks == 1 or pack.num_tokens == 0:
        return attend(
            q,
            k,
            v,
            spec,
            cu_seqlens=pack,
            softmax_scale=softmax_scale,
            backend=backend,
            routing=routing,
            return_routing=True,
        )
    _check_shard(q, k, v, pack, num_ranks, group.rank(), layout)
    wire = Wire(group, Traffic() if traffic is None else traffic, chosen.name, layer)
    cut = row_cut(pack, num_ranks, layout)
    positions_S = device_positions(pack, cut, group.rank(), q.device)
    if routing is not None:
        check_routing(routing, spec, pack, q, k.shape[1], positions_S)
    elif isinstance(spec, MoBA):
        routing = route_over(wire, q, k, spec, layout=layout, pack=pack, backend=backend)
    call = ShardedCall(
        spec, pack, cut, group.rank(), wire, positions_S, routing, softmax_scale, backend, node_ranks=node_ranks
    )
    tally = PairTally()
    out, lse = _ContextAttend.apply(q, k, v, call, chosen, tally)  # type: ignore[no-untyped-call]
    planned = planned_pairs_of_shard(pack, spec, num_ranks=num_ranks, rank=group.rank(), layout=layout) * q.shape[1]
    covered = pack.segments(spec, complete=routing is None or routing.complete).num_covered_documents
    report = ExecutionReport(resolve(backend, q, v).name, planned, tally, covered)
    return AttendResult(out, lse, routing, report)


def planned_pairs_of_shard(pack: Pack, spec: AttentionSpec, *, num_ranks: int, rank: int, layout: Layout) -> int:
    """(query, key) pairs that one query head of this shard attends to; summed over ranks: `pack.planned_pairs(spec)`.

    Queries look back only, so those of tokens start .. stop - 1 attend to what the row cut off at `stop` plans, less
    what the row cut off at `start` plans.
    """

    def planned_before(token: int) -> int:
        return planned_pairs_of_lengths(np.diff(np.minimum(pack.bounds, token)), spec)

    pieces = shard_pieces(pack.num_tokens, num_ranks, rank, layout)
    return sum(planned_before(stop) - planned_before(start) for start, stop in pieces)


class _ContextAttend(torch.autograd.Function):
    """A transport's forward and backward, differentiable in q, k and v. No op inside is traced by autograd."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: ShardedCall, transport: Transport, tally: PairTally
    ) -> tuple[Tensor, Tensor]:
        sent = transport.forward(q, k, v, call, tally)
        out = sent.out.to(q.dtype)
        ctx.save_for_backward(out, *sent.saved)
        ctx.kept, ctx.call, ctx.transport, ctx.dtypes = sent.kept, call, transport, (q.dtype, sent.lse.dtype)
        ctx.mark_non_differentiable(sent.lse)
        return out, sent.lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("context_attend")
        out, *saved = ctx.saved_tensors
        dtype, accumulated = ctx.dtypes
        delta = row_dot(dout, out, accumulated)
        dq, dk, dv = ctx.transport.backward(dout, delta, tuple(saved), ctx.kept, ctx.call)
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), None, None, None


def _transport(name: str, spec: AttentionSpec, num_heads: int, num_kv_heads: int, num_ranks: int) -> Transport:
    """The transport of that name. ValueError when it is unknown or cannot serve, with every reason."""
    name = "all_gather" if name == "auto" else name
    reasons = refusals(name, spec, num_heads=num_heads, num_kv_heads=num_kv_heads, num_ranks=num_ranks)
    if reasons:
        raise ValueError(f"transport {name!r} cannot serve this call: {'; '.join(reasons)}; fix: pass transport='auto'")
    return TRANSPORTS[name]


def _whole_row(cu_seqlens: Pack | Sequence[int] | Tensor | None, q: Tensor, group: Group | None) -> Pack:
    """The documents of the whole row."""
    if isinstance(cu_seqlens, Pack):
        return cu_seqlens
    if cu_seqlens is not None:
        return Pack(cu_seqlens)
    length = torch.tensor([q.shape[0]], device=q.device)
    if group is not None and group.size() > 1:
        all_reduce(length, group=group).wait()
    num_tokens = int(length)
    return Pack([0, num_tokens] if num_tokens else [0])


def _check_shard(q: Tensor, k: Tensor, v: Tensor, pack: Pack, num_ranks: int, rank: int, layout: Layout) -> None:
    expected = shard_length(pack.num_tokens, num_ranks, rank, layout)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3 or x.shape[0] != expected:
            raise ValueError(
                f"{name} must be [{expected}, heads, dim]: the {layout} shard of rank {rank} of {num_ranks} in a row "
                f"of {pack.num_tokens} tokens; got {tuple(x.shape)}; fix: cut the row with "
                "moba_train.parallel.shard.shard, and pass the cu_seqlens of the whole row"
            )
