"""Bytes that context parallelism moves for one layer and one row: closed forms, before anything runs; no torch.

For every exchange of a transport a table says how many bytes each rank sends to each other rank, so that sums over a
row are what a rank sends, sums over a column what it receives, and shares inside and across nodes can be told apart.
Where the traffic follows from shapes (all_gather, a2a, a2a+all_gather, full attention under pull, pooled keys, halo)
the table is exact, padding included; where routing decides (pull and route_queries under MoBA) it is the expectation
under uniform routing (`parts`). Phases have the names under which the wire counts them.

Shape letters: T tokens of the row, S tokens of a shard, L of the longest shard, H query heads, K key/value heads, D
head dim, Dv value dim, C chunks, W whole chunks of the rank with most, E straddling chunks, N ranks, U ranks that
exchange heads, e bytes of an element, a bytes of an element that is added up over ranks (4; 8 for fp64 inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np

from moba_kernels.spec import AttentionSpec, MoBA

from .cut import Cut, Layout, cut_row, num_pieces
from .parts import FloatArray, Parts, parts_of, pulled_tokens, sent_queries
from .rules import inner_ranks

# Keys and values of one stride of KV heads, gathered or pulled; the expected messages of one stride of routing heads
# under route_queries. Large enough that small rows go in one message that is worth its latency, small enough that a
# long row's buffers stay a fraction of its activations (where one head is larger than this, one head it is).
STRIDE_BYTES = 64 << 20
QUERY_STRIDE_BYTES = 256 << 20
# Largest number of chunks whose ids the routing keeps in two bytes (`moba_kernels.Routing`).
_NARROW_CHUNKS = 65535

Hidden = Literal["no", "local", "strides"]
"""What can be computed while an exchange is under way: nothing; attention on local keys; the stride before."""


@dataclass(frozen=True)
class HeadShape:
    """Attention heads of one tensor-parallel rank, as `context_attend` sees them."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    element_bytes: int

    @property
    def sum_bytes(self) -> int:
        """a: bytes of an element of partial results and of gradients that are added up over ranks."""
        return max(4, self.element_bytes)

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's key and value of one KV head."""
        return (self.head_dim + self.value_dim) * self.element_bytes

    @property
    def dkv_bytes(self) -> int:
        """Bytes of their gradients while they are added up."""
        return (self.head_dim + self.value_dim) * self.sum_bytes


@dataclass(frozen=True)
class RowShape:
    """A row and its cut. documents: cumulative lengths; () = one document."""

    num_tokens: int
    num_ranks: int
    layout: Layout
    documents: tuple[int, ...] = ()

    @property
    def cut(self) -> Cut:
        return cut_row(self.num_tokens, self.num_ranks, self.layout)

    @property
    def bounds(self) -> tuple[int, ...]:
        """Cumulative lengths of the documents."""
        return self.documents or (0, self.num_tokens)

    def parts(self, spec: AttentionSpec) -> Parts:
        return parts_of(self.cut, self.bounds, spec)


@dataclass(frozen=True)
class Exchange:
    """One phase of one layer's exchanges.

    Attributes:
        phase: "forward/..." or "backward/...", as in `Traffic`.
        bytes_NN: what each rank sends to each other; the diagonal is 0.
        calls: collectives that it takes.
        ring: everybody's part goes to everybody (all-gather, reduce-scatter, all-reduce): a library passes it from rank
            to rank, so that it enters every node once; otherwise each pair of ranks exchanges directly.
        hidden: what can be computed meanwhile.
        host_reads: times that the host waits for numbers from the device (split sizes).
    """

    phase: str
    bytes_NN: FloatArray
    calls: int = 1
    ring: bool = False
    hidden: Hidden = "no"
    host_reads: int = 0

    @property
    def forward(self) -> bool:
        return self.phase.startswith("forward/")

    @property
    def sent_N(self) -> FloatArray:
        """[N]: bytes that each rank sends."""
        sent: FloatArray = self.bytes_NN.sum(1)
        return sent

    @property
    def received_N(self) -> FloatArray:
        """[N]: bytes that each rank receives."""
        received: FloatArray = self.bytes_NN.sum(0)
        return received


def routing_exchanges(spec: AttentionSpec, heads: HeadShape, row: RowShape) -> tuple[Exchange, ...]:
    """Pooled keys: 4*K*D bytes a whole chunk (padded to W a rank) to all, 8*K*D a straddling one each way."""
    if not isinstance(spec, MoBA) or row.num_ranks == 1:
        return ()
    parts = row.parts(spec)
    elements = heads.num_kv_heads * heads.head_dim
    straddling, whole = int(parts.straddling_C().sum()), parts.most_whole()
    everyone = _to_all(row.num_ranks)
    found = (
        Exchange("forward/straddling_keys", everyone * (2 * 8 * straddling * elements / row.num_ranks), ring=True),
        Exchange("forward/pooled_keys", everyone * (4.0 * whole * elements), ring=True),
    )
    return tuple(exchange for exchange in found if exchange.bytes_NN.any())


