"""The flash kernel that PyTorch ships for CPUs: it returns the log-sum-exp, and takes one head dim for q, k and v.

    forward(q, k, v, dropout, causal, *, scale) -> (out, lse)
    backward(dout, q, k, v, out, lse, dropout, causal, *, scale) -> (dq, dk, dv)

q, out [B, H, L, D]; k, v [B, K, M, D]; lse [B, H, L]; fp32 or fp64. B batch, H query heads, K key/value heads, L rows,
M keys, D head dim.
"""

from __future__ import annotations

from functools import cache

import torch

forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@cache
def groups_natively() -> bool:
    """Does the kernel of this PyTorch serve several query heads by one KV head?

    Older ones (PyTorch 2.6) do not, and without a word take the memory behind a KV head for the next one; backward
    writes there. Asked of the kernel itself, with memory of known contents there.
    """
    keys_BHLD = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    out, _ = forward(torch.ones(1, 2, 1, 1), keys_BHLD[:, :1], keys_BHLD[:, :1], 0.0, False)
    return bool((out == 0).all())
