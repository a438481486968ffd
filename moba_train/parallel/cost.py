"""What a transport costs on a machine, and which one is cheapest: pure functions of integers and `Hardware`, no torch.

Time t of an exchange (alpha-beta): calls * (latency + peers * peer latency) + the slower of

    inside the node     bytes of the busiest rank / node bandwidth
    across nodes        bytes of the busiest rank / cross bandwidth; of a ring, which enters each node once, the ranks
                        of a node share these bytes

What of it goes on beside computing, with C the time of attention in that direction (mean over ranks):

    "no"        nothing
    "strides"   n messages, each but one beside another stride's attention:   (n-1) * min(t/n, C/n)
    "local"     the first beside attention on local keys, the others beside attention on what the one before brought

exposed_s = t - overlap * (what goes on beside computing): a second of hidden communication still slows the computing
down by 1 - overlap seconds. A transport is judged by its overhead, exposed_s of forward and backward and the time that
the busiest rank computes longer than the mean. Attention takes 2*(D+Dv) FLOPs a (query, key) pair forward, 2.5 times
as many backward; projections and the gate are alike for all transports and left out.

Shape letters: N ranks, U ranks of a node that exchange heads, D head dim, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moba_kernels.spec import AttentionSpec

from .hardware import Hardware
from .parts import FloatArray, local_pairs, pairs_of_keys, pairs_of_queries, parts_of
from .rules import TRANSPORT_NAMES, inner_ranks, refusals
from .volume import Exchange, HeadShape, RowShape, routing_exchanges, transport_exchanges

# A transport has to beat those before it by this share of their overhead (the model is no better than that), and by
# this share of the time of attention (less is not worth leaving the simpler one for).
TIE, NEGLIGIBLE = 0.1, 0.005
# FLOPs of attention's backward pass / forward pass: scores again, then dV, dP, dQ, dK (10 D H against 4 D H a pair).
_BACKWARD = 2.5


@dataclass(frozen=True)
class TransportCost:
    """One layer, forward and backward, the mean over the rows that were given.

    Attributes:
        sent_N, received_N: bytes of each rank by phase, pooled keys included.
        communication_s: all exchanges, one after the other; exposed_s: what of it costs time.
        compute_s: attention of the busiest rank; balance: its work / the mean over ranks.
    """

    transport: str
    sent_N: Mapping[str, FloatArray]
    received_N: Mapping[str, FloatArray]
    communication_s: float
    exposed_s: float
    compute_s: float
    balance: float

    @property
    def overhead_s(self) -> float:
        """What the layer takes longer than attention spread evenly over ranks that need nothing from one another."""
        return self.exposed_s + self.compute_s * (1 - 1 / self.balance)

    @property
    def sent_bytes(self) -> float:
        """Of the busiest rank."""
        return _busiest(self.sent_N)

    @property
    def received_bytes(self) -> float:
        """Of the busiest rank."""
        return _busiest(self.received_N)


@dataclass(frozen=True)
class Choice:
    """The transport of one kind of layer. costs: of all that can serve, cheapest first; refused: why others cannot."""

    transport: str
    costs: tuple[TransportCost, ...]
    refused: Mapping[str, tuple[str, ...]]

    @property
    def cost(self) -> TransportCost:
        """Of the chosen one."""
        return next(cost for cost in self.costs if cost.transport == self.transport)


def choose_transport(
    spec: AttentionSpec,
    heads: HeadShape,
    rows: Sequence[RowShape],
    hardware: Hardware,
    *,
    node_ranks: int,
    forwards: int = 1,
    among: Iterable[str] = TRANSPORT_NAMES,
) -> Choice:
    """The cheapest transport for layers of one kind; the same on every rank that passes the same arguments.

    Args:
        rows: typical rows, all cut over the same ranks; their costs are averaged.
        node_ranks: context-parallel ranks that share a node.
        forwards: forward passes per backward pass: 2 under activation recompute, whose second one replays the routing.
        among: names to choose from; of those that tie the first of `TRANSPORT_NAMES` wins, which is all_gather.
    Raises ValueError when none can serve, with every reason.
    """
    names = sorted(among, key=TRANSPORT_NAMES.index)
    counts = {"num_heads": heads.num_heads, "num_kv_heads": heads.num_kv_heads, "num_ranks": rows[0].num_ranks}
    refused = {name: refusals(name, spec, **counts) for name in names}
    costs = [
        transport_cost(name, spec, heads, rows, hardware, node_ranks=node_ranks, forwards=forwards)
        for name in names
        if not refused[name]
    ]
    if not costs:
        reasons = "; ".join(reason for of_name in refused.values() for reason in of_name)
        raise ValueError(f"no transport can serve: {reasons}; fix: let 'all_gather' be among them, it always can")
    best = costs[0]
    for cost in costs[1:]:
        gain_s = best.overhead_s - cost.overhead_s
        if gain_s > TIE * best.overhead_s and gain_s > NEGLIGIBLE * best.compute_s:
            best = cost
    costs.sort(key=lambda cost: cost.overhead_s)
    return Choice(best.transport, tuple(costs), {name: why for name, why in refused.items() if why})


def transport_cost(
    transport: str,
    spec: AttentionSpec,
    heads: HeadShape,
    rows: Sequence[RowShape],
    hardware: Hardware,
    *,
    node_ranks: int,
    forwards: int = 1,
) -> TransportCost:
    """The cost of a transport that can serve; see `choose_transport` for the arguments."""
    of_rows = [_cost_of_row(transport, spec, heads, row, hardware, node_ranks, forwards) for row in rows]
    if len(of_rows) == 1:
        return of_rows[0]
    return TransportCost(
        transport,
        _mean_of([cost.sent_N for cost in of_rows]),
        _mean_of([cost.received_N for cost in of_rows]),
        *(
            float(np.mean([getattr(cost, name) for cost in of_rows]))
            for name in ("communication_s", "exposed_s", "compute_s", "balance")
        ),
    )


def exchange_seconds(exchange: Exchange, hardware: Hardware, node_ranks: int) -> float:
    """Seconds of one exchange, until the slowest rank has all: latency and bandwidth; host reads included."""
    num_ranks = len(exchange.bytes_NN)
    if not exchange.bytes_NN.any():
        return 0.0
    node = np.arange(num_ranks) // node_ranks
    near = node[:, None] == node
    across_N, within_N = (_busier_way(exchange.bytes_NN * part) for part in (~near, near))
    if exchange.ring:
        within_N = within_N + across_N  # what has entered a node goes on from rank to rank
        across_N = across_N / min(node_ranks, num_ranks)
    slowest = max(within_N.max() / hardware.node_bytes_s, across_N.max() / hardware.cross_bytes_s) / hardware.link_share
    peers = int((exchange.bytes_NN > 0).sum(1).max())
    latency = exchange.calls * (hardware.latency_s + peers * hardware.peer_latency_s)
    return float(slowest + latency + exchange.host_reads * hardware.host_read_s)


def compute_pairs(
    transport: str, spec: AttentionSpec, heads: HeadShape, row: RowShape, node_ranks: int
) -> tuple[FloatArray, float]:
    """([N] (query, key) pairs of all heads that each rank computes, the mean of those on local keys), expected."""
    parts, num_ranks = row.parts(spec), row.num_ranks
    if transport == "route_queries":
        pairs = pairs_of_keys(parts)
    elif transport in ("a2a", "a2a+all_gather"):
        ranks = num_ranks
        if transport == "a2a+all_gather":
            ranks = inner_ranks(heads.num_heads, heads.num_kv_heads, num_ranks, node_ranks)
        of_nodes = pairs_of_queries(parts_of(row.cut.joined(ranks), row.bounds, spec))
        pairs = np.repeat(of_nodes / ranks, ranks)
    else:
        pairs = pairs_of_queries(parts)
    local = float(local_pairs(parts).mean()) if transport in ("pull", "route_queries") else 0.0
    return pairs * heads.num_heads, local * heads.num_heads


def _cost_of_row(
    transport: str,
    spec: AttentionSpec,
    heads: HeadShape,
    row: RowShape,
    hardware: Hardware,
    node_ranks: int,
    forwards: int,
) -> TransportCost:
    routing = routing_exchanges(spec, heads, row)
    moved = transport_exchanges(transport, spec, heads, row, node_ranks=node_ranks)
    pairs_N, local = compute_pairs(transport, spec, heads, row, node_ranks)
    second = 2 * (heads.head_dim + heads.value_dim) / hardware.attention_flops(spec, heads.element_bytes)  # a pair
    communication_s = exposed_s = 0.0
    for forward, times, work in ((True, forwards, second), (False, 1, _BACKWARD * second)):
        phases = [exchange for exchange in moved if exchange.forward == forward]
        seconds = [exchange_seconds(exchange, hardware, node_ranks) for exchange in phases]
        beside_s = _beside(phases, seconds, float(pairs_N.mean()) * work, local * work)
        communication_s += times * sum(seconds)
        exposed_s += times * (sum(seconds) - hardware.overlap * beside_s)
    gate_s = sum(exchange_seconds(exchange, hardware, node_ranks) for exchange in routing)
    passes = [*((exchange, 1) for exchange in routing), *((x, forwards if x.forward else 1) for x in moved)]
    return TransportCost(
        transport,
        _by_phase((exchange.phase, times * exchange.sent_N) for exchange, times in passes),
        _by_phase((exchange.phase, times * exchange.received_N) for exchange, times in passes),
        communication_s + gate_s,
        exposed_s + gate_s,
        float(pairs_N.max()) * second * (forwards + _BACKWARD),
        float(pairs_N.max() / pairs_N.mean()) if pairs_N.any() else 1.0,
    )


def _beside(phases: Sequence[Exchange], seconds: Sequence[float], compute_s: float, local_s: float) -> float:
    """Seconds of one direction's exchanges that go on beside computing; see the module."""
    beside = 0.0
    for kind, beside_first in (("strides", 0.0), ("local", local_s)):
        of_kind = [(exchange, s) for exchange, s in zip(phases, seconds, strict=True) if exchange.hidden == kind]
        if of_kind:
            messages = max(exchange.calls for exchange, _ in of_kind)
            each = sum(s for _, s in of_kind) / messages
            beside_others = (compute_s - beside_first) / messages
            beside += min(each, beside_first) + (messages - 1) * min(each, beside_others)
    return beside


def _busier_way(bytes_NN: FloatArray) -> FloatArray:
    """[N]: bytes of each rank in the direction that takes longer."""
    busier: FloatArray = np.maximum(bytes_NN.sum(0), bytes_NN.sum(1))
    return busier


def _busiest(by_phase: Mapping[str, FloatArray]) -> float:
    return float(sum(by_phase.values(), np.zeros(1)).max())


def _by_phase(pairs: Iterable[tuple[str, FloatArray]]) -> dict[str, FloatArray]:
    total: dict[str, FloatArray] = {}
    for phase, bytes_N in pairs:
        total[phase] = total[phase] + bytes_N if phase in total else bytes_N
    return total


def _mean_of(of_rows: Sequence[Mapping[str, FloatArray]]) -> dict[str, FloatArray]:
    return _by_phase((phase, bytes_N / len(of_rows)) for row in of_rows for phase, bytes_N in row.items())


__all__ = ["TIE", "Choice", "TransportCost", "choose_transport", "compute_pairs", "exchange_seconds", "transport_cost"]
