"""Which rows picked which chunk: per-chunk lists by a counting sort on the device, bitwise the same on every run.

Shape letters: T queries of the range, K key/value heads of the range, C chunks, P pick slots, E entries.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
