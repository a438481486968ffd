"""The work of one attention call as tiles: query rows of one KV head against one contiguous slice of the keys at hand.

A query row is one (query, head): row id = query * H + head; the id T * H stands for padding. Tiles come in steps;
within a step every row stands at most once, so a step's results are merged in place without any collision.

- `causal_steps`: every query against its segment's keys up to itself. Full takes documents as segments, MoBA's own
  chunk takes chunks. Step j holds each tile of queries against the j-th slice of its segment.
- `pick_steps`: slot by slot, the picks sorted by chunk (a counting sort, stable, so the order is that of the tokens).

Shape letters: T queries at hand, S keys at hand, H query heads, K key/value heads, N tiles, M rows of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..pack import IntArray
from .call import AttendCall, host_positions

# Tile shapes for CPU GEMMs: rows enough to amortise a slice of keys, slices short enough to waste little at the
# diagonal. A tile of queries holds this many tokens, times H/K rows each.
MAX_CAUSAL_QUERIES = 64
MAX_CAUSAL_SLICE = 256
MAX_PICK_ROWS = 256
MAX_PICK_SLICE = 4096


@dataclass(frozen=True)
class Step:
    """Tiles with one slice length. Host arrays are numpy, `rows_NM` lies on the device."""

    rows_NM: Tensor
    key_start_N: IntArray
    key_len_N: IntArray
    kv_head_N: IntArray
    length: int
    """Slots for keys in every tile; key_len <= length."""
    causal: bool
    """Rows see keys up to their own position only; otherwise the whole slice."""
    fresh: bool
    """No row of this step has been written before."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one call."""

    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int

    @classmethod
    def of(cls, q_THD: Tensor, k_SKD: Tensor) -> Shape:
        return cls(q_THD.shape[0], k_SKD.shape[0], q_THD.shape[1], k_SKD.shape[1])

    @property
    def pad_row(self) -> int:
        return self.num_queries * self.num_heads


def visible_keys(call: AttendCall) -> IntArray:
    """[T + 1]: how many keys at hand lie at or before each query (they are a prefix); 0 for the padding query."""
    query_T = host_positions(call.q_positions, call.pack.num_tokens)
    if call.k_positions is None:
        visible = query_T + 1
    else:
        key_S = host_positions(call.k_positions, call.pack.num_tokens)
        visible = np.searchsorted(key_S, query_T, side="right")
    return np.append(visible, 0)


def _power_of_two(value: int, low: int, high: int) -> int:
    """The power of two at or above `value`, held within [low, high]."""
    return min(high, max(low, 1 << max(0, value - 1).bit_length()))


