"""Which queries travel to which ranks: the plan of transport "route_queries" (route_queries.py), made on the device.

A *query* here is what the gate routes: one token under one routing head, with the G = H/R query heads that share its
picks. It travels to every other rank that holds keys of its chunks, once, however many of them lie there:

    a picked chunk     on each rank that holds a part of it
    its own chunk      on each rank that holds a part of it before the query (only chunks that straddle shards)

Who holds which chunk follows from the row and the cut. Index lists have sizes that the host must know; they are counted
on the device, exchanged, and read once per layer. Lists are then filled by sums and searches, so nothing else waits.

Shape letters: S tokens of the shard, H query heads, R routing heads (H under select="head", K under "group"), C chunks,
P picks, N ranks, W ranks that hold keys of one chunk (of the chunk that most ranks share), Q queries in a message,
J destinations that a query can have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moba_kernels import MoBA, Pack, Routing
from moba_kernels.pack import device_copy

from .cut import Cut, IntArray
from .transport import HostCopy, ShardedCall

# Bytes that `needed_ranks` and `list_queries` take per query and rank: a flag, two running sums.
PLAN_BYTES = 7


class Holders(NamedTuple):
    """Who holds keys of which chunk, int64 on the device."""

    rank_CW: Tensor
    """[C+1,W] ascending, N = nobody. The last line is nobody's: a pick of -1 (none) finds it."""
    first_CW: Tensor
    """[C+1,W]: the first token of the chunk that this rank holds."""


def chunk_holders(pack: Pack, chunk_size: int, cut: Cut) -> tuple[IntArray, IntArray]:
    """`Holders` on the host; a pure function of the row and its cut."""
    start_C = pack.chunks(chunk_size).start_C
    held = [(start, stop, rank) for rank, pieces in enumerate(cut.pieces) for start, stop in pieces if stop > start]
    start, stop, rank = np.array(sorted(held), dtype=np.int64).reshape(-1, 3).T
    first_chunk = np.searchsorted(start_C, start, side="right") - 1
    overlaps = np.searchsorted(start_C, stop - 1, side="right") - first_chunk
    piece_E = np.repeat(np.arange(len(start)), overlaps)
    chunk_E = first_chunk[piece_E] + np.arange(len(piece_E)) - (np.cumsum(overlaps) - overlaps)[piece_E]
    # Pieces ascend, so the first (chunk, rank) of several is the one with the earliest token.
    pairs, index = np.unique(chunk_E * cut.num_ranks + rank[piece_E], return_index=True)
    chunk, holder = np.divmod(pairs, cut.num_ranks)
    column = np.arange(len(pairs)) - np.searchsorted(chunk, chunk)
    rank_CW = np.full((len(start_C) + 1, int(column.max(initial=0)) + 1), cut.num_ranks, dtype=np.int64)
    first_CW = np.zeros_like(rank_CW)
    rank_CW[chunk, column] = holder
    first_CW[chunk, column] = np.maximum(start[piece_E], start_C[chunk_E])[index]
    return rank_CW, first_CW


def device_holders(pack: Pack, chunk_size: int, cut: Cut, device: torch.device) -> Holders:
    """`chunk_holders` on `device`; made once per row, so that no layer waits for a copy."""

    def build() -> Holders:
        return Holders(*(device_copy(array, device) for array in chunk_holders(pack, chunk_size, cut)))

    return pack.derived(("chunk holders", chunk_size, cut, device), build)


def needed_ranks(routing: Routing, positions_S: Tensor, cut: Cut, rank: int) -> Tensor:
    """bool [N,R,S]: does the query of this head and token travel to that rank? Never to `rank`, which holds it.

    routing: of the shard's tokens, at positions_S.
    """
    device, num_ranks = positions_S.device, cut.num_ranks
    holders = device_holders(routing.pack, routing.spec.chunk_size, cut, device)
    shape = (1, routing.num_routed_heads, positions_S.numel())
    needed = torch.zeros((num_ranks + 1, *shape[1:]), dtype=torch.bool, device=device)
    own_S = routing.own_chunks
    for rank_C, first_C in zip(holders.rank_CW.unbind(1), holders.first_CW.unbind(1), strict=True):
        holds_keys_before = first_C[own_S] < positions_S
        needed.scatter_(0, torch.where(holds_keys_before, rank_C[own_S], num_ranks).expand(shape), True)
    for picked_SR in routing.picks.unbind(2):
        for rank_C in holders.rank_CW.unbind(1):
            needed.scatter_(0, rank_C[picked_SR.T].unsqueeze(0), True)
    needed[rank] = False
    return needed[:num_ranks]


def expected_destinations(spec: MoBA, cut: Cut) -> float:
    """Ranks that a query is expected to travel to when picks are uniform over the row, causality left out.

    Each of P picks meets any rank alike: d = (N-1) * (1 - (1 - 1/N)^P). A chunk lies on about 1 + chunk_size / L ranks,
    L tokens in the longest shard, and the query's own chunk on as many others: that raises P.
    """
    shared = spec.chunk_size / max(1, cut.longest)
    met = spec.num_picks * (1 + shared) + shared
    missed: float = (1 - 1 / cut.num_ranks) ** met
    return (cut.num_ranks - 1) * (1 - missed)


