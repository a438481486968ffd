"""How a row of T tokens is divided among N ranks: integers only, no torch.

A row is cut into pieces as `torch.tensor_split` cuts them (any T, any N; pieces differ by one token at most, late ones
may be empty):

    contiguous: N pieces, rank r holds piece r
    zigzag:    2N pieces, rank r holds pieces r and 2N-1-r     (equal causal work under full attention; as in Megatron)

        tokens  0 1 | 2 3 | 4 5 | 6 7      N = 2, zigzag: rank 0 holds 0 1 6 7, rank 1 holds 2 3 4 5

A shard keeps ascending token order. Padding to equal lengths exists only inside collectives.

Shape letters: T tokens of the row, S tokens of a shard, L tokens of the longest shard, N ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Layout = Literal["zigzag", "contiguous"]
Pieces = tuple[tuple[int, int], ...]
"""(start, stop) of token ranges, ascending."""


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


@dataclass(frozen=True)
class Cut:
    """A row and who holds what of it: rank r holds the pieces `pieces[r]` in token order (some may be empty)."""

    num_tokens: int
    pieces: tuple[Pieces, ...]

    @property
    def num_ranks(self) -> int:
        return len(self.pieces)

    @property
    def longest(self) -> int:
        """L: what every rank pads to inside a collective."""
        return max(self.length(rank) for rank in range(self.num_ranks))

    def length(self, rank: int) -> int:
        """S: tokens that `rank` holds."""
        return sum(stop - start for start, stop in self.pieces[rank])

    def positions(self, rank: int) -> IntArray:
        """[S] int64: global token indices of the shard, strictly ascending."""
        return np.concatenate([np.arange(start, stop, dtype=np.int64) for start, stop in self.pieces[rank]])

    def owner_of_token(self) -> IntArray:
        """[T] int64: the rank that holds each token."""
        owner = np.empty(self.num_tokens, dtype=np.int64)
        for rank, pieces in enumerate(self.pieces):
            for start, stop in pieces:
                owner[start:stop] = rank
        return owner

    def joined(self, ranks_together: int) -> Cut:
        """The cut of N / ranks_together holders, each with all that so many consecutive ranks hold."""
        groups = range(0, self.num_ranks, ranks_together)
        held = (sum(self.pieces[first : first + ranks_together], ()) for first in groups)
        return Cut(self.num_tokens, tuple(tuple(sorted(pieces)) for pieces in held))


def cut_row(num_tokens: int, num_ranks: int, layout: Layout) -> Cut:
    """The cut of a row by one of the two layouts."""
    return Cut(num_tokens, tuple(shard_pieces(num_tokens, num_ranks, rank, layout) for rank in range(num_ranks)))


def shard_pieces(num_tokens: int, num_ranks: int, rank: int, layout: Layout) -> Pieces:
    """(start, stop) of this rank's pieces in token order: one for "contiguous", two for "zigzag"; may be empty."""
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank must lie in 0..{num_ranks - 1}; got {rank}; fix: pass the rank inside the group")
    bounds = piece_bounds(num_tokens, num_ranks, layout)
    held = (rank,) if layout == "contiguous" else (rank, 2 * num_ranks - 1 - rank)
    return tuple((int(bounds[i]), int(bounds[i + 1])) for i in held)


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


__all__ = [
    "Cut",
    "IntArray",
    "Layout",
    "Pieces",
    "cut_row",
    "longest_shard",
    "num_pieces",
    "piece_bounds",
    "piece_owners",
    "shard_length",
    "shard_pieces",
    "shard_positions",
]
