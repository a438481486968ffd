"""Chunk sums on a GPU: fp64, without atomics, bitwise the same on every run.

Keys at hand ascend, so the keys of a chunk are one contiguous slice. Chunks longer than PART tokens are cut into parts
of PART tokens (by position in the row, whatever is at hand), so that few long chunks fill a GPU as well; a second
kernel adds a chunk's parts in order.

Shape letters: S keys at hand, K key/value heads, D head dim, C chunks, P parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pack import ChunkGeometry, Pack
from ..triton_math import TRITON_TYPE, Variant

# Tokens of a part: 128 KB of bf16 keys at D = 128, and parts take 8 / (2 * PART) of the keys' own bytes.
PART = 512
# Rows that a program adds up side by side; one tree at the end adds them together.
BLOCK_S = 16
NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_heads"], do_not_specialize_on_alignment=["num_heads"])
def _sum_slices(  # type: ignore[no-untyped-def]
    k, edges, sums, num_heads, stride_s, stride_k, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr
):
    """sums[p, head] = sum of keys edges[p] .. edges[p + 1] - 1 of one head."""
    part, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, last = tl.load(edges + part), tl.load(edges + part + 1)
    column_D = tl.arange(0, BLOCK_D)
    row_S = tl.arange(0, BLOCK_S)
    base = k + head.to(tl.int64) * stride_k + column_D[None, :]
    total_SD = tl.zeros((BLOCK_S, BLOCK_D), tl.float64)
    for row in range(first, last, BLOCK_S):
        at_S = row + row_S
        mask_SD = (at_S < last)[:, None] & (column_D < D)[None, :]
        keys_SD = tl.load(base + at_S[:, None].to(tl.int64) * stride_s, mask=mask_SD, other=0.0)
        total_SD += keys_SD.to(tl.float32).to(tl.float64)
    out = sums + (part * num_heads + head) * D + column_D
    tl.store(out, tl.sum(total_SD, 0), mask=column_D < D)


@triton.jit(do_not_specialize=["num_heads"], do_not_specialize_on_alignment=["num_heads"])
def _sum_parts(parts, part_edges, sums, num_heads, D: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """sums[c, head] = parts part_edges[c] .. part_edges[c + 1] - 1 of one head, added in order."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column_D = tl.arange(0, BLOCK_D)
    inside_D = column_D < D
    first, last = tl.load(part_edges + chunk), tl.load(part_edges + chunk + 1)
    total_D = tl.zeros((BLOCK_D,), tl.float64)
    for part in range(first, last):
        total_D += tl.load(parts + (part * num_heads + head) * D + column_D, mask=inside_D, other=0.0)
    tl.store(sums + (chunk * num_heads + head) * D + column_D, total_D, mask=inside_D)


def pool_sums(k_SKD: Tensor, *, pack: Pack, chunk_size: int, k_positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """([C,K,D] fp64 sums, [C] int64 counts) over the keys at hand. No host sync."""
    geometry = pack.chunks(chunk_size)
    num_chunks, (_, num_heads, dim) = geometry.num_chunks, k_SKD.shape
    sums = k_SKD.new_empty((num_chunks, num_heads, dim), dtype=torch.float64)
    if num_chunks == 0 or sums.numel() == 0:
        return sums, torch.zeros(num_chunks, dtype=torch.int64, device=k_SKD.device)
    keys = k_SKD if k_SKD.stride(2) == 1 else k_SKD.contiguous()
    tensors = geometry.tensors(k_SKD.device)
    bounds_C = torch.cat((tensors.start_C, tensors.end_C[-1:]))  # chunks tile the row
    k_positions = None if k_positions is None else k_positions.to(k_SKD.device)
    edges_C = bounds_C if k_positions is None else torch.searchsorted(k_positions, bounds_C)
    if int((geometry.end_C - geometry.start_C).max()) <= PART:
        _launch_slices(keys, edges_C, sums)
    else:
        start_P, part_edges_C = _cut(geometry, bounds_C)
        edges_P = start_P if k_positions is None else torch.searchsorted(k_positions, start_P)
        parts = sums.new_empty((edges_P.numel() - 1, num_heads, dim))
        _launch_slices(keys, edges_P, parts)
        block = triton.next_power_of_2(dim)
        _sum_parts[(num_chunks, num_heads)](
            parts, part_edges_C, sums, num_heads, D=dim, BLOCK_D=block, num_warps=1, num_stages=2
        )
    return sums, edges_C.diff()


def _cut(geometry: ChunkGeometry, bounds_C: Tensor) -> tuple[Tensor, Tensor]:
    """(int64 [P + 1] first token of every part and the row's end, int64 [C + 1] first part of every chunk)."""
    # The host knows how many parts there are; where they lie is worked out on the device.
    num_parts = int((-(-(geometry.end_C - geometry.start_C) // PART)).sum())
    of_chunk_C = (bounds_C.diff() + PART - 1) // PART
    edges_C = torch.nn.functional.pad(of_chunk_C.cumsum(0), (1, 0))
    index_C = torch.arange(geometry.num_chunks, device=bounds_C.device)
    chunk_P = torch.repeat_interleave(index_C, of_chunk_C, output_size=num_parts)
    start_P = bounds_C[chunk_P] + (torch.arange(num_parts, device=bounds_C.device) - edges_C[chunk_P]) * PART
    return torch.cat((start_P, bounds_C[-1:])), edges_C


def _launch_slices(keys: Tensor, edges: Tensor, sums: Tensor) -> None:
    dim = keys.shape[2]
    _sum_slices[(edges.numel() - 1, keys.shape[1])](
        keys,
        edges,
        sums,
        keys.shape[1],
        keys.stride(0),
        keys.stride(1),
        D=dim,
        BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_S=BLOCK_S,
        num_warps=NUM_WARPS,
        num_stages=2,
    )


def variants(head_dims: Iterable[tuple[int, int]], dtypes: Iterable[torch.dtype], target: int) -> Iterator[Variant]:
    """The compiled forms that `pool_sums` launches for keys of these head dims (D, Dv) and dtypes, on any target."""
    dtypes = tuple(dtypes)
    for dim in sorted({dim for dim, _ in head_dims}):
        padded = {"D": dim, "BLOCK_D": triton.next_power_of_2(dim)}
        for dtype in dtypes:
            types = {"k": f"*{TRITON_TYPE[dtype]}", "edges": "*i64", "sums": "*fp64"}
            types |= dict.fromkeys(("num_heads", "stride_s", "stride_k"), "i32")
            aligned = frozenset({"k", "edges", "sums", "stride_s", "stride_k"})
            constants = {**padded, "BLOCK_S": BLOCK_S}
            label = f"pool slices D={dim} {TRITON_TYPE[dtype]}"
            yield Variant(label, _sum_slices, types, constants, NUM_WARPS, 2, dim, dtype, aligned)
        types = {"parts": "*fp64", "part_edges": "*i64", "sums": "*fp64", "num_heads": "i32"}
        aligned = frozenset({"parts", "part_edges", "sums"})
        yield Variant(f"pool parts D={dim}", _sum_parts, types, padded, 1, 2, dim, torch.float32, aligned)
