"""The parameter of the key convolution (FlashMoBA, arXiv 2511.11571); the operation is `moba_kernels.key_conv`.

It clusters related tokens' keys inside a chunk, which is what a mean over the chunk can be found by. Width 3 or 5, one
filter per channel. A tap never reaches before the start of the token's document; under context parallelism the
W - 1 tokens before each piece of the shard come from their owner (`moba_train.parallel.halo`), and their gradient goes
back.

Legend: S tokens at hand, K key/value heads on this tensor-parallel rank, D head dimension, W width, P pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import moba_kernels
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

    def forward(self, k_SKD: Tensor, halos: Tensor, piece_lengths: Sequence[int], document_offset_S: Tensor) -> Tensor:
        """Keys after the convolution, [S,K,D], in the dtype of k_SKD; computed in fp32.

        Args:
            k_SKD: this rank's keys.
            halos: [P,W-1,K,D], the W - 1 tokens before each piece of the shard (`moba_train.parallel.halo`).
            piece_lengths: tokens of each piece.
            document_offset_S: int64 [S], tokens of the same document before each token.
        """
        return moba_kernels.key_conv(
            k_SKD, self.weight, document_offset=document_offset_S, halos=halos, piece_lengths=piece_lengths
        )

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
