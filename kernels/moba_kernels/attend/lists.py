"""Which rows picked which chunk, on the host side of the CPU path: a stable counting sort in ranges of queries.

A row is one (query, head): row id = query * H + head. Lists come chunk by chunk; within one, rows ascend.

Shape letters: T queries at hand, H query heads, K key/value heads, P pick slots, C chunks, E entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..pack import IntArray
from ..ranges import ranges
from ..routing import Routing

# Entries sorted at a time: 8 MB of keys, 16 MB of order, and as much again inside the sort.
RANGE_ENTRIES = 1 << 21
# The built-in kernel takes 256 rows at a time in tiles of LONG_TILE rows and more, a quarter of that below; on lists
# that average LONG_LIST rows this outweighs the padding.
LONG_TILE, LONG_LIST = 768, 1024
MAX_TILE_ROWS = 512
MIN_TILE_ROWS = 16


@dataclass(frozen=True)
class ChunkList:
    """The rows of some queries that picked one chunk under one KV head."""

    rows_E: Tensor
    """int64, ascending, each once."""
    kv_head: int
    first_key: int
    num_keys: int
    tile_rows: int

    def pairs(self) -> tuple[int, int]:
        """(attended pairs, elements of score tiles with their padding)."""
        rows = len(self.rows_E)
        return rows * self.num_keys, (rows + -rows % self.tile_rows) * self.num_keys

    def pieces(self, max_rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows, the same padded to whole tiles with its first row), at most max_rows (one tile at least) at a time."""
        for part in ranges(len(self.rows_E), max_rows // self.tile_rows * self.tile_rows or self.tile_rows):
            real = self.rows_E[part]
            padding = -len(real) % self.tile_rows
            yield real, torch.cat((real, real[:1].expand(padding))) if padding else real


def tile_rows_of(num_entries: int, num_lists: int) -> int:
    """Rows of a tile: LONG_TILE for long lists, else a power of two near a quarter of the average list.

    Fixed by sizes known beforehand, never by the picks: a row's tile must not depend on what later rows picked.
    """
    average = num_entries // max(1, num_lists)
    if average >= LONG_LIST:
        return LONG_TILE
    return min(MAX_TILE_ROWS, max(MIN_TILE_ROWS, 1 << (max(1, average // 4) - 1).bit_length()))


def chunk_lists(
    routing: Routing, takes_picks_T: Tensor, key_edges_C: IntArray, num_heads: int, num_kv_heads: int
) -> Iterator[ChunkList]:
    """Every (row, picked chunk) once, in lists. Chunk c holds keys key_edges_C[c] .. key_edges_C[c+1]-1 at hand.

    takes_picks_T: bool [T]; other queries have their picks in their causal segment.
    """
    keys_of = np.diff(key_edges_C)
    picks = routing.picks
    num_queries, routed, slots = picks.shape
    if not picks.numel() or not keys_of.any():
        return
    num_lists, heads_of_pick = len(keys_of) * num_kv_heads, num_heads // routed
    has_keys_C = torch.from_numpy(keys_of > 0)
    kv_head_R1 = (torch.arange(routed, dtype=torch.int32) // (routed // num_kv_heads))[:, None]
    queries_at_once = max(1, RANGE_ENTRIES // (num_heads * slots))
    lists_with_keys = int((keys_of > 0).sum()) * num_kv_heads
    tile_rows = tile_rows_of(min(num_queries, queries_at_once) * num_heads * slots, lists_with_keys)
    for part in ranges(num_queries, queries_at_once):
        pick = picks[part]
        listed = (pick >= 0) & takes_picks_T[part, None, None] & has_keys_C[pick.clamp_min(0).long()]
        list_QRP = torch.where(listed, pick * num_kv_heads + kv_head_R1, num_lists)
        order = torch.sort(list_QRP.flatten(), stable=True).indices
        counts = np.bincount(list_QRP.flatten().numpy(), minlength=num_lists + 1)[:num_lists]
        ends = np.cumsum(counts)
        for i in np.flatnonzero(counts).tolist():
            chunk, kv_head = divmod(i, num_kv_heads)
            row = order[ends[i] - counts[i] : ends[i]] // slots + part.start * routed
            if heads_of_pick > 1:
                row = (row[:, None] * heads_of_pick + torch.arange(heads_of_pick)).flatten()
            yield ChunkList(row, kv_head, int(key_edges_C[chunk]), int(keys_of[chunk]), tile_rows)
