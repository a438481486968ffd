"""What a pass of the torch backend accumulates into, in fp32 (fp64 for fp64 inputs).

Shape letters: T queries at hand, S keys at hand, H query heads, K key/value heads, D head dim, Dv value dim, R = T*H
query rows (row id = query * H + head); row R is a spare one that padding writes to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def joined(lse: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """(lse of both parts, the share of the added one), fp64; two parts of nothing are (-inf, 0)."""
    both = torch.logaddexp(lse, added.double())
    return both, (added - both.clamp_min(torch.finfo(both.dtype).min)).exp_()


@dataclass(frozen=True)
class Sums:
    """out [R+1,Dv], 0 where nothing was merged yet, and lse [R+1], -inf there.

    lse is fp64: of large scores, as under a bias of the keys, what fp32 rounds off moves weight between parts, and
    backward, which takes it from the scores, then has a dq in which this does not cancel.
    """

    out: Tensor
    lse: Tensor

    @classmethod
    def nothing(cls, num_rows: int, value_dim: int, like: Tensor, dtype: torch.dtype) -> Sums:
        return cls(
            like.new_zeros((num_rows + 1, value_dim), dtype=dtype),
            like.new_full((num_rows + 1,), -torch.inf, dtype=torch.float64),
        )

    def merge_(self, rows: Tensor, out: Tensor, lse: Tensor, *, fresh: bool = False) -> None:
        """Fold in partial results of `rows`, each once, the spare row aside (formula: merge.py)."""
        if not fresh:
            lse, share = joined(self.lse.index_select(0, rows), lse)
            out = self.out.index_select(0, rows).lerp_(out, share.to(out.dtype).unsqueeze(-1))
        self.out.index_copy_(0, rows, out)
        self.lse.index_copy_(0, rows, lse.double())


@dataclass(frozen=True)
class Gradients:
    """What a backward pass reads, and dq [R+1,D], dk [S,K,D], dv [S,K,Dv], 0 at first."""

    dout_THD: Tensor
    """[T,H,Dv] in the inputs' dtype."""
    lse_TH: Tensor
    """The global lse; 0 where a row has no key at all, which keeps its (masked) weights finite."""
    delta_TH: Tensor
    dq: Tensor
    dk_SKD: Tensor
    dv_SKD: Tensor
