"""Transport "route_queries" equals one rank, sends what the routing asks for and no more, and its load is known."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from math import comb
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moba_kernels import MoBA, Pack, PairTally, Partial, Routing, random_routing
from moba_train.parallel import context_attend, route_queries
from moba_train.parallel.cut import Cut, Layout, cut_row
from moba_train.parallel.emulation import run_threads
from moba_train.parallel.parts import parts_of
from moba_train.parallel.parts import sent_queries as expected_queries
from moba_train.parallel.query_messages import send_queries, sort_arrived
from moba_train.parallel.query_plan import (
    chunk_holders,
    imbalance,
    list_queries,
    needed_ranks,
    queries_received,
    start_count,
)
from moba_train.parallel.route_queries import RouteQueries
from moba_train.parallel.traffic import Traffic
from moba_train.parallel.transport import HostCopy, ShardedCall
from moba_train.parallel.wire import Group, Wire
from tests.distributed import run_ranks
from tests.parallel.sharded_case import (
    CASES,
    LAYOUTS,
    Case,
    LoggingWire,
    NoHostRead,
    check_case,
    error_of,
    inputs_of,
    my_shard,
    one_rank,
)

ROUTED = tuple(case for case in CASES if isinstance(case.spec, MoBA))


def _call(case: Case, group: Group, layout: Layout, routing: Routing, traffic: Traffic | None = None) -> ShardedCall:
    """`routing` is that of the whole row."""
    assert isinstance(case.spec, MoBA)
    pack = routing.pack
    cut = cut_row(pack.num_tokens, group.size(), layout)
    positions = torch.from_numpy(cut.positions(group.rank()))
    wire = Wire(group, Traffic() if traffic is None else traffic)
    return ShardedCall(case.spec, pack, cut, group.rank(), wire, positions, routing.select(positions), None, "auto")


def _one_rank_routing(case: Case, inputs: tuple[Tensor, ...]) -> Routing:
    _, routing = one_rank(case, inputs, None, torch.float32, "torch")
    assert routing is not None
    return routing


def _forward_and_backward(
    transport: RouteQueries, case: Case, inputs: tuple[Tensor, ...], group: Group, layout: Layout, routing: Routing
) -> tuple[list[Tensor], Traffic]:
    """(out, lse, dq, dk, dv) of the shard and what they moved; a second backward pass gives the same bits."""
    q, k, v, dout = (my_shard(x, group.rank(), group.size(), layout) for x in inputs)
    traffic = Traffic()
    call = _call(case, group, layout, routing, traffic)
    sent = transport.forward(q, k, v, call, PairTally())
    delta = (dout * sent.out).sum(-1).to(sent.lse.dtype)
    grads = transport.backward(dout, delta, sent.saved, sent.kept, call)
    again = transport.backward(dout, delta, sent.saved, sent.kept, replace(call, wire=Wire(group)))
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True)), case.name
    return [sent.out, sent.lse, *grads], traffic


def _equal_one_rank(rank: int, n: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    for layout in LAYOUTS:
        for case in ROUTED:
            check_case(case, group, layout, torch.float32, floor=2e-6, transport="route_queries")
        check_case(CASES[1], group, layout, torch.bfloat16, floor=1e-3, transport="route_queries")


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_output_gradients_and_routing_equal_one_rank(num_ranks: int) -> None:
    run_ranks(_equal_one_rank, num_ranks)


@pytest.mark.parametrize("num_ranks", [1, 8])
def test_one_rank_and_eight_of_which_some_hold_no_token_equal_one_rank(num_ranks: int) -> None:
    def main(group: Group) -> None:
        for case, layout in zip((*CASES[1:5], CASES[7]), (*LAYOUTS, *LAYOUTS, LAYOUTS[0]), strict=True):
            check_case(case, group, layout, torch.float32, floor=2e-6, transport="route_queries")

    run_threads(main, num_ranks)


def test_small_integers_give_the_picks_of_one_rank_ties_included() -> None:
    case = Case("small integers", (0, 64, 96, 101), MoBA(4, 3))
    inputs = inputs_of(case, integers=True)
    plain, routing = one_rank(case, inputs, None, torch.float32, "torch")
    assert routing is not None

    def main(group: Group) -> None:
        q, k, v, dout = (my_shard(x, group.rank(), 3, "zigzag") for x in inputs)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        q, k, v = leaves
        options: dict[str, Any] = {"layout": "zigzag", "group": group, "transport": "route_queries"}
        result = context_attend(q, k, v, case.spec, cu_seqlens=Pack(case.cu_seqlens), **options)
        assert result.routing is not None
        assert torch.equal(result.routing.chunk_ids, my_shard(routing.chunk_ids, group.rank(), 3, "zigzag"))
        grads = torch.autograd.grad(result.out, leaves, dout)
        for got, whole in zip((result.out.detach(), result.lse, *grads), plain, strict=True):
            assert error_of(got, my_shard(whole, group.rank(), 3, "zigzag").double()) < 1e-5

    run_threads(main, 3)


def test_a_frozen_or_random_routing_is_used_as_it_is_and_the_same_bits_come_again() -> None:
    case = CASES[1]
    assert isinstance(case.spec, MoBA)
    inputs, pack = inputs_of(case), Pack(case.cu_seqlens)
    everyone = random_routing(case.spec, pack=pack, num_heads=4, num_kv_heads=2, seed=5, device="cpu")
    exact, _ = one_rank(case, inputs, everyone, torch.float64, "reference")

    def main(group: Group) -> set[str]:
        q, k, v, _ = (my_shard(x, group.rank(), 3, "zigzag") for x in inputs)
        mine = _call(case, group, "zigzag", everyone).routing
        traffic = Traffic()
        options: dict[str, Any] = {"layout": "zigzag", "group": group, "transport": "route_queries", "cu_seqlens": pack}
        first = context_attend(q, k, v, case.spec, routing=mine, traffic=traffic, **options)
        recomputed = context_attend(q, k, v, case.spec, routing=first.routing, **options)
        assert torch.equal(first.out, recomputed.out) and torch.equal(first.lse, recomputed.lse)
        assert error_of(first.out, my_shard(exact[0], group.rank(), 3, "zigzag")) < 1e-5
        return set(traffic.sent)

    assert run_threads(main, 3) == [{"forward/counts", "forward/queries", "forward/out"}] * 3


@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=lambda case: case.spec.select)
def test_one_head_at_a_time_gives_the_same_bits(case: Case) -> None:
    inputs = inputs_of(case)
    routing = _one_rank_routing(case, inputs)

    def main(group: Group) -> None:
        at_once, _ = _forward_and_backward(RouteQueries(), case, inputs, group, "contiguous", routing)
        in_turn, _ = _forward_and_backward(RouteQueries(stride_bytes=1), case, inputs, group, "contiguous", routing)
        assert all(torch.equal(a, b) for a, b in zip(at_once, in_turn, strict=True))

    run_threads(main, 4)


def test_strides_cover_all_heads_and_fit_the_bytes_that_are_expected() -> None:
    case = Case("", (0, 4096), MoBA(64, 5), (8, 2), (16, 16))
    routing = random_routing(case.spec, pack=Pack(case.cu_seqlens), num_heads=8, num_kv_heads=2, seed=0, device="cpu")  # type: ignore[arg-type]

    def main(group: Group) -> None:
        call = _call(case, group, "zigzag", routing)
        q, v = torch.zeros(512, 8, 16), torch.zeros(512, 2, 16)
        # 7 others, each met with 1 - (7/8)^(4 + 5/8): an eighth of a shard makes 5 chunks lie on one rank more
        query, plan = 16 * 4 + 17 * 4, 8 * 7
        of_head = 512 * (7 * (1 - (7 / 8) ** (4 + 5 / 8)) * query + plan)
        assert RouteQueries(stride_bytes=int(3.1 * of_head)).heads(q, v, call) == [(0, 3), (3, 6), (6, 8)]
        assert RouteQueries(stride_bytes=int(8.1 * of_head)).heads(q, v, call) == [(0, 8)]
        assert RouteQueries(stride_bytes=1).heads(q, v, call) == [(head, head + 1) for head in range(8)]

    run_threads(main, 8)


def _sent_by_hand(case: Case, routing: Routing, cut: Cut) -> np.ndarray[Any, np.dtype[np.int64]]:
    """[N,N]: queries that each rank sends to each other, one by one from the chunks that they attend to."""
    geometry, owner = routing.pack.chunks(routing.spec.chunk_size), cut.owner_of_token()
    sent = np.zeros((cut.num_ranks, cut.num_ranks), dtype=np.int64)
    for token, of_heads in enumerate(routing.chunk_ids.tolist()):
        for chunks in of_heads:
            keys = [range(geometry.start_C[c], min(geometry.end_C[c], token + 1)) for c in chunks if c >= 0]
            for holder in {owner[key] for of_chunk in keys for key in of_chunk} - {owner[token]}:
                sent[owner[token], holder] += 1
    return sent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_queries_whose_chunks_lie_elsewhere(dtype: torch.dtype) -> None:
    def check(case: Case, layout: Layout, n: int) -> None:
        assert isinstance(case.spec, MoBA)
        inputs = tuple(x.to(dtype) for x in inputs_of(case))
        routing = _one_rank_routing(case, tuple(x.float() for x in inputs))
        sent = _sent_by_hand(case, routing, cut_row(routing.pack.num_tokens, n, layout))
        routed, picks = routing.stored.shape[1:]
        group, (dim, value_dim), e = case.heads[0] // routed, case.dims, dtype.itemsize
        query, out = group * dim * e + 4 + 2 * picks, group * (value_dim + 1) * 4
        dout, dq = group * (value_dim * e + 8), group * dim * 4

        def main(rank_group: Group) -> Traffic:
            return _forward_and_backward(RouteQueries(), case, inputs, rank_group, layout, routing)[1]

        for traffic, leaving, coming in zip(run_threads(main, n), sent.sum(1), sent.sum(0), strict=True):
            told = (n - 1) * 4 * routed
            assert traffic.sent == {
                "forward/counts": told,
                "forward/queries": leaving * query,
                "forward/out": coming * out,
                "backward/dout": leaving * dout,
                "backward/dq": coming * dq,
            }, case.name
            assert traffic.received == {
                "forward/counts": told,
                "forward/queries": coming * query,
                "forward/out": leaving * out,
                "backward/dout": coming * dout,
                "backward/dq": leaving * dq,
            }, case.name
        received = queries_received(routing, cut_row(routing.pack.num_tokens, n, layout))
        assert received.tolist() == sent.sum(0).tolist()

    for case, layout, n in ((CASES[1], "zigzag", 3), (CASES[3], "contiguous", 4), (CASES[4], "zigzag", 8)):
        check(case, layout, n)  # type: ignore[arg-type]


def test_nothing_but_counts_is_sent_where_every_query_finds_its_chunks_on_its_own_rank() -> None:
    case = Case("own chunk only, whole on its rank", (0, 32), MoBA(8, 1))
    inputs = inputs_of(case)
    routing = _one_rank_routing(case, inputs)
    traffics = run_threads(
        lambda group: _forward_and_backward(RouteQueries(), case, inputs, group, "contiguous", routing)[1], 4
    )
    for traffic in traffics:
        assert traffic.total_sent() == traffic.sent["forward/counts"] > 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_ranks", [8, 32])
def test_uniform_routing_sends_as_many_queries_as_the_closed_form_says(num_ranks: int, layout: Layout) -> None:
    chunk, chunks_of_rank, heads, spec = 8, 4, 16, MoBA(8, 6)
    num_chunks = num_ranks * chunks_of_rank
    pack, cut = Pack([0, num_chunks * chunk]), cut_row(num_chunks * chunk, num_ranks, layout)
    routing = random_routing(spec, pack=pack, num_heads=heads, num_kv_heads=heads, seed=3, device="cpu")
    received = queries_received(routing, cut)

    owner_C = cut.owner_of_token()[::chunk]
    expected = np.zeros((num_ranks, num_ranks))
    for c, owner in enumerate(owner_C):  # p of the c chunks before c, m of them on each rank
        p, m_N = min(spec.topk - 1, c), np.bincount(owner_C[:c], minlength=num_ranks)
        expected[owner] += [chunk * heads * (1 - comb(c - m, p) / comb(c, p)) for m in m_N]
    np.fill_diagonal(expected, 0.0)
    assert received.sum() == pytest.approx(expected.sum(), rel=0.01)
    assert received == pytest.approx(expected.sum(0), rel=0.1, abs=3 * np.sqrt(chunk * heads))
    model = expected_queries(parts_of(cut, pack.cu_seqlens, spec)) * heads
    assert model == pytest.approx(expected, rel=1e-9, abs=1e-9)
    # Without causality, as if every query saw the whole row, the short formula is an upper bound.
    d = (num_ranks - 1) * (1 - (1 - 1 / num_ranks) ** (spec.topk - 1))
    assert 0.7 < received.sum() / (pack.num_tokens * heads * d) < 1.0


def test_the_cost_model_expects_the_queries_that_packed_documents_and_cut_chunks_send() -> None:
    spec, heads = MoBA(6, 3), 200
    pack, cut = Pack([0, 0, 100, 101, 250, 301]), cut_row(301, 5, "zigzag")
    routing = random_routing(spec, pack=pack, num_heads=heads, num_kv_heads=heads, seed=1, device="cpu")
    expected = expected_queries(parts_of(cut, pack.cu_seqlens, spec)) * heads
    for rank in range(5):
        positions = torch.from_numpy(cut.positions(rank))
        sent = needed_ranks(routing.select(positions), positions, cut, rank).sum((1, 2)).numpy()
        assert sent == pytest.approx(expected[rank], rel=0.03)


def test_a_chunk_that_everyone_picks_loads_its_holder_and_is_seen_in_the_imbalance() -> None:
    spec, pack, cut = MoBA(8, 2), Pack([0, 64]), cut_row(64, 4, "contiguous")
    own = torch.arange(64) // 8
    everyone_picks_the_first = torch.stack([own, torch.where(own > 0, 0, -1)], 1).unsqueeze(1)
    routing = Routing.from_chunk_ids(everyone_picks_the_first, spec, pack)
    received = queries_received(routing, cut)
    assert received.tolist() == [48, 0, 0, 0]
    assert imbalance(received) == 4.0
    assert imbalance(np.array([5, 5, 5, 5])) == imbalance(np.zeros(4, dtype=np.int64)) == 1.0


def test_holders_of_a_chunk_are_ranks_in_order_with_their_first_token_of_it() -> None:
    # zigzag, N = 2: rank 0 holds 0-2 and 9-11, rank 1 holds 3-8; chunks 0-4, 5-9, 10-11
    rank_CW, first_CW = chunk_holders(Pack([0, 12]), 5, cut_row(12, 2, "zigzag"))
    assert rank_CW.tolist() == [[0, 1], [0, 1], [0, 2], [2, 2]]
    assert first_CW[:2].tolist() == [[0, 3], [9, 5]]
    assert first_CW[2, 0] == 10
    assert chunk_holders(Pack([0, 12]), 12, cut_row(12, 2, "zigzag"))[1][0].tolist() == [0, 3]


def _attends_to_nothing(q: Tensor, k: Tensor, v: Tensor, spec: MoBA, **_: Any) -> Partial:
    return Partial(q.new_zeros(*q.shape[:2], v.shape[2]), q.new_full(q.shape[:2], -torch.inf))


def _has_no_gradient(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


def test_outside_of_attention_nothing_is_read_from_the_device_but_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route_queries, "attend_partial", _attends_to_nothing)
    monkeypatch.setattr(route_queries, "attend_partial_backward", _has_no_gradient)
    case = CASES[1]
    inputs = inputs_of(case)
    routing = _one_rank_routing(case, inputs)

    def main(group: Group) -> None:
        q, k, v, dout = (my_shard(x, group.rank(), 2, "zigzag") for x in inputs)
        call = _call(case, group, "zigzag", routing)
        transport = RouteQueries(stride_bytes=1)
        with NoHostRead():
            sent = transport.forward(q, k, v, call, PairTally())
            transport.backward(dout, sent.lse, sent.saved, sent.kept, call)
        assert sum(sum(stride.received) for stride in sent.kept) > 0

    run_threads(main, 2)


@pytest.mark.parametrize(("num_tokens", "picks"), [(70_000, 2), (70_000, 0), (40, 2)])
def test_queries_arrive_by_head_and_token_with_their_picks_whatever_their_width(num_tokens: int, picks: int) -> None:
    """Chunk ids beyond two bytes, no picks at all, and ids in two bytes."""
    spec, pack = MoBA(1, 1 + picks), Pack([0, num_tokens])
    case = Case("", pack.cu_seqlens, spec)
    own = torch.arange(num_tokens)
    chunk_ids = torch.stack([own, *((own - 1 - i).clamp_min(-1) for i in range(picks))], 1)
    routing = Routing.from_chunk_ids(chunk_ids.unsqueeze(1).repeat(1, 2, 1), spec, pack)
    wide = routing.stored.dtype == torch.int32
    assert wide == (num_tokens > 65535)

    def main(group: Group) -> None:
        call = _call(case, group, "contiguous", routing)
        q = call.positions_S.view(-1, 1, 1).expand(-1, 2, 3).float() + torch.tensor([[0.0], [0.5]])
        (stride,) = start_count(call, [(0, 2)])()
        arrived = sort_arrived(send_queries(q, stride, list_queries(call, stride), call).wait(), q, call)
        # The first tokens of the second shard look back into the first one; nobody else travels.
        looking_back = torch.arange(picks) + num_tokens // 2 if group.rank() == 0 else torch.arange(0)
        assert arrived.position_Q.tolist() == looking_back.repeat(2).tolist()
        assert stride.received_of_head == (len(looking_back),) * 2
        assert arrived.q_QGD[:, 0, 0].tolist() == torch.cat([looking_back, looking_back + 0.5]).tolist()
        ids = arrived.picks_QP.long() if wide else arrived.picks_QP.view(torch.uint16).long()
        assert torch.equal(ids, chunk_ids[looking_back.repeat(2), 1:])

    run_threads(main, 2)


def test_heads_and_positions_arrive_whole_where_their_product_is_past_2_to_the_31() -> None:
    num_heads, num_tokens, chunk = 2049, 1 << 20, 1 << 16
    pack = Pack([0, num_tokens])
    case = Case("", pack.cu_seqlens, MoBA(chunk, 2), heads=(num_heads, num_heads))
    cut = cut_row(num_tokens, 2, "contiguous")

    def main(group: Group) -> None:
        position = torch.tensor([num_tokens - 1 if group.rank() else 0])  # the one query of each rank that is looked at
        own_and_first = torch.tensor([[15, 0] if group.rank() else [0, -1]])
        ids = own_and_first.unsqueeze(1).repeat(1, num_heads, 1)
        routing = Routing.from_chunk_ids(ids, case.spec, pack, position)  # type: ignore[arg-type]
        call = ShardedCall(case.spec, pack, cut, group.rank(), Wire(group), position, routing, None, "auto")
        q = torch.arange(num_heads).view(1, -1, 1).float()
        (stride,) = start_count(call, [(0, num_heads)])()
        arrived = sort_arrived(send_queries(q, stride, list_queries(call, stride), call).wait(), q, call)
        if group.rank() == 0:  # the holder of the first chunk
            assert arrived.position_Q.tolist() == [num_tokens - 1] * num_heads
            assert arrived.q_QGD.flatten().tolist() == list(range(num_heads))

    run_threads(main, 2)


def test_local_keys_are_attended_to_while_the_host_reads_and_while_queries_travel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case("picks", (0, 64), MoBA(8, 4))
    logs: tuple[list[str], ...] = ([], [])
    attend, gradients, read = route_queries.attend_partial, route_queries.attend_partial_backward, HostCopy.wait

    def noted(what: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            logs[int(threading.current_thread().name.split()[1])].append(what)
            return run(*args, **options)

        return call

    monkeypatch.setattr(route_queries, "attend_partial", noted("attend", attend))
    monkeypatch.setattr(route_queries, "attend_partial_backward", noted("gradients", gradients))
    monkeypatch.setattr(HostCopy, "wait", noted("read sizes", read))
    inputs = inputs_of(case)
    routing = _one_rank_routing(case, inputs)

    def rank_main(group: Group) -> None:
        call = replace(_call(case, group, "zigzag", routing), wire=LoggingWire(group, logs=logs))
        q, k, v, dout = (my_shard(x, group.rank(), 2, "zigzag") for x in inputs)
        sent = RouteQueries().forward(q, k, v, call, PairTally())
        RouteQueries().backward(dout, sent.lse, sent.saved, sent.kept, call)

    run_threads(rank_main, 2)
    forward = [
        *("start forward/counts", "wait forward/counts", "attend", "read sizes"),
        *("start forward/queries", "attend", "wait forward/queries", "attend"),
        *("start forward/out", "wait forward/out"),
    ]
    backward = [
        *("start backward/dout", "gradients", "wait backward/dout", "gradients"),
        *("start backward/dq", "wait backward/dq"),
    ]
    for log in logs:
        assert [what for what, _ in groupby(log)] == [*forward, *backward]  # what arrives is attended to head by head
