"""Work in ranges, so that scratch stays bounded however long a row is."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of a temporary: 16 MB in fp32, many times what a kernel launch costs.
TEMPORARY_ELEMENTS = 1 << 22


def ranges(total: int, size: int) -> Iterator[slice]:
    """0 .. total - 1 in slices of `size` (at least 1)."""
    size = max(1, size)
    for begin in range(0, total, size):
        yield slice(begin, min(total, begin + size))


def row_dot(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """rowsum(a * b) of two [T,H,D] tensors, multiplied and summed in `dtype`: [T,H]."""
    out = a.new_empty(a.shape[:2], dtype=dtype)
    for part in ranges(a.shape[0], TEMPORARY_ELEMENTS // max(1, a.shape[1] * a.shape[2])):
        torch.sum(a[part].to(dtype) * b[part].to(dtype), -1, out=out[part])
    return out
