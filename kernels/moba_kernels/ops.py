"""The public operations: pool, route, attend, and the partial forms that context parallelism is made of.

Shape letters: T query tokens at hand, S key tokens at hand, H query heads, K key/value heads (H % K == 0), D head dim,
Dv value dim, C chunks of the pack. Query head h reads KV head h // (H/K). MoBA: arXiv 2502.13189.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from operator import index
from typing import Any

import torch
from torch import Tensor

from .attend.call import AttendCall, accumulate_dtype
from .checks import (
    check_backward,
    check_device,
    check_heads,
    check_positions,
    check_qkv,
    check_routing,
    check_rows,
    check_scale,
    check_spec,
    check_tensors,
)
from .derivative import refuse_second_derivative
from .dispatch import Backend, resolve
from .errors import bad_argument
from .opaque import opaque
from .pack import Pack, pack_of
from .report import AttendResult, ExecutionReport, PairTally, Partial
from .routing import Routing
from .spec import AttentionSpec, Full, MoBA
from .triton_support import on_device_of


@contextmanager
def _as_given(x: Tensor) -> Iterator[None]:
    """Inside, ops run on x's GPU and in the dtypes that they are given: autocast would round matrix products."""
    device = x.device.type
    autocasts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    with on_device_of(x), torch.autocast(device, enabled=False) if autocasts else nullcontext():
        yield


