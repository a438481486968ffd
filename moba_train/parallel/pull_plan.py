"""Which keys a rank pulls from whom: from the picks by one exchange of bitmaps, or from the row and its cut alone.

A part (parts.py) is what one rank holds of one chunk in one go, so a rank wants it whole or not at all:

    by picks        a picked chunk ends before its query's own chunk begins: all its parts are wanted
    by own chunks   a query attends causally inside its own chunk: parts before a local part of it are wanted

Under full attention a document stands for a chunk and nothing is picked. Every rank works out all parts from the row
and the cut, so a bitmap over (KV head, part of the owner) is a whole request, of a size that both sides know.

Shape letters: S tokens of the shard, K key/value heads, C chunks, P parts of the row (by owner, then by position),
Q parts held here, N ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moba_kernels import MoBA, Routing
from moba_kernels.pack import device_copy
from moba_kernels.routing import stored_picks

from .cut import IntArray
from .parts import Parts, parts_of
from .transport import HostCopy, ShardedCall

# Picks marked at a time: bounds the int64 copy that indexing needs, whatever the length of the shard.
PICKS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Geometry:
    """`Parts` as one rank uses them, index arrays on its device."""

    rank: int
    own_P: Tensor
    """bool: what this rank's own chunks want."""
    row_Q: Tensor
    """Where each part held here begins in the shard."""
    parts: Parts
    order_P: IntArray
    """Where each part stands in `parts`, which go by position."""
    edges: tuple[int, ...]
    """[N + 1]: rank r holds parts edges[r] .. edges[r + 1] - 1."""
    edges_N1: Tensor
    start_P: Tensor
    length_P: Tensor
    chunk_P: Tensor
    owner_P: Tensor
    by_position_P: Tensor
    """Parts in token order."""

    @property
    def held(self) -> slice:
        """The parts held here."""
        return slice(self.edges[self.rank], self.edges[self.rank + 1])

    @property
    def num_held(self) -> int:
        return self.edges[self.rank + 1] - self.edges[self.rank]

    def request_bytes(self, num_kv_heads: int) -> list[int]:
        """[N]: bytes of a request to each owner: a bit for every KV head and part."""
        return [-(-num_kv_heads * (stop - start) // 8) for start, stop in zip(self.edges, self.edges[1:], strict=False)]


@dataclass(frozen=True)
class PullPlan:
    """What this rank pulls and what others pull from it: bitmaps on the device, sizes on the host.

    Rows (a row = one token of one KV head) travel by rank, KV head and token. Index lists are built anew from the
    bitmaps for forward and backward, so that a layer keeps some kilobytes and not eight bytes a row.
    """

    geometry: Geometry
    wanted_KP: Tensor
    asked_NKQ: Tensor
    """bool: what each rank wants of the parts held here."""
    wanted_NK: IntArray
    """Rows that come from each rank, by KV head."""
    asked_NK: IntArray
    """Rows that go to each rank, by KV head."""

    @property
    def num_kv_heads(self) -> int:
        return int(self.wanted_KP.shape[0])

    def splits(self, first: int, stop: int) -> tuple[list[int], list[int]]:
        """Rows (to, from) every rank of KV heads first .. stop - 1."""
        return self.asked_NK[:, first:stop].sum(1).tolist(), self.wanted_NK[:, first:stop].sum(1).tolist()

    def sent_index(self, first: int, stop: int) -> Tensor:
        """[rows] int64 into the shard's [S*K] rows: what goes to all ranks of KV heads first .. stop - 1."""
        geometry, asked = self.geometry, self.asked_NKQ[:, first:stop]
        num_heads, num_parts = asked.shape[1:]
        counts = (asked * geometry.length_P[geometry.held]).flatten()
        entry, offset = _spread(counts, int(self.asked_NK[:, first:stop].sum()))
        head = first + entry // max(1, num_parts) % num_heads
        token = geometry.row_Q[entry % max(1, num_parts)] + offset
        return token * self.num_kv_heads + head

    def received_places(self, first: int, stop: int) -> Tensor:
        """[stop - first, P] int64: where each part's rows begin among those received of KV heads first .. stop - 1."""
        counts = self.wanted_KP[first:stop] * self.geometry.length_P
        before, edge = _running(counts), self.geometry.edges_N1
        rows_NK = (before[:, edge[1:]] - before[:, edge[:-1]]).T
        first_NK = (rows_NK.flatten().cumsum(0) - rows_NK.flatten()).view(rows_NK.shape)
        return before[:, :-1] + (first_NK.T - before[:, edge[:-1]])[:, self.geometry.owner_P]

    def pulled_index(self, head: int, place_P: Tensor) -> tuple[Tensor, Tensor]:
        """([n] rows among those received, [n] ascending global token indices) of one KV head; place_P: its line of
        `received_places`."""
        geometry, order = self.geometry, self.geometry.by_position_P
        counts = (self.wanted_KP[head] * geometry.length_P)[order]
        entry, offset = _spread(counts, int(self.wanted_NK[:, head].sum()))
        part = order[entry]
        return place_P[part] + offset, geometry.start_P[part] + offset


@dataclass(frozen=True)
class Asking:
    """A plan in the making: its bitmaps are there, its sizes are on their way to the host."""

    geometry: Geometry
    wanted_KP: Tensor
    asked_NKQ: Tensor
    sizes: HostCopy

    def plan(self) -> PullPlan:
        """Wait for the sizes: the one host read of a layer."""
        wanted_NK, asked_NK = self.sizes.wait()
        return PullPlan(self.geometry, self.wanted_KP, self.asked_NKQ, wanted_NK, asked_NK)


def known_plan(call: ShardedCall, num_kv_heads: int, device: torch.device) -> PullPlan | None:
    """The plan where nothing can be picked, else None: alike on all ranks, because it depends on the row alone.

    It follows from the row and its cut, is made once a row, and asks nobody.
    """
    if isinstance(call.spec, MoBA) and stored_picks(call.spec, call.pack):
        return None

    def build() -> PullPlan:
        geometry, num_ranks = _geometry(call, device), call.num_ranks
        parts, order_P, held = geometry.parts, geometry.order_P, geometry.held
        tokens_P = parts.tokens_P[order_P]
        wanted_NP = np.stack([wanted_by_own_chunks(parts, rank)[order_P] for rank in range(num_ranks)])
        wanted_N = np.bincount(parts.owner_P[order_P], wanted_NP[call.rank] * tokens_P, num_ranks).astype(np.int64)
        asked_NQ = np.ascontiguousarray(wanted_NP[:, held])
        wanted_NK, asked_NK = (np.repeat(x[:, None], num_kv_heads, 1) for x in (wanted_N, asked_NQ @ tokens_P[held]))
        wanted_KP = geometry.own_P.expand(num_kv_heads, -1)
        asked_NKQ = device_copy(asked_NQ, device)[:, None].expand(-1, num_kv_heads, -1)
        return PullPlan(geometry, wanted_KP, asked_NKQ, wanted_NK, asked_NK)

    return call.pack.derived(("pull plan", _chunk_size(call), call.cut, call.rank, num_kv_heads, device), build)


def ask(call: ShardedCall, num_kv_heads: int, device: torch.device) -> Asking:
    """Tell every owner which of its parts this rank wants, and learn what others want of its own. Collective."""
    assert isinstance(call.spec, MoBA) and call.routing is not None
    geometry, num_ranks = _geometry(call, device), call.num_ranks
    picked_KC = picked_chunks(call.routing, num_kv_heads, call.pack.chunks(call.spec.chunk_size).num_chunks)
    wanted_KP = (picked_KC[:, geometry.chunk_P] & (geometry.owner_P != call.rank)) | geometry.own_P
    sizes = geometry.request_bytes(num_kv_heads)
    own_size = sizes[call.rank]
    sent = _pack_bits(wanted_KP, geometry, call)
    received = call.wire.all_to_all(sent, sizes, [own_size] * num_ranks, phase="forward/request").wait()
    bits = _unpack_bits(received.view(num_ranks, own_size))[:, : num_kv_heads * geometry.num_held]
    asked_NKQ = bits.view(num_ranks, num_kv_heads, geometry.num_held)
    wanted_NK = _running(wanted_KP * geometry.length_P)[:, geometry.edges_N1].diff(dim=1).T
    asked_NK = (asked_NKQ * geometry.length_P[geometry.held]).sum(2)
    return Asking(geometry, wanted_KP, asked_NKQ, HostCopy.start(torch.stack([wanted_NK, asked_NK])))


def picked_chunks(routing: Routing, num_kv_heads: int, num_chunks: int) -> Tensor:
    """bool [K,C]: some query at hand, of a query head that reads the KV head, picked the chunk."""
    num_queries, num_heads, slots = routing.stored.shape
    device = routing.stored.device
    marked = torch.zeros(num_kv_heads * num_chunks + 1, dtype=torch.bool, device=device)  # the last one: no pick
    first_K1 = (torch.arange(num_kv_heads, device=device) * num_chunks)[:, None]
    at_once = max(1, PICKS_AT_ONCE // max(1, num_heads * slots))
    for begin in range(0, num_queries, at_once):
        picks = routing.picks_of(slice(begin, begin + at_once))
        picks = picks.reshape(len(picks), num_kv_heads, num_heads * slots // num_kv_heads)
        marked.index_fill_(0, torch.where(picks < 0, marked.numel() - 1, picks + first_K1).flatten(), True)
    return marked[:-1].view(num_kv_heads, num_chunks)


def wanted_by_own_chunks(parts: Parts, rank: int) -> npt.NDArray[np.bool_]:
    """[P], parts by position: `rank` does not hold the part, but a later one of the same chunk."""
    index_P = np.arange(len(parts.chunk_P))
    mine = index_P[parts.owner_P == rank]
    last_C = np.full(parts.num_chunks, -1)
    last_C[parts.chunk_P[mine]] = mine  # the last of several stays
    wanted: npt.NDArray[np.bool_] = (index_P < last_C[parts.chunk_P]) & (parts.owner_P != rank)
    return wanted


def _geometry(call: ShardedCall, device: torch.device) -> Geometry:
    """Made once per row, so that no layer waits for a copy to the device; what ranks share, once for all threads of an
    emulation."""
    cut, rank = call.cut, call.rank

    def of_row() -> tuple[Parts, IntArray, tuple[int, ...], tuple[Tensor, ...]]:
        parts = parts_of(cut, call.pack.cu_seqlens, call.spec)
        order = np.argsort(parts.owner_P, kind="stable")
        start, tokens, chunk, owner = (x[order] for x in (_starts(parts), parts.tokens_P, parts.chunk_P, parts.owner_P))
        edges = np.searchsorted(owner, np.arange(cut.num_ranks + 1))
        arrays = (edges, start, tokens, chunk, owner, np.argsort(order))
        return parts, order, tuple(edges.tolist()), tuple(device_copy(array, device) for array in arrays)

    def of_rank() -> Geometry:
        parts, order, edges, arrays = call.pack.derived(("pull parts", _chunk_size(call), cut, device), of_row)
        own_P = wanted_by_own_chunks(parts, rank)[order]
        row_Q = np.searchsorted(cut.positions(rank), _starts(parts)[order][edges[rank] : edges[rank + 1]])
        own, row = (device_copy(array, device) for array in (own_P, row_Q))
        return Geometry(rank, own, row, parts, order, edges, *arrays)

    return call.pack.derived(("pull geometry", _chunk_size(call), cut, rank, device), of_rank)


def _starts(parts: Parts) -> IntArray:
    """The first token of each part, by position."""
    return np.cumsum(parts.tokens_P) - parts.tokens_P


def _chunk_size(call: ShardedCall) -> int | None:
    return call.spec.chunk_size if isinstance(call.spec, MoBA) else None


def _pack_bits(wanted_KP: Tensor, geometry: Geometry, call: ShardedCall) -> Tensor:
    """uint8: for every owner its [K, parts] bits, padded to bytes."""
    num_kv_heads, num_parts = wanted_KP.shape

    def build() -> Tensor:
        bits: list[IntArray] = []
        for start, stop in zip(geometry.edges, geometry.edges[1:], strict=False):
            of_owner = (np.arange(num_kv_heads)[:, None] * num_parts + np.arange(start, stop)).ravel()
            bits += [of_owner, np.full(-len(of_owner) % 8, num_kv_heads * num_parts)]
        return device_copy(np.concatenate(bits), wanted_KP.device)

    order = call.pack.derived(("pull bits", _chunk_size(call), call.cut, num_kv_heads, wanted_KP.device), build)
    bits = torch.cat([wanted_KP.flatten(), wanted_KP.new_zeros(1)])[order].view(-1, 8)
    return (bits << torch.arange(8, device=bits.device)).sum(1).to(torch.uint8)


def _unpack_bits(packed_NB: Tensor) -> Tensor:
    """bool [N, 8 * bytes]."""
    places = torch.arange(8, dtype=torch.uint8, device=packed_NB.device)
    return ((packed_NB[:, :, None] >> places) & 1).flatten(1).bool()


def _spread(count_E: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """([total] entry, [total] index within it) of `count_E[e]` rows for every entry e; total = their sum."""
    entry = torch.repeat_interleave(count_E, output_size=total)
    return entry, torch.arange(total, device=count_E.device) - (count_E.cumsum(0) - count_E)[entry]


def _running(x: Tensor) -> Tensor:
    """[..., n + 1]: sums of what stands before, along the last dim."""
    return torch.nn.functional.pad(x.cumsum(-1), (1, 0))


__all__ = ["Asking", "PullPlan", "ask", "known_plan", "picked_chunks", "wanted_by_own_chunks"]