def halo_exchanges(halo: int, heads: HeadShape, row: RowShape) -> tuple[Exchange, ...]:
    """Key convolution: the last `halo` tokens of every piece to all; their gradients are reduced."""
    if halo == 0 or row.num_ranks == 1:
        return ()
    elements = num_pieces(row.num_ranks, row.layout) // row.num_ranks * halo * heads.num_kv_heads * heads.head_dim
    everyone = _to_all(row.num_ranks)
    return (
        Exchange("forward/halo", everyone * float(elements * heads.element_bytes), ring=True),
        Exchange("backward/halo", everyone * float(elements * heads.sum_bytes), ring=True),
    )


def transport_exchanges(
    transport: str, spec: AttentionSpec, heads: HeadShape, row: RowShape, *, node_ranks: int
) -> tuple[Exchange, ...]:
    """What a transport that can serve (`rules.refusals`) moves, forward and backward. KeyError for an unknown name."""
    if row.num_ranks == 1 or row.num_tokens == 0:
        return ()
    return _FORMS[transport](spec, heads, row, node_ranks)


def num_strides(num_tokens: int, heads: HeadShape) -> int:
    """Messages of an all-gather of keys and values: strides of KV heads that fit STRIDE_BYTES."""
    stride = max(1, min(heads.num_kv_heads, STRIDE_BYTES // max(1, num_tokens * heads.kv_bytes)))
    return -(-heads.num_kv_heads // stride)


def _to_all(num_ranks: int) -> FloatArray:
    """[N,N]: 1 for every pair of different ranks."""
    return 1.0 - np.eye(num_ranks)


def _lengths(cut: Cut) -> FloatArray:
    """[N]: tokens of each shard."""
    return np.array([cut.length(rank) for rank in range(cut.num_ranks)], dtype=np.float64)


def _pick_bytes(spec: AttentionSpec, row: RowShape) -> int:
    """Bytes of the picks of one query under one routing head, as `moba_kernels.Routing` stores them."""
    if not isinstance(spec, MoBA):
        return 0
    parts = row.parts(spec)
    stored = min(spec.num_picks, int(parts.before_C.max(initial=0)))
    return stored * (2 if parts.num_chunks < _NARROW_CHUNKS else 4)


def _all_gather(spec: AttentionSpec, heads: HeadShape, row: RowShape, node_ranks: int) -> tuple[Exchange, ...]:
    """L*K tokens to all: keys and values forward and backward; their gradients come back in a bytes."""
    calls = num_strides(row.num_tokens, heads)
    tokens = _to_all(row.num_ranks) * float(row.cut.longest * heads.num_kv_heads)
    return (
        Exchange("forward/kv", tokens * heads.kv_bytes, calls, ring=True, hidden="strides"),
        Exchange("backward/kv", tokens * heads.kv_bytes, calls, ring=True, hidden="strides"),
        Exchange("backward/dkv", tokens * heads.dkv_bytes, calls, ring=True, hidden="strides"),
    )


def _a2a(spec: AttentionSpec, heads: HeadShape, row: RowShape, node_ranks: int) -> tuple[Exchange, ...]:
    """See `a2a`: S tokens of H/U query heads and max(1, K/U) KV heads to each of the ranks that exchange heads."""
    return _swap_heads(spec, heads, row, row.num_ranks)


def _swap_heads(spec: AttentionSpec, heads: HeadShape, row: RowShape, ranks: int) -> tuple[Exchange, ...]:
    """The exchanges inside groups of `ranks` consecutive ranks."""
    e, a, dim, value_dim = heads.element_bytes, heads.sum_bytes, heads.head_dim, heads.value_dim
    queries, kv_heads = heads.num_heads // ranks, max(1, heads.num_kv_heads // ranks)
    routed = spec.routed_heads(queries, kv_heads) if isinstance(spec, MoBA) else 0
    group = np.arange(row.num_ranks) // ranks
    mates = (group[:, None] == group) * _to_all(row.num_ranks)
    tokens = _lengths(row.cut)
    out, back = mates * tokens[:, None], mates * tokens
    of_kv = heads.kv_bytes if heads.num_kv_heads >= ranks else heads.dkv_bytes
    found = (
        Exchange("forward/qkv", out * (queries * dim * e + kv_heads * heads.kv_bytes)),
        Exchange("forward/picks", out * (routed * _pick_bytes(spec, row))),
        Exchange("forward/out", back * (queries * (value_dim * e + a))),
        Exchange("backward/dout", out * (queries * (value_dim * e + a))),
        Exchange("backward/dqkv", back * (queries * dim * e + kv_heads * of_kv)),
    )
    return tuple(exchange for exchange in found if exchange.phase != "forward/picks" or _pick_bytes(spec, row))


def _a2a_all_gather(spec: AttentionSpec, heads: HeadShape, row: RowShape, node_ranks: int) -> tuple[Exchange, ...]:
    """See `a2a_all_gather`: heads among U ranks of a node, then keys and values among ranks of the same place."""
    ranks = inner_ranks(heads.num_heads, heads.num_kv_heads, row.num_ranks, node_ranks)
    if ranks == 1:
        return _all_gather(spec, heads, row, node_ranks)
    if ranks == row.num_ranks:
        return _a2a(spec, heads, row, node_ranks)
    held = replace(heads, num_heads=heads.num_heads // ranks, num_kv_heads=max(1, heads.num_kv_heads // ranks))
    place = np.arange(row.num_ranks) % ranks
    same_place = (place[:, None] == place) * _to_all(row.num_ranks)
    tokens = same_place * float(row.cut.joined(ranks).longest * held.num_kv_heads)
    calls = num_strides(row.num_tokens, held)
    return (
        *_swap_heads(spec, heads, row, ranks),
        Exchange("forward/kv", tokens * held.kv_bytes, calls, hidden="strides"),
        Exchange("backward/kv", tokens * held.kv_bytes, calls, hidden="strides"),
        Exchange("backward/dkv", tokens * held.dkv_bytes, calls, hidden="strides"),
    )


def _pull(spec: AttentionSpec, heads: HeadShape, row: RowShape, node_ranks: int) -> tuple[Exchange, ...]:
    """See `pull`: a bit for each part of each KV head, then rows of keys and values, and back of their gradients."""
    parts = row.parts(spec)
    routed = spec.routed_heads(heads.num_heads, heads.num_kv_heads) if isinstance(spec, MoBA) else 1
    draws = max(1, routed // heads.num_kv_heads)
    rows = pulled_tokens(parts, draws) * heads.num_kv_heads
    pieces, longest = num_pieces(row.num_ranks, row.layout) // row.num_ranks, int(np.diff(row.bounds).max())
    calls = num_strides(min(row.num_tokens, pieces * longest), heads)
    asked = -(-heads.num_kv_heads * parts.fragments_N // 8)
    found = (
        Exchange("forward/request", _to_all(row.num_ranks) * asked, host_reads=1),
        Exchange("forward/kv", rows * heads.kv_bytes, calls, hidden="local"),
        Exchange("backward/kv", rows * heads.kv_bytes, calls, hidden="local"),
        Exchange("backward/dkv", rows.T * heads.dkv_bytes, calls, hidden="strides"),
    )
    return found if _pick_bytes(spec, row) else found[1:]


def _route_queries(spec: AttentionSpec, heads: HeadShape, row: RowShape, node_ranks: int) -> tuple[Exchange, ...]:
    """See `route_queries`: a query and its picks to each holder of its chunks; partial results and gradients return."""
    assert isinstance(spec, MoBA)  # `rules.refusals`
    e, a = heads.element_bytes, heads.sum_bytes
    routed = spec.routed_heads(heads.num_heads, heads.num_kv_heads)
    group = heads.num_heads // routed
    rows = sent_queries(row.parts(spec)) * routed
    place = 4 if routed * row.num_tokens < 2**31 else 8
    query, answer = group * heads.head_dim * e + place + _pick_bytes(spec, row), group * (heads.value_dim + 1) * a
    bytes_of_head = (rows.sum() / row.num_ranks * (query + answer)) / routed
    calls = -(-routed // max(1, min(routed, int(QUERY_STRIDE_BYTES / max(1.0, bytes_of_head)))))
    return (
        Exchange("forward/counts", _to_all(row.num_ranks) * (4.0 * routed), host_reads=1),
        Exchange("forward/queries", rows * query, calls, hidden="local"),
        Exchange("forward/out", rows.T * answer, calls, hidden="strides"),
        Exchange("backward/dout", rows * (group * (heads.value_dim * e + 2 * a)), calls, hidden="local"),
        Exchange("backward/dq", rows.T * (group * heads.head_dim * a), calls, hidden="strides"),
    )


_FORMS: Mapping[str, Callable[[AttentionSpec, HeadShape, RowShape, int], tuple[Exchange, ...]]] = MappingProxyType(
    {
        "all_gather": _all_gather,
        "a2a": _a2a,
        "a2a+all_gather": _a2a_all_gather,
        "pull": _pull,
        "route_queries": _route_queries,
    }
)

__all__ = [
    "Exchange",
    "HeadShape",
    "RowShape",
    "halo_exchanges",
    "num_strides",
    "routing_exchanges",
    "transport_exchanges",
]
