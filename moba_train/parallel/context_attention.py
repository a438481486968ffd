"""Attention over a row that several ranks hold: the sharded form of `moba_kernels.attend`.

    1. MoBA: ranks exchange pooled chunk keys; every local query picks among all chunks of its document (pooled_keys.py)
    2. a transport brings keys and values to the queries, or queries to the keys; partial outputs are merged in fp32
       (one file each: all_gather.py, a2a.py, a2a_all_gather.py, pull.py, route_queries.py)
    3. backward: delta = rowsum(dout * out) and the global log-sum-exp make every part's gradient independent of the
       others; dK and dV are reduced in fp32 and end where their keys live

N ranks give what one rank gives: the same picks, and outputs and gradients up to the order of fp32 additions.

What a call checks is this rank's own: the shard's length, and that the routing fits. That ranks agree on row, spec,
layout, heads and dtype is the caller's to see to, as the engine does once a step (fingerprint.py): where they send
different amounts, gloo ends the process and NCCL hangs until its timeout.

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
from moba_kernels.routing import stored_picks
from moba_kernels.triton_support import on_device_of

from .a2a import AllToAll
from .a2a_all_gather import AllToAllAllGather
from .all_gather import AllGather
from .cost import choose_transport
from .cut import Layout, Pieces, shard_length, shard_pieces
from .hardware import PRESETS
from .pooled_keys import route_over
from .pull import Pull
from .route_queries import RouteQueries
from .rules import refusals
from .traffic import Traffic
from .transport import ShardedCall, Transport, device_positions, row_cut
from .volume import HeadShape, RowShape
from .watch import Watch
from .wire import Group, Wire

TRANSPORTS: Mapping[str, Transport] = MappingProxyType(
    {
        "all_gather": AllGather(),
        "a2a": AllToAll(),
        "a2a+all_gather": AllToAllAllGather(),
        "pull": Pull(),
        "route_queries": RouteQueries(),
    }
)
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
    watch: Watch | None = None,
) -> AttendResult:
    """Causal attention, full or MoBA, of this rank's shard over the whole row. Collective over `group`.

    Args:
        q: [S,H,D]; k: [S,K,D]; v: [S,K,Dv]: this rank's shard, keys after RoPE; S may be 0.
        spec: Full() or MoBA(chunk_size, topk, select).
        layout: how the row is cut (cut.py), any T and any number of ranks.
        group: context-parallel group; None or one rank is `moba_kernels.attend`.
        transport: "auto" = what the cost model (cost.py) finds cheapest for this row on this kind of device, or one of
            `rules.TRANSPORT_NAMES`.
        cu_seqlens: documents of the *whole* row: a Pack (built once a row), their cumulative lengths, or None = one
            document (the slow form: ranks add up their lengths first).
        softmax_scale: None = 1/sqrt(D).
        routing: frozen routing of the local queries (activation recompute, controls) in place of the gate's; then no
            keys are pooled or exchanged.
        backend: backend of `moba_kernels`.
        node_ranks: at most so many consecutive ranks share a node; "a2a+all_gather" exchanges heads among them.
        layer: named if an exchange breaks off; traffic: counts the bytes of this call, and of its backward pass when it
            runs; watch: is told which exchange this rank waits for.
    Returns:
        AttendResult of the local queries: out [S,H,Dv] in q's dtype, differentiable in q, k, v; lse [S,H] fp32, over
        the whole row; routing always (None under Full); report: pairs planned for the queries of this rank, and pairs
        computed on this rank, which are equal in the sum over ranks (some transports compute where the keys are).
    Raises ValueError for a shard of the wrong length and a layout or transport that is unknown or cannot serve;
    ExchangeError when an exchange breaks off.
    """
    num_ranks = 1 if group is None else group.size()
    _check_transport(transport, spec, q.shape[1], k.shape[1], num_ranks)
    pack = _whole_row(cu_seqlens, q, group)
    if group is None or num_ranks == 1 or pack.num_tokens == 0:
        options = {"softmax_scale": softmax_scale, "backend": backend, "routing": routing, "return_routing": True}
        return attend(q, k, v, spec, cu_seqlens=pack, **options)  # type: ignore[arg-type]
    _check_shard(q, k, v, pack, num_ranks, group.rank(), layout)
    if transport == "auto":
        transport = _cheapest(q, k, v, spec, pack, num_ranks, layout, node_ranks)
    wire = Wire(group, Traffic() if traffic is None else traffic, transport, layer, watch=watch)
    cut = row_cut(pack, num_ranks, layout)
    positions_S = device_positions(pack, cut, group.rank(), q.device)
    if routing is not None:
        check_routing(routing, spec, pack, q, k.shape[1], positions_S)
        routing = routing.in_slots(stored_picks(routing.spec, pack))  # messages are of one width on all ranks
    elif isinstance(spec, MoBA):
        routing = route_over(wire, q, k, spec, layout=layout, pack=pack, backend=backend)
    call = ShardedCall(
        spec, pack, cut, group.rank(), wire, positions_S, routing, softmax_scale, backend, node_ranks=node_ranks
    )
    return attend_shard(q, k, v, call, TRANSPORTS[transport])


def attend_shard(q: Tensor, k: Tensor, v: Tensor, call: ShardedCall, transport: Transport) -> AttendResult:
    """`context_attend` with everything decided. Collective over the ranks of the call."""
    tally, spec, pack = PairTally(), call.spec, call.pack
    out, lse = _ContextAttend.apply(q, k, v, call, transport, tally)  # type: ignore[no-untyped-call]
    planned = _planned_pairs(pack, spec, call.cut.pieces[call.rank]) * q.shape[1]
    covered = pack.segments(spec, complete=call.routing is None or call.routing.complete).num_covered_documents
    report = ExecutionReport(resolve(call.backend, q, v).name, planned, tally, covered)
    return AttendResult(out, lse, call.routing, report)


def planned_pairs_of_shard(pack: Pack, spec: AttentionSpec, *, num_ranks: int, rank: int, layout: Layout) -> int:
    """(query, key) pairs that one query head of this shard attends to; over all ranks: `pack.planned_pairs(spec)`."""
    return _planned_pairs(pack, spec, shard_pieces(pack.num_tokens, num_ranks, rank, layout))


def _planned_pairs(pack: Pack, spec: AttentionSpec, pieces: Pieces) -> int:
    """Queries look back only, so those of tokens start .. stop - 1 attend to what the row cut off at `stop` plans, less
    what the row cut off at `start` plans.
    """

    def planned_before(token: int) -> int:
        return planned_pairs_of_lengths(np.diff(np.minimum(pack.bounds, token)), spec)

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
        ctx.row_dot = resolve(call.backend, q, v).row_dot
        ctx.kept, ctx.call, ctx.transport, ctx.dtypes = sent.kept, call, transport, (q.dtype, sent.lse.dtype)
        ctx.mark_non_differentiable(sent.lse)
        return out, sent.lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("context_attend")
        out, *saved = ctx.saved_tensors
        dtype, accumulated = ctx.dtypes
        with on_device_of(out):
            delta = ctx.row_dot(dout, out, accumulated)
        dq, dk, dv = ctx.transport.backward(dout, delta, tuple(saved), ctx.kept, ctx.call)
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), None, None, None


def _check_transport(name: str, spec: AttentionSpec, num_heads: int, num_kv_heads: int, num_ranks: int) -> None:
    """ValueError when the transport is unknown or cannot serve, with every reason."""
    if name == "auto":
        return
    reasons = refusals(name, spec, num_heads=num_heads, num_kv_heads=num_kv_heads, num_ranks=num_ranks)
    if reasons:
        raise ValueError(f"transport {name!r} cannot serve this call: {'; '.join(reasons)}; fix: pass transport='auto'")


def _cheapest(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, pack: Pack, num_ranks: int, layout: Layout, node_ranks: int
) -> str:
    """What the cost model chooses for this row and these shapes: once a row, and alike on all ranks, whose GPUs may be
    of different models: any CUDA device counts as an H100 here. (The engine knows better; it decides for all ranks.)"""
    heads = HeadShape(q.shape[1], k.shape[1], q.shape[2], v.shape[2], q.element_size())

    def choose() -> str:
        row = RowShape(pack.num_tokens, num_ranks, layout, tuple(pack.cu_seqlens))
        hardware = PRESETS["h100" if q.device.type == "cuda" else "cpu"]
        return choose_transport(spec, heads, [row], hardware, node_ranks=node_ranks).transport

    return pack.derived(("transport", spec, heads, num_ranks, layout, node_ranks, q.device.type), choose)


def _whole_row(cu_seqlens: Pack | Sequence[int] | Tensor | None, q: Tensor, group: Group | None) -> Pack:
    """The documents of the whole row."""
    if isinstance(cu_seqlens, Pack):
        return cu_seqlens
    if cu_seqlens is not None:
        return Pack(cu_seqlens)
    length = torch.tensor([q.shape[0]], device=q.device)
    if group is not None and group.size() > 1:
        Wire(group, transport="row length").all_reduce(length, phase="forward/length").wait()
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