@opaque
def pool_sums(
    k_THD: Tensor, *, pack: Pack, chunk_size: int, k_positions: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Sums and counts of the keys at hand, chunk by chunk: what ranks exchange before they gate.

    Args:
        k_THD: [S,K,D] keys after RoPE; k_positions: [S] int64 ascending global token indices, None = all tokens.
    Returns:
        (sum_CKD fp64 [C,K,D], count_C int64 [C]); chunks not at hand give 0. Add those of all ranks, then `mean_keys`.
    """
    check_rows("k", k_THD)
    check_positions("k", k_positions, k_THD.shape[0], pack)
    with torch.no_grad(), _as_given(k_THD):
        serve = resolve(backend, k_THD).pool_sums
        return serve(k_THD.detach(), pack=pack, chunk_size=chunk_size, k_positions=k_positions)


def mean_keys(sum_CKD: Tensor, count_C: Tensor) -> Tensor:
    """The published means, fp32 [C,K,D], from fp64 sums and int64 counts; a chunk without keys gives 0."""
    check_tensors(sums=sum_CKD, counts=count_C)
    if sum_CKD.dim() != 3 or count_C.shape != sum_CKD.shape[:1]:
        got = f"{tuple(sum_CKD.shape)} and {tuple(count_C.shape)}"
        raise bad_argument("sums must be [C,K,D] and counts [C]", got, "pass what pool_sums returns")
    return (sum_CKD / count_C.clamp_min(1).view(-1, 1, 1)).float()


@opaque
def route_means(
    q_THD: Tensor,
    mean_CKD: Tensor,
    spec: MoBA,
    *,
    pack: Pack,
    q_positions: Tensor | None = None,
    backend: str = "auto",
) -> Routing:
    """The gate given the published means of the whole row.

    Args:
        q_THD: [T,H,D] queries at hand; mean_CKD: fp32 [C,K,D]; q_positions: [T] int64 ascending, None = all tokens.
    Returns the picks of the queries at hand. The same query gets the same picks whatever else is in the call.
    """
    _check_moba(spec)
    check_rows("q", q_THD)
    check_positions("q", q_positions, q_THD.shape[0], pack)
    check_tensors(means=mean_CKD)
    num_chunks = pack.chunks(spec.chunk_size).num_chunks
    if mean_CKD.dim() != 3 or mean_CKD.shape[0] != num_chunks or mean_CKD.shape[2] != q_THD.shape[-1]:
        fix = "pass mean_keys(*pool_sums(...)) of the same pack and chunk_size"
        raise bad_argument(f"means must be [{num_chunks}, K, {q_THD.shape[-1]}]", tuple(mean_CKD.shape), fix)
    if mean_CKD.dtype != torch.float32:
        raise bad_argument("means are published as fp32", mean_CKD.dtype, "pass the result of mean_keys")
    check_heads(q_THD.shape[1], mean_CKD.shape[1])
    check_device("means", mean_CKD, q_THD)
    with torch.no_grad(), _as_given(q_THD):
        serve = resolve(backend, q_THD, mean_CKD).route_means
        return serve(q_THD.detach(), mean_CKD, spec, pack=pack, q_positions=q_positions).trusted()


@opaque
def route(
    q: Tensor,
    k: Tensor,
    spec: MoBA,
    *,
    cu_seqlens: Pack | Sequence[int] | Tensor | None = None,
    backend: str = "auto",
) -> Routing:
    """Which chunks each query of the row attends to. q [T,H,D], k [T,K,D]. No gradient flows through the choice."""
    _check_moba(spec)
    check_qkv(q, k)
    pack = pack_of(cu_seqlens, q.shape[0])
    sums, counts = pool_sums(k, pack=pack, chunk_size=spec.chunk_size, backend=backend)
    return route_means(q, mean_keys(sums, counts), spec, pack=pack, backend=backend)


@opaque
def attend_partial(
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    spec: AttentionSpec,
    *,
    pack: Pack,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    routing: Routing | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
    tally: PairTally | None = None,
) -> Partial:
    """Attention of the queries at hand over the keys at hand. Forward only: no autograd graph is built.

    Query i attends to key j iff both lie in one document, j <= i, and (Full, or j's chunk is in i's routing; the own
    chunk always is). A chunk may be at hand in part only.

    Args:
        q_THD: [T,H,D]; k_SKD: [S,K,D]; v_SKD: [S,K,Dv].
        q_positions, k_positions: int64 [T] and [S], strictly ascending global token indices; None = all tokens.
        routing: of the queries at hand; required under MoBA, refused under Full.
        softmax_scale: None = 1/sqrt(D).
        tally: counts what was computed, for an ExecutionReport.
    Returns:
        Partial(out [T,H,Dv], lse [T,H]), fp32 (fp64 for fp64 inputs); a query with no key at hand gives 0 and -inf.
    """
    call, serve = _prepare(
        q_THD,
        k_SKD,
        v_SKD,
        spec,
        pack,
        q_positions,
        k_positions,
        routing,
        softmax_scale,
        backend,
    )
    with torch.no_grad(), _as_given(q_THD):
        return serve.attend_partial(q_THD.detach(), k_SKD.detach(), v_SKD.detach(), call, tally)


@opaque
def attend_partial_backward(
    dout_THDv: Tensor,
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    lse_TH: Tensor,
    delta_TH: Tensor,
    spec: AttentionSpec,
    *,
    pack: Pack,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    routing: Routing | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """This part's share of the gradients: (dq [T,H,D], dk [S,K,D], dv [S,K,Dv]), fp32 (fp64 for fp64 inputs).

    Args:
        dout_THDv: gradient of the merged output. lse_TH: the lse over *all* keys, not this part's.
        delta_TH: rowsum(dout * out) with the merged out. The rest as in `attend_partial`.
    Shares add up: summed over any split of the keys or queries they are the whole gradient.
    """
    call, serve = _prepare(
        q_THD,
        k_SKD,
        v_SKD,
        spec,
        pack,
        q_positions,
        k_positions,
        routing,
        softmax_scale,
        backend,
    )
    check_backward(dout_THDv, lse_TH, delta_TH, q_THD, v_SKD.shape[2])
    with torch.no_grad(), _as_given(q_THD):
        return serve.attend_partial_backward(dout_THDv, q_THD, k_SKD, v_SKD, lse_TH, delta_TH, call)


def _check_moba(spec: AttentionSpec) -> None:
    if not isinstance(spec, MoBA):
        raise bad_argument("routing needs a MoBA spec", repr(spec), "pass MoBA(chunk_size, topk)")


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    pack: Pack,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    routing: Routing | None,
    softmax_scale: float | None,
    backend: str,
    result_dtype: torch.dtype | None = None,
) -> tuple[AttendCall, Backend]:
    """Check a call and find its backend. result_dtype: None = that of partials."""
    check_spec(spec)
    check_qkv(q, k, v)
    check_positions("q", q_positions, q.shape[0], pack)
    check_positions("k", k_positions, k.shape[0], pack)
    check_scale(softmax_scale)
    if routing is not None:
        check_routing(routing, spec, pack, q, k.shape[1], q_positions)
    elif isinstance(spec, MoBA):
        raise bad_argument("attend_partial under MoBA needs a routing", None, "pass routing=route_means(...)")
    scale = q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
    result_dtype = result_dtype or accumulate_dtype(q)
    return AttendCall(pack, q_positions, k_positions, routing, scale, result_dtype), resolve(backend, q, v)


class _Attend(torch.autograd.Function):
    """attend_partial over the whole row, differentiable in q, k and v. No op inside is traced by autograd."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: AttendCall, serve: Backend, tally: PairTally) -> Any:
        with _as_given(q):
            out, lse = serve.attend_partial(q, k, v, call, tally)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call, ctx.serve = call, serve
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> Any:
        refuse_second_derivative("attend")
        q, k, v, out, lse = ctx.saved_tensors
        with _as_given(q):
            delta = ctx.serve.row_dot(dout, out, lse.dtype)
            return *ctx.serve.attend_partial_backward(dout, q, k, v, lse, delta, ctx.call), None, None, None


@opaque
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    *,
    cu_seqlens: Pack | Sequence[int] | Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
    routing: Routing | None = None,
    return_routing: bool = False,
) -> AttendResult:
    """Causal attention over one packed row, full or MoBA (arXiv 2502.13189), differentiable in q, k and v.

    Args:
        q: [T,H,D]; k: [T,K,D]; v: [T,K,Dv], Dv may differ from D. H % K == 0. bf16, fp16, fp32 or fp64, one device.
        spec: Full() or MoBA(chunk_size, topk, select).
        cu_seqlens: a Pack, cumulative document lengths (the slow, convenient form), or None = one document.
        softmax_scale: None = 1/sqrt(D).
        backend: "auto", "reference", "torch", "triton" or "flash".
        routing: forced picks (frozen routing, activation recompute, controls) in place of the gate's.
        return_routing: also return the routing used.
    Returns:
        AttendResult. out [T,H,Dv] in q's dtype; lse [T,H] fp32 (fp64 for fp64 inputs), natural log, no gradient flows
        through it. Nor does one through the choice of chunks: dk and dv come from chosen pairs only.
    Raises:
        ValueError for arguments that do not fit together; BackendError when the backend refuses, with every reason.
    """
    check_spec(spec)
    check_qkv(q, k, v)
    pack = pack_of(cu_seqlens, q.shape[0])
    computed: AttentionSpec = spec
    if isinstance(spec, MoBA) and routing is None:
        if return_routing or pack.segments(spec, complete=True).any_picks:
            routing = route(q, k, spec, cu_seqlens=pack, backend=backend)
        else:  # topk chunks cover every document: there is nothing to choose
            computed = Full()
    call, serve = _prepare(q, k, v, computed, pack, None, None, routing, softmax_scale, backend, q.dtype)
    tally = PairTally()
    out, lse = _Attend.apply(q, k, v, call, serve, tally)  # type: ignore[no-untyped-call]
    planned = pack.planned_pairs(spec) * q.shape[1]
    report = ExecutionReport(serve.name, planned, tally, call.segments.num_covered_documents)
    return AttendResult(out, lse, routing if return_routing else None, report)


@opaque
def moba_attn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    moba_chunk_size: int,
    moba_topk: int,
) -> Tensor:
    """The signature that users of the original MoBA call; GQA allowed. q [T,H,D], k and v [T,K,D]; returns out [T,H,D].

    `moba_topk` counts the own chunk, as there; 1 means the own chunk only (the original runs full attention then).
    max_seqlen must be at least the longest document: ValueError otherwise.
    """
    check_rows("q", q)
    try:
        max_seqlen = index(max_seqlen)  # of numpy and of a tensor, too
    except TypeError:
        fix = "pass the longest document's length"
        raise bad_argument("max_seqlen must be an integer", repr(max_seqlen), fix) from None
    pack = pack_of(cu_seqlens, q.shape[0])
    longest = max((b - a for a, b in zip(pack.cu_seqlens, pack.cu_seqlens[1:], strict=False)), default=0)
    if max_seqlen < longest:
        raise bad_argument(
            f"max_seqlen must be at least the longest document, {longest}", max_seqlen, "pass its length"
        )
    return attend(q, k, v, MoBA(moba_chunk_size, moba_topk), cu_seqlens=pack).out
