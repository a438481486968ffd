"""A tile of query rows against a run of keys: what the causal and the pick kernels have in common.

A query row is one (query, query head) of one KV head. All query heads of a KV head share a tile, so a key tile that is
loaded serves the whole group. The softmax runs in base 2 (`top` is in units of log2) and accumulates in fp32.

Shape letters: M rows of a tile, N keys of a block, D head dim, DP padded to a power of two, V value dim, VP likewise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_math import LN_2, LOG2_E, add_dot, dot, narrow


@triton.jit
def load_rows(base, at_M, valid_M, D: tl.constexpr, DP: tl.constexpr):  # type: ignore[no-untyped-def]
    """[M, DP]: rows that begin at offsets `at_M`, zero where not valid and beyond D."""
    dim = tl.arange(0, DP)
    mask = valid_M[:, None]
    if DP != D:
        mask = mask & (dim[None, :] < D)
    return tl.load(base + at_M[:, None] + dim[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, at_M, x, valid_M, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The counterpart of `load_rows`; x is rounded to the dtype it is stored in. Row strides: multiples of 16."""
    # Offset and validity wait through the loop over keys as one number a row. Without the exchange the compiler works
    # them out in the layout of the store, and spills. It cannot see through the exchange: unless told that rows begin
    # at multiples of 16, it stores them element by element.
    at_M = tl.multiple_of(tl.gather(tl.where(valid_M, at_M, -16), tl.arange(0, M), 0), 16)
    dim = tl.arange(0, DP)
    mask = (at_M >= 0)[:, None]
    if DP != D:
        mask = mask & (dim[None, :] < D)
    tl.store(base + at_M[:, None] + dim[None, :], narrow(x, base.dtype.element_ty), mask=mask)


@triton.jit
def load_keys(source, start, stop, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """[N, DP]: keys (or values) start .. start + N - 1 of one KV head; MASKED: those from `stop` on are zero.

    source: (pointer to the head's first row, row stride, descriptor of [tokens, heads * dim] or None, the head's first
    column). Whole blocks come through the descriptor (TMA) where there is one.
    """
    base, stride, blocks, column = source
    key = tl.arange(0, N)
    dim = tl.arange(0, DP)
    at = base + tl.cast(start, tl.int64) * stride + key[:, None] * stride + dim[None, :]
    if blocks is not None and not MASKED:
        x = blocks.load([start, column])
    elif MASKED:
        mask = (start + key < stop)[:, None]
        if DP != D:
            mask = mask & (dim[None, :] < D)
        x = tl.load(at, mask=mask, other=0.0)
    elif DP != D:
        x = tl.load(at, mask=(dim < D)[None, :], other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def _softmax_block(  # type: ignore[no-untyped-def]
    q, keys, values, acc, top, total, start, stop, seen_M, scale2,
    D: tl.constexpr, DP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys folded into (acc, top, total). Scale is not negative."""
    scores = dot(q, tl.trans(load_keys(keys, start, stop, N, D, DP, MASKED)))
    if MASKED:
        # Scaled before the mask: -inf * 0 would be NaN under softmax_scale=0.
        seen = (start + tl.arange(0, N))[None, :] < seen_M[:, None]
        scores = tl.where(seen, scores * scale2, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        p = tl.exp2(scores - base[:, None])
    else:
        new_top = tl.maximum(top, tl.max(scores, 1) * scale2)
        base = new_top
        p = tl.exp2(scores * scale2 - base[:, None])
    decay = tl.exp2(top - base)
    total = total * decay + tl.sum(p, 1)
    acc = acc * decay[:, None]
    acc = add_dot(acc, narrow(p, q.dtype), load_keys(values, start, stop, N, V, VP, MASKED))
    return acc, new_top, total


@triton.jit
def fold_keys(  # type: ignore[no-untyped-def]
    q, keys, values, acc, top, total, first, whole_stop, stop, seen_M, scale2,
    D: tl.constexpr, DP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The keys first .. stop - 1 folded into a running softmax (acc [M,VP], top [M], total [M]).

    Every row sees all keys before whole_stop = first + a multiple of N; beyond, row i sees those before seen_M[i].
    keys, values: sources, see `load_keys`.
    """
    for start in range(first, whole_stop, N):
        acc, top, total = _softmax_block(
            q, keys, values, acc, top, total, start, stop, seen_M, scale2, D, DP, V, VP, N, False
        )
    for start in range(whole_stop, stop, N):
        acc, top, total = _softmax_block(
            q, keys, values, acc, top, total, start, stop, seen_M, scale2, D, DP, V, VP, N, True
        )
    return acc, top, total


@triton.jit
def finish_softmax(acc, top, total):  # type: ignore[no-untyped-def]
    """(out, lse): normalised, natural log; a row that has seen nothing gives 0 and -inf."""
    total = tl.where(total == 0.0, 1.0, total)  # top is -inf then
    return acc * (1.0 / total)[:, None], (top + tl.log2(total)) * LN_2


@triton.jit
def load_log2_sum(lse, at_M, valid_M):  # type: ignore[no-untyped-def]
    """lse in units of log2; +inf for rows that are not there or see nothing, so that their weights become 0."""
    x = tl.load(lse + at_M, mask=valid_M, other=-float("inf"))
    return tl.where(x == -float("inf"), float("inf"), x * LOG2_E)


@triton.jit
def _gradient_block(  # type: ignore[no-untyped-def]
    q, dout, keys, values, acc, lse2_M, delta_M, start, stop, seen_M, scale2,
    D: tl.constexpr, DP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys: acc += dS K with P = exp2(scores - lse2), dS = P (dO V^T - delta)."""
    k = load_keys(keys, start, stop, N, D, DP, MASKED)
    p = tl.exp2(dot(q, tl.trans(k)) * scale2 - lse2_M[:, None])
    if MASKED:
        p = tl.where((start + tl.arange(0, N))[None, :] < seen_M[:, None], p, 0.0)
    dp = dot(dout, tl.trans(load_keys(values, start, stop, N, V, VP, MASKED)))
    ds = p * (dp - delta_M[:, None])
    return add_dot(acc, narrow(ds, q.dtype), k)


@triton.jit
def query_gradient(  # type: ignore[no-untyped-def]
    q, dout, keys, values, acc, lse2_M, delta_M, first, whole_stop, stop, seen_M, scale2,
    D: tl.constexpr, DP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """acc [M,DP] plus the share of dQ / scale that the keys first .. stop - 1 give. Bounds as in `fold_keys`."""
    for start in range(first, whole_stop, N):
        acc = _gradient_block(
            q, dout, keys, values, acc, lse2_M, delta_M, start, stop, seen_M, scale2, D, DP, V, VP, N, False
        )
    for start in range(whole_stop, stop, N):
        acc = _gradient_block(
            q, dout, keys, values, acc, lse2_M, delta_M, start, stop, seen_M, scale2, D, DP, V, VP, N, True
        )
    return acc