def most_destinations(routing: Routing, cut: Cut) -> int:
    """J: destinations that no query can exceed."""
    shared = device_holders(routing.pack, routing.spec.chunk_size, cut, routing.stored.device).rank_CW.shape[1]
    return min(cut.num_ranks - 1, routing.stored.shape[2] * shared + shared - 1)


@dataclass(frozen=True)
class Stride:
    """What is sent and received for some routing heads; host integers."""

    first: int
    stop: int
    """Routing heads first .. stop - 1."""
    sent: tuple[int, ...]
    """[N] queries to each rank."""
    received: tuple[int, ...]
    """[N] queries from each rank."""
    received_of_head: tuple[int, ...]
    """[stop - first] queries from all ranks."""
    with_destination: tuple[int, ...]
    """[J] queries that have a first, second, ... destination."""


class SentQueries(NamedTuple):
    """Index lists of one stride, int64 on the device, in the order of sending: by rank, head, token."""

    index_Q: Tensor
    """token * R + head of each."""
    by_turn_Q: Tensor
    """The same queries, those at their first destination first, then those at their second, ...: within such a turn no
    query stands twice, so that a turn is merged at once, and a query's parts come in rank order."""


def start_count(call: ShardedCall, heads: Sequence[tuple[int, int]]) -> Callable[[], tuple[Stride, ...]]:
    """Count the queries to send and start to tell everyone; the returned function waits and gives the strides `heads`.

    Collective. That function is the one place where the host waits for the device: 2*N*R integers and J a stride.
    """
    routing, num_ranks = routing_of(call), call.num_ranks
    turns = most_destinations(routing, call.cut)
    counts, with_destination = [], []
    nth_J = torch.arange(turns, device=call.positions_S.device).view(-1, 1, 1)
    for first, stop in heads:
        needed = needed_ranks(_of_heads(routing, first, stop), call.positions_S, call.cut, call.rank)
        counts.append(needed.sum(2, dtype=torch.int32))
        with_destination.append((needed.sum(0, dtype=torch.int16) > nth_J).sum((1, 2), dtype=torch.int32))
        del needed
    sent_NR, one_each = torch.cat(counts, 1), [1] * num_ranks
    told = call.wire.all_to_all(sent_NR, one_each, one_each, phase="forward/counts")

    # A wait of the device's stream, not of the host.
    reading = HostCopy.start(torch.cat([sent_NR.flatten(), told.wait().flatten(), *with_destination]))

    def wait() -> tuple[Stride, ...]:
        numbers = reading.wait().astype(np.int64)
        sent, received = numbers[: 2 * sent_NR.numel()].reshape(2, num_ranks, -1)
        in_turn = numbers[2 * sent_NR.numel() :].reshape(len(heads), turns)
        return tuple(
            Stride(
                first,
                stop,
                tuple(sent[:, first:stop].sum(1).tolist()),
                tuple(received[:, first:stop].sum(1).tolist()),
                tuple(received[:, first:stop].sum(0).tolist()),
                tuple(in_turn[i].tolist()),
            )
            for i, (first, stop) in enumerate(heads)
        )

    return wait


def list_queries(call: ShardedCall, stride: Stride) -> SentQueries:
    """Which queries are sent, in which order."""
    routing, num_tokens = routing_of(call), call.positions_S.numel()
    needed = needed_ranks(_of_heads(routing, stride.first, stride.stop), call.positions_S, call.cut, call.rank)
    nth_Q = torch.arange(1, sum(stride.sent) + 1, dtype=torch.int32, device=needed.device)
    # The n-th that is needed stands where the running count first reaches n.
    place_Q = torch.searchsorted(needed.flatten().cumsum(0, dtype=torch.int32), nth_Q)
    turn_Q = needed.cumsum(0, dtype=torch.int16).flatten()[place_Q]
    head_Q = place_Q // max(1, num_tokens) % (stride.stop - stride.first) + stride.first
    index_Q = place_Q % max(1, num_tokens) * routing.num_routed_heads + head_Q
    return SentQueries(index_Q, turn_Q.argsort(stable=True))


def routing_of(call: ShardedCall) -> Routing:
    """The routing, which every MoBA call has."""
    assert call.routing is not None
    return call.routing


def queries_received(routing: Routing, cut: Cut) -> IntArray:
    """[N] queries that each rank receives from the others: the uneven part of its load. Pure; reads the device.

    routing: of all tokens of the row (the gate's, or `moba_kernels.random_routing`); one head is an estimate already.
    """
    received = torch.zeros(cut.num_ranks, dtype=torch.int64, device=routing.stored.device)
    for rank in range(cut.num_ranks):
        positions_S = torch.from_numpy(cut.positions(rank)).to(received.device)
        received += needed_ranks(routing.select(positions_S), positions_S, cut, rank).sum((1, 2))
    return received.cpu().numpy()  # type: ignore[no-any-return]


def imbalance(load_N: IntArray) -> float:
    """The largest load of a rank divided by the mean; 1.0 = even, also when there is none."""
    return float(load_N.max() / load_N.mean()) if load_N.any() else 1.0


def _of_heads(routing: Routing, first: int, stop: int) -> Routing:
    return routing.of_kv_heads(first, stop, routing.num_routed_heads)


__all__ = [
    "PLAN_BYTES",
    "Holders",
    "SentQueries",
    "Stride",
    "chunk_holders",
    "device_holders",
    "expected_destinations",
    "imbalance",
    "list_queries",
    "most_destinations",
    "needed_ranks",
    "queries_received",
    "routing_of",
    "start_count",
]
