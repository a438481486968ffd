"""Causal segments in Triton: documents under Full, own chunks under MoBA. Every row is written fresh.

A program takes one tile: consecutive query rows of one segment and one KV head, against the segment's keys at hand up
to the last one that any of its queries sees. Queries at hand of a segment, times the heads of the group, are a run of
rows without gaps, so a group of any size fills its tiles. Long tiles start first.

Shape letters: T queries, S keys, H query heads, K key/value heads, G segments, M rows of a tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_math import LOG2_E, TRITON_TYPE, Variant
from .triton_config import Kind, Tile, groups_of_variants, key_blocks, padded, tile_of, variant
from .triton_geometry import DeviceGeometry
from .triton_tables import TileTable, tile_table
from .triton_tile import finish_softmax, fold_keys, load_log2_sum, load_rows, query_gradient, store_rows

_UNALIGNED = ["lse", "delta", "run_of_tile", "tile_ends", "query_edges", "key_edges", "visible", "attended", "scored"]
_UNSPECIALISED = ["num_segments", "stride_lt"]
_GENERAL = frozenset((*_UNALIGNED, *_UNSPECIALISED))


@triton.jit
def _causal_tile(  # type: ignore[no-untyped-def]
    tile, run_of_tile, tile_ends, query_edges, key_edges, visible, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """(first query, first row and rows of the segment; first, whole_stop and stop among the keys at hand) of a tile."""
    segment = tl.load(run_of_tile + tile)
    first_query = tl.load(query_edges + segment)
    num_rows = (tl.load(query_edges + segment + 1) - first_query) * GROUP
    begin = (tile - tl.load(tile_ends + segment)) * M
    first = tl.load(key_edges + segment)
    lowest = tl.load(visible + first_query + begin // GROUP)
    stop = tl.load(visible + first_query + (tl.minimum(begin + M, num_rows) - 1) // GROUP)
    return first_query, begin, num_rows, first, first + (lowest - first) // N * N, stop


@triton.jit
def _rows_of_tile(first_query, kv, begin, num_rows, GROUP: tl.constexpr, M: tl.constexpr):  # type: ignore[no-untyped-def]
    """(query_M, query head_M, valid_M), int64."""
    row = begin + tl.arange(0, M)
    query = first_query + tl.minimum(row, num_rows - 1) // GROUP
    return query.to(tl.int64), (kv * GROUP + row % GROUP).to(tl.int64), row < num_rows


@triton.jit(do_not_specialize=_UNSPECIALISED, do_not_specialize_on_alignment=_UNALIGNED)
def causal_forward(  # type: ignore[no-untyped-def]
    q, k, v, k_blocks, v_blocks, out, lse, run_of_tile, tile_ends, query_edges, key_edges, visible, attended, scored,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh, stride_lt,
    num_segments, scale,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out and lse of every query at hand over its segment. Grid: (tiles, KV heads)."""
    tile = tl.load(tile_ends + num_segments) - 1 - tl.program_id(0)
    if tile < 0:
        return
    kv = tl.program_id(1)
    first_query, begin, num_rows, first, whole_stop, stop = _causal_tile(
        tile, run_of_tile, tile_ends, query_edges, key_edges, visible, GROUP, M, N
    )
    query, head, valid = _rows_of_tile(first_query, kv, begin, num_rows, GROUP, M)
    seen = tl.load(visible + query)
    queries = load_rows(q, query * stride_qt + head * stride_qh, valid, D, DP)
    keys = (k + kv.to(tl.int64) * stride_kh, stride_kt, k_blocks, kv * stride_kh)
    values = (v + kv.to(tl.int64) * stride_vh, stride_vt, v_blocks, kv * stride_vh)
    acc, top, total = fold_keys(
        queries, keys, values,
        tl.zeros((M, VP), tl.float32), tl.full((M,), -float("inf"), tl.float32), tl.zeros((M,), tl.float32),
        first, whole_stop, stop, seen, scale * LOG2_E, D, DP, V, VP, N,
    )  # fmt: skip
    result, log_sum = finish_softmax(acc, top, total)
    store_rows(out, query * stride_ot + head * stride_oh, result, valid, M, V, VP)
    tl.store(lse + query * stride_lt + head, log_sum, mask=valid)
    program = kv.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(attended + program, tl.sum(tl.where(valid, seen - first, 0).to(tl.int64), 0))
    tl.store(scored + program, tl.cdiv(stop - first, N).to(tl.int64) * (M * N))


