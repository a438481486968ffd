"""How a row is cut over context-parallel ranks: pure integer geometry, and the tensor operations that follow it.

A row of T tokens is cut into pieces as `torch.tensor_split` cuts them (any T, any N; pieces differ by one token at
most, late ones may be empty):

    contiguous: N pieces, rank r holds piece r
    zigzag:    2N pieces, rank r holds pieces r and 2N-1-r     (equal causal work under full attention; as in Megatron)

        tokens  0 1 | 2 3 | 4 5 | 6 7      N = 2, zigzag: rank 0 holds 0 1 6 7, rank 1 holds 2 3 4 5

A shard keeps ascending token order. Padding to equal lengths exists only inside collectives.

Shape letters: T tokens of the row, S tokens of a shard, L tokens of the longest shard, N ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import all_gather

IntArray = npt.NDArray[np.int64]
Layout = Literal["zigzag", "contiguous"]


def num_pieces(num_ranks: int, layout: Layout) -> int:
    """Pieces of a row: N for "contiguous", 2N for "zigzag". ValueError for another layout."""
    if layout == "contiguous":
        return num_ranks
    if layout == "zigzag":
        return 2 * num_ranks
    raise ValueError(f"layout must be 'zigzag' or 'contiguous'; got {layout!r}; fix: pass one of the two")


def piece_bounds(num_tokens: int, num_ranks: int, layout: Layout) -> IntArray:
    """[pieces + 1] int64: piece i holds tokens bounds[i] .. bounds[i + 1] - 1."""
    pieces = num_pieces(num_ranks, layout)
    index = np.arange(pieces + 1, dtype=np.int64)
    bounds: IntArray = index * (num_tokens // pieces) + np.minimum(index, num_tokens % pieces)
    return bounds


def piece_owners(num_ranks: int, layout: Layout) -> IntArray:
    """[pieces] int64: the rank that holds each piece."""
    index = np.arange(num_pieces(num_ranks, layout), dtype=np.int64)
    return np.minimum(index, 2 * num_ranks - 1 - index) if layout == "zigzag" else index


def shard_pieces(num_tokens: int, num_ranks: int, rank: int, layout: Layout) -> tuple[tuple[int, int], ...]:
    """(start, stop) of this rank's pieces in token order: one for "contiguous", two for "zigzag"; may be empty."""
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank must lie in 0..{num_ranks - 1}; got {rank}; fix: pass the rank inside the group")
    bounds = piece_bounds(num_tokens, num_ranks, layout).tolist()
    held = np.flatnonzero(piece_owners(num_ranks, layout) == rank).tolist()
    return tuple((bounds[i], bounds[i + 1]) for i in held)


def shard_length(num_tokens: int, num_ranks: int, rank: int, layout: Layout) -> int:
    """S: tokens that this rank holds."""
    return sum(stop - start for start, stop in shard_pieces(num_tokens, num_ranks, rank, layout))


def longest_shard(num_tokens: int, num_ranks: int, layout: Layout) -> int:
    """L: what every rank pads to inside a collective. Rank 0 holds the longest piece of each kind."""
    lengths = np.diff(piece_bounds(num_tokens, num_ranks, layout))
    return int(np.bincount(piece_owners(num_ranks, layout), weights=lengths).max())


def shard_positions(num_tokens: int, num_ranks: int, rank: int, layout: Layout) -> IntArray:
    """[S] int64: global token indices of this rank's shard, strictly ascending."""
    pieces = shard_pieces(num_tokens, num_ranks, rank, layout)
    return np.concatenate([np.arange(start, stop, dtype=np.int64) for start, stop in pieces])


def shard(x: Tensor, dim: int, *, num_ranks: int, rank: int, layout: Layout) -> Tensor:
    """This rank's part of `x`, which holds all T tokens along `dim`; S tokens along `dim`. Differentiable."""
    pieces = shard_pieces(x.shape[dim], num_ranks, rank, layout)
    parts = [x.narrow(dim, start, stop - start) for start, stop in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def unshard(shards: Sequence[Tensor], dim: int, *, num_tokens: int, layout: Layout) -> Tensor:
    """The inverse of `shard`: T tokens along `dim` from the shards of all ranks in rank order.

    A shard may be longer than its part (padded to equal lengths, as collectives return it); the padding is dropped.
    """
    pieces: dict[int, Tensor] = {}
    for rank, x in enumerate(shards):
        offset = 0
        for start, stop in shard_pieces(num_tokens, len(shards), rank, layout):
            if stop > start:
                pieces[start] = x.narrow(dim, offset, stop - start)
            offset += stop - start
    if not pieces:
        return shards[0].narrow(dim, 0, 0)
    return torch.cat([pieces[start] for start in sorted(pieces)], dim)


def gather_shards(x: Tensor, dim: int, *, num_tokens: int, layout: Layout, group: dist.ProcessGroup | None) -> Tensor:
    """All-gather: every rank passes its shard (S tokens along `dim`) and gets all T tokens in order. No gradient.

    Collective over `group`; None or one rank returns `x`. Bytes received: (N - 1) times the longest shard.
    """
    num_ranks = 1 if group is None else group.size()
    if group is None or num_ranks == 1:
        return x.detach()
    longest = longest_shard(num_tokens, num_ranks, layout)
    sent = pad_rows(x.detach().movedim(dim, 0), longest)
    received = sent.new_empty((num_ranks, *sent.shape))
    all_gather(received.view(-1, *sent.shape[1:]), sent, group=group).wait()
    return unshard(received.unbind(0), 0, num_tokens=num_tokens, layout=layout).movedim(0, dim)


def pad_rows(x: Tensor, rows: int) -> Tensor:
    """`x` [S, ...] as a contiguous [rows, ...], zeros after its S rows."""
    padded = x.new_zeros((rows, *x.shape[1:]))
    padded[: x.shape[0]] = x
    return padded
