"""Picked chunks in Triton: gathered query rows against the keys at hand of the chunk they picked.

One launch serves one pick slot. In a slot a row picks one chunk at most, so it stands in one list and one tile: the
kernel reads the row's running result, folds the chunk in and writes it back; no two programs meet, nothing is
accumulated in an order that varies, and no scratch per pick is needed. Programs beyond a slot's last tile end at once.

Shape letters: T queries, S keys, H query heads, K key/value heads, C chunks, P slots, M rows of a tile.
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
from .triton_lists import PickLists
from .triton_tables import TileTable, max_tiles, tile_table
from .triton_tile import (
    finish_softmax,
    fold_keys,
    load_log2_sum,
    load_rows,
    query_gradient,
    store_rows,
)

_UNALIGNED = ["lse", "delta", "entries", "edges", "run_of_tile", "tile_ends", "key_edges", "attended", "scored"]
_UNSPECIALISED = ["slot", "num_slots", "num_chunks", "num_kv_heads", "stride_lt"]
_GENERAL = frozenset((*_UNALIGNED, *_UNSPECIALISED))


@triton.jit
def _pick_tile(  # type: ignore[no-untyped-def]
    tile, edges, run_of_tile, tile_ends, key_edges, slot, num_slots, num_chunks, lists_of_slot,
    EXPAND: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """(KV head, first entry of the list, first row in the list, rows of the list, first key, stop key) of a tile."""
    run = tl.load(run_of_tile + tile)
    kv_chunk = run - slot * lists_of_slot
    at = edges + kv_chunk.to(tl.int64) * num_slots + slot
    first_entry = tl.load(at)
    num_rows = (tl.load(at + 1) - first_entry).to(tl.int32) * EXPAND
    chunk_edge = key_edges + kv_chunk % num_chunks
    begin = (tile - tl.load(tile_ends + run)) * M
    return kv_chunk // num_chunks, first_entry, begin, num_rows, tl.load(chunk_edge), tl.load(chunk_edge + 1)


@triton.jit
def _rows_of_tile(  # type: ignore[no-untyped-def]
    entries, kv, first_entry, begin, num_rows, GROUP: tl.constexpr, EXPAND: tl.constexpr, M: tl.constexpr
):
    """(query_M, query head_M, valid_M), int64."""
    row = begin + tl.arange(0, M)
    valid = row < num_rows
    entry = tl.load(entries + first_entry + row // EXPAND, mask=valid, other=0)
    if EXPAND == 1:
        query = entry // GROUP
        head = entry % GROUP
    else:
        query = entry
        head = row % EXPAND
    return query.to(tl.int64), (kv * GROUP + head).to(tl.int64), valid


@triton.jit(do_not_specialize=_UNSPECIALISED, do_not_specialize_on_alignment=_UNALIGNED)
def picks_forward(  # type: ignore[no-untyped-def]
    q, k, v, k_blocks, v_blocks, out, lse, entries, edges, run_of_tile, tile_ends, key_edges, attended, scored,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh, stride_lt,
    slot, num_slots, num_chunks, num_kv_heads, scale,
    GROUP: tl.constexpr, EXPAND: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One slot's chunks folded into the running out (fp32) and lse. Grid: tiles."""
    lists_of_slot = num_kv_heads * num_chunks
    tile = tl.load(tile_ends + slot * lists_of_slot) + tl.program_id(0)
    if tile >= tl.load(tile_ends + (slot + 1) * lists_of_slot):
        return
    kv, first_entry, begin, num_rows, first, stop = _pick_tile(
        tile, edges, run_of_tile, tile_ends, key_edges, slot, num_slots, num_chunks, lists_of_slot, EXPAND, M
    )
    query, head, valid = _rows_of_tile(entries, kv, first_entry, begin, num_rows, GROUP, EXPAND, M)
    # The running result is a softmax that has been normalised: total 1, or nothing yet.
    top = tl.load(lse + query * stride_lt + head, mask=valid, other=-float("inf")) * LOG2_E
    keys = (k + kv.to(tl.int64) * stride_kh, stride_kt, k_blocks, kv * stride_kh)
    values = (v + kv.to(tl.int64) * stride_vh, stride_vt, v_blocks, kv * stride_vh)
    acc, top, total = fold_keys(
        load_rows(q, query * stride_qt + head * stride_qh, valid, D, DP), keys, values,
        load_rows(out, query * stride_ot + head * stride_oh, valid, V, VP), top,
        tl.where(top == -float("inf"), 0.0, 1.0),
        first, first + (stop - first) // N * N, stop, tl.zeros((M,), tl.int32) + stop,
        scale * LOG2_E, D, DP, V, VP, N,
    )  # fmt: skip
    result, log_sum = finish_softmax(acc, top, total)
    store_rows(out, query * stride_ot + head * stride_oh, result, valid, M, V, VP)
    tl.store(lse + query * stride_lt + head, log_sum, mask=valid)
    program = slot.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(attended + program, tl.minimum(num_rows - begin, M).to(tl.int64) * (stop - first))
    tl.store(scored + program, tl.cdiv(stop - first, N).to(tl.int64) * (M * N))


