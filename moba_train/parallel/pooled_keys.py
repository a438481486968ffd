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
import torch.distributed as dist
from torch import Tensor

from moba_kernels import MoBA, Pack, Routing, mean_keys, pool_sums, route_means

from .collectives import all_gather
from .shard import IntArray, Layout, pad_rows, piece_bounds, piece_owners, shard_positions


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


def route_context(
    q: Tensor,
    k: Tensor,
    spec: MoBA,
    *,
    layout: Layout,
    group: dist.ProcessGroup | None,
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
    positions = shard_positions(pack.num_tokens, group.size(), group.rank(), layout)
    positions_S = torch.from_numpy(positions).to(q.device)
    mean_CKD = global_means(k, spec, layout=layout, group=group, pack=pack, positions_S=positions_S, backend=backend)
    return route_means(q, mean_CKD, spec, pack=pack, q_positions=positions_S, backend=backend)


@torch.no_grad()
def global_means(
    k_SKD: Tensor,
    spec: MoBA,
    *,
    layout: Layout,
    group: dist.ProcessGroup,
    pack: Pack,
    positions_S: Tensor,
    backend: str = "auto",
) -> Tensor:
    """fp32 [C,K,D]: the mean key of every chunk of the row, the same on every rank. Collective over `group`."""
    owners = chunk_owners(pack, spec.chunk_size, num_ranks=group.size(), layout=layout)
    sum_CKD, count_C = pool_sums(k_SKD, pack=pack, chunk_size=spec.chunk_size, k_positions=positions_S, backend=backend)
    sent_WKD, sum_EKD = contribution(sum_CKD, count_C, owners, group.rank())
    received = sent_WKD.new_empty((group.size() * sent_WKD.shape[0], *sent_WKD.shape[1:]))
    # Both exchanges are under way before either is waited for; an empty one is skipped on all ranks alike.
    pending = []
    if sum_EKD.shape[0]:
        pending.append(dist.all_reduce(sum_EKD, group=group, async_op=True))
    if sent_WKD.shape[0]:
        pending.append(all_gather(received, sent_WKD, group=group))
    for work in pending:
        work.wait()
    return assemble(received, sum_EKD, owners, pack, spec.chunk_size)


def contribution(sum_CKD: Tensor, count_C: Tensor, owners: ChunkOwners, rank: int) -> tuple[Tensor, Tensor]:
    """What `rank` puts in: fp32 [W,K,D] means of its whole chunks, padded; fp64 [E,K,D] its sums of straddling ones."""
    device = sum_CKD.device
    whole = torch.from_numpy(owners.whole_on(rank)).to(device)
    means = mean_keys(sum_CKD[whole], count_C[whole])
    return pad_rows(means, owners.most_whole), sum_CKD[torch.from_numpy(owners.straddling).to(device)]


def assemble(received: Tensor, sum_EKD: Tensor, owners: ChunkOwners, pack: Pack, chunk_size: int) -> Tensor:
    """fp32 [C,K,D] from the gathered means of all ranks [N*W,K,D] and the total sums of straddling chunks [E,K,D]."""
    geometry = pack.chunks(chunk_size)
    count_E = (geometry.end_C - geometry.start_C)[owners.straddling]
    means = torch.cat([received, mean_keys(sum_EKD, torch.from_numpy(count_E).to(sum_EKD.device))])
    return means[torch.from_numpy(owners.rows_of_exchange()).to(means.device)]
