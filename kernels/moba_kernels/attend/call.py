"""The arguments of one attention call that every backend shares, checked once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..pack import IntArray, Pack, Segments
from ..routing import Routing
from ..spec import Full

LEAST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class AttendCall:
    """What to attend to: the pack, the positions at hand (None = all tokens), the routing (None = Full), the scale."""

    pack: Pack
    q_positions: Tensor | None
    k_positions: Tensor | None
    routing: Routing | None
    scale: float
    result_dtype: torch.dtype
    """Of out, dq, dk and dv: fp32 for partials (fp64 for fp64 inputs), the inputs' own for a whole attention."""

    @property
    def segments(self) -> Segments:
        """Where this call is plain causal attention. Queries outside `covered_C` also attend to their picks."""
        if self.routing is None:
            return self.pack.segments(Full(), complete=True)
        return self.pack.segments(self.routing.spec, complete=self.routing.complete)


def accumulate_dtype(q: Tensor) -> torch.dtype:
    """fp64 inputs stay fp64 throughout (so that gradcheck works); everything else accumulates and publishes fp32."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def with_positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float, int]:
    """(q, scale) of the same scores with scale > 0, and what to multiply dq by.

    Flash kernels mask with -inf before they scale, in fp32, and so make NaN of a scale that is not positive there.
    """
    if scale >= LEAST_SCALE:
        return q, scale, 1
    sign = -1 if scale <= -LEAST_SCALE else 0
    return q * sign, -scale if sign else 1.0, sign


def host_positions(positions: Tensor | None, num_tokens: int) -> IntArray:
    """Positions as a host array (one read off the CPU)."""
    if positions is None:
        return np.arange(num_tokens, dtype=np.int64)
    return positions.detach().cpu().numpy().astype(np.int64, copy=False)
