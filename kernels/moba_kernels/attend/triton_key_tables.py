"""What each program of the dK/dV kernel does: tiles of keys, their work cut into items. Made on the device, no sync.

A tile is up to N keys at hand of one causal segment. Its rows come in units of M rows (triton_keys.py). An item is at
most W consecutive units of one tile under one KV head, so that a chunk that nearly every query picks (an attention
sink) does not keep one program busy for ever.

Shape letters: T queries at hand, S keys at hand, K key/value heads at work, G causal segments, C chunks, X = K * tiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_math import Variant
from .call import AttendCall
from .triton_geometry import DeviceGeometry
from .triton_lists import PickLists

# Tiles that the one counting program takes at a time; rows of the tables that a program fills.
COUNTED_TILES, COUNTING_WARPS = 2048, 8
FILLED_ITEMS, FILLING_WARPS = 256, 2


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
    """int32 [programs, 2], of the same items: (kv * tiles + tile or -1, slot of its piece or -1 = all of its tile)."""
    sums: Tensor
    """int32 [split tiles, 3]: (kv * tiles + tile or -1 = none, first slot, one past the last)."""


@triton.jit
def _units_of_tile(  # type: ignore[no-untyped-def]
    x, inside, tiles, edges, num_tiles, num_chunks, num_slots, group, expand, block_m, LISTS: tl.constexpr
):
    """Units of tile x (kv * tiles + tile); -1 = there is no such tile."""
    kv, tile = x // num_tiles, tiles + x % num_tiles * 6
    first, stop = tl.load(tile, mask=inside, other=0), tl.load(tile + 1, mask=inside, other=0)
    diagonal, whole = tl.load(tile + 2, mask=inside, other=0), tl.load(tile + 3, mask=inside, other=0)
    rows_stop = tl.load(tile + 4, mask=inside, other=0)
    units = tl.cdiv((whole - diagonal) * group, block_m) + tl.cdiv((rows_stop - whole) * group, block_m)
    if LISTS:
        chunk = tl.load(tile + 5, mask=inside, other=0)
        edge = edges + (kv * num_chunks + chunk).to(tl.int64) * num_slots
        rows = tl.load(edge + num_slots, mask=inside, other=0) - tl.load(edge, mask=inside, other=0)
        units += tl.cdiv(rows.to(tl.int32) * expand, block_m)
    return tl.where(inside & (stop > first), units, -1)


_COUNTS = [
    "num_tiles", "num_heads", "num_chunks", "num_slots", "group", "expand", "block_m", "num_pieces", "min_units",
]  # fmt: skip
_FILLS = ["num_owners", "num_items", "num_sums", "steps"]


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_COUNTS)
def _count_items(  # type: ignore[no-untyped-def]
    tiles, edges, units, stops, num_tiles, num_heads, num_chunks, num_slots, group, expand, block_m, num_pieces,
    min_units, LISTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """units[X] = W. stops[0 .. 2, x]: items, split tiles and pieces of split tiles, of tiles 0 .. x. One program."""
    num_owners = num_tiles * num_heads
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((), tl.int64)
    for start in range(0, num_owners, BLOCK):
        x = start + lane
        inside = x < num_owners
        many = _units_of_tile(x, inside, tiles, edges, num_tiles, num_chunks, num_slots, group, expand, block_m, LISTS)
        tl.store(units + x, many, mask=inside)
        total += tl.sum(tl.maximum(many, 0).to(tl.int64), 0)
    # A tile with u > W units has at most 2 u / W items, so all split tiles together have at most num_pieces.
    width = tl.maximum(tl.cdiv(2 * total, tl.maximum(num_pieces, 1)), min_units)
    width = tl.minimum(width, 0x7FFFFFFF).to(tl.int32)
    tl.store(units + num_owners, width)
    tl.debug_barrier()  # other threads may read a tile's units than wrote them
    items, splits, pieces = tl.zeros((), tl.int32), tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    for start in range(0, num_owners, BLOCK):
        x = start + lane
        inside = x < num_owners
        many = tl.load(units + x, mask=inside, other=-1)
        items_X = tl.where(many < 0, 0, tl.maximum((many.to(tl.int64) + width - 1) // width, 1).to(tl.int32))
        splits_X = (items_X > 1).to(tl.int32)
        pieces_X = items_X * splits_X
        tl.store(stops + x, items + tl.cumsum(items_X, 0), mask=inside)
        tl.store(stops + num_owners + x, splits + tl.cumsum(splits_X, 0), mask=inside)
        tl.store(stops + 2 * num_owners + x, pieces + tl.cumsum(pieces_X, 0), mask=inside)
        items += tl.sum(items_X, 0)
        splits += tl.sum(splits_X, 0)
        pieces += tl.sum(pieces_X, 0)


@triton.jit
def _owner_of(stops, thing, num_owners, steps):  # type: ignore[no-untyped-def]
    """The x with stops[x - 1] <= thing < stops[x]; num_owners = there is none. By halving, 2 ** steps > num_owners."""
    low = tl.zeros_like(thing)
    high = low + num_owners
    for _ in range(steps):
        open_ = low < high
        middle = (low + high) // 2
        beyond = tl.load(stops + middle, mask=open_, other=0) > thing
        high = tl.where(open_ & beyond, middle, high)
        low = tl.where(open_ & (beyond == 0), middle + 1, low)
    return low


@triton.jit(do_not_specialize=_FILLS, do_not_specialize_on_alignment=_FILLS)
def _fill_items(  # type: ignore[no-untyped-def]
    units, stops, items, results, sums, num_owners, num_items, num_sums, steps, BLOCK: tl.constexpr
):
    """BLOCK rows of each of the three tables of KeyItems."""
    thing = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    piece_stops = stops + 2 * num_owners
    width = tl.load(units + num_owners).to(tl.int64)
    inside = thing < num_items
    owner = _owner_of(stops, thing, num_owners, steps)
    there = inside & (owner < num_owners)
    stop = tl.load(stops + owner, mask=there, other=0)
    count = stop - tl.load(stops + owner - 1, mask=there & (owner > 0), other=0)
    part = (thing - (stop - count)).to(tl.int64)
    unit_stop = tl.minimum((part + 1) * width, tl.load(units + owner, mask=there, other=0))
    slot = tl.load(piece_stops + owner, mask=there, other=0) - count + part
    tl.store(items + thing * 3, tl.where(there, owner, -1), mask=inside)
    tl.store(items + thing * 3 + 1, (part * width).to(tl.int32), mask=inside)
    tl.store(items + thing * 3 + 2, unit_stop.to(tl.int32), mask=inside)
    tl.store(results + thing * 2, tl.where(there, owner, -1), mask=inside)
    tl.store(results + thing * 2 + 1, tl.where(count > 1, slot, -1).to(tl.int32), mask=inside)
    inside = thing < num_sums
    owner = _owner_of(stops + num_owners, thing, num_owners, steps)
    there = inside & (owner < num_owners)
    count = tl.load(stops + owner, mask=there, other=0)
    count -= tl.load(stops + owner - 1, mask=there & (owner > 0), other=0)
    stop = tl.load(piece_stops + owner, mask=there, other=0)
    tl.store(sums + thing * 3, tl.where(there, owner, -1), mask=inside)
    tl.store(sums + thing * 3 + 1, stop - count, mask=inside)
    tl.store(sums + thing * 3 + 2, stop, mask=inside)


def key_items(
    tiles: Tensor, lists: PickLists | None, num_kv_heads: int, group: int, block_m: int, num_pieces: int, min_units: int
) -> KeyItems:
    """Cut the units of every tile into items of at most W; a real tile has one at least, since somebody must write it.

    W is min_units, or more where split tiles would have over num_pieces pieces together. KV heads: those of `lists`.
    """
    num_owners = num_kv_heads * tiles.shape[0]
    num_items, num_sums = num_owners + num_pieces, num_pieces // 2
    units, stops = tiles.new_empty(num_owners + 1), tiles.new_empty((3, num_owners))
    _count_items[(1,)](
        tiles, tiles if lists is None else lists.edges, units, stops, tiles.shape[0], num_kv_heads,
        *((1, 1) if lists is None else (lists.num_chunks, lists.num_slots)),
        group, 1 if lists is None else group // lists.rows_per_query, block_m, num_pieces, min_units,
        LISTS=lists is not None, BLOCK=COUNTED_TILES, num_warps=COUNTING_WARPS, num_stages=1,
    )  # fmt: skip
    items, results, sums = (tiles.new_empty(size) for size in ((num_items, 3), (num_items, 2), (num_sums, 3)))
    _fill_items[(triton.cdiv(num_items, FILLED_ITEMS),)](
        units, stops, items, results, sums, num_owners, num_items, num_sums, num_owners.bit_length(),
        BLOCK=FILLED_ITEMS, num_warps=FILLING_WARPS, num_stages=1,
    )  # fmt: skip
    return KeyItems(items, results, sums)


def variants(head_dims: Iterable[tuple[int, int]], dtypes: Iterable[torch.dtype], target: int) -> Iterator[Variant]:
    """The compiled forms that `key_items` launches: the same for all inputs and targets."""
    head_dim, dtype = next(iter(head_dims))[0], next(iter(dtypes))
    pointers = ("tiles", "edges", "units", "stops", "items", "results", "sums")
    for lists in (True, False):
        types = dict.fromkeys(_COUNTS, "i32") | dict.fromkeys(pointers[:4], "*i32")
        types |= {"edges": "*i64"} if lists else {}
        constants = {"LISTS": lists, "BLOCK": COUNTED_TILES}
        yield Variant(
            f"count items{' of lists' if lists else ''}", _count_items, types, constants, COUNTING_WARPS, 1, head_dim,
            dtype, frozenset(pointers[:4]),
        )  # fmt: skip
    types = dict.fromkeys(_FILLS, "i32") | dict.fromkeys(pointers[2:], "*i32")
    constants = {"BLOCK": FILLED_ITEMS}
    yield Variant(
        "fill items", _fill_items, types, constants, FILLING_WARPS, 1, head_dim, dtype, frozenset(pointers[2:])
    )
