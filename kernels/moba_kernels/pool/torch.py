"""Chunk sums in one pass over the keys: an indexed add into fp64, in ranges of tokens so that the fp64 copy is small.

Shape letters: S keys at hand, K key/value heads, D head dim, C chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..pack import Pack
from ..scatter import add_rows_

# Elements of the fp64 copy held at a time: 16 MB, far above the cost of a call, far below a long row's keys.
RANGE_ELEMENTS = 1 << 21


def pool_sums(k_SKD: Tensor, *, pack: Pack, chunk_size: int, k_positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """([C,K,D] fp64 sums, [C] int64 counts) over the keys at hand."""
    geometry = pack.chunks(chunk_size)
    chunk_S = geometry.tensors(k_SKD.device).chunk_of_token_T
    if k_positions is not None:
        chunk_S = chunk_S[k_positions]
    num_keys, num_heads, dim = k_SKD.shape
    sums = k_SKD.new_zeros((geometry.num_chunks, num_heads * dim), dtype=torch.float64)
    step = max(1, RANGE_ELEMENTS // max(1, num_heads * dim))
    for begin in range(0, num_keys, step):
        keys = k_SKD[begin : begin + step].flatten(1).double()
        add_rows_(sums, chunk_S[begin : begin + step], keys)
    counts = torch.bincount(chunk_S, minlength=geometry.num_chunks)
    return sums.view(geometry.num_chunks, num_heads, dim), counts
