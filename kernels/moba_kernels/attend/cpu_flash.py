"""The flash kernel that PyTorch ships for CPUs: it returns the log-sum-exp, and takes one head dim for q, k and v.

q, dout, out [B, H, L, D]; k, v [B, K, M, D]; lse [B, H, L]; fp32 or fp64; strides are free but for the last dim, which
must lie dense. B batch, H query heads, K KV
heads, L rows, M keys, D head dim.
"""

from __future__ import annotations

from functools import cache
from math import frexp

import torch
from torch import Tensor

from .call import with_positive_scale

# Overloads, not the names that they go by: choosing one for every call takes longer than some of the calls' work.
_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _exactly_scaled(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """(q, scale) of the same scores, and what to multiply dq by; scale is a power of two.

    The kernel rounds scale * q k^T in its forward pass and not in the backward pass. Of large scores, as under a bias
    of the keys, the weights then differ, and dq = sum p (dP - delta) k no longer cancels.
    """
    q, scale, sign = with_positive_scale(q, scale)
    if frexp(scale)[0] == 0.5:
        return q, scale, sign
    return q * scale, 1.0, sign * scale


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse)."""
    q, scale, _ = _exactly_scaled(q, scale)
    out, lse = _FORWARD(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    q, scale, factor = _exactly_scaled(q, scale)
    dq, dk, dv = _BACKWARD(dout, q, k, v, out, lse, 0.0, causal, scale=scale)
    return dq if factor == 1 else dq.mul_(factor), dk, dv


@cache
def groups_natively() -> bool:
    """Does the kernel of this PyTorch serve several query heads by one KV head?

    Older ones (PyTorch 2.6) do not, and without a word take the memory behind a KV head for the next one; backward
    writes there. Asked of the kernel itself, with memory of known contents there.
    """
    keys_BHLD = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    out, _ = forward(torch.ones(1, 2, 1, 1), keys_BHLD[:, :1], keys_BHLD[:, :1], False, 1.0)
    return bool((out == 0).all())
