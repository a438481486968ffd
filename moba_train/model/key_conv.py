"""Key convolution (FlashMoBA, arXiv 2511.11571): k + SiLU(depthwise causal convolution of k), before RoPE.

It clusters related tokens' keys inside a chunk, which is what a mean over the chunk can be found by. Width 3 or 5, one
filter per channel. A tap never reaches before the start of the token's document; under context parallelism the
W - 1 tokens before each piece of the shard come from their owner (`moba_train.parallel.halo`), and their gradient goes
back.

Legend: S tokens at hand, K key/value heads on this tensor-parallel rank, D head dimension, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moba_train.quiet import quiet_imports

with quiet_imports():
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


class KeyConv(nn.Module):
    """The module. Weight [K,D,W], sharded over tensor-parallel ranks by head; tap W - 1 is the token itself.

    Args:
        num_kv_heads: K on this rank.
        head_dim: D.
        width: W.
        dtype: of the weight.
        tp_group: tensor-parallel group, for checkpoints.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        width: int,
        *,
        dtype: torch.dtype,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.zeros(num_kv_heads, head_dim, width, dtype=dtype))
        self._tp_group = tp_group

    def forward(self, k_SKD: Tensor, extended: Sequence[Tensor], document_offset_S: Tensor) -> Tensor:
        """Keys after the convolution, [S,K,D], in the dtype of k_SKD; computed in fp32.

        Args:
            k_SKD: this rank's keys.
            extended: each piece of the shard with the W - 1 tokens before it in front: [W - 1 + S_piece, K, D].
            document_offset_S: int64 [S], tokens of the same document before each token.
        """
        filters = self.weight.float()
        lags = range(self.width - 1, 0, -1)
        keys = k_SKD.float()
        summed = keys * filters[:, :, -1]
        for lag in lags:
            before = torch.cat([piece[self.width - 1 - lag : piece.shape[0] - lag] for piece in extended]).float()
            inside = (document_offset_S >= lag)[:, None, None]
            summed = summed + torch.where(inside, before, 0.0) * filters[:, :, self.width - 1 - lag]
        return (keys + nn.functional.silu(summed)).to(k_SKD.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[object, ...] = (), metadata: dict[str, object] | None = None
    ) -> dict[str, object]:
        """The weight as Megatron's checkpoints want it: sharded along key/value heads."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self._tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


__all__ = ["KeyConv"]
