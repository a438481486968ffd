"""The key convolution in bounded ranges of tokens, forward and backward, on any device. See key_conv/README.md.

Rows of a piece are counted from its first token; rows -(W - 1) .. -1 are its halo.

Shape letters: S tokens at hand, K key/value heads, D head dim, W width of the filter, P pieces that k is made of,
N tokens of a range.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements of one intermediate: 1 MB in fp32; about six are alive at a time.
RANGE_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens and the W - 1 tokens before them."""

    k_SKD: Tensor
    halo_WKD: Tensor
    document_offset_S: Tensor
    filters_WKD: Tensor
    """Tap by tap, in the dtype of the computation."""

    @property
    def width(self) -> int:
        return self.filters_WKD.shape[0]

    def rows(self, low: int, high: int) -> Tensor:
        """Rows low .. high - 1 (low >= -(W - 1), high >= 0) in the dtype of the computation."""
        rows = self.k_SKD[max(low, 0) : high].to(self.filters_WKD.dtype)
        if low >= 0:
            return rows
        return torch.cat((self.halo_WKD[low + self.width - 1 :].to(self.filters_WKD.dtype), rows))

    def inside(self, low: int, high: int, lag: int) -> Tensor:
        """bool [N,1,1]: does the token `lag` before each of these rows lie in the row's document."""
        return (self.document_offset_S[low:high] >= lag)[:, None, None]

    def tap(self, lag: int) -> Tensor:
        """[K,D]: the weight of the token `lag` before."""
        return self.filters_WKD[self.width - 1 - lag]

    def filtered(self, window: Tensor, low: int, high: int) -> Tensor:
        """z of rows low .. high - 1; window holds rows low - (W - 1) .. high - 1."""
        reach = self.width - 1
        z = window[reach:] * self.tap(0)
        for lag in range(1, self.width):
            before = window[reach - lag : reach - lag + high - low]
            z += torch.where(self.inside(low, high, lag), before, 0.0).mul_(self.tap(lag))
        return z


def convolve(
    k_SKD: Tensor, weight_KDW: Tensor, halos_PWKD: Tensor, document_offset_S: Tensor, lengths: Sequence[int]
) -> Tensor:
    """[S,K,D] in k's dtype."""
    out = k_SKD.new_empty(k_SKD.shape)
    for _, start, piece in _pieces(k_SKD, weight_KDW, halos_PWKD, document_offset_S, lengths):
        for low, high in _ranges(piece, 0):
            window = piece.rows(low - piece.width + 1, high)
            z = piece.filtered(window, low, high)
            out[start + low : start + high] = torch.nn.functional.silu(z).add_(window[piece.width - 1 :])
    return out


def convolve_backward(
    dout_SKD: Tensor,
    k_SKD: Tensor,
    weight_KDW: Tensor,
    halos_PWKD: Tensor,
    document_offset_S: Tensor,
    lengths: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dk in k's dtype, dweight [K,D,W] fp64, dhalos fp32, or fp64 for fp64 keys)."""
    dk = k_SKD.new_empty(k_SKD.shape)
    dfilters_WKD = weight_KDW.new_zeros(weight_KDW.shape, dtype=torch.float64).permute(2, 0, 1).contiguous()
    dhalos = halos_PWKD.new_zeros(halos_PWKD.shape, dtype=_compute_dtype(k_SKD))
    for index, start, piece in _pieces(k_SKD, weight_KDW, halos_PWKD, document_offset_S, lengths):
        length, reach = piece.k_SKD.shape[0], piece.width - 1
        dout = dout_SKD[start : start + length]
        for low, high in _ranges(piece, -reach):
            drows = _backward_of_rows(piece, dout, dfilters_WKD, low, high)
            if low < 0:  # a range is longer than the halo, so the first one holds all of it
                dhalos[index] = drows[:reach]
            dk[start + max(low, 0) : start + high] = drows[max(0, -low) :]
    return dk, dfilters_WKD.permute(1, 2, 0), dhalos


def _backward_of_rows(piece: Piece, dout: Tensor, dfilters_WKD: Tensor, low: int, high: int) -> Tensor:
    """Gradient of rows low .. high - 1 of a piece, halo rows (below 0) included; adds to the filters' gradient.

    A row is read by the W - 1 rows after it, so z is worked out for those as well.
    """
    length, reach = piece.k_SKD.shape[0], piece.width - 1
    first, last = max(low, 0), min(high + reach, length)
    window = piece.rows(first - reach, last)
    z = piece.filtered(window, first, last)
    dout = dout[first:last].to(z.dtype)
    gate = torch.sigmoid(z)
    dz = z.mul_(1 - gate).add_(1).mul_(gate).mul_(dout)
    drows = dz.new_zeros((high - low, *dz.shape[1:]))
    own = high - first
    drows[max(0, -low) :] = dout[:own]
    for lag in range(piece.width):
        begin, end = max(low + lag, 0), min(high + lag, length)  # the rows that read rows low .. high - 1 at this lag
        if begin < end:
            inside = piece.inside(begin, end, lag)
            share = torch.where(inside, dz[begin - first : end - first], 0.0).mul_(piece.tap(lag))
            drows[begin - lag - low : end - lag - low] += share
        inside = piece.inside(first, first + own, lag)
        read = torch.where(inside, window[reach - lag : reach - lag + own], 0.0)
        dfilters_WKD[reach - lag] += read.mul_(dz[:own]).sum(0)
    return drows


def _pieces(
    k_SKD: Tensor, weight_KDW: Tensor, halos_PWKD: Tensor, document_offset_S: Tensor, lengths: Sequence[int]
) -> Iterator[tuple[int, int, Piece]]:
    """(index, first token, piece) of every piece that has tokens."""
    filters = weight_KDW.to(_compute_dtype(k_SKD)).permute(2, 0, 1).contiguous()
    start = 0
    for index, length in enumerate(lengths):
        rows = slice(start, start + length)
        if length:
            yield index, start, Piece(k_SKD[rows], halos_PWKD[index], document_offset_S[rows], filters)
        start += length


def _ranges(piece: Piece, low: int) -> Iterator[tuple[int, int]]:
    """(first row, one past the last) of ranges of bounded size, from row `low` on."""
    length, num_heads, dim = piece.k_SKD.shape
    step = max(piece.width + 1, RANGE_ELEMENTS // max(1, num_heads * dim))
    for begin in range(low, length, step):
        yield begin, min(begin + step, length)


def _compute_dtype(k: Tensor) -> torch.dtype:
    return torch.float64 if k.dtype == torch.float64 else torch.float32
