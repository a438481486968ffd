"""RMSNorm by tiles of tokens, for the CPU: PyTorch has no fused kernel there.

Its separate operations keep a second tensor of the input's size for the backward pass, and each of them walks through
memory that does not fit a cache. Here one number per token is kept besides the input, and a tile's temporaries stay in
the cache: at [131072, 128] forward and backward take a quarter of the time.

Shape letters: S tokens, ... whatever is normalised for each token, M its last dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moba_train.model.tiles import MIN_TILE_TOKENS


def tiled_rms_norm(x: Tensor, weight_M: Tensor, eps: float) -> Tensor:
    """x [S,...,M] / sqrt(mean(x^2) + eps) * weight, computed in fp32, in the dtype of x; differentiable in both."""
    out: Tensor = _TiledRmsNorm.apply(x, weight_M, eps)  # type: ignore[no-untyped-call]
    return out


class _TiledRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_M: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        inverse_rms = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
        for rows in _tiles(x):
            tile = x[rows].float()
            inverse = inverse_rms[rows]
            torch.rsqrt(tile.square().mean(-1, keepdim=True).add_(eps), out=inverse)
            out[rows] = (tile * inverse).mul_(weight_M)
        ctx.save_for_backward(x, weight_M, inverse_rms)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_M, inverse_rms = ctx.saved_tensors
        dx = torch.empty_like(x)
        dweight = torch.zeros(weight_M.shape, dtype=torch.float32, device=x.device)
        for rows in _tiles(x):
            inverse = inverse_rms[rows]
            normed, gradient = x[rows].float() * inverse, dout[rows].float()
            dweight.add_((gradient * normed).flatten(0, -2).sum(0))
            gradient = gradient * weight_M
            along = (gradient * normed).mean(-1, keepdim=True)
            dx[rows] = gradient.addcmul_(normed, along, value=-1).mul_(inverse)
        return dx, dweight.to(weight_M.dtype), None


def _tiles(x: Tensor) -> Iterator[slice]:
    for start in range(0, x.shape[0], MIN_TILE_TOKENS):
        yield slice(start, start + MIN_TILE_TOKENS)


__all__ = ["tiled_rms_norm"]