def causal_steps(
    query_edges: IntArray, key_edges: IntArray, visible_T: IntArray, shape: Shape, device: torch.device
) -> Iterator[Step]:
    """Segment s holds queries query_edges[s] .. query_edges[s+1]-1 and keys key_edges[s] .. key_edges[s+1]-1."""
    queries_of, keys_of = np.diff(query_edges), np.diff(key_edges)
    if not shape.num_queries or not shape.num_keys:
        return
    tile_queries = _power_of_two(int(queries_of.max()), 8, MAX_CAUSAL_QUERIES)
    length = _power_of_two(int(keys_of.max()), 8, MAX_CAUSAL_SLICE)
    tiles_of = -(-queries_of // tile_queries)
    segment_N = np.repeat(np.arange(len(tiles_of)), tiles_of)
    index_N = np.arange(len(segment_N)) - np.repeat(np.cumsum(tiles_of) - tiles_of, tiles_of)
    first_N = query_edges[segment_N] + index_N * tile_queries
    count_N = np.minimum(tile_queries, query_edges[segment_N + 1] - first_N)
    start_N = key_edges[segment_N]
    seen_N = np.minimum(visible_T[first_N + count_N - 1], key_edges[segment_N + 1]) - start_N
    heads_of_kv = shape.num_heads // shape.num_kv_heads
    kv_head = torch.arange(shape.num_kv_heads, device=device)
    slot_M = torch.arange(tile_queries * heads_of_kv, device=device)
    for j in range(-(-int(seen_N.max()) // length)):
        active = np.flatnonzero(seen_N > j * length)
        key_start = start_N[active] + j * length
        key_len = np.minimum(length, seen_N[active] - j * length)
        # Tiles whose first query sees the whole slice need no mask; they are a step of their own.
        whole = (key_len == length) & (visible_T[first_N[active]] >= key_start + length)
        for causal, chosen in ((False, np.flatnonzero(whole)), (True, np.flatnonzero(~whole))):
            if not len(chosen):
                continue
            first = torch.from_numpy(first_N[active[chosen]]).to(device)[:, None, None]
            count = torch.from_numpy(count_N[active[chosen]]).to(device)[:, None, None]
            token = first + slot_M // heads_of_kv
            rows = token * shape.num_heads + kv_head[:, None] * heads_of_kv + slot_M % heads_of_kv  # [N,K,M]
            rows = torch.where(slot_M // heads_of_kv < count, rows, shape.pad_row)
            repeat = shape.num_kv_heads
            yield Step(
                rows_NM=rows.flatten(0, 1),
                key_start_N=np.repeat(key_start[chosen], repeat),
                key_len_N=np.repeat(key_len[chosen], repeat),
                kv_head_N=np.tile(np.arange(repeat), len(chosen)),
                length=length,
                causal=causal,
                fresh=j == 0,
            )


def pick_steps(picks_THP: Tensor, key_edges_C: IntArray, shape: Shape, device: torch.device) -> Iterator[Step]:
    """Chunk c holds keys key_edges_C[c] .. key_edges_C[c+1]-1 of those at hand (none where it is not at hand)."""
    keys_of = np.diff(key_edges_C)
    if not picks_THP.numel() or not shape.num_keys:
        return
    length = min(MAX_PICK_SLICE, -(-int(keys_of.max()) // 8) * 8)
    num_slices = len(keys_of) * shape.num_kv_heads
    # Fixed by sizes known beforehand, never by the picks: a row's tile must not depend on what later rows picked.
    expected = shape.num_queries * shape.num_heads // max(1, num_slices)
    tile_rows = _power_of_two(expected // 2, 16, MAX_PICK_ROWS)
    heads_of_kv = shape.num_heads // shape.num_kv_heads
    kv_head_H = torch.arange(shape.num_heads, device=device) // heads_of_kv
    has_keys_C = torch.from_numpy(keys_of > 0).to(device)
    for slot in range(picks_THP.shape[2]):
        pick_TH = picks_THP[:, :, slot]
        at_hand = (pick_TH >= 0) & has_keys_C[pick_TH.clamp_min(0)]
        slice_R = torch.where(at_hand, pick_TH * shape.num_kv_heads + kv_head_H, num_slices).flatten()
        key = slice_R.to(torch.int16 if num_slices < 2**15 else torch.int32)
        order = torch.sort(key, stable=True).indices
        counts = torch.bincount(slice_R, minlength=num_slices + 1)[:num_slices].cpu().numpy()
        offsets = np.cumsum(counts) - counts
        tiles_of = -(-counts // tile_rows)
        slice_N = np.repeat(np.arange(num_slices), tiles_of)
        if not len(slice_N):
            continue
        index_N = np.arange(len(slice_N)) - np.repeat(np.cumsum(tiles_of) - tiles_of, tiles_of)
        begin = torch.from_numpy(offsets[slice_N] + index_N * tile_rows).to(device)[:, None]
        left = torch.from_numpy(counts[slice_N] - index_N * tile_rows).to(device)[:, None]
        slot_M = torch.arange(tile_rows, device=device)
        rows = order[(begin + slot_M).clamp_max(order.numel() - 1)]
        rows = torch.where(slot_M < left, rows, shape.pad_row)
        chunk_N, kv_head_N = slice_N // shape.num_kv_heads, slice_N % shape.num_kv_heads
        for begin_key in range(0, int(keys_of.max()), length):
            key_len = np.minimum(length, keys_of[chunk_N] - begin_key)
            some = np.flatnonzero(key_len > 0)
            yield Step(
                rows_NM=rows if len(some) == len(slice_N) else rows[torch.from_numpy(some).to(device)],
                key_start_N=key_edges_C[chunk_N[some]] + begin_key,
                key_len_N=key_len[some],
                kv_head_N=kv_head_N[some],
                length=length,
                causal=False,
                fresh=False,
            )
