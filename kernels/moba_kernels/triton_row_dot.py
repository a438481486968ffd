"""rowsum(a * b) on a GPU, in fp32: both are read once, where a handful of torch kernels would write what they multiply.

Shape letters: T tokens, H heads, D dim, R = T * H rows, M rows of a program.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_math import TRITON_TYPE, Variant

# Elements that a program takes: 16 a thread of each tensor.
PROGRAM_ELEMENTS = 2048
NUM_WARPS = 4

_UNSPECIALISED = ["num_rows", "heads"]


@triton.jit(do_not_specialize=_UNSPECIALISED, do_not_specialize_on_alignment=_UNSPECIALISED)
def _row_dot(  # type: ignore[no-untyped-def]
    a, b, out, num_rows, heads, stride_at, stride_ah, stride_bt, stride_bh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """out[row] of BLOCK_M rows (token, head)."""
    row_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token_M, head_M = (row_M // heads).to(tl.int64), (row_M % heads).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    mask = (row_M < num_rows)[:, None] & (dim < D)[None, :]
    at_a, at_b = token_M * stride_at + head_M * stride_ah, token_M * stride_bt + head_M * stride_bh
    a_MD = tl.load(a + at_a[:, None] + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    b_MD = tl.load(b + at_b[:, None] + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row_M, tl.sum(a_MD * b_MD, 1), mask=row_M < num_rows)


def row_dot(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """rowsum(a * b) of two [T,H,D] tensors, multiplied and summed in `dtype`, which is fp32: fp32 [T,H]."""
    a, b = (x if x.stride(2) == 1 else x.contiguous() for x in (a, b))
    out = a.new_empty(a.shape[:2], dtype=dtype)
    if out.numel():
        constants = _constants(a.shape[2])
        _row_dot[(triton.cdiv(out.numel(), constants["BLOCK_M"]),)](
            a, b, out, out.numel(), a.shape[1], *a.stride()[:2], *b.stride()[:2], **constants,
            num_warps=NUM_WARPS, num_stages=1,
        )  # fmt: skip
    return out


def _constants(dim: int) -> dict[str, int]:
    block_d = triton.next_power_of_2(dim)
    return {"D": dim, "BLOCK_D": block_d, "BLOCK_M": PROGRAM_ELEMENTS // block_d}


def variants(head_dims: Iterable[tuple[int, int]], dtypes: Iterable[torch.dtype], target: int) -> Iterator[Variant]:
    """The compiled forms that `row_dot` launches for outputs of these value dims and dtypes, on any target."""
    dtypes = tuple(dtypes)
    for dim in sorted({value_dim for _, value_dim in head_dims}):
        for dtype in dtypes:
            types = {"a": f"*{TRITON_TYPE[dtype]}", "b": f"*{TRITON_TYPE[dtype]}", "out": "*fp32"}
            types |= dict.fromkeys((*_UNSPECIALISED, "stride_at", "stride_ah", "stride_bt", "stride_bh"), "i32")
            aligned = frozenset(types) - set(_UNSPECIALISED)
            label = f"row dot D={dim} {TRITON_TYPE[dtype]}"
            yield Variant(label, _row_dot, types, _constants(dim), NUM_WARPS, 1, dim, dtype, aligned)
