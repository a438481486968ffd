"""How evenly routing loads context-parallel ranks: expectations from the chance that a query picks a chunk.

A query of chunk q picks p = min(topk - 1, q) of the q chunks before it, without repetition, chunk c with a chance that
grows with a weight; queries and heads pick independently of one another. Three kinds of weights:

    uniform   all alike
    zipf      1 / popularity rank of the chunk; the order of popularity is drawn once and is the same for all heads
    recency   1 / distance in chunks

One document. The chance is 1 - exp(-weight * t), with t such that chances add up to p: what weighted drawing without
repetition tends to (exact for equal weights). `scaling_counts` draws routings of the same kinds and counts.

Shape letters: T tokens of the row, C chunks, P parts (what one rank holds of one chunk), N ranks, H query heads, K
key/value heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moba_kernels.spec import MoBA
from moba_train.parallel.cut import Layout, cut_row
from moba_train.parallel.parts import FloatArray, Parts, parts_of

Kind = Literal["uniform", "zipf", "recency"]
KINDS: tuple[Kind, ...] = ("uniform", "zipf", "recency")

# Stands for log(1 - p) where p = 1; see `moba_train.parallel.parts`.
_CERTAIN = -1e4
_POPULARITY_SEED = 0
_NEWTON_STEPS = 15


@dataclass(frozen=True)
class Loads:
    """What each rank has to do for one layer of one row, expected.

    Attributes:
        pairs_of_queries_N: (query, key) pairs of one head whose query it holds: all_gather and pull compute there.
        pairs_of_keys_N: pairs whose key it holds: route_queries computes there.
        pulled_N: tokens of one KV head that it receives under pull.
        queries_N: tokens of one head that it receives under route_queries.
    """

    pairs_of_queries_N: FloatArray
    pairs_of_keys_N: FloatArray
    pulled_N: FloatArray
    queries_N: FloatArray


def peak_to_mean(load_N: FloatArray) -> float:
    """The largest load of a rank / the mean; 1.0 = even, also when there is none."""
    return float(load_N.max() / load_N.mean()) if load_N.any() else 1.0


def pick_weights(kind: Kind, num_chunks: int) -> FloatArray:
    """[C,C]: weight of each chunk (second) for the queries of each chunk (first)."""
    if kind == "recency":
        index = np.arange(num_chunks)
        distance_CC: FloatArray = np.maximum(1, index[:, None] - index[None, :]).astype(np.float64)
        return 1.0 / distance_CC
    rank_C: FloatArray = np.ones(num_chunks)
    if kind == "zipf":
        rank_C += np.random.default_rng(_POPULARITY_SEED).permutation(num_chunks)
    return np.broadcast_to(1.0 / rank_C, (num_chunks, num_chunks))


def pick_chances(kind: Kind, num_chunks: int, num_picks: int) -> FloatArray:
    """[C,C]: the chance that a query of the first chunk picks the second; 0 from its own chunk on."""
    before_CC = np.tri(num_chunks, k=-1)
    weight_CC = pick_weights(kind, num_chunks) * before_CC
    wanted_C = np.minimum(num_picks, np.arange(num_chunks)).astype(np.float64)
    if kind == "uniform":
        alike_CC: FloatArray = before_CC * (wanted_C / np.maximum(1, np.arange(num_chunks)))[:, None]
        return alike_CC
    # Newton on log t: the sum of chances rises in t and is concave, so steps from the left never pass the root.
    time_C = wanted_C / np.maximum(weight_CC.sum(1), 1e-300)
    for _ in range(_NEWTON_STEPS):
        left_CC = np.exp(-weight_CC * time_C[:, None])
        short_C = wanted_C - (before_CC * (1 - left_CC)).sum(1)
        slope_C = (weight_CC * left_CC).sum(1)
        time_C = time_C + np.where(slope_C > 0, short_C / np.maximum(slope_C, 1e-300), 0.0)
    chance_CC = before_CC * (1 - np.exp(-weight_CC * time_C[:, None]))
    every_C = np.arange(num_chunks) <= num_picks
    picked_CC: FloatArray = np.where(every_C[:, None], before_CC, chance_CC)
    return picked_CC


def expected_loads(
    chance_CC: FloatArray, spec: MoBA, *, num_tokens: int, num_ranks: int, layout: Layout, heads_per_kv: int
) -> Loads:
    """Loads of all ranks for one document of `num_tokens`.

    chance_CC: `pick_chances` of its chunks; heads_per_kv: query heads that pick for one KV head.
    """
    parts = parts_of(cut_row(num_tokens, num_ranks, layout), (0, num_tokens), spec)
    miss_CC = np.where(chance_CC < 1, np.log1p(-np.where(chance_CC < 1, chance_CC, 0.0)), _CERTAIN)
    held_NC = _held(parts)
    return Loads(
        pairs_of_queries_N=_pairs_of_queries(parts),
        pairs_of_keys_N=_pairs_of_keys(parts, chance_CC),
        pulled_N=_pulled(parts, (held_NC * heads_per_kv) @ miss_CC),
        queries_N=_queries(parts, miss_CC @ (held_NC > 0).T.astype(np.float64)),
    )


def _held(parts: Parts) -> FloatArray:
    """[N,C]: tokens of each chunk that each rank holds."""
    return np.stack([parts.held_by(rank) for rank in range(parts.num_ranks)])


def _pairs_of_queries(parts: Parts) -> FloatArray:
    picked_P = np.minimum(parts.before_C, parts.num_picks)[parts.chunk_P] * parts.chunk_size
    tokens_P = parts.tokens_P
    return parts.over_ranks(tokens_P * (parts.offset_P + picked_P) + tokens_P * (tokens_P + 1) // 2)


def _pairs_of_keys(parts: Parts, chance_CC: FloatArray) -> FloatArray:
    tokens_P = parts.tokens_P
    own_P = tokens_P * (parts.tokens_C[parts.chunk_P] - parts.offset_P) - tokens_P * (tokens_P - 1) // 2
    return parts.over_ranks(own_P + tokens_P * (parts.tokens_C @ chance_CC)[parts.chunk_P])


def _pulled(parts: Parts, miss_NC: FloatArray) -> FloatArray:
    """[N] tokens of one KV head. miss_NC: log of the chance that no query of the rank picks the chunk."""
    pulled_N = np.zeros(parts.num_ranks)
    index_P = np.arange(len(parts.chunk_P))
    for rank in range(parts.num_ranks):
        mine = parts.owner_P == rank
        last_C = np.full(parts.num_chunks, -1)
        np.maximum.at(last_C, parts.chunk_P[mine], index_P[mine])
        behind_P = index_P < last_C[parts.chunk_P]  # a later token of the same chunk is local
        wanted_P = np.where(behind_P, 1.0, -np.expm1(miss_NC[rank])[parts.chunk_P])
        pulled_N[rank] = (wanted_P * parts.tokens_P)[~mine].sum()
    return pulled_N


def _queries(parts: Parts, miss_CN: FloatArray) -> FloatArray:
    """[N] tokens of one head. miss_CN: log of the chance that a query of the chunk picks nothing on the rank."""
    received_N = np.zeros(parts.num_ranks)
    index_P = np.arange(len(parts.chunk_P))
    for rank in range(parts.num_ranks):
        mine = parts.owner_P == rank
        first_C = np.full(parts.num_chunks, len(index_P))
        np.minimum.at(first_C, parts.chunk_P[mine], index_P[mine])
        after_P = index_P > first_C[parts.chunk_P]  # the rank holds an earlier part of the query's own chunk
        asked_P = np.where(after_P, 1.0, -np.expm1(miss_CN[:, rank])[parts.chunk_P])
        received_N[rank] = (asked_P * parts.tokens_P)[~mine].sum()
    return received_N


__all__ = ["KINDS", "Kind", "Loads", "expected_loads", "peak_to_mean", "pick_chances", "pick_weights"]
