"""Attention over a row that several ranks hold: the sharded form of `moba_kernels.attend`.

    1. MoBA: ranks exchange pooled chunk keys; every local query picks among all chunks of its document (pooled_keys.py)
    2. a transport brings keys and values to the queries; partial outputs are merged in fp32 (all_gather.py)
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
import torch.distributed as dist
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
from .pooled_keys import route_context
from .shard import Layout, shard_length, shard_pieces, shard_positions
from .transport import ShardedCall, Transport

TRANSPORTS: Mapping[str, Transport] = MappingProxyType({"all_gather": AllGather()})


def context_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    *,
    layout: Layout,
    group: dist.ProcessGroup | None,
    transport: str = "auto",
    cu_seqlens: Pack | Sequence[int] | Tensor | None = None,
    softmax_scale: float | None = None,
    routing: Routing | None = None,
    backend: str = "auto",
) -> AttendResult:
    """Causal attention, full or MoBA, of this rank's shard over the whole row. Collective over `group`.

    Args:
        q: [S,H,D]; k: [S,K,D]; v: [S,K,Dv]: this rank's shard, keys after RoPE; S may be 0.
        spec: Full() or MoBA(chunk_size, topk, select).
        layout: how the row is cut (shard.py), any T and any number of ranks.
        group: context-parallel group; None or one rank is `moba_kernels.attend`.
        transport: "all_gather", or "auto", which is "all_gather".
        cu_seqlens: documents of the *whole* row: a Pack (built once a row), their cumulative lengths, or None = one
            document (the slow form: ranks add up their lengths first).
        softmax_scale: None = 1/sqrt(D).
        routing: frozen routing of the local queries (activation recompute, controls) in place of the gate's; then no
            keys are pooled or exchanged.
        backend: backend of `moba_kernels`.
    Returns:
        AttendResult of the local queries: out [S,H,Dv] in q's dtype, differentiable in q, k, v; lse [S,H] fp32, over
        the whole row; routing always (None under Full); report (planned and computed pairs of this rank).
    Raises ValueError when the shard does not have the length that the row, the layout and the rank call for, or for an
    unknown layout or transport.
    """
    chosen = _transport(transport)
    num_ranks = 1 if group is None else group.size()
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
    positions = shard_positions(pack.num_tokens, num_ranks, group.rank(), layout)
    positions_S = torch.from_numpy(positions).to(q.device)
    if routing is not None:
        check_routing(routing, spec, pack, q, k.shape[1], positions_S)
    elif isinstance(spec, MoBA):
        routing = route_context(q, k, spec, layout=layout, group=group, pack=pack, backend=backend)
    call = ShardedCall(spec, pack, layout, group, positions_S, routing, softmax_scale, backend)
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
        out, lse = transport.forward(q, k, v, call, tally)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call, ctx.transport = call, transport
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("context_attend")
        q, k, v, out, lse = ctx.saved_tensors
        delta = row_dot(dout, out, lse.dtype)
        dq, dk, dv = ctx.transport.backward(dout, q, k, v, lse, delta, ctx.call)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _transport(name: str) -> Transport:
    found = TRANSPORTS.get("all_gather" if name == "auto" else name)
    if found is None:
        allowed = ", ".join(repr(known) for known in ("auto", *TRANSPORTS))
        raise ValueError(f"unknown transport; got {name!r}; allowed: {allowed}; fix: pass transport='auto'")
    return found


def _whole_row(cu_seqlens: Pack | Sequence[int] | Tensor | None, q: Tensor, group: dist.ProcessGroup | None) -> Pack:
    """The documents of the whole row."""
    if isinstance(cu_seqlens, Pack):
        return cu_seqlens
    if cu_seqlens is not None:
        return Pack(cu_seqlens)
    length = torch.tensor([q.shape[0]], device=q.device)
    if group is not None and group.size() > 1:
        dist.all_reduce(length, group=group)
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
