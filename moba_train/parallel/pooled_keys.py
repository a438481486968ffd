"""Routing over a sharded row: ranks exchange pooled chunk keys, never keys or values, and every query gates globally.

Every rank works out from (cu_seqlens, chunk_size, N, layout) alone which chunks lie wholly on which rank and which
straddle shards, so nothing about the exchange is read from a device or sent ahead:

    whole chunks       travel as their fp32 mean      all-gather,  4*K*D bytes a chunk
    straddling chunks  travel as fp64 partial sums    all-reduce,  8*K*D bytes a chunk each way; their counts are known

Sums are taken in fp64 and published as fp32 means, so the routing does not depend on how the row is cut.
MoBA: arXiv 2502.13189, equations 5 and 6.

Shape letters: S tokens of the shard, H query heads, K key/value heads, D head dim, C chunks, E straddling chunks,
W whole chunks of the rank that has most, N ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moba_kernels import MoBA, Pack, Routing, mean_keys, pool_sums, route_means
from moba_kernels.pack import device_copy

from .cut import IntArray, Layout, piece_bounds, piece_owners
from .shard import pad_rows
from .transport import device_positions, row_cut
from .wire import Group, Wire


@dataclass(frozen=True)
class ChunkOwners:
    """Which rank holds each chunk; a pure function of the row and its cut."""

    owner_C: IntArray
    """[C]: the rank that holds the whole chunk, -1 = it straddles shards."""
    num_ranks: int

    @property
    def straddling(self) -> IntArray:
        """[E] ids of the chunks that no rank holds whole."""
        return np.flatnonzero(self.owner_C < 0)

    def whole_on(self, rank: int) -> IntArray:
        """Ids of the chunks that lie wholly on `rank`, ascending."""
        return np.flatnonzero(self.owner_C == rank)

    @property
    def most_whole(self) -> int:
        """W: what every rank pads its means to."""
        return int(np.bincount(self.owner_C[self.owner_C >= 0], minlength=1).max())

    def rows_of_exchange(self) -> IntArray:
        """[C]: where each mean stands in [N*W + E]: the gathered means of all ranks, then the straddling chunks'."""
        rows = np.empty(len(self.owner_C), dtype=np.int64)
        by_owner = np.argsort(self.owner_C, kind="stable")
        owners = self.owner_C[by_owner]
        index_in_owner = np.arange(len(owners)) - np.searchsorted(owners, owners)
        first = np.where(owners < 0, self.num_ranks * self.most_whole, owners * self.most_whole)
        rows[by_owner] = first + index_in_owner
        return rows


def chunk_owners(pack: Pack, chunk_size: int, *, num_ranks: int, layout: Layout) -> ChunkOwners:
    """Who holds which chunk. A chunk over two neighbouring pieces of one rank (the middle of a zigzag) is whole."""
    geometry = pack.chunks(chunk_size)
    bounds = piece_bounds(pack.num_tokens, num_ranks, layout)
    owners = piece_owners(num_ranks, layout)
    changes = np.concatenate(([0], np.cumsum(owners[1:] != owners[:-1])))
    first_C = np.searchsorted(bounds, geometry.start_C, side="right") - 1
    last_C = np.searchsorted(bounds, geometry.end_C - 1, side="right") - 1
    return ChunkOwners(np.where(changes[first_C] == changes[last_C], owners[first_C], -1), num_ranks)


@dataclass(frozen=True)
class ExchangePlan:
    """`ChunkOwners` as one rank uses them, index arrays on its device."""

    owners: ChunkOwners
    whole: Tensor
    """Ids of the chunks that lie wholly on this rank."""
    straddling: Tensor
    """[E] ids of the chunks that no rank holds whole."""
    count_E: Tensor
    """[E] int64: their tokens."""
    rows_C: Tensor
    """[C]: where each mean stands in [N*W + E]."""


