"""Rows of a [tokens, heads, dim] tensor by number, gathered from where they lie."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """x [T,H,D] seen as [T*H,D], row = token * H + head.

    A view of a fused projection, say, has no such form without a copy of all of it, and rows are asked for by tile.
    So they are counted in steps that both the tokens and the heads of x are multiples of.
    """

    steps_D: Tensor
    """A view of what x stores, D elements from every step on."""
    num_heads: int
    per_token: int
    per_head: int

    @classmethod
    def of(cls, x_THD: Tensor) -> Rows:
        (num_tokens, num_heads, dim), (token_stride, head_stride, stride) = x_THD.shape, x_THD.stride()
        step = gcd(token_stride, head_stride) or 1
        per_token, per_head = token_stride // step, head_stride // step
        last = (num_tokens - 1) * per_token + (num_heads - 1) * per_head
        return cls(x_THD.as_strided((last + 1, dim), (step, stride)), num_heads, per_token, per_head)

    def take(self, row_N: Tensor) -> Tensor:
        """[N,D]: rows by number."""
        if (self.per_token, self.per_head) != (self.num_heads, 1):
            row_N = row_N // self.num_heads * self.per_token + row_N % self.num_heads * self.per_head
        return self.steps_D.index_select(0, row_N)
