"""Partial attention in Triton: causal segments, then picks slot by slot; forward and backward by hand.

Bitwise the same on every run: no float atomics, and every sum has one order. The host never waits for the device: tile
tables and pick lists are made there (triton_tables.py, triton_lists.py).

Scratch. Work is done in units, a range of KV heads times a range of queries, so that what a unit needs beyond inputs
and results stays below SCRATCH_BYTES: fp32 accumulators (only where results are narrower), pick lists and tile tables.
The smallest unit is one KV head and UNIT_QUERIES queries (its accumulators take 512 * H/K * Dv bytes). BYTES_OF_LIST
for each chunk and slot come with every unit, however few its queries; where they are more than half of the bound (from
1M tokens on with chunks of 16 and topk 64), a unit takes up to twice as much as they do. Not in the bound: geometry and
tile tables of causal segments (about 20 bytes a query, kept on the pack of a whole row), and, in the backward, the
lists that dK and dV need over all queries of a KV head (4 bytes a pick, about 50 a chunk and slot) and what
triton_keys.py states.

Shape letters: T queries at hand, S keys at hand, H query heads, K key/value heads, D head dim, Dv value dim, P picks,
C chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..report import PairTally, Partial
from ..triton_math import target_of
from .call import AttendCall
from .triton_causal import run_causal_dq, run_causal_forward
from .triton_config import Kind, Tile, is_short, tile_of
from .triton_geometry import DeviceGeometry, device_geometry
from .triton_keys import key_gradients
from .triton_lists import MAX_COUNTS, PickLists, build_lists
from .triton_picks import run_picks_dq, run_picks_forward
from .triton_rows import narrow_rows

SCRATCH_BYTES = 512 << 20
# Query ranges begin at multiples of it.
UNIT_QUERIES = 128
# Of a pick: its list entry; of a list (chunk and slot): edges, counts of rows and tiles, the tile table's share, and
# what a program counts.
BYTES_OF_PICK = 4
BYTES_OF_LIST = 72
# Rows further apart are copied: kernels address a block of keys, which has at most 128, in 32 bits.
MAX_ROW_STRIDE = (2**31 - 1) // 128
# What a counting sort holds while it runs, whatever its size (triton_lists.py).
SORT_BYTES = 8 * MAX_COUNTS


@dataclass(frozen=True)
class Unit:
    """Queries first .. stop - 1 under KV heads kv_first .. kv_stop - 1."""

    kv_first: int
    kv_stop: int
    first: int
    stop: int

    def queries(self, x: Tensor, num_kv_heads: int) -> Tensor:
        """The unit's part of [T, H or R, ...]."""
        group = x.shape[1] // num_kv_heads
        return x[self.first : self.stop, self.kv_first * group : self.kv_stop * group]

    def keys(self, x: Tensor) -> Tensor:
        """The unit's part of [S, K, ...]."""
        return x[:, self.kv_first : self.kv_stop]

    def geometry(self, whole: DeviceGeometry) -> DeviceGeometry:
        """Segments seen from the unit's queries; those without one are empty."""
        if self.stop - self.first == whole.visible_T.numel():
            return whole
        return replace(
            whole,
            query_edges_G=whole.query_edges_G.clamp(self.first, self.stop) - self.first,
            visible_T=whole.visible_T[self.first : self.stop],
            picking_T=whole.picking_T[self.first : self.stop],
        )