@triton.jit(do_not_specialize=_UNSPECIALISED, do_not_specialize_on_alignment=_UNALIGNED)
def causal_dq(  # type: ignore[no-untyped-def]
    q, k, v, k_blocks, v_blocks, dout, dq, lse, delta, run_of_tile, tile_ends, query_edges, key_edges, visible,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dt, stride_dh, stride_gt, stride_gh,
    stride_lt, num_segments, scale, factor,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dq / scale * factor of every query at hand from its segment (d: dout's strides, g: dq's). Grid: as above."""
    tile = tl.load(tile_ends + num_segments) - 1 - tl.program_id(0)
    if tile < 0:
        return
    kv = tl.program_id(1)
    first_query, begin, num_rows, first, whole_stop, stop = _causal_tile(
        tile, run_of_tile, tile_ends, query_edges, key_edges, visible, GROUP, M, N
    )
    query, head, valid = _rows_of_tile(first_query, kv, begin, num_rows, GROUP, M)
    seen = tl.load(visible + query)
    lse2 = load_log2_sum(lse, query * stride_lt + head, valid)
    delta_M = tl.load(delta + query * stride_lt + head, mask=valid, other=0.0)
    keys = (k + kv.to(tl.int64) * stride_kh, stride_kt, k_blocks, kv * stride_kh)
    values = (v + kv.to(tl.int64) * stride_vh, stride_vt, v_blocks, kv * stride_vh)
    acc = query_gradient(
        load_rows(q, query * stride_qt + head * stride_qh, valid, D, DP),
        load_rows(dout, query * stride_dt + head * stride_dh, valid, V, VP), keys, values,
        tl.zeros((M, DP), tl.float32), lse2, delta_M,
        first, whole_stop, stop, seen, scale * LOG2_E, D, DP, V, VP, N,
    )  # fmt: skip
    store_rows(dq, query * stride_gt + head * stride_gh, acc * factor, valid, M, D, DP)


def run_causal_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    geometry: DeviceGeometry,
    tile: Tile,
    target: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Write out (any dtype) and lse of all queries; returns (attended, scored), the pairs. Scale is not negative."""
    group = q.shape[1] // k.shape[1]
    tiles = _segment_tiles(geometry, q.shape[0], group, tile.block_m)
    counts = q.new_zeros((2, k.shape[1] * tiles.bound), dtype=torch.int64)
    causal_forward[(tiles.bound, k.shape[1])](
        q, k, v, *key_blocks(k, v, tile, target), out, lse,
        tiles.run_of_tile, tiles.ends, geometry.query_edges_G, geometry.key_edges_G,
        geometry.visible_T, *counts, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2],
        lse.stride(0), geometry.num_segments, scale, **_constants(q.shape[2], v.shape[2], group, tile),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    attended, scored = counts.sum(1)  # read much later, if ever: numbers of programs would be kept until then
    return attended, scored


def run_causal_dq(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dq: Tensor, lse: Tensor, delta: Tensor, geometry: DeviceGeometry,
    tile: Tile, target: int, scale: float, factor: float,
) -> None:  # fmt: skip
    """Write dq / scale * factor (any dtype) of all queries; factor is the scale unless picks are still to be added."""
    group = q.shape[1] // k.shape[1]
    tiles = _segment_tiles(geometry, q.shape[0], group, tile.block_m)
    causal_dq[(tiles.bound, k.shape[1])](
        q, k, v, *key_blocks(k, v, tile, target), dout, dq, lse, delta,
        tiles.run_of_tile, tiles.ends, geometry.query_edges_G, geometry.key_edges_G,
        geometry.visible_T, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2], *dq.stride()[:2],
        lse.stride(0), geometry.num_segments, scale, factor, **_constants(q.shape[2], v.shape[2], group, tile),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _segment_tiles(geometry: DeviceGeometry, num_queries: int, group: int, block_m: int) -> TileTable:
    """The tiles of all segments; a query at hand is `group` rows."""
    return geometry.derived(
        ("segment tiles", group, block_m),
        lambda: tile_table(geometry.query_edges_G.diff() * group, block_m, num_queries * group),
    )


def _constants(head_dim: int, value_dim: int, group: int, tile: Tile) -> dict[str, int]:
    return {
        "GROUP": group, "D": head_dim, "DP": padded(head_dim), "V": value_dim, "VP": padded(value_dim),
        "M": tile.block_m, "N": tile.block_n,
    }  # fmt: skip


def variants(head_dims: Iterable[tuple[int, int]], dtypes: Iterable[torch.dtype], target: int) -> Iterator[Variant]:
    """The compiled forms that launches use: results in the inputs' dtype, and fp32 for scratch and partials."""
    for (head_dim, value_dim), dtype in product(head_dims, dtypes):
        for group, short in product(groups_of_variants(head_dim, value_dim, dtype), (False, True)):
            yield from _variants_of(head_dim, value_dim, dtype, target, group, short=short)


def _variants_of(
    head_dim: int, value_dim: int, dtype: torch.dtype, target: int, group: int, *, short: bool
) -> Iterator[Variant]:
    narrow, wide = TRITON_TYPE[dtype], "fp32"
    for result in dict.fromkeys((narrow, wide)):
        kinds: tuple[tuple[Kind, Any, dict[str, str]], ...] = (
            ("causal forward", causal_forward, {"out": result, "attended": "i64", "scored": "i64"}),
            ("causal dq", causal_dq, {"dout": narrow, "dq": result, "delta": "fp32"}),
        )
        label = f"{'short' if short else 'long'}, {result} result, {group} heads a group"
        for kind, kernel, pointers in kinds:
            tile = tile_of(kind, head_dim, value_dim, dtype, target, short=short)
            yield variant(
                kernel, {"q": narrow, "k": narrow, "v": narrow, "lse": "fp32", **pointers},
                _constants(head_dim, value_dim, group, tile), tile, dtype, target, _GENERAL, label,
            )  # fmt: skip
