"""Chunk sums, the obvious way: one chunk after the other, fp64. arXiv 2502.13189, eq. 6 (mean pooling of keys).

Shape letters: S keys at hand, K key/value heads, D head dim, C chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..pack import Pack


def pool_sums(k_SKD: Tensor, *, pack: Pack, chunk_size: int, k_positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """([C,K,D] fp64 sums, [C] int64 counts) over the keys at hand."""
    geometry = pack.chunks(chunk_size)
    positions = torch.arange(pack.num_tokens, device=k_SKD.device) if k_positions is None else k_positions
    sum_CKD = k_SKD.new_zeros((geometry.num_chunks, *k_SKD.shape[1:]), dtype=torch.float64)
    count_C = torch.zeros(geometry.num_chunks, dtype=torch.int64, device=k_SKD.device)
    for chunk in range(geometry.num_chunks):
        inside = (positions >= int(geometry.start_C[chunk])) & (positions < int(geometry.end_C[chunk]))
        sum_CKD[chunk] = k_SKD[inside].double().sum(0)
        count_C[chunk] = inside.sum()
    return sum_CKD, count_C
