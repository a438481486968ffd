"""Rotary position embedding with angles in fp64, and its extensions to longer sequences.

Own code instead of Megatron's RotaryEmbedding for three reasons: fp32 angles are off by 0.04 rad at position 10^6; its
table is cached and would go stale when a stage changes the base; and it hard-codes where a context-parallel rank's
tokens lie. Here a row's table is computed once, from the positions that this rank holds, counted from each document's
start, so that a document gives the same numbers wherever in a row it lies.

Pairs (i, i + D/2) turn together (the layout of Llama checkpoints in Hugging Face form).

Legend: S tokens at hand, H heads, D head dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moba_kernels.pack import device_copy
from moba_train.config.schema import RopeConfig


@dataclass(frozen=True)
class RopeTable:
    """Rotations of the tokens at hand: cos and sin, fp32 [S, 1, D/2], the attention factor included."""

    cos: Tensor
    sin: Tensor

    def rotate(self, x_SHD: Tensor) -> Tensor:
        """x [S,H,D] (any float dtype) turned by each token's angles, computed in fp32, in the dtype of x."""
        turned: Tensor = _Rotate.apply(x_SHD, self.cos, self.sin)  # type: ignore[no-untyped-call]
        return turned


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """fp64 [D/2], radians a position: base^(-2i/D), then scaled as `rope.scaling` says."""
    plain = rope.base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling == "llama3":
        return _llama3(rope, plain)
    if rope.scaling == "yarn":
        return _yarn(rope, plain, head_dim)
    return plain


def attention_factor(rope: RopeConfig) -> float:
    """What queries and keys are multiplied by: yarn's 0.1 ln(factor) + 1 (arXiv 2309.00071, equation 22), else 1."""
    if rope.scaling == "yarn" and rope.factor > 1.0:
        return 0.1 * math.log(rope.factor) + 1.0
    return 1.0


def rope_table(rope: RopeConfig, head_dim: int, positions_S: Tensor) -> RopeTable:
    """The table of the tokens at hand.

    Args:
        rope: the stage's embedding.
        head_dim: D, even.
        positions_S: int64 [S], position of each token in its document; the table lies on the same device.
    """
    frequencies = device_copy(inverse_frequencies(rope, head_dim).numpy(), positions_S.device)
    angles = positions_S.to(torch.float64)[:, None, None] * frequencies
    factor = attention_factor(rope)
    return RopeTable((angles.cos() * factor).float(), (angles.sin() * factor).float())


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Llama 3.1: long waves interpolated in full, short waves kept, a linear ramp in (length / wave) between."""
    wave_length = 2 * math.pi / plain
    kept = (rope.original_seq_len / wave_length - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return plain * kept + plain / rope.factor * (1 - kept)


def _yarn(rope: RopeConfig, plain: Tensor, head_dim: int) -> Tensor:
    """YaRN's "NTK by parts" (arXiv 2309.00071, section 3.2), dimensions rounded outwards as in its reference code."""

    def dimension_of(rotations: float) -> float:
        turns = rope.original_seq_len / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.base))

    low = max(math.floor(dimension_of(rope.beta_fast)), 0)
    high = min(math.ceil(dimension_of(rope.beta_slow)), head_dim - 1)
    span = max(high - low, 1e-3)  # the reference code widens an empty ramp by this much
    interpolated = ((torch.arange(head_dim // 2, dtype=torch.float64) - low) / span).clamp(0.0, 1.0)
    return plain / rope.factor * interpolated + plain * (1 - interpolated)


class _Rotate(torch.autograd.Function):
    """The rotation; its gradient is the rotation the other way round, so that only the table is kept."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x_SHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x_SHD, cos, sin)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors  # type: ignore[attr-defined]
        return _turn(grad_outputs[0], cos, -sin), None, None


def _turn(x_SHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x_SHD.float().chunk(2, dim=-1)
    turned = torch.empty(x_SHD.shape, dtype=torch.float32, device=x_SHD.device)
    out_left, out_right = turned.chunk(2, dim=-1)
    torch.mul(left, cos, out=out_left).addcmul_(right, sin, value=-1)
    torch.mul(right, cos, out=out_right).addcmul_(left, sin)
    return turned.to(x_SHD.dtype)


__all__ = ["RopeTable", "attention_factor", "inverse_frequencies", "rope_table"]
