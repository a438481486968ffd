"""What the transports really send: the framework's own attention over N ranks, run as threads, its bytes counted.

Rows are small (the counters do not care), heads are few, and routings are drawn by the weights of `scaling_loads`, so
that predictions can be held to the counters: shapes decide the bytes of some transports, and these must agree to the
byte; under the others the draw decides, and expectations must agree up to its noise.

Shape letters: T tokens of the row, S tokens of a shard, H query heads, C chunks, N ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moba_kernels import MoBA, Pack, Routing
from moba_train.parallel import context_attend
from moba_train.parallel.cut import Layout, cut_row
from moba_train.parallel.emulation import ThreadGroup, run_threads
from moba_train.parallel.parts import FloatArray
from moba_train.parallel.query_plan import queries_received
from moba_train.parallel.traffic import Traffic
from moba_train.parallel.volume import HeadShape, RowShape, transport_exchanges
from scaling_loads import Kind, peak_to_mean, pick_weights

HEADS = HeadShape(num_heads=4, num_kv_heads=2, head_dim=4, value_dim=4, element_bytes=4)
_SEED = 1


@dataclass(frozen=True)
class CountCase:
    """A small row over threads. heads: those that `transport` can serve on so many ranks."""

    transport: str
    num_ranks: int
    spec: MoBA
    num_tokens: int
    kind: Kind = "uniform"
    layout: Layout = "zigzag"
    heads: HeadShape = HEADS
    node_ranks: int = 8


@dataclass(frozen=True)
class Count:
    """Bytes of a forward and a backward pass, and (query, key) pairs computed, of every rank.

    Attributes:
        received, sent: phase -> [N] bytes counted by the wire.
        pairs_N: over all heads, counted by the operator.
        predicted: phase -> [N] bytes received by the closed forms (`moba_train.parallel.volume`).
    """

    received: Mapping[str, FloatArray]
    sent: Mapping[str, FloatArray]
    pairs_N: FloatArray
    predicted: Mapping[str, FloatArray]

    @property
    def counted_bytes(self) -> float:
        """Received, mean over ranks."""
        return sum(float(x.mean()) for x in self.received.values())

    @property
    def predicted_bytes(self) -> float:
        """The same by the closed forms."""
        return sum(float(x.mean()) for x in self.predicted.values())

    @property
    def exact(self) -> bool:
        """Does every phase of every rank agree to the byte?"""
        phases = set(self.received) | set(self.predicted)
        none = np.zeros(len(self.pairs_N))
        return all(np.array_equal(self.received.get(p, none), self.predicted.get(p, none)) for p in phases)

    def balance(self, phase: str) -> float:
        """max / mean over ranks of the bytes received in a phase."""
        return peak_to_mean(self.received[phase])


def drawn_routing(kind: Kind, spec: MoBA, pack: Pack, num_heads: int) -> Routing:
    """A routing of all T tokens of one document: each head of each query draws by `pick_weights`, without repetition.

    Smallest exponential first (Efraimidis and Spirakis, 2006): the p smallest of Exp(1) / weight are such a draw.
    """
    geometry = pack.chunks(spec.chunk_size)
    own_T = torch.from_numpy(geometry.chunk_of_token_T)
    weight_CC = torch.from_numpy(np.array(pick_weights(kind, geometry.num_chunks)))
    shape = (pack.num_tokens, num_heads, geometry.num_chunks)
    # numpy's stream, not torch's, which depends on the build
    draw_THC = torch.from_numpy(np.random.default_rng(_SEED).standard_exponential(shape, dtype=np.float32))
    draw_THC /= weight_CC[own_T].float()[:, None]
    later_TC = torch.arange(geometry.num_chunks) >= own_T[:, None]
    draw_THC.masked_fill_(later_TC[:, None], torch.inf)
    first = draw_THC.topk(min(spec.num_picks, geometry.num_chunks), largest=False)
    picks = torch.where(first.values.isinf(), -1, first.indices)
    return Routing(picks, spec, pack, complete=True)


def count(case: CountCase) -> Count:
    """Run the case, forward and backward, and count."""
    heads, pack = case.heads, Pack([0, case.num_tokens])
    generator = torch.Generator().manual_seed(_SEED)
    shapes = (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads, heads.num_heads)
    whole = [torch.randn(case.num_tokens, h, heads.head_dim, generator=generator) for h in shapes]
    routing = drawn_routing(case.kind, case.spec, pack, heads.num_heads)
    cut = cut_row(case.num_tokens, case.num_ranks, case.layout)

    def rank_main(group: ThreadGroup) -> tuple[Traffic, int]:
        positions_S = torch.from_numpy(cut.positions(group.rank()))
        q, k, v, dout = (x[positions_S] for x in whole)
        for x in (q, k, v):
            x.requires_grad_()
        traffic = Traffic()
        result = context_attend(
            q,
            k,
            v,
            case.spec,
            layout=case.layout,
            group=group,
            transport=case.transport,
            cu_seqlens=pack,
            routing=routing.select(positions_S),
            node_ranks=case.node_ranks,
            traffic=traffic,
        )
        torch.autograd.grad(result.out, (q, k, v), dout)
        return traffic, int(result.report.computed_pairs)

    results = run_threads(rank_main, case.num_ranks)
    row = RowShape(case.num_tokens, case.num_ranks, case.layout)
    exchanges = transport_exchanges(case.transport, case.spec, heads, row, node_ranks=case.node_ranks)
    predicted: dict[str, FloatArray] = {}
    for exchange in exchanges:
        predicted[exchange.phase] = predicted.get(exchange.phase, 0) + exchange.received_N
    return Count(
        received=_by_phase([traffic.received for traffic, _ in results]),
        sent=_by_phase([traffic.sent for traffic, _ in results]),
        pairs_N=np.array([pairs for _, pairs in results], dtype=np.float64),
        predicted=predicted,
    )


def planned_queries(kind: Kind, spec: MoBA, *, num_tokens: int, num_ranks: int) -> FloatArray:
    """[N] queries that each rank would receive under route_queries: its own plan on a drawn routing, zigzag.

    Nothing is sent, so it serves for more ranks than threads do. Heads as in `HEADS`.
    """
    routing = drawn_routing(kind, spec, Pack([0, num_tokens]), HEADS.num_heads)
    return queries_received(routing, cut_row(num_tokens, num_ranks, "zigzag")).astype(np.float64)


def _by_phase(counters: Sequence[Mapping[str, int]]) -> dict[str, FloatArray]:
    phases = sorted({phase for counter in counters for phase in counter})
    return {phase: np.array([counter.get(phase, 0) for counter in counters], dtype=np.float64) for phase in phases}


__all__ = ["HEADS", "Count", "CountCase", "count", "drawn_routing", "planned_queries"]
