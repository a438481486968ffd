"""Which rows picked which chunk: per-chunk lists by a counting sort on the device, bitwise the same on every run.

Queries are cut into parts. `count_picks` counts the picks of every (list, part) by integer atomics, whose order does
not matter; a running sum over (list, part) gives each part's place in each list; `place_picks` walks the pairs of one
(part, KV head, slot) in order and writes the entries. Nothing depends on timing.

Shape letters: T queries of the range, K key/value heads of the range, C chunks, P pick slots, E entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_math import Variant
from .triton_geometry import DeviceGeometry

# Counts of all (list, part) at a time.
MAX_COUNTS = 1 << 23
# Pairs that one program places at least, and at a time: each step waits for the one before it.
MIN_PART_PAIRS = 1024
STEP_PAIRS = 32
# A thread compares one pair with all of its step: more threads than pairs would do the same again.
PLACING_WARPS = STEP_PAIRS // 32
COUNTED_PAIRS = 1024

_UNALIGNED = ["picks", "picking", "key_edges"]
_UNSPECIALISED = [
    "num_pairs", "part_pairs", "num_parts", "num_chunks", "num_slots", "stride_pt", "stride_ph",
]  # fmt: skip


@dataclass(frozen=True)
class PickLists:
    """The picks of a range of queries and KV heads, sorted by (KV head, chunk, slot, query, head).

    An entry is `query * rows_per_query + head_in_group`, both relative to the range and the KV head:
    rows_per_query = H/K under select="head", where every query head picks for itself; 1 under select="group", where an
    entry stands for all query heads of the group. Left out: picks that are none, chunks with no key at hand, queries
    whose picks lie in their segment already (`DeviceGeometry.picking_T`).
    """

    entries_E: Tensor
    """int32 [upper bound of E]; what lies beyond edges[-1] is not an entry."""
    edges: Tensor
    """int64 [K*C*P + 1]: list i = (kv * C + chunk) * P + slot is entries_E[edges[i] : edges[i + 1]], so that
    all picks of a chunk stand together: edges[(kv * C + chunk) * P] .. edges[(kv * C + chunk + 1) * P] - 1."""
    num_kv_heads: int
    num_chunks: int
    num_slots: int
    rows_per_query: int


@triton.jit
def _picked_list(  # type: ignore[no-untyped-def]
    picks, picking, key_edges, pair, stop, kv, slot, num_chunks, num_slots, stride_pt, stride_ph, HEADS: tl.constexpr
):
    """(list, valid) of some pairs of one KV head and slot; a pair is query * HEADS + head."""
    query = (pair // HEADS).to(tl.int64)
    head = (kv * HEADS + pair % HEADS).to(tl.int64)
    valid = pair < stop
    valid = valid & (tl.load(picking + query, mask=valid, other=0) != 0)
    chunk = tl.load(picks + query * stride_pt + head * stride_ph + slot, mask=valid, other=-1).to(tl.int32)
    if picks.dtype.element_ty == tl.int16:
        chunk = chunk & 0xFFFF  # stored as uint16, where 65535 = none
        valid = valid & (chunk != 0xFFFF)
    else:
        valid = valid & (chunk >= 0)
    chunk = tl.where(valid, chunk, 0)
    num_keys = tl.load(key_edges + chunk + 1) - tl.load(key_edges + chunk)
    return (kv * num_chunks + chunk) * num_slots + slot, valid & (num_keys > 0)


@triton.jit(do_not_specialize=_UNSPECIALISED, do_not_specialize_on_alignment=_UNALIGNED)
def count_picks(  # type: ignore[no-untyped-def]
    picks, picking, key_edges, counts, num_pairs, part_pairs, num_parts, num_chunks, num_slots, stride_pt, stride_ph,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """counts[1 + list * parts + part] += picks. Grid: (blocks of pairs, KV heads, slots)."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    which, valid = _picked_list(
        picks, picking, key_edges, pair, num_pairs, tl.program_id(1), tl.program_id(2), num_chunks, num_slots,
        stride_pt, stride_ph, HEADS,
    )  # fmt: skip
    tl.atomic_add(counts + 1 + which.to(tl.int64) * num_parts + pair // part_pairs, 1, mask=valid, sem="relaxed")


@triton.jit(do_not_specialize=_UNSPECIALISED, do_not_specialize_on_alignment=_UNALIGNED)
def place_picks(  # type: ignore[no-untyped-def]
    picks, picking, key_edges, places, entries, num_pairs, part_pairs, num_parts, num_chunks, num_slots, stride_pt,
    stride_ph, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Entries to their places, which are counted up on the way. Grid: (parts, KV heads, slots)."""
    begin = tl.program_id(0) * part_pairs
    stop = tl.minimum(begin + part_pairs, num_pairs)
    lane = tl.arange(0, BLOCK)
    for start in range(begin, stop, BLOCK):
        pair = start + lane
        which, valid = _picked_list(
            picks, picking, key_edges, pair, stop, tl.program_id(1), tl.program_id(2), num_chunks, num_slots,
            stride_pt, stride_ph, HEADS,
        )  # fmt: skip
        which = tl.where(valid, which, -1)
        same = which[:, None] == which[None, :]
        rank = tl.sum((same & (lane[None, :] < lane[:, None])).to(tl.int32), 1)
        last = rank + 1 == tl.sum(same.to(tl.int32), 1)
        counter = places + which.to(tl.int64) * num_parts + tl.program_id(0)
        # Other warps have moved the counters a step ago: read where they wrote, not in L1.
        place = tl.load(counter, mask=valid, other=0, cache_modifier=".cg") + rank
        tl.store(entries + place, pair, mask=valid)
        tl.debug_barrier()
        tl.store(counter, place + 1, mask=valid & last)
        tl.debug_barrier()


def build_lists(stored_TRP: Tensor, geometry: DeviceGeometry, num_kv_heads: int) -> PickLists:
    """Sort the picks of some queries and KV heads.

    Args:
        stored_TRP: `Routing.stored` of these queries and of the routing heads of these KV heads; R / num_kv_heads is
            H/K under select="head" and 1 under "group". Any strides; copied unless the last dim is contiguous.
        geometry: its picking_T is that of these queries.
    Scratch: 4 bytes an entry and 8 a count, MAX_COUNTS counts or one a list, whichever is more.
    """
    num_queries, routed, num_slots = stored_TRP.shape
    heads = routed // num_kv_heads
    num_pairs, num_lists = num_queries * heads, num_kv_heads * geometry.num_chunks * num_slots
    num_parts = max(1, min(MAX_COUNTS // num_lists, num_pairs // MIN_PART_PAIRS))
    part_pairs = -(-num_pairs // (num_parts * STEP_PAIRS)) * STEP_PAIRS
    num_parts = -(-num_pairs // part_pairs)
    device = stored_TRP.device
    counts = torch.zeros(1 + num_lists * num_parts, dtype=torch.int64, device=device)
    entries = torch.empty(num_kv_heads * num_pairs * num_slots, dtype=torch.int32, device=device)
    picks = stored_TRP.view(torch.int16) if stored_TRP.dtype == torch.uint16 else stored_TRP
    picks = picks if picks.stride(2) == 1 else picks.contiguous()
    picking = geometry.picking_T.view(torch.int8)
    sizes = (num_pairs, part_pairs, num_parts, geometry.num_chunks, num_slots, picks.stride(0), picks.stride(1))
    grid = (triton.cdiv(num_pairs, COUNTED_PAIRS), num_kv_heads, num_slots)
    count_picks[grid](
        picks, picking, geometry.key_edges_C, counts, *sizes, HEADS=heads, BLOCK=COUNTED_PAIRS, num_stages=1
    )
    places = counts.cumsum_(0)  # int64 from the start: PyTorch would copy counts of another dtype to add them up
    edges = places[::num_parts].clone()
    grid = (num_parts, num_kv_heads, num_slots)
    place_picks[grid](
        picks, picking, geometry.key_edges_C, places, entries, *sizes, HEADS=heads, BLOCK=STEP_PAIRS,
        num_warps=PLACING_WARPS, num_stages=1,
    )  # fmt: skip
    return PickLists(entries, edges, num_kv_heads, geometry.num_chunks, num_slots, heads)


def variants(head_dims: Iterable[tuple[int, int]], dtypes: Iterable[torch.dtype], target: int) -> Iterator[Variant]:
    """The compiled forms that `build_lists` launches for groups of 4 heads: the same for all inputs and targets."""
    integers = ("num_pairs", "part_pairs", "num_parts", "num_chunks", "num_slots", "stride_pt", "stride_ph")
    head_dim, dtype = next(iter(head_dims))[0], next(iter(dtypes))
    for picks, heads in product(("i16", "i32"), (1, 4)):
        types = {"picks": f"*{picks}", "picking": "*i8", "key_edges": "*i32", **dict.fromkeys(integers, "i32")}
        for kernel, pointers, block, warps in (
            (count_picks, {"counts": "*i64"}, COUNTED_PAIRS, 4),
            (place_picks, {"places": "*i64", "entries": "*i32"}, STEP_PAIRS, PLACING_WARPS),
        ):
            yield Variant(
                label=f"{kernel.__name__} {picks} of {heads}", kernel=kernel, types={**types, **pointers},
                constants={"HEADS": heads, "BLOCK": block}, num_warps=warps, num_stages=1, head_dim=head_dim,
                dtype=dtype, divisible_by_16=frozenset(pointers),
            )  # fmt: skip
