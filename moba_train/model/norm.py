"""RMSNorm whose input tensor-parallel ranks may share along the sequence (Megatron's sequence parallelism).

A norm looks at each token by itself, so it needs no communication forward. Backward, each rank's weight gradient is the
sum over its own tokens only; the mark on the weight makes Megatron's `finalize_model_grads` add the ranks' sums up.
Megatron's own wrapper of this norm refuses sequence parallelism because it does not set the mark.
"""

from __future__ import annotations

import torch

from moba_train.model.tiled_norm import tiled_rms_norm
from moba_train.quiet import quiet_imports

with quiet_imports():
    from megatron.core.transformer.transformer_config import TransformerConfig


class RmsNorm(torch.nn.RMSNorm):
    """x / rms(x) * weight over the last dim (arXiv 1910.07467), in the dtype of x; bf16 is computed in fp32.

    Args:
        config: Megatron's; `sequence_parallel` is read.
        hidden_size: length of the last dim, and of `weight`.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> the same shape. On a GPU PyTorch's kernel, on a CPU ours."""
        assert self.eps is not None
        return super().forward(x) if x.is_cuda else tiled_rms_norm(x, self.weight, self.eps)


__all__ = ["RmsNorm"]