@triton.jit(do_not_specialize=_UNSPECIALISED, do_not_specialize_on_alignment=_UNALIGNED)
def picks_dq(  # type: ignore[no-untyped-def]
    q, k, v, k_blocks, v_blocks, dout, dq, lse, delta, entries, edges, run_of_tile, tile_ends, key_edges,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dt, stride_dh, stride_gt, stride_gh,
    stride_lt, slot, num_slots, num_chunks, num_kv_heads, scale,
    GROUP: tl.constexpr, EXPAND: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One slot's share added to dq / scale (fp32). d: dout's strides, g: dq's. Grid: tiles."""
    lists_of_slot = num_kv_heads * num_chunks
    tile = tl.load(tile_ends + slot * lists_of_slot) + tl.program_id(0)
    if tile >= tl.load(tile_ends + (slot + 1) * lists_of_slot):
        return
    kv, first_entry, begin, num_rows, first, stop = _pick_tile(
        tile, edges, run_of_tile, tile_ends, key_edges, slot, num_slots, num_chunks, lists_of_slot, EXPAND, M
    )
    query, head, valid = _rows_of_tile(entries, kv, first_entry, begin, num_rows, GROUP, EXPAND, M)
    lse2 = load_log2_sum(lse, query * stride_lt + head, valid)
    delta_M = tl.load(delta + query * stride_lt + head, mask=valid, other=0.0)
    keys = (k + kv.to(tl.int64) * stride_kh, stride_kt, k_blocks, kv * stride_kh)
    values = (v + kv.to(tl.int64) * stride_vh, stride_vt, v_blocks, kv * stride_vh)
    acc = query_gradient(
        load_rows(q, query * stride_qt + head * stride_qh, valid, D, DP),
        load_rows(dout, query * stride_dt + head * stride_dh, valid, V, VP), keys, values,
        load_rows(dq, query * stride_gt + head * stride_gh, valid, D, DP), lse2, delta_M,
        first, first + (stop - first) // N * N, stop, tl.zeros((M,), tl.int32) + stop,
        scale * LOG2_E, D, DP, V, VP, N,
    )  # fmt: skip
    store_rows(dq, query * stride_gt + head * stride_gh, acc, valid, M, D, DP)


def run_picks_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lists: PickLists, key_edges_C: Tensor, tile: Tile,
    target: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fold all picks into out (fp32) and lse, slot by slot; returns (attended, scored), the pairs.

    Scale is not negative.
    """
    tiles, programs, constants, sizes = _pick_tiles(lists, tile, q, v)
    counts = q.new_zeros((2, lists.num_slots * programs), dtype=torch.int64)
    for slot in range(lists.num_slots):
        picks_forward[(programs,)](
            q, k, v, *key_blocks(k, v, tile, target), out, lse,
        lists.entries_E, lists.edges, tiles.run_of_tile, tiles.ends, key_edges_C,
            *counts, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2], lse.stride(0),
            slot, *sizes, scale, **constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    attended, scored = counts.sum(1)
    return attended, scored


def run_picks_dq(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dq: Tensor, lse: Tensor, delta: Tensor, lists: PickLists,
    key_edges_C: Tensor, tile: Tile, target: int, scale: float,
) -> None:  # fmt: skip
    """Add the share of all picks to dq / scale (fp32), slot by slot."""
    tiles, programs, constants, sizes = _pick_tiles(lists, tile, q, v)
    for slot in range(lists.num_slots):
        picks_dq[(programs,)](
            q, k, v, *key_blocks(k, v, tile, target), dout, dq, lse, delta,
        lists.entries_E, lists.edges, tiles.run_of_tile, tiles.ends, key_edges_C,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2], *dq.stride()[:2], lse.stride(0),
            slot, *sizes, scale, **constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip


def _pick_tiles(
    lists: PickLists, tile: Tile, q: Tensor, v: Tensor
) -> tuple[TileTable, int, dict[str, int], tuple[int, int, int]]:
    """The tiles of all slots in order (slot, KV head, chunk), enough programs for a slot, the kernels' arguments."""
    group = q.shape[1] // lists.num_kv_heads
    expand = group // lists.rows_per_query
    rows_KCP = lists.edges.diff().view(lists.num_kv_heads, lists.num_chunks, lists.num_slots) * expand
    rows = q.shape[0] * q.shape[1]
    tiles = tile_table(rows_KCP.permute(2, 0, 1).flatten(), tile.block_m, rows * lists.num_slots)
    programs = max_tiles(lists.num_kv_heads * lists.num_chunks, tile.block_m, rows)
    sizes = lists.num_slots, lists.num_chunks, lists.num_kv_heads
    return tiles, programs, _constants(q.shape[2], v.shape[2], group, expand, tile), sizes


def _constants(head_dim: int, value_dim: int, group: int, expand: int, tile: Tile) -> dict[str, int]:
    return {
        "GROUP": group, "EXPAND": expand, "D": head_dim, "DP": padded(head_dim), "V": value_dim,
        "VP": padded(value_dim), "M": tile.block_m, "N": tile.block_n,
    }  # fmt: skip


def variants(head_dims: Iterable[tuple[int, int]], dtypes: Iterable[torch.dtype], target: int) -> Iterator[Variant]:
    """The compiled forms that launches use, for heads of a group that pick apart or together."""
    for (head_dim, value_dim), dtype in product(head_dims, dtypes):
        for group, short in product(groups_of_variants(head_dim, value_dim, dtype), (False, True)):
            for expand in dict.fromkeys((1, group)):
                yield from _variants_of(head_dim, value_dim, dtype, target, group, expand, short=short)


def _variants_of(
    head_dim: int, value_dim: int, dtype: torch.dtype, target: int, group: int, expand: int, *, short: bool
) -> Iterator[Variant]:
    narrow = TRITON_TYPE[dtype]
    kinds: tuple[tuple[Kind, Any, dict[str, str]], ...] = (
        ("picks forward", picks_forward, {"out": "fp32", "attended": "i64", "scored": "i64"}),
        ("picks dq", picks_dq, {"dout": narrow, "dq": "fp32", "delta": "fp32"}),
    )
    for kind, kernel, pointers in kinds:
        tile = tile_of(kind, head_dim, value_dim, dtype, target, short=short)
        shared = {"q": narrow, "k": narrow, "v": narrow, "lse": "fp32", "edges": "i64"}
        label = f"{'short' if short else 'long'}, {'head' if expand == 1 else 'group'}, {group} heads a group"
        yield variant(
            kernel,
            shared | pointers,
            _constants(head_dim, value_dim, group, expand, tile),
            tile,
            dtype,
            target,
            _GENERAL,
            label,
        )
