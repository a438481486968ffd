"""What the flash backend hands to flash kernels: causal squares, rectangles, and per-chunk lists of gathered queries.

A flash kernel knows two problems: n queries against the same n tokens' keys, causal; and n queries against m keys, all
of them seen. `causal_pieces` cuts the causal segments of a call into these two, whatever part of the tokens is at hand;
`pick_batches` sorts the picks by chunk, so that the queries which picked a chunk stand side by side. Both keep what one
kernel call touches within a limit.

Shape letters: T queries at hand, S keys at hand, H query heads, K key/value heads, G = H/K, P picks, C chunks, N
gathered (query, head) rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..pack import IntArray
from ..routing import Routing
from .call import AttendCall, host_positions

# Flash kernels do not tell what they multiply out; their tiles are about this many queries by this many keys.
TILE = 128

# Of one slot while its range is sorted: its chunk as int32 and twice as int64, the sort's narrow key, copy and order.
SORT_BYTES_OF_SLOT = 40


@dataclass(frozen=True)
class Lists:
    """Problems side by side: queries q_edges[i] .. q_edges[i+1] - 1 see keys k_edges[i] .. k_edges[i+1] - 1.

    No list is empty. causal: queries and keys of a list are the same tokens, and query j sees keys 0 .. j of it.
    """

    q_edges: IntArray
    k_edges: IntArray
    causal: bool

    @property
    def q_lengths(self) -> IntArray:
        return np.diff(self.q_edges)

    @property
    def k_lengths(self) -> IntArray:
        return np.diff(self.k_edges)

    @property
    def num_pairs(self) -> int:
        """(query, key) pairs of one head."""
        n, m = self.q_lengths, self.k_lengths
        return int((n * (n + 1) // 2 if self.causal else n * m).sum())

    @property
    def num_scored(self) -> int:
        """Score elements of one head, counted in tiles of TILE by TILE."""
        n, m = -(-self.q_lengths // TILE), -(-self.k_lengths // TILE)
        return TILE * TILE * int((n * (n + 1) // 2 if self.causal else n * m).sum())


class FlashKernels(Protocol):
    """A set of flash kernels. q, dout, out [N,H,W], k, v [M,K,W] in `compute_dtype`, W a multiple of `width_multiple`;
    lse [N,H] in the accumulating dtype. Query head h reads KV head h // (H/K). Strides are free but for the last dim.
    """

    @property
    def width_multiple(self) -> int: ...

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What inputs of `dtype` are converted to."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float) -> tuple[Tensor, Tensor]:
        """(out [N,H,W], lse [N,H])."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lists: Lists, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv); the kernel takes rowsum(dout * out) for delta, and any lse."""
        ...


@dataclass(frozen=True)
class Piece:
    """Consecutive queries against consecutive keys of those at hand, for all heads. Edges count from their starts."""

    queries: slice
    keys: slice
    lists: Lists


@dataclass(frozen=True)
class PickBatch:
    """Gathered (query, head) rows of one KV head against that head's keys."""

    kv_head: int
    token_N: Tensor
    head_N: Tensor
    keys: slice | Tensor
    lists: Lists


def causal_pieces(call: AttendCall, limit: int) -> Iterator[Piece]:
    """Every query of a segment against the segment's keys at hand up to its own, squares first.

    Queries are cut into runs: consecutive tokens of one segment whose keys are all at hand, or all not, `limit` tokens
    at most. A run sees every earlier key of its segment (a rectangle) and, if they are at hand, its own (a square). In
    the worst case, positions without order, a run is one token.
    """
    edges = call.segments.edges
    query_T, key_S = (host_positions(x, call.pack.num_tokens) for x in (call.q_positions, call.k_positions))
    if not len(query_T) or not len(key_S):
        return
    segment_T = np.searchsorted(edges, query_T, side="right") - 1
    place_T = np.searchsorted(key_S, query_T)  # keys at hand before the query
    own_T = key_S[np.minimum(place_T, len(key_S) - 1)] == query_T
    begins = np.ones(len(query_T), dtype=bool)
    begins[1:] = (
        (np.diff(query_T) != 1)
        | (np.diff(segment_T) != 0)
        | (own_T[1:] != own_T[:-1])
        | ((query_T - edges[segment_T])[1:] % limit == 0)
    )
    first_R = np.flatnonzero(begins)
    count_R = np.diff(np.append(first_R, len(query_T)))
    square = own_T[first_R]
    yield from _squares(first_R[square].tolist(), count_R[square].tolist(), place_T[first_R[square]].tolist(), limit)
    low_R, high_R = np.searchsorted(key_S, edges[segment_T[first_R]]), place_T[first_R]
    some = np.flatnonzero(high_R > low_R)
    runs = zip(*(x[some].tolist() for x in (first_R, count_R, low_R, high_R)), strict=True)
    for first, count, low, high in runs:
        for start in range(low, high, limit):
            stop = min(start + limit, high)
            lists = Lists(np.array([0, count]), np.array([0, stop - start]), causal=False)
            yield Piece(slice(first, first + count), slice(start, stop), lists)


