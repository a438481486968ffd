"""The key convolution on a GPU: one kernel forward, one backward, bitwise the same on every run.

A program takes a tile of rows of one piece and one head. Rows of a piece are counted from its first token; rows
-(W - 1) .. -1 are its halo. Nothing is kept between forward and backward: the backward works z out again for every row
that reads a row of the tile, from keys that lie in the cache by then. Weight gradients are summed by program in rows'
order, written out, and added up by torch: no atomics.

Shape letters: S tokens at hand, K key/value heads, D head dim, W width of the filter, P pieces that k is made of,
T rows of a tile, N programs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_math import TRITON_TYPE, Variant, narrow

# Rows that a backward program sums the weight gradient over: its partial sums are 2 W / SUMMED_ROWS of the keys' bytes.
SUMMED_ROWS = 512
# Elements of a tile: what keeps the registers low enough for several programs on a multiprocessor.
FORWARD_ELEMENTS = 2048
BACKWARD_ELEMENTS = 1024
NUM_WARPS = 4
# What models use; other widths up to 8 compile when they are first run.
WIDTHS = (3, 5)
UNSPECIALISED = ("num_heads", "num_rows", "num_tiles")


@triton.jit
def _tap(weight, lag, head, column_D, D: tl.constexpr, W: tl.constexpr):  # type: ignore[no-untyped-def]
    """[1,D]: the weight of the token `lag` before."""
    at_D = (head * D + column_D) * W + (W - 1 - lag)
    return tl.load(weight + at_D, mask=column_D < D, other=0.0)[None, :]


@triton.jit
def _keys(k, halo, row_T, wanted_T, stride, num_heads, head, column_D, D: tl.constexpr, W: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 [T,D] keys of rows of a piece, from its halo below row 0; zeros where they are not wanted."""
    of_piece_T = k + row_T.to(tl.int64) * stride
    of_halo_T = halo + (row_T + (W - 1)).to(tl.int64) * num_heads * D + head * D
    at_TD = tl.where(row_T >= 0, of_piece_T, of_halo_T)[:, None] + column_D[None, :]
    return tl.load(at_TD, mask=wanted_T[:, None] & (column_D < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _filtered(  # type: ignore[no-untyped-def]
    k, halo, weight, row_T, offset_T, inside_T, stride, num_heads, head, column_D, D: tl.constexpr, W: tl.constexpr
):
    """fp32 [T,D]: the sum of the taps of each row that is inside, over its own document."""
    z_TD = _keys(k, halo, row_T, inside_T, stride, num_heads, head, column_D, D, W) * _tap(
        weight, 0, head, column_D, D, W
    )
    for lag in tl.static_range(1, W):
        wanted_T = inside_T & (offset_T >= lag)
        keys_TD = _keys(k, halo, row_T - lag, wanted_T, stride, num_heads, head, column_D, D, W)
        z_TD += keys_TD * _tap(weight, lag, head, column_D, D, W)
    return z_TD


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNSPECIALISED)
def _convolve(  # type: ignore[no-untyped-def]
    k, halo, weight, offset, out, num_heads, num_rows, stride_s, stride_k,
    D: tl.constexpr, BLOCK_D: tl.constexpr, W: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside_T = row_T < num_rows
    column_D = tl.arange(0, BLOCK_D)
    keys = k + head.to(tl.int64) * stride_k
    offset_T = tl.load(offset + row_T, mask=inside_T, other=0)
    z_TD = _filtered(keys, halo, weight, row_T, offset_T, inside_T, stride_s, num_heads, head, column_D, D, W)
    own_TD = _keys(keys, halo, row_T, inside_T, stride_s, num_heads, head, column_D, D, W)
    result_TD = own_TD + z_TD * tl.sigmoid(z_TD)
    at_TD = out + ((row_T.to(tl.int64) * num_heads + head) * D)[:, None] + column_D[None, :]
    tl.store(at_TD, narrow(result_TD, out.dtype.element_ty), mask=inside_T[:, None] & (column_D < D)[None, :])


@triton.jit
def _load_rows(x, row_T, inside_T, num_heads, head, column_D, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 [T,D] rows of a contiguous [rows,K,D] tensor; zeros where they are not inside."""
    at_TD = x + ((row_T.to(tl.int64) * num_heads + head) * D)[:, None] + column_D[None, :]
    return tl.load(at_TD, mask=inside_T[:, None] & (column_D < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _inner_gradient(  # type: ignore[no-untyped-def]
    k, halo, weight, offset, dout, row_T, num_rows, stride, num_heads, head, column_D, D: tl.constexpr, W: tl.constexpr
):
    """(fp32 [T,D] gradient of z, [T] offsets) of rows; zeros outside the piece."""
    inside_T = (row_T >= 0) & (row_T < num_rows)
    offset_T = tl.load(offset + row_T, mask=inside_T, other=0)
    z_TD = _filtered(k, halo, weight, row_T, offset_T, inside_T, stride, num_heads, head, column_D, D, W)
    gate_TD = tl.sigmoid(z_TD)
    dout_TD = _load_rows(dout, row_T, inside_T, num_heads, head, column_D, D)
    return dout_TD * gate_TD * (1 + z_TD * (1 - gate_TD)), offset_T


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNSPECIALISED)
def _convolve_backward(  # type: ignore[no-untyped-def]
    k, halo, weight, offset, dout, dk, dhalo, dweight_parts, num_heads, num_rows, num_tiles, stride_s, stride_k,
    D: tl.constexpr, BLOCK_D: tl.constexpr, W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """dk and dhalo of num_tiles tiles of rows, the halo's first, and their share of the weight gradient."""
    part, head = tl.program_id(0), tl.program_id(1)
    column_D = tl.arange(0, BLOCK_D)
    tap_W = tl.arange(0, BLOCK_W)
    keys = k + head.to(tl.int64) * stride_k
    dtaps_WD = tl.zeros((BLOCK_W, BLOCK_D), tl.float32)
    for tile in range(num_tiles):
        row_T = (part * num_tiles + tile) * BLOCK_T + tl.arange(0, BLOCK_T) - (W - 1)
        own_TD = _keys(keys, halo, row_T, row_T < num_rows, stride_s, num_heads, head, column_D, D, W)
        inside_T = (row_T >= 0) & (row_T < num_rows)
        drow_TD = _load_rows(dout, row_T, inside_T, num_heads, head, column_D, D)
        for lag in range(W):  # the row `lag` later has read this one through tap W - 1 - lag
            dz_TD, ahead_T = _inner_gradient(
                keys, halo, weight, offset, dout, row_T + lag, num_rows, stride_s, num_heads, head, column_D, D, W
            )
            reads_T1 = (ahead_T >= lag)[:, None]
            drow_TD += tl.where(reads_T1, dz_TD * _tap(weight, lag, head, column_D, D, W), 0.0)
            dtap_D = tl.sum(tl.where(reads_T1, dz_TD * own_TD, 0.0), 0)
            dtaps_WD += tl.where((tap_W == W - 1 - lag)[:, None], dtap_D[None, :], 0.0)
        at_T = (row_T.to(tl.int64) * num_heads + head) * D
        mask_TD = inside_T[:, None] & (column_D < D)[None, :]
        tl.store(dk + at_T[:, None] + column_D[None, :], narrow(drow_TD, dk.dtype.element_ty), mask=mask_TD)
        halo_T = at_T + (W - 1) * num_heads * D
        mask_TD = (row_T < 0)[:, None] & (column_D < D)[None, :]
        tl.store(dhalo + halo_T[:, None] + column_D[None, :], drow_TD, mask=mask_TD)
    at_WD = ((part.to(tl.int64) * num_heads + head) * W + tap_W)[:, None] * D + column_D[None, :]
    tl.store(dweight_parts + at_WD, dtaps_WD, mask=(tap_W < W)[:, None] & (column_D < D)[None, :])


def convolve(
    k_SKD: Tensor, weight_KDW: Tensor, halos_PWKD: Tensor, document_offset_S: Tensor, lengths: Sequence[int]
) -> Tensor:
    """[S,K,D] in k's dtype."""
    keys, filters, halos, offsets = _prepared(k_SKD, weight_KDW, halos_PWKD, document_offset_S)
    out = keys.new_empty(keys.shape)
    constants = _constants(weight_KDW.shape[1], weight_KDW.shape[2], FORWARD_ELEMENTS)
    for index, start, end in _pieces(lengths):
        _convolve[(triton.cdiv(end - start, constants["BLOCK_T"]), keys.shape[1])](
            keys[start:end],
            halos[index],
            filters,
            offsets[start:end],
            out[start:end],
            keys.shape[1],
            end - start,
            keys.stride(0),
            keys.stride(1),
            **constants,
            num_warps=NUM_WARPS,
            num_stages=1,
        )
    return out


def convolve_backward(
    dout_SKD: Tensor,
    k_SKD: Tensor,
    weight_KDW: Tensor,
    halos_PWKD: Tensor,
    document_offset_S: Tensor,
    lengths: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dk in k's dtype, dweight fp64 [K,D,W], dhalos fp32)."""
    keys, filters, halos, offsets = _prepared(k_SKD, weight_KDW, halos_PWKD, document_offset_S)
    dout = dout_SKD.contiguous()
    num_heads, dim, width = weight_KDW.shape
    constants = _constants(dim, width, BACKWARD_ELEMENTS) | {"BLOCK_W": triton.next_power_of_2(width)}
    dk, dhalos = keys.new_empty(keys.shape), torch.zeros(halos.shape, dtype=torch.float32, device=keys.device)
    dfilters_KWD = torch.zeros((num_heads, width, dim), dtype=torch.float64, device=keys.device)
    for index, start, end in _pieces(lengths):
        rows = end - start + width - 1
        programs, tiles = triton.cdiv(rows, SUMMED_ROWS), triton.cdiv(min(rows, SUMMED_ROWS), constants["BLOCK_T"])
        parts_NKWD = keys.new_empty((programs, num_heads, width, dim), dtype=torch.float32)
        _convolve_backward[(programs, num_heads)](
            keys[start:end],
            halos[index],
            filters,
            offsets[start:end],
            dout[start:end],
            dk[start:end],
            dhalos[index],
            parts_NKWD,
            num_heads,
            end - start,
            tiles,
            keys.stride(0),
            keys.stride(1),
            **constants,
            num_warps=NUM_WARPS,
            num_stages=1,
        )
        dfilters_KWD += parts_NKWD.sum(0, dtype=torch.float64)
    return dk, dfilters_KWD.transpose(1, 2), dhalos


def _prepared(k: Tensor, weight: Tensor, halos: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Laid out as the kernels read them; only small tensors are copied, and keys whose channels are not adjacent."""
    keys = k if k.stride(2) == 1 else k.contiguous()
    return keys, weight.float().contiguous(), halos.contiguous(), offset.to(torch.int32).contiguous()


def _pieces(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(index, first token, one past the last) of every piece that has tokens."""
    start = 0
    for index, length in enumerate(lengths):
        if length:
            yield index, start, start + length
        start += length


def _constants(dim: int, width: int, elements: int) -> dict[str, int]:
    padded = triton.next_power_of_2(dim)
    return {"D": dim, "BLOCK_D": padded, "W": width, "BLOCK_T": max(1, elements // padded)}


def variants(head_dims: Iterable[tuple[int, int]], dtypes: Iterable[torch.dtype], target: int) -> Iterator[Variant]:
    """The compiled forms that `key_conv` launches for keys of these head dims (D, Dv) and dtypes, on any target."""
    dtypes = tuple(dtypes)
    for dim in sorted({dim for dim, _ in head_dims}):
        for dtype in dtypes:
            for width in WIDTHS:
                yield _variant(_convolve, ("out",), dim, dtype, width)
                yield _variant(_convolve_backward, ("dout", "dk"), dim, dtype, width)


def _variant(kernel: object, like_k: tuple[str, ...], dim: int, dtype: torch.dtype, width: int) -> Variant:
    pointers = dict.fromkeys(("k", "halo", *like_k), f"*{TRITON_TYPE[dtype]}")
    pointers |= {"weight": "*fp32", "offset": "*i32"}
    sizes = ["num_heads", "num_rows", "stride_s", "stride_k"]
    constants = _constants(dim, width, FORWARD_ELEMENTS)
    if kernel is _convolve_backward:
        pointers |= {"dhalo": "*fp32", "dweight_parts": "*fp32"}
        sizes.append("num_tiles")
        constants = _constants(dim, width, BACKWARD_ELEMENTS) | {"BLOCK_W": triton.next_power_of_2(width)}
    types = pointers | dict.fromkeys(sizes, "i32")
    # Offsets of a piece that begins anywhere are not aligned.
    aligned = frozenset({*pointers, "stride_s", "stride_k"} - {"offset"})
    label = f"key conv{' backward' if kernel is _convolve_backward else ''} D={dim} {TRITON_TYPE[dtype]} W={width}"
    return Variant(label, kernel, types, constants, NUM_WARPS, 1, dim, dtype, aligned)
