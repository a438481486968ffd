"""Rows of a [tokens, heads, dim] tensor by number, gathered from where they lie."""

from __future__ import annotations

from math import gcd

from torch import Tensor


def take_rows(x_THD: Tensor, row_N: Tensor) -> Tensor:
    """[N,D]: rows of x seen as [T*H,D], row = token * H + head.

    A view of a fused projection, say, has no such form without a copy of all of it, and this is asked for tile by tile.
    So rows are counted in steps that both the tokens and the heads of x are multiples of.
    """
    (num_tokens, num_heads, dim), (token_stride, head_stride, stride) = x_THD.shape, x_THD.stride()
    step = gcd(token_stride, head_stride) or 1
    per_token, per_head = token_stride // step, head_stride // step
    if (per_token, per_head) != (num_heads, 1):
        row_N = row_N // num_heads * per_token + row_N % num_heads * per_head
    last = (num_tokens - 1) * per_token + (num_heads - 1) * per_head
    return x_THD.as_strided((last + 1, dim), (step, stride)).index_select(0, row_N)