def _squares(first: list[int], count: list[int], place: list[int], limit: int) -> Iterator[Piece]:
    """Runs whose queries and keys both stand one after the other go together, `limit` tokens at most."""
    begin = 0
    while begin < len(first):
        end = begin + 1
        while (
            end < len(first)
            and first[end] == first[end - 1] + count[end - 1]
            and place[end] == place[end - 1] + count[end - 1]
            and first[end] + count[end] - first[begin] <= limit
        ):
            end += 1
        edges = np.concatenate(([0], np.cumsum(count[begin:end])))
        total = int(edges[-1])
        queries, keys = (slice(x[begin], x[begin] + total) for x in (first, place))
        yield Piece(queries, keys, Lists(edges, edges, causal=True))
        begin = end


def pick_batches(
    call: AttendCall, num_heads: int, num_kv_heads: int, limit: int, sort_bytes: int
) -> Iterator[PickBatch]:
    """The picks outside the causal segments: KV head after KV head, chunk after chunk, tokens in order.

    A batch gathers rows and keys, `limit` of both together at most; what sorting takes stays within `sort_bytes`, as
    queries come in ranges. The host reads the number of rows of every list, once a call.
    """
    routing = call.routing
    if routing is None or not call.segments.any_picks or not routing.stored.numel():
        return
    key_S = host_positions(call.k_positions, call.pack.num_tokens)
    edges = np.append(call.pack.chunks(routing.spec.chunk_size).start_C, call.pack.num_tokens)
    key_edges_C = np.searchsorted(key_S, edges)
    open_C = torch.from_numpy((np.diff(key_edges_C) > 0) & ~call.segments.covered_C).to(routing.stored.device)
    group, kept = num_heads // num_kv_heads, routing.stored.shape[2]
    num_queries = max(1, sort_bytes // (SORT_BYTES_OF_SLOT * group * kept))
    parts = [
        (first, kv_head) for first in range(0, routing.num_queries, num_queries) for kv_head in range(num_kv_heads)
    ]
    slots = [(slice(first, first + num_queries), kv_head) for first, kv_head in parts]
    counts = torch.stack([_count(_picks(routing, *x, num_heads, num_kv_heads, open_C), open_C) for x in slots])
    for (queries, kv_head), counts_C in zip(slots, counts.cpu().numpy(), strict=True):
        if not counts_C.any():
            continue
        chunk_I = _picks(routing, queries, kv_head, num_heads, num_kv_heads, open_C)
        order_I = torch.sort(chunk_I.to(torch.int16 if len(open_C) < 2**15 else torch.int32), stable=True).indices
        del chunk_I
        for items in _batches(counts_C, key_edges_C, limit):
            row = order_I[items[0][0] : items[-1][1]] // kept
            token, head = row // group + queries.start, row % group + kv_head * group
            lists = Lists(_edges(items, 0), _edges(items, 2), causal=False)
            yield PickBatch(kv_head, token, head, _keys_of(items, row.device), lists)


def _picks(routing: Routing, queries: slice, kv_head: int, num_heads: int, num_kv_heads: int, open_C: Tensor) -> Tensor:
    """[n*G*P] int64 of n queries and one KV head: the chunk that a slot picked, C where nothing is to do for it."""
    rows = torch.arange(*queries.indices(routing.num_queries), device=open_C.device)
    of_head = routing.of_kv_heads(kv_head, kv_head + 1, num_kv_heads).select(rows)
    chunk_I = of_head.picks_of_heads(num_heads // num_kv_heads).flatten().long()
    return torch.where((chunk_I >= 0) & open_C[chunk_I.clamp_min(0)], chunk_I, len(open_C))


def _count(chunk_I: Tensor, open_C: Tensor) -> Tensor:
    """[C] slots of every chunk. Integers: the order of additions does not matter."""
    counts = torch.zeros(len(open_C) + 1, dtype=torch.int64, device=chunk_I.device)
    counts.scatter_add_(0, chunk_I, torch.ones((), dtype=torch.int64, device=chunk_I.device).expand_as(chunk_I))
    return counts[:-1]


Item = tuple[int, int, int, int]
"""Sorted rows [0] .. [1] - 1 against keys [2] .. [3] - 1."""


def _batches(counts_C: IntArray, key_edges_C: IntArray, limit: int) -> Iterator[list[Item]]:
    """Consecutive lists in batches; a list that is too long is cut, its keys first."""
    half = max(1, limit // 2)
    batch: list[Item] = []
    size, begin = 0, 0
    for chunk in np.flatnonzero(counts_C).tolist():
        end = begin + int(counts_C[chunk])
        low, high = int(key_edges_C[chunk]), int(key_edges_C[chunk + 1])
        for k in range(low, high, half):
            for r in range(begin, end, half):
                item = (r, min(r + half, end), k, min(k + half, high))
                added = item[1] - item[0] + item[3] - item[2]
                # A batch's rows stand one after the other, and none of its keys stands twice.
                if batch and (size + added > limit or batch[-1][1] != r or batch[-1][2] == k):
                    yield batch
                    batch, size = [], 0
                batch.append(item)
                size += added
        begin = end
    if batch:
        yield batch


def _edges(items: list[Item], side: int) -> IntArray:
    return np.concatenate(([0], np.cumsum([item[side + 1] - item[side] for item in items])))


def _keys_of(items: list[Item], device: torch.device) -> slice | Tensor:
    """The keys of a batch as they lie, or, where chunks between them have no list, as an index."""
    if all(a[3] == b[2] for a, b in pairwise(items)):
        return slice(items[0][2], items[-1][3])
    return torch.from_numpy(np.concatenate([np.arange(item[2], item[3]) for item in items])).to(device)
