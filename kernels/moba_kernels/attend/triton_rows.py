"""Passes over rows around the attention kernels, each in one launch where torch would take several.

Shape letters: T queries, H query heads, K key/value heads of a range, R = T * H / K rows of a KV head, D head dim, M
rows of a program.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_math import LOG2_E, TRITON_TYPE, Variant, narrow

SUM_ROWS = 1024
# Elements that a program narrows: 16 a thread.
PROGRAM_ELEMENTS = 2048
NUM_WARPS = 4

_SUM_SIZES = ["num_rows", "group", "first_head", "stride_lt", "stride_dt"]
_NARROW_SIZES = ["num_rows", "heads"]


@triton.jit(do_not_specialize=_SUM_SIZES, do_not_specialize_on_alignment=_SUM_SIZES)
def _sums_by_head(  # type: ignore[no-untyped-def]
    lse, delta, sums, num_rows, group, first_head, stride_lt, stride_dt, BLOCK: tl.constexpr
):
    """sums[kv, row] = (lse in units of log2, delta) of BLOCK rows. Grid: (blocks of R + 1 rows, KV heads)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kv = tl.program_id(1)
    token, head = (row // group).to(tl.int64), first_head + kv * group + row % group
    valid = row < num_rows
    x = tl.load(lse + token * stride_lt + head, mask=valid, other=-float("inf"))
    d = tl.load(delta + token * stride_dt + head, mask=valid, other=0.0)
    at = sums + (kv.to(tl.int64) * (num_rows + 1) + row) * 2
    inside = row <= num_rows
    tl.store(at, tl.where(x == -float("inf"), float("inf"), x * LOG2_E), mask=inside)
    tl.store(at + 1, d, mask=inside)


def sums_by_head(lse_TH: Tensor, delta_TH: Tensor, first_head: int, num_heads: int, num_kv_heads: int) -> Tensor:
    """fp32 [K, R + 1, 2]: (lse in units of log2, delta) of every row of num_heads query heads from first_head on, KV
    head by KV head. +inf for an lse of -inf, and in the spare last row: such rows get no weight.

    lse, delta: fp32 [T,H], last dim contiguous.
    """
    group = num_heads // num_kv_heads
    num_rows = lse_TH.shape[0] * group
    sums = lse_TH.new_empty((num_kv_heads, num_rows + 1, 2))
    _sums_by_head[(triton.cdiv(num_rows + 1, SUM_ROWS), num_kv_heads)](
        lse_TH, delta_TH, sums, num_rows, group, first_head, lse_TH.stride(0), delta_TH.stride(0), BLOCK=SUM_ROWS,
        num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip
    return sums


@triton.jit(do_not_specialize=_NARROW_SIZES, do_not_specialize_on_alignment=_NARROW_SIZES)
def _narrow_rows(  # type: ignore[no-untyped-def]
    x, out, factor, num_rows, heads, stride_ot, stride_oh, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr
):
    """out = x * factor, BLOCK_M rows (token, head)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    mask = (row < num_rows)[:, None] & (dim < D)[None, :]
    wide = tl.load(x + row[:, None] * D + dim[None, :], mask=mask, other=0.0)
    at = row // heads * stride_ot + row % heads * stride_oh
    tl.store(out + at[:, None] + dim[None, :], narrow(wide * factor, out.dtype.element_ty), mask=mask)


def narrow_rows(x: Tensor, factor: float, out: Tensor) -> None:
    """out = x * factor. x: fp32 [T,H,D], contiguous; out: [T,H,D] of a narrower dtype, last dim contiguous."""
    if out.numel():
        constants = _constants(x.shape[2])
        num_rows = x.shape[0] * x.shape[1]
        _narrow_rows[(triton.cdiv(num_rows, constants["BLOCK_M"]),)](
            x, out, factor, num_rows, x.shape[1], *out.stride()[:2], **constants, num_warps=NUM_WARPS, num_stages=1
        )


def _constants(dim: int) -> dict[str, int]:
    block_d = triton.next_power_of_2(dim)
    return {"D": dim, "BLOCK_D": block_d, "BLOCK_M": PROGRAM_ELEMENTS // block_d}


def variants(head_dims: Iterable[tuple[int, int]], dtypes: Iterable[torch.dtype], target: int) -> Iterator[Variant]:
    """The compiled forms that launches use, on any target."""
    pairs, narrower = tuple(head_dims), tuple(dtype for dtype in dtypes if dtype != torch.float32)
    for dim in sorted({dim for pair in pairs for dim in pair}):
        for dtype in narrower:
            types = {"x": "*fp32", "out": f"*{TRITON_TYPE[dtype]}", "factor": "fp32"}
            types |= dict.fromkeys((*_NARROW_SIZES, "stride_ot", "stride_oh"), "i32")
            aligned = frozenset({"x", "out", "stride_ot", "stride_oh"})
            label = f"narrow rows D={dim} {TRITON_TYPE[dtype]}"
            yield Variant(label, _narrow_rows, types, _constants(dim), NUM_WARPS, 1, dim, dtype, aligned)
    types = {"lse": "*fp32", "delta": "*fp32", "sums": "*fp32", **dict.fromkeys(_SUM_SIZES, "i32")}
    dim, aligned = pairs[0][0], frozenset({"lse", "delta", "sums"})
    yield Variant("sums by head", _sums_by_head, types, {"BLOCK": SUM_ROWS}, NUM_WARPS, 1, dim, torch.float32, aligned)
