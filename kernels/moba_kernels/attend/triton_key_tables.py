"""What each program of the dK/dV kernel does: tiles of keys, their work cut into items. Made on the device, no sync.

A tile is up to N keys at hand of one causal segment. Its rows come in units of M rows (triton_keys.py). An item is at
most W consecutive units of one tile under one KV head, so that a chunk that nearly every query picks (an attention
sink) does not keep one program busy for ever.

Shape letters: T queries at hand, S keys at hand, K key/value heads at work, G causal segments, C chunks, X = K * tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .call import AttendCall
from .triton_geometry import DeviceGeometry
from .triton_lists import PickLists


def longest_segment(call: AttendCall) -> int:
    """No causal segment holds more tokens. Known on the host."""
    tokens = call.pack.num_tokens
    if call.routing is None:
        return tokens
    spec = call.routing.spec
    return min(tokens, spec.chunk_size * (spec.topk if call.routing.complete else 1))


def key_tiles(call: AttendCall, geometry: DeviceGeometry, block_n: int, num_keys: int) -> Tensor:
    """int32 [tiles, 6]: (first key, one past the last, first query that sees the first key, first query after the
    diagonal, one past the last query, chunk). Tiles beyond the real ones are empty: their last key lies before the
    first.

    Under MoBA all queries of the segment count as diagonal ones: they are few, and the other loop is for the lists.
    """
    query_edges, key_edges = geometry.query_edges_G, geometry.key_edges_G
    tiles_G = (key_edges.diff() + (block_n - 1)) // block_n
    stop_G = tiles_G.cumsum(0)
    index = torch.arange((num_keys + geometry.num_segments * (block_n - 1)) // block_n, device=key_edges.device)
    segment = torch.searchsorted(stop_G, index, right=True).clamp_max_(geometry.num_segments - 1)
    first = key_edges[segment] + (index - stop_G[segment] + tiles_G[segment]) * block_n
    stop = torch.minimum(first + block_n, key_edges[segment + 1])
    rows_first, rows_stop = query_edges[segment], query_edges[segment + 1]
    diagonal = torch.searchsorted(geometry.visible_T, first.int(), right=True)
    diagonal = torch.minimum(torch.maximum(diagonal, rows_first), rows_stop)
    if call.routing is None:
        whole = torch.searchsorted(geometry.visible_T, (stop - 1).int(), right=True)
        whole = torch.minimum(torch.maximum(whole, diagonal), rows_stop)
        chunk = torch.zeros_like(first)
    else:
        whole = rows_stop
        edges, _ = call.segments.tensors(key_edges.device)
        chunks = call.pack.chunks(call.routing.spec.chunk_size).tensors(key_edges.device)
        chunk = torch.searchsorted(chunks.start_C, edges[segment])
    return torch.stack((first, stop, diagonal, whole, rows_stop, chunk), 1).int()


@dataclass(frozen=True)
class KeyItems:
    """How the tiles of all KV heads are cut into items."""

    items: Tensor
    """int32 [programs, 3]: (kv * tiles + tile or -1 = no item, first unit, one past the last)."""
    results: Tensor
    """int32 [programs, 2], of the same items: (kv * tiles + tile, slot of its piece or -1 = the tile has one item)."""
    sums: Tensor
    """int32 [split tiles, 3]: (kv * tiles + tile or -1 = none, first slot, one past the last)."""


def key_items(
    tiles: Tensor, lists: PickLists | None, num_kv_heads: int, group: int, block_m: int, num_pieces: int, min_units: int
) -> KeyItems:
    """Cut the units of every tile into items of at most W; a real tile has one at least, since somebody must write it.

    W is min_units, or more where split tiles would have over num_pieces pieces together. KV heads: those of `lists`.
    """
    first, stop, diagonal, whole, rows_stop, chunk = tiles.long().unbind(1)
    real_X = (stop > first).repeat(num_kv_heads)
    causal_X = _ceil((whole - diagonal) * group, block_m) + _ceil((rows_stop - whole) * group, block_m)
    units_KX = causal_X.expand(num_kv_heads, -1)
    if lists is not None:
        edges_KC = lists.edges[:: lists.num_slots]
        list_id = chunk + lists.num_chunks * torch.arange(num_kv_heads, device=tiles.device)[:, None]
        rows_KX = (edges_KC[list_id + 1] - edges_KC[list_id]) * (group // lists.rows_per_query)
        units_KX = units_KX + _ceil(rows_KX, block_m)
    units_X = torch.where(real_X, units_KX.flatten(), 0)
    # A tile with u > W units has at most 2 u / W items, so all split tiles together have at most num_pieces.
    size = _ceil(2 * units_X.sum(), max(1, num_pieces)).clamp_min(min_units)
    items_X = torch.where(real_X, ((units_X + size - 1) // size).clamp_min(1), 0)
    split_X = items_X > 1
    stop_X, slot_stop_X = items_X.cumsum(0), torch.where(split_X, items_X, 0).cumsum(0)
    owner, none = _owners(stop_X, items_X.numel() + num_pieces)
    part = torch.arange(owner.numel(), device=owner.device) - (stop_X[owner] - items_X[owner])
    slot = torch.where(split_X[owner], slot_stop_X[owner] - items_X[owner] + part, -1)
    unit_stop = torch.minimum((part + 1) * size, units_X[owner])
    items = torch.stack((torch.where(none, -1, owner), part * size, unit_stop), 1).int()
    results = torch.stack((owner, slot), 1).int()
    owner, none = _owners(split_X.cumsum(0), num_pieces // 2)
    sums = torch.stack((torch.where(none, -1, owner), slot_stop_X[owner] - items_X[owner], slot_stop_X[owner]), 1)
    return KeyItems(items, results, sums.int())


def _owners(stop_X: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of things 0 .. count - 1: the x with stop_X[x - 1] <= thing < stop_X[x], and whether there is none."""
    owner = torch.searchsorted(stop_X, torch.arange(count, device=stop_X.device), right=True)
    return owner.clamp_max(stop_X.numel() - 1), owner == stop_X.numel()


def _ceil(x: Tensor, divisor: int) -> Tensor:
    return (x + (divisor - 1)) // divisor
