"""The parts of chunks that ranks hold, and what uniform routing asks of them: integers and expectations, no torch.

A part is what one rank holds of one chunk in one go; a chunk that straddles shards has several. Full attention is the
case of one chunk a document, without picks.

Uniform routing is the yardstick of the cost model: every query picks min(c, topk - 1) of the c chunks before its own,
all subsets alike and independent of other queries. Skewed routing asks for fewer chunks (pull moves less) and for some
of them more often (route_queries is less even).

Shape letters: T tokens of the row, C chunks, P parts, N ranks, H query heads, K key/value heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moba_kernels.spec import AttentionSpec, MoBA

from .cut import Cut, IntArray

FloatArray = npt.NDArray[np.float64]

# Stands for log(1 - p) where p = 1: exp() of it is 0, and sums of it stay exact enough to be taken apart again.
_CERTAIN = -1e4


@dataclass(frozen=True)
class Parts:
    """All parts of a row, in token order; built by `parts_of`."""

    num_ranks: int
    num_picks: int
    """topk - 1; 0 under full attention."""
    chunk_size: int
    chunk_P: IntArray
    owner_P: IntArray
    tokens_P: IntArray
    offset_P: IntArray
    """Tokens of the same chunk before the part."""
    fragments_N: IntArray
    """What each rank holds, counted by chunk and piece of the cut: its neighbouring pieces count apart."""
    tokens_C: IntArray
    first_C: IntArray
    """The first chunk of the document that each chunk belongs to."""
    end_C: IntArray
    """One past its last chunk."""

    @property
    def num_chunks(self) -> int:
        return len(self.tokens_C)

    @property
    def before_C(self) -> IntArray:
        """[C]: chunks of the same document before each chunk."""
        return np.arange(self.num_chunks) - self.first_C

    @property
    def chance_C(self) -> FloatArray:
        """[C]: the chance that a query of this chunk picks a given one of the chunks before it."""
        before = self.before_C
        return np.where(before > 0, np.minimum(1.0, self.num_picks / np.maximum(1, before)), 0.0)

    def straddling_C(self) -> npt.NDArray[np.bool_]:
        """[C]: no rank holds the whole chunk."""
        return np.bincount(self.chunk_P, minlength=self.num_chunks) > 1

    def most_whole(self) -> int:
        """W: whole chunks of the rank that holds most of them."""
        whole = ~self.straddling_C()[self.chunk_P]
        return int(np.bincount(self.owner_P[whole], minlength=1).max())

    def held_by(self, rank: int) -> FloatArray:
        """[C]: tokens of each chunk that `rank` holds."""
        mine = self.owner_P == rank
        held: FloatArray = np.bincount(self.chunk_P[mine], self.tokens_P[mine], self.num_chunks).astype(np.float64)
        return held

    def over_ranks(self, x_P: npt.ArrayLike) -> FloatArray:
        """[N]: x of the parts, added up by owner."""
        total: FloatArray = np.bincount(self.owner_P, np.asarray(x_P, np.float64), self.num_ranks).astype(np.float64)
        return total

    def sum_before(self, x_C: FloatArray) -> FloatArray:
        """[C]: the sum of x over the chunks of the same document before each chunk."""
        total = np.concatenate(([0.0], np.cumsum(x_C)))
        before: FloatArray = total[:-1] - total[self.first_C]
        return before

    def sum_after(self, x_C: FloatArray) -> FloatArray:
        """[C]: the sum of x over the chunks of the same document after each chunk."""
        total = np.concatenate(([0.0], np.cumsum(x_C)))
        after: FloatArray = total[self.end_C] - total[1:]
        return after


def parts_of(cut: Cut, documents: Sequence[int], spec: AttentionSpec) -> Parts:
    """The parts of a row. documents: cumulative lengths from 0 to `cut.num_tokens`; empty documents have no chunk."""
    bounds = np.unique(np.asarray(documents, dtype=np.int64))
    lengths = np.diff(bounds)
    chunk_size = spec.chunk_size if isinstance(spec, MoBA) else max(1, cut.num_tokens)
    chunks_of_doc = -(-lengths // chunk_size)
    ends = np.cumsum(chunks_of_doc)
    first_C = np.repeat(ends - chunks_of_doc, chunks_of_doc)
    index = np.arange(len(first_C), dtype=np.int64)
    start_C = np.repeat(bounds[:-1], chunks_of_doc) + (index - first_C) * chunk_size
    tokens_C = np.diff(np.append(start_C, cut.num_tokens))

    held = sorted(
        (start, stop, rank) for rank, pieces in enumerate(cut.pieces) for start, stop in pieces if stop > start
    )
    piece_start = np.array([start for start, _, _ in held], dtype=np.int64)
    piece_owner = np.array([rank for _, _, rank in held], dtype=np.int64)
    start_P = np.union1d(piece_start, start_C)
    chunk_P = np.searchsorted(start_C, start_P, side="right") - 1
    owner_P = piece_owner[np.searchsorted(piece_start, start_P, side="right") - 1] if held else chunk_P
    fragments_N = np.bincount(owner_P, minlength=cut.num_ranks)
    # Two neighbouring pieces of one rank (the middle of a zigzag) hold a chunk together.
    new = np.append(True, (np.diff(chunk_P) != 0) | (np.diff(owner_P) != 0))[: len(start_P)]
    start_P, chunk_P, owner_P = start_P[new], chunk_P[new], owner_P[new]
    tokens_P = np.diff(np.append(start_P, cut.num_tokens))
    return Parts(
        num_ranks=cut.num_ranks,
        num_picks=spec.num_picks if isinstance(spec, MoBA) else 0,
        chunk_size=chunk_size,
        chunk_P=chunk_P,
        owner_P=owner_P,
        tokens_P=tokens_P,
        offset_P=start_P - start_C[chunk_P],
        fragments_N=fragments_N,
        tokens_C=tokens_C,
        first_C=first_C,
        end_C=np.repeat(ends, chunks_of_doc),
    )


def pairs_of_queries(parts: Parts) -> FloatArray:
    """[N]: (query, key) pairs of one head that each rank's queries attend to; exact under the gate's routing."""
    picked_P = np.minimum(parts.before_C, parts.num_picks)[parts.chunk_P] * parts.chunk_size
    tokens = parts.tokens_P
    return parts.over_ranks(tokens * (parts.offset_P + picked_P) + tokens * (tokens + 1) // 2)


def pairs_of_keys(parts: Parts) -> FloatArray:
    """[N]: expected pairs of one head whose key each rank holds, whoever asks."""
    tokens = parts.tokens_P
    own_P = tokens * (parts.tokens_C[parts.chunk_P] - parts.offset_P) - tokens * (tokens - 1) // 2
    askers_C = parts.sum_after(parts.tokens_C * parts.chance_C)
    return parts.over_ranks(own_P + tokens * askers_C[parts.chunk_P])


def local_pairs(parts: Parts) -> FloatArray:
    """[N]: expected pairs of one head of which each rank holds both query and key."""
    pairs = np.zeros(parts.num_ranks)
    for rank in range(parts.num_ranks):
        mine = parts.owner_P == rank
        chunk, tokens = parts.chunk_P[mine], parts.tokens_P[mine]
        held_C = parts.held_by(rank)
        picked = (held_C * parts.chance_C * parts.sum_before(held_C)).sum()
        before = np.cumsum(tokens) - tokens
        earlier = before - before[np.searchsorted(chunk, chunk)]  # local tokens before the part in its own chunk
        pairs[rank] = picked + (tokens * earlier + tokens * (tokens + 1) // 2).sum()
    return pairs


def pulled_tokens(parts: Parts, draws: int) -> FloatArray:
    """[N,N]: expected tokens of one KV head that the second rank wants of those that the first one holds.

    A part is wanted when a local query picked its chunk or stands behind the part in the same chunk. A chunk is missed
    by n queries, each picking it with chance p in `draws` draws, with chance (1 - p) ** (n * draws).

    draws: picks of one token for one KV head: H/K for select="head", 1 for "group".
    """
    wanted_NN = np.zeros((parts.num_ranks, parts.num_ranks))
    chance_C = parts.chance_C
    certain_C = chance_C >= 1
    log_miss_C = np.where(certain_C, _CERTAIN, np.log1p(-np.where(certain_C, 0.0, chance_C)))
    index_P = np.arange(len(parts.chunk_P))
    for rank in range(parts.num_ranks):
        picked_C = -np.expm1(parts.sum_after(parts.held_by(rank) * draws * log_miss_C))
        last_C = np.full(parts.num_chunks, -1)
        np.maximum.at(last_C, parts.chunk_P[parts.owner_P == rank], index_P[parts.owner_P == rank])
        wanted_P = np.where(index_P < last_C[parts.chunk_P], 1.0, picked_C[parts.chunk_P])
        wanted_NN[:, rank] = parts.over_ranks(wanted_P * parts.tokens_P)
    np.fill_diagonal(wanted_NN, 0.0)
    return wanted_NN


def sent_queries(parts: Parts) -> FloatArray:
    """[N,N]: expected tokens of one routing head that the first rank sends to the second.

    A query goes to every other rank that holds a part of a chunk it picked, or an earlier part of its own chunk. It
    misses all m of the c chunks that a rank has a part of, with p picks, with chance C(c - m, p) / C(c, p).
    """
    sent_NN = np.zeros((parts.num_ranks, parts.num_ranks))
    before_C = parts.before_C
    index_P = np.arange(len(parts.chunk_P))
    for rank in range(parts.num_ranks):
        mine = parts.owner_P == rank
        held_C = np.bincount(parts.chunk_P[mine], minlength=parts.num_chunks) > 0
        elsewhere_C = before_C - parts.sum_before(held_C.astype(np.float64))
        miss_C = np.ones(parts.num_chunks)
        for pick in range(min(parts.num_picks, int(before_C.max(initial=0)))):
            left = np.maximum(before_C - pick, 1)
            miss_C *= np.where(before_C > pick, np.maximum(elsewhere_C - pick, 0) / left, 1.0)
        first_C = np.full(parts.num_chunks, len(index_P))
        np.minimum.at(first_C, parts.chunk_P[mine], index_P[mine])
        asked_P = np.where(index_P > first_C[parts.chunk_P], 1.0, 1 - miss_C[parts.chunk_P])
        sent_NN[:, rank] = parts.over_ranks(asked_P * parts.tokens_P)
    np.fill_diagonal(sent_NN, 0.0)
    return sent_NN


__all__ = [
    "FloatArray",
    "Parts",
    "local_pairs",
    "pairs_of_keys",
    "pairs_of_queries",
    "parts_of",
    "pulled_tokens",
    "sent_queries",
]
