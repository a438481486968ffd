"""Merging partial softmaxes. Shape letters: T query tokens, H query heads, Dv value dim.

With lse = log(exp(lse_a) + exp(lse_b)): out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_tensors
from .errors import bad_argument
from .report import Partial


def merge_partials(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Partial:
    """Attention over the union of two disjoint key sets, from the two partial results.

    out [T,H,Dv], lse [T,H]; fp32 or fp64 only (bf16 partials spoil gradients at scale): ValueError otherwise. A row
    with lse -inf on both sides gives 0 and -inf.
    """
    check_tensors(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    for tensor in (out_a, lse_a, out_b, lse_b):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise bad_argument(
                "partials are merged in fp32", tensor.dtype, "keep partials in fp32 until the last merge"
            )
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape or lse_a.shape != out_a.shape[:-1]:
        got = f"out {tuple(out_a.shape)}, {tuple(out_b.shape)}, lse {tuple(lse_a.shape)}, {tuple(lse_b.shape)}"
        raise bad_argument(
            "partials must be out [T,H,Dv] and lse [T,H], both alike", got, "merge parts of one query set"
        )
    lse = torch.logaddexp(lse_a, lse_b)
    base = torch.where(lse == -torch.inf, 0.0, lse)
    out = out_a * torch.exp(lse_a - base).unsqueeze(-1) + out_b * torch.exp(lse_b - base).unsqueeze(-1)
    return Partial(out, lse)
