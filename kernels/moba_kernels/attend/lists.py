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
    """The rows of some queries that picked one chunk under one KV head, and keys of the chunk."""

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


def queries_at_once(group: int, slots: int) -> int:
    """Queries of one KV head whose picks are sorted together."""
    return max(1, RANGE_ENTRIES // (group * slots))


def average_list(num_queries: int, group: int, slots: int, num_chunks: int) -> int:
    """Rows of a list if all picks were made and spread evenly over the chunks at hand."""
    return min(num_queries, queries_at_once(group, slots)) * group * slots // max(1, num_chunks)


def tile_rows_of(average: int) -> int:
    """Rows of a tile: LONG_TILE for long lists, else a power of two near a quarter of the average list.

    Fixed by sizes known beforehand, never by the picks: a row's tile must not depend on what later rows picked.
    """
    if average >= LONG_LIST:
        return LONG_TILE
    return min(MAX_TILE_ROWS, max(MIN_TILE_ROWS, 1 << (max(1, average // 4) - 1).bit_length()))


def chunk_lists(
    routing: Routing, takes_picks_T: Tensor, key_edges_C: IntArray, num_heads: int, num_kv_heads: int, max_keys: int
) -> Iterator[ChunkList]:
    """Every (row, picked chunk) once, in lists. Chunk c holds keys key_edges_C[c] .. key_edges_C[c+1]-1 at hand.

    takes_picks_T: bool [T]; other queries have their picks in their causal segment. A list has max_keys keys at most:
    a longer chunk gives several of the same rows.
    """
    keys_of = np.diff(key_edges_C)
    num_queries, routed, slots = routing.stored.shape
    if not routing.stored.numel() or not keys_of.any():
        return
    num_chunks, group = len(keys_of), num_heads // num_kv_heads
    routed_of_kv = routed // num_kv_heads  # group, or 1 where the group picks together
    has_keys_C = torch.from_numpy(keys_of > 0)
    tile_rows = tile_rows_of(average_list(num_queries, group, slots, int((keys_of > 0).sum())))
    member = torch.arange(group // routed_of_kv)
    for kv_head in range(num_kv_heads):
        of_head = routing.of_kv_heads(kv_head, kv_head + 1, num_kv_heads)
        for part in ranges(num_queries, queries_at_once(group, slots)):
            pick = of_head.picks_of(part)
            listed = (pick >= 0) & takes_picks_T[part, None, None] & has_keys_C[pick.clamp_min(0).long()]
            chunk_QRP = torch.where(listed, pick, num_chunks)
            order = torch.sort(chunk_QRP.flatten(), stable=True).indices
            counts = np.bincount(chunk_QRP.flatten().numpy(), minlength=num_chunks + 1)[:num_chunks]
            ends = np.cumsum(counts)
            for chunk in np.flatnonzero(counts).tolist():
                entry = order[ends[chunk] - counts[chunk] : ends[chunk]] // slots
                first_row = (entry // routed_of_kv + part.start) * num_heads + kv_head * group + entry % routed_of_kv
                rows = (first_row[:, None] + member).flatten()
                for keys in ranges(int(keys_of[chunk]), max_keys):
                    first_key = int(key_edges_C[chunk]) + keys.start
                    yield ChunkList(rows, kv_head, first_key, keys.stop - keys.start, tile_rows)