def _even_ranges(size: int, at_most: int) -> Iterator[tuple[int, int]]:
    """0 .. size - 1 in as few ranges of at most so many as possible, about equally long."""
    step = -(-size // max(1, -(-size // at_most)))
    for first in range(0, size, step):
        yield first, min(size, first + step)


def work_units(num_queries: int, num_kv_heads: int, bytes_per_query: int, fixed_bytes: int, budget: int) -> list[Unit]:
    """Cut T queries x K heads into units that fit: bytes_per_query a query and fixed_bytes, both for each KV head.

    Whole KV heads as long as one fits; then ranges of the queries of one KV head, which take at least fixed_bytes
    themselves: units of fewer queries would spend most of their time and memory on what comes with every unit.
    """
    heads = budget // max(1, bytes_per_query * num_queries + fixed_bytes)
    if heads >= 1:
        return [Unit(*kv, 0, num_queries) for kv in _even_ranges(num_kv_heads, min(heads, num_kv_heads))]
    fitting = max(budget - fixed_bytes, fixed_bytes) // bytes_per_query // UNIT_QUERIES
    blocks = -(-num_queries // UNIT_QUERIES)
    ranges = [
        (first * UNIT_QUERIES, min(num_queries, stop * UNIT_QUERIES))
        for first, stop in _even_ranges(blocks, max(1, fitting))
    ]
    return [Unit(kv, kv + 1, *queries) for kv in range(num_kv_heads) for queries in ranges]


def _addressable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As they are, or a copy: kernels ask for rows that are contiguous, and of one KV head not too far apart."""
    return tuple(x if x.stride(2) == 1 and x.stride(0) <= MAX_ROW_STRIDE else x.contiguous() for x in tensors)


def _picks_outside_segments(call: AttendCall) -> bool:
    """Is there anything beyond the causal segments? Known on the host."""
    return call.routing is not None and call.segments.any_picks and call.routing.stored.numel() > 0


def _geometry(call: AttendCall, device: torch.device) -> DeviceGeometry:
    """That of a whole row is kept on its pack: all layers and their backward passes take the same."""
    if call.q_positions is not None or call.k_positions is not None:
        return device_geometry(call, device)
    picked = None if call.routing is None else (call.routing.spec, call.routing.complete)
    return call.pack.derived(("attend geometry", picked, device), lambda: device_geometry(call, device))


def _units(call: AttendCall, num_kv_heads: int, accumulator_bytes: int, geometry: DeviceGeometry) -> list[Unit]:
    """accumulator_bytes: of one query and KV head."""
    num_queries = geometry.visible_T.numel()
    if call.routing is None or not _picks_outside_segments(call):
        return [Unit(0, num_kv_heads, 0, num_queries)]
    routed, slots = call.routing.stored.shape[1] // num_kv_heads, call.routing.stored.shape[2]
    per_query = accumulator_bytes + BYTES_OF_PICK * routed * slots
    lists = BYTES_OF_LIST * geometry.num_chunks * slots
    return work_units(num_queries, num_kv_heads, per_query, lists, SCRATCH_BYTES - SORT_BYTES)


def _tiles(
    kinds: tuple[Kind, Kind], q: Tensor, k: Tensor, v: Tensor, call: AttendCall, geometry: DeviceGeometry
) -> tuple[Tile, Tile]:
    """Of causal segments, of picks; chosen by the usual length of a segment and by the chunk size."""
    target, group, dims = target_of(q.device), q.shape[1] // k.shape[1], (q.shape[2], v.shape[2])
    tokens = -(-call.pack.num_tokens // max(1, geometry.num_segments))
    chunk = call.routing.spec.chunk_size if call.routing is not None else tokens
    return tuple(  # type: ignore[return-value]
        tile_of(kind, *dims, q.dtype, target, short=is_short(size * group, size))
        for kind, size in zip(kinds, (tokens, chunk), strict=True)
    )


def _lists_of(unit: Unit, call: AttendCall, geometry: DeviceGeometry, num_kv_heads: int) -> PickLists:
    assert call.routing is not None
    return build_lists(unit.queries(call.routing.bits, num_kv_heads), geometry, unit.kv_stop - unit.kv_first)


def attend_partial(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, call: AttendCall, tally: PairTally | None) -> Partial:
    """softmax(scale * q k^T + mask) v and its log-sum-exp. Shapes and dtypes as in ops.attend_partial."""
    scale = call.scale
    if scale < 0:  # the kernels scale a maximum after it is taken
        q_THD, scale = -q_THD, -scale
    q, k, v = _addressable(q_THD, k_SKD, v_SKD)
    num_queries, num_heads, num_kv_heads = *q.shape[:2], k.shape[1]
    out = q.new_empty((num_queries, num_heads, v.shape[2]), dtype=call.result_dtype)
    lse = q.new_empty((num_queries, num_heads), dtype=torch.float32)
    if not num_queries:
        return Partial(out, lse)
    geometry = _geometry(call, q.device)
    causal_tile, pick_tile = _tiles(("causal forward", "picks forward"), q, k, v, call, geometry)
    picks, exact = _picks_outside_segments(call), out.dtype == torch.float32
    target = target_of(q.device)
    row_bytes = 0 if exact else 4 * v.shape[2] * num_heads // num_kv_heads
    for unit in _units(call, num_kv_heads, row_bytes, geometry):
        mine = unit.geometry(geometry)
        queries, keys, values = unit.queries(q, num_kv_heads), unit.keys(k), unit.keys(v)
        result, log_sum = unit.queries(out, num_kv_heads), unit.queries(lse, num_kv_heads)
        running = result if exact or not picks else result.new_empty(result.shape, dtype=torch.float32)
        counts = [run_causal_forward(queries, keys, values, running, log_sum, mine, causal_tile, target, scale)]
        if picks:
            lists = _lists_of(unit, call, mine, num_kv_heads)
            counts += [
                run_picks_forward(
                    queries, keys, values, running, log_sum, lists, mine.key_edges_C, pick_tile, target, scale
                )
            ]  # fmt: skip
        if running is not result:
            narrow_rows(running, 1.0, result)
        if tally is not None:
            for attended, scored in counts:
                tally.add(attended, scored)
        del running  # before the next unit's are made
        if picks:
            del lists
    return Partial(out, lse)


def attend_partial_backward(
    dout_THD: Tensor,
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    lse_TH: Tensor,
    delta_TH: Tensor,
    call: AttendCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """This part's (dq, dk, dv) in call.result_dtype, from the global lse and delta. See ops.attend_partial_backward.

    dQ and (dK, dV) are passes of their own: each writes its results without atomics, in one order.
    """
    dout, q, k, v = _addressable(dout_THD.to(q_THD.dtype), q_THD, k_SKD, v_SKD)
    lse, delta = (x.float().contiguous() for x in (lse_TH, delta_TH))
    dq, dk, dv = (x.new_empty(x.shape, dtype=call.result_dtype) for x in (q, k, v))
    num_queries, num_kv_heads = q.shape[0], k.shape[1]
    if not num_queries:
        return dq, dk.zero_(), dv.zero_()
    geometry = _geometry(call, q.device)
    tiles = _tiles(("causal dq", "picks dq"), q, k, v, call, geometry)
    picks = _picks_outside_segments(call)
    row_bytes = 0 if dq.dtype == torch.float32 else 4 * q.shape[2] * q.shape[1] // num_kv_heads
    units = _units(call, num_kv_heads, row_bytes, geometry)
    for kv_first, kv_stop in dict.fromkeys((unit.kv_first, unit.kv_stop) for unit in units):
        everything = Unit(kv_first, kv_stop, 0, num_queries)
        lists = None  # of the unit before: gone before these are made
        lists = _lists_of(everything, call, geometry, num_kv_heads) if picks else None
        key_gradients(dout, q, k, v, lse, delta, call, geometry, lists, kv_first, kv_stop, dk, dv)
        if everything in units:
            _query_gradients(everything, lists, dout, q, k, v, lse, delta, dq, call, geometry, tiles)
            continue
        lists = None  # a range of queries has lists of its own, sorted anew
        for unit in units:
            if unit.kv_first == kv_first:
                mine = unit.geometry(geometry)
                lists = _lists_of(unit, call, mine, num_kv_heads)
                _query_gradients(unit, lists, dout, q, k, v, lse, delta, dq, call, mine, tiles)
                lists = None
    return dq, dk, dv


def _query_gradients(
    unit: Unit,
    lists: PickLists | None,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    call: AttendCall,
    geometry: DeviceGeometry,
    tiles: tuple[Tile, Tile],
) -> None:
    """Write the unit's part of dq. geometry and lists are the unit's."""
    num_kv_heads = k.shape[1]
    queries, douts, log_sum, deltas, result = (unit.queries(x, num_kv_heads) for x in (q, dout, lse, delta, dq))
    keys, values = unit.keys(k), unit.keys(v)
    exact, scale, target = result.dtype == torch.float32, call.scale, target_of(q.device)
    if lists is None:
        run_causal_dq(queries, keys, values, douts, result, log_sum, deltas, geometry, tiles[0], target, scale, scale)
        return
    # The scale comes last: then a tile of picks begins with the sum so far instead of adding it in the end, when
    # registers are short.
    running = result if exact else result.new_empty(result.shape, dtype=torch.float32)
    run_causal_dq(queries, keys, values, douts, running, log_sum, deltas, geometry, tiles[0], target, scale, 1.0)
    run_picks_dq(
        queries, keys, values, douts, running, log_sum, deltas, lists, geometry.key_edges_C, tiles[1], target, scale
    )
    if exact:
        result.mul_(scale)
    else:
        narrow_rows(running, scale, result)
