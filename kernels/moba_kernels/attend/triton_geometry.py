"""Where segments and chunks lie among the queries and keys at hand, worked out on the device: no host sync.

Shape letters: T queries at hand, S keys at hand, G causal segments, C chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from .call import AttendCall

D = TypeVar("D")


@dataclass(frozen=True)
class DeviceGeometry:
    """All tensors lie on the device and are contiguous; counts are host integers."""

    query_edges_G: Tensor
    """int32 [G + 1]: queries at hand of segment s are query_edges_G[s] .. query_edges_G[s + 1] - 1."""
    key_edges_G: Tensor
    """int32 [G + 1]: keys at hand of segment s, likewise."""
    visible_T: Tensor
    """int32 [T]: how many keys at hand lie at or before each query; they are the first ones."""
    key_edges_C: Tensor
    """int32 [C + 1]: keys at hand of chunk c. [1] under Full."""
    picking_T: Tensor
    """bool [T]: the query has picks outside its segment (False where its document is covered, and under Full)."""
    num_segments: int
    num_chunks: int
    _derived: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def derived(self, key: Hashable, build: Callable[[], D]) -> D:
        """What follows from it and `key` alone (a table of tiles), whatever the KV head: built once, kept on it."""
        if key not in self._derived:
            self._derived[key] = build()
        kept: D = self._derived[key]
        return kept


def device_geometry(call: AttendCall, device: torch.device) -> DeviceGeometry:
    """The geometry of a call. `Segments` says what is a segment."""
    segments = call.segments
    edges, covered_C = segments.tensors(device)
    token_T = torch.arange(call.pack.num_tokens, device=device)
    query_T = token_T if call.q_positions is None else call.q_positions.to(device)
    key_S = token_T if call.k_positions is None else call.k_positions.to(device)
    if call.routing is None:
        chunk_edges = edges.new_zeros(1)
        picking_T = torch.zeros(query_T.shape, dtype=torch.bool, device=device)
    else:
        geometry = call.pack.chunks(call.routing.spec.chunk_size).tensors(device)
        chunk_edges = torch.cat((geometry.start_C, edges[-1:]))
        picking_T = ~covered_C[geometry.chunk_of_token_T[query_T]]
    return DeviceGeometry(
        query_edges_G=_count_before(query_T, edges),
        key_edges_G=_count_before(key_S, edges),
        visible_T=_count_before(key_S, query_T + 1),
        key_edges_C=_count_before(key_S, chunk_edges),
        picking_T=picking_T,
        num_segments=len(segments.edges) - 1,
        num_chunks=chunk_edges.numel() - 1,
    )


def _count_before(ascending: Tensor, limits: Tensor) -> Tensor:
    """int32: how many of `ascending` lie below each limit."""
    return torch.searchsorted(ascending, limits, out_int32=True)