def exchange_plan(
    pack: Pack, chunk_size: int, *, num_ranks: int, rank: int, layout: Layout, device: torch.device
) -> ExchangePlan:
    """The plan of `rank`; made once per row, so that no layer waits for a copy to the device."""

    def build() -> ExchangePlan:
        owners = chunk_owners(pack, chunk_size, num_ranks=num_ranks, layout=layout)
        geometry = pack.chunks(chunk_size)
        counts = (geometry.end_C - geometry.start_C)[owners.straddling]
        arrays = (owners.whole_on(rank), owners.straddling, counts, owners.rows_of_exchange())
        return ExchangePlan(owners, *(device_copy(array, device) for array in arrays))

    return pack.derived(("pooled keys", chunk_size, num_ranks, rank, layout, device), build)


def route_context(
    q: Tensor,
    k: Tensor,
    spec: MoBA,
    *,
    layout: Layout,
    group: Group | None,
    pack: Pack,
    backend: str = "auto",
) -> Routing:
    """Which chunks of the whole row this rank's queries attend to. Collective over `group`; no gradient.

    Args:
        q: [S,H,D] and k: [S,K,D], this rank's shard, keys after RoPE.
        pack: the documents of the whole row; `layout` says how it was cut.
    Returns the Routing of the local queries (`q_positions` are their global indices), the same for any N.
    """
    if group is None or group.size() == 1:
        sums, counts = pool_sums(k, pack=pack, chunk_size=spec.chunk_size, backend=backend)
        return route_means(q, mean_keys(sums, counts), spec, pack=pack, backend=backend)
    return route_over(Wire(group, transport="pooled keys"), q, k, spec, layout=layout, pack=pack, backend=backend)


def route_over(
    wire: Wire, q: Tensor, k: Tensor, spec: MoBA, *, layout: Layout, pack: Pack, backend: str = "auto"
) -> Routing:
    """`route_context` over a wire that counts the bytes and names the layer."""
    positions_S = device_positions(pack, row_cut(pack, wire.size, layout), wire.rank, q.device)
    mean_CKD = global_means(wire, k, spec, layout=layout, pack=pack, positions_S=positions_S, backend=backend)
    return route_means(q, mean_CKD, spec, pack=pack, q_positions=positions_S, backend=backend)


@torch.no_grad()
def global_means(
    wire: Wire,
    k_SKD: Tensor,
    spec: MoBA,
    *,
    layout: Layout,
    pack: Pack,
    positions_S: Tensor,
    backend: str = "auto",
) -> Tensor:
    """fp32 [C,K,D]: the mean key of every chunk of the row, the same on every rank. Collective over the wire."""
    plan = exchange_plan(pack, spec.chunk_size, num_ranks=wire.size, rank=wire.rank, layout=layout, device=k_SKD.device)
    sum_CKD, count_C = pool_sums(k_SKD, pack=pack, chunk_size=spec.chunk_size, k_positions=positions_S, backend=backend)
    sent_WKD, sum_EKD = contribution(sum_CKD, count_C, plan)
    # Both exchanges are under way before either is waited for; an empty one is skipped on all ranks alike.
    summed = wire.all_reduce(sum_EKD, phase="forward/straddling_keys") if sum_EKD.shape[0] else None
    gathered = wire.all_gather(sent_WKD, phase="forward/pooled_keys") if sent_WKD.shape[0] else None
    total = sum_EKD if summed is None else summed.wait()
    received = sent_WKD if gathered is None else gathered.wait().flatten(0, 1)
    return assemble(received, total, plan)


def contribution(sum_CKD: Tensor, count_C: Tensor, plan: ExchangePlan) -> tuple[Tensor, Tensor]:
    """What a rank puts in: fp32 [W,K,D] means of its whole chunks, padded; fp64 [E,K,D] its sums of straddling ones."""
    means = mean_keys(sum_CKD[plan.whole], count_C[plan.whole])
    return pad_rows(means, plan.owners.most_whole), sum_CKD[plan.straddling]


def assemble(received: Tensor, sum_EKD: Tensor, plan: ExchangePlan) -> Tensor:
    """fp32 [C,K,D] from the gathered means of all ranks [N*W,K,D] and the total sums of straddling chunks [E,K,D]."""
    return torch.cat([received, mean_keys(sum_EKD, plan.count_E)])[plan.rows_C]
