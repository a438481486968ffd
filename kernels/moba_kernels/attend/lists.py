"""Which rows picked which chunk, on the host side of the CPU path: a stable counting sort in ranges of queries.

A row is one (query, head): row id = query * H + head. Lists come chunk by chunk; within one, rows ascend.

Shape letters: T queries at hand, H query heads, K key/value heads, G = H/K, P pick slots, C chunks, E rows of lists,
M the same in whole tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..pack import IntArray
from ..ranges import ranges
from ..routing import Routing

# Entries sorted at a time: 12 MB of keys, 16 MB of order, 16 MB of rows, and as much again in whole tiles.
RANGE_ENTRIES = 1 << 21
# Tiles of 128 rows cost the built-in kernel more a row, and tiles of 768 no less, while they leave threads idle
# (measured).
MAX_TILE_ROWS = 256
MIN_TILE_ROWS = 16
# Shorter lists, in pairs, are not worth a call each; tiles of many lists then share a GEMM. A row costs such a tile as
# much as KEYS_OF_TILED_ROW keys (measured).
MIN_PAIRS_OF_LIST = 1 << 16
KEYS_OF_TILED_ROW = 128


@dataclass(frozen=True)
class ChunkList:
    """The rows of some queries that picked one chunk under one KV head, and keys of the chunk."""

    rows: slice
    """Of `ListPart.rows_M`, whole tiles."""
    num_rows: int
    """So many of them are the list, ascending, each once; the first one again fills the last tile."""
    first_key: int
    num_keys: int

    def pieces(self, max_rows: int, tile_rows: int) -> Iterator[tuple[slice, int]]:
        """(rows in whole tiles, how many of them are the list's), at most max_rows (one tile at least) at a time."""
        for part in ranges(self.rows.stop - self.rows.start, max_rows // tile_rows * tile_rows or tile_rows):
            num_rows = min(part.stop, self.num_rows) - part.start
            yield slice(self.rows.start + part.start, self.rows.start + part.stop), num_rows


@dataclass(frozen=True)
class ListPart:
    """The lists of some queries under one KV head."""

    kv_head: int
    rows_M: Tensor
    """int64, list after list."""
    tile_rows: int
    lists: Sequence[ChunkList]

    def pairs(self) -> tuple[int, int]:
        """(attended pairs, elements of score tiles with their padding)."""
        return (
            sum(of.num_rows * of.num_keys for of in self.lists),
            sum((of.rows.stop - of.rows.start) * of.num_keys for of in self.lists),
        )


def queries_at_once(group: int, slots: int) -> int:
    """Queries of one KV head whose picks are sorted together."""
    return max(1, RANGE_ENTRIES // (group * slots))


def average_list(num_queries: int, group: int, slots: int, num_chunks: int) -> int:
    """Rows of a list if all picks were made and spread evenly over the chunks at hand."""
    return min(num_queries, queries_at_once(group, slots)) * group * slots // max(1, num_chunks)


def worth_a_call(average: int, num_keys: int) -> bool:
    """Are lists that average so many rows faster on their own? Decided by sizes, never by the picks."""
    return average * (num_keys + KEYS_OF_TILED_ROW) >= MIN_PAIRS_OF_LIST


def tile_rows_of(average: int) -> int:
    """Rows of a tile: a power of two near a quarter of the average list, within limits.

    Fixed by sizes known beforehand, never by the picks: a row's tile must not depend on what later rows picked.
    """
    return min(MAX_TILE_ROWS, max(MIN_TILE_ROWS, 1 << (max(1, average // 4) - 1).bit_length()))


def chunk_lists(
    routing: Routing, takes_picks_T: Tensor, key_edges_C: IntArray, num_heads: int, num_kv_heads: int, max_keys: int
) -> Iterator[ListPart]:
    """Every (row, picked chunk) once, in lists. Chunk c holds keys key_edges_C[c] .. key_edges_C[c+1]-1 at hand.

    takes_picks_T: bool [T]; other queries have their picks in their causal segment. A list has max_keys keys at most:
    a longer chunk gives several of the same rows.
    """
    keys_of = np.diff(key_edges_C)
    num_queries, routed, slots = routing.stored.shape
    if not routing.stored.numel() or not keys_of.any():
        return
    group = num_heads // num_kv_heads
    members = group * num_kv_heads // routed  # query heads that share a pick
    has_keys_C = torch.from_numpy(keys_of > 0)
    tile_rows = tile_rows_of(average_list(num_queries, group, slots, int((keys_of > 0).sum())))
    for kv_head in range(num_kv_heads):
        of_head = routing.of_kv_heads(kv_head, kv_head + 1, num_kv_heads)
        head_G = np.arange(kv_head * group, (kv_head + 1) * group)
        for part in ranges(num_queries, queries_at_once(group, slots)):
            row_XG = (np.arange(part.start, part.stop)[:, None] * num_heads + head_G).reshape(-1, members)
            # Nothing of the sort stays while the lists are worked on.
            rows = _rows_by_chunk(of_head.picks_of(part), takes_picks_T[part], has_keys_C, row_XG)
            lists = _part(kv_head, *rows, tile_rows, key_edges_C, max_keys)
            del rows
            if lists.lists:
                yield lists


def _rows_by_chunk(
    pick_QRP: Tensor, takes_picks_Q: Tensor, has_keys_C: Tensor, row_XG: IntArray
) -> tuple[IntArray, IntArray]:
    """(rows of the picks that are taken, chunk after chunk; how many each chunk has). row_XG: rows of each (query,
    routed head).
    """
    num_chunks, slots = len(has_keys_C), pick_QRP.shape[2]
    listed = (pick_QRP >= 0) & takes_picks_Q[:, None, None] & has_keys_C[pick_QRP.clamp_min(0).long()]
    chunk_I = torch.where(listed, pick_QRP, num_chunks).flatten().numpy()
    counts = np.bincount(chunk_I, minlength=num_chunks + 1)[:num_chunks]
    # Radix sort up to 16 bits.
    order = np.argsort(chunk_I.astype(np.uint16) if num_chunks < 2**16 else chunk_I, kind="stable")
    return row_XG[order[: counts.sum()] // slots].ravel(), counts * row_XG.shape[1]


def _part(
    kv_head: int, rows_E: IntArray, counts: IntArray, tile_rows: int, key_edges_C: IntArray, max_keys: int
) -> ListPart:
    """Chunk c's list has counts[c] of the rows, which stand chunk after chunk."""
    lists: list[ChunkList] = []
    rows: list[IntArray] = []
    begin, first = 0, 0
    for chunk in np.flatnonzero(counts).tolist():
        count, first_key, stop_key = int(counts[chunk]), int(key_edges_C[chunk]), int(key_edges_C[chunk + 1])
        padding = -count % tile_rows
        rows += rows_E[begin : begin + count], np.full(padding, rows_E[begin])
        place = slice(first, first + count + padding)
        for keys in ranges(stop_key - first_key, max_keys):
            lists.append(ChunkList(place, count, first_key + keys.start, keys.stop - keys.start))
        begin, first = begin + count, place.stop
    return ListPart(kv_head, torch.from_numpy(np.concatenate((rows_E[:0], *rows))), tile_rows, lists)
