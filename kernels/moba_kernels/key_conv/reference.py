"""The key convolution, the obvious way: token by token and tap by tap in fp64. FlashMoBA, arXiv 2511.11571.

Shape letters: S tokens at hand, K key/value heads, D head dim, W width of the filter, P pieces that k is made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def convolve(
    k_SKD: Tensor, weight_KDW: Tensor, halos_PWKD: Tensor, document_offset_S: Tensor, lengths: Sequence[int]
) -> Tensor:
    """[S,K,D] in k's dtype: k + SiLU(z), z the sum of the taps."""
    filters, offsets = weight_KDW.double(), document_offset_S.tolist()
    out = k_SKD.double().clone()
    for piece, start, end in _pieces(lengths):
        keys = _with_halo(k_SKD, halos_PWKD, piece, start, end)
        for token in range(start, end):
            z = _taps(keys, filters, token - start, offsets[token])
            out[token] += z * torch.sigmoid(z)
    return out.to(k_SKD.dtype)


def convolve_backward(
    dout_SKD: Tensor,
    k_SKD: Tensor,
    weight_KDW: Tensor,
    halos_PWKD: Tensor,
    document_offset_S: Tensor,
    lengths: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dk in k's dtype, dweight fp64, dhalos fp64): every tap gives its share to the key and the weight it read."""
    filters, offsets, width = weight_KDW.double(), document_offset_S.tolist(), weight_KDW.shape[2]
    dk, dweight = dout_SKD.double().clone(), torch.zeros_like(filters)
    dhalos = torch.zeros_like(halos_PWKD, dtype=torch.float64)
    for piece, start, end in _pieces(lengths):
        keys = _with_halo(k_SKD, halos_PWKD, piece, start, end)
        for token in range(start, end):
            z = _taps(keys, filters, token - start, offsets[token])
            gate = torch.sigmoid(z)
            dz = dout_SKD[token].double() * (gate + z * gate * (1 - gate))
            for lag in range(min(width - 1, offsets[token]) + 1):
                tap, source = width - 1 - lag, token - start - lag
                dweight[:, :, tap] += dz * keys[source + width - 1]
                target = dk[start + source] if source >= 0 else dhalos[piece, source + width - 1]
                target += dz * filters[:, :, tap]
    return dk.to(k_SKD.dtype), dweight, dhalos


def _pieces(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(piece, first token, one past the last)."""
    start = 0
    for piece, length in enumerate(lengths):
        yield piece, start, start + length
        start += length


def _with_halo(k_SKD: Tensor, halos_PWKD: Tensor, piece: int, start: int, end: int) -> Tensor:
    """fp64 [W - 1 + length, K, D]: a piece with the tokens before it in front."""
    return torch.cat((halos_PWKD[piece], k_SKD[start:end])).double()


def _taps(keys: Tensor, filters_KDW: Tensor, token: int, offset: int) -> Tensor:
    """z of one token: taps over the tokens of its document only."""
    width = filters_KDW.shape[2]
    z = torch.zeros_like(filters_KDW[:, :, 0])
    for lag in range(min(width - 1, offset) + 1):
        z += filters_KDW[:, :, width - 1 - lag] * keys[token - lag + width - 1]
    return z
