"""Ranks as threads of one process: what they compute is what real ranks compute, at any number of them."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist

from moba_kernels import MoBA, Pack, Routing, random_routing, route
from moba_train.parallel import context_attend, route_context
from moba_train.parallel.cut import Layout, cut_row
from moba_train.parallel.emulation import ThreadGroup, run_threads
from moba_train.parallel.pooled_keys import chunk_owners, route_over
from moba_train.parallel.rules import TRANSPORT_NAMES, refusals
from moba_train.parallel.traffic import Traffic
from moba_train.parallel.volume import HeadShape, RowShape, transport_exchanges
from moba_train.parallel.wire import Group, Wire
from tests.distributed import run_ranks
from tests.parallel.sharded_case import (
    CASES,
    LAYOUTS,
    Case,
    check_case,
    error_of,
    inputs_of,
    my_shard,
    one_rank,
    sharded,
)


def _collectives(group: Group) -> list[object]:
    """Every collective of a wire on small integers, over the whole group and between its even and odd ranks."""
    rank, n = group.rank(), group.size()
    wire = Wire(group)
    x = torch.arange(6, dtype=torch.float32).view(2, 3) + 10 * rank
    halves = wire.among([r for r in range(n) if r % 2 == rank % 2])
    rows = [(rank + r) % 3 for r in range(n)]  # symmetric, so that everyone knows what comes
    sent = torch.arange(sum(rows), dtype=torch.float32) + 100 * rank
    parts = torch.arange(n * 2, dtype=torch.float64).view(n, 2) * (rank + 1)
    results = [
        wire.all_gather(x, phase="forward/a"),
        wire.reduce_scatter(parts, phase="forward/b"),
        wire.all_reduce(x.clone(), phase="forward/c"),
        wire.all_to_all(sent, rows, rows, phase="forward/d"),
        halves.all_gather(x, phase="forward/e"),
        halves.reduce_scatter(parts[: halves.size], phase="forward/f"),
    ]
    found: list[object] = [pending.wait().tolist() for pending in results]
    return [*found, dict(wire.traffic.sent), dict(wire.traffic.received)]


def _collectives_over_gloo(rank: int, n: int) -> list[object]:
    group = dist.group.WORLD
    assert group is not None
    return _collectives(group)


def test_threads_exchange_what_gloo_ranks_exchange_and_count_the_same_bytes() -> None:
    over_threads = run_threads(_collectives, 4)
    assert over_threads == run_ranks(_collectives_over_gloo, 4)
    gathered = over_threads[1][0]
    assert gathered[2] == [[20.0, 21.0, 22.0], [23.0, 24.0, 25.0]]  # type: ignore[index]
    assert over_threads[3][4] == [[[10.0, 11.0, 12.0], [13.0, 14.0, 15.0]], [[30.0, 31.0, 32.0], [33.0, 34.0, 35.0]]]
    sent, received = over_threads[0][-2:]
    assert sent["forward/a"] == received["forward/a"] == 3 * 6 * 4  # type: ignore[index]
    assert sent["forward/c"] == 2 * 3 * 6 * 4 // 4  # type: ignore[index]
    assert sent["forward/e"] == 6 * 4  # type: ignore[index]


def test_a_rank_that_fails_ends_all_threads_with_its_own_error() -> None:
    def fails(group: ThreadGroup) -> None:
        if group.rank() == 1:
            raise ValueError("rank 1 gives up")
        Wire(group).all_reduce(torch.zeros(1), phase="forward/x").wait()

    with pytest.raises(ValueError, match="rank 1 gives up"):
        run_threads(fails, 3)
    assert threading.active_count() < 50


def test_a_rank_that_fails_ends_those_who_meet_among_themselves_for_the_first_time_later() -> None:
    def fails(group: ThreadGroup) -> None:
        if group.rank() == 0:
            raise ValueError("rank 0 gives up")
        if group.rank() == 2:
            return
        while not group.table.barrier.broken:  # it fails first, though it may run last
            group.table.turn.release()
            time.sleep(0.01)
            group.table.turn.acquire()
        Wire(group).among((0, 1)).all_gather(torch.zeros(1), phase="forward/x").wait()

    with pytest.raises(ValueError, match="rank 0 gives up"):
        run_threads(fails, 3)


@pytest.mark.parametrize("num_ranks", [2, 5, 8])
def test_attention_over_threads_equals_one_rank(num_ranks: int) -> None:
    def check(group: ThreadGroup) -> None:
        for layout in LAYOUTS:
            for case in CASES:
                check_case(case, group, layout, torch.float32, floor=2e-6)

    run_threads(check, num_ranks)


@pytest.mark.parametrize("transport", TRANSPORT_NAMES)
def test_ranks_may_be_given_routings_of_any_width(transport: str) -> None:
    """The gate's has seven slots here. The second rank's has none, the third's gaps, the last one's one more."""
    case = Case("one document", (0, 64), MoBA(8, 9), heads=(4, 4))
    inputs, pack = inputs_of(case), Pack(case.cu_seqlens)
    picks = random_routing(case.spec, pack=pack, num_heads=4, num_kv_heads=4, seed=1, device="cpu").picks.clone()
    picks[16:32] = -1
    picks[32:48, :, 1::2] = -1
    whole = Routing(picks, case.spec, pack)
    expected, _ = one_rank(case, inputs, whole, torch.float32, "torch")

    def rank_main(group: ThreadGroup) -> None:
        rank = group.rank()
        q, k, v, dout = (my_shard(x, rank, 4, "contiguous") for x in inputs)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        positions = torch.arange(16 * rank, 16 * rank + 16)
        given = picks[positions]
        given = {1: given[:, :, :0], 3: torch.nn.functional.pad(given, (1, 0), value=-1)}.get(rank, given)
        routing = Routing(given, case.spec, pack, positions)
        result = context_attend(
            *leaves, case.spec, layout="contiguous", group=group, transport=transport, cu_seqlens=pack,
            routing=routing, node_ranks=2,
        )  # fmt: skip
        grads = torch.autograd.grad(result.out, leaves, dout)
        for got, one in zip([result.out.detach(), result.lse, *grads], expected, strict=True):
            assert error_of(got, my_shard(one, rank, 4, "contiguous").double()) < 1e-5

    run_threads(rank_main, 4)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_every_transport_picks_what_one_rank_picks_on_small_integers_ties_included(num_ranks: int) -> None:
    case = Case("small integers, packed", (0, 0, 64, 65, 101, 128), MoBA(4, 3), heads=(8, 8))
    inputs = inputs_of(case, integers=True)
    expected, whole = one_rank(case, inputs, None, torch.float32, "torch")
    assert whole is not None
    served: set[str] = set()

    def rank_main(group: ThreadGroup) -> None:
        for transport in TRANSPORT_NAMES:
            if refusals(transport, case.spec, num_heads=8, num_kv_heads=8, num_ranks=num_ranks):
                continue
            served.add(transport)
            for layout in LAYOUTS:
                got, mine = sharded(
                    case, inputs, group, layout, torch.float32, transport=transport, node_ranks=max(1, num_ranks // 2)
                )
                where = (transport, layout, group.rank())
                assert mine is not None
                ids = my_shard(whole.chunk_ids, group.rank(), num_ranks, layout)
                assert torch.equal(mine.chunk_ids, ids), where
                for x, one in zip(got, expected, strict=True):
                    assert error_of(x, my_shard(one, group.rank(), num_ranks, layout).double()) < 1e-5, where

    run_threads(rank_main, num_ranks)
    assert served == set(TRANSPORT_NAMES) - ({"a2a"} if num_ranks == 3 else set())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8, 64])
def test_routing_on_random_inputs_is_that_of_one_rank(num_ranks: int, layout: Layout) -> None:
    """The published means are the same bits for any cut, and a query's scores do not depend on its neighbours."""
    pack = Pack([0, 700, 701, 701, 1500])
    generator = torch.Generator().manual_seed(num_ranks)
    q, k = torch.randn(1500, 4, 16, generator=generator), torch.randn(1500, 2, 16, generator=generator)
    for spec in (MoBA(32, 4), MoBA(48, 3, "group")):
        whole = route(q, k, spec, cu_seqlens=pack)

        def rank_main(group: ThreadGroup, spec: MoBA = spec, whole_ids: torch.Tensor = whole.chunk_ids) -> int:
            mine = (my_shard(x, group.rank(), num_ranks, layout) for x in (q, k))
            routing = route_context(*mine, spec, layout=layout, group=group, pack=pack)
            return int((routing.chunk_ids != my_shard(whole_ids, group.rank(), num_ranks, layout)).any(-1).sum())

        assert sum(run_threads(rank_main, num_ranks)) == 0


def test_512_ranks_share_a_row_that_no_chunk_and_no_document_divides() -> None:
    pack, spec, n = Pack([0, 1000, 1001, 3001]), MoBA(96, 3), 512
    q, k, v, _ = inputs_of(CASES[0].__class__("512 ranks", pack.cu_seqlens, spec, heads=(2, 1)))
    whole = route(q, k, spec, cu_seqlens=pack)

    def rank_main(group: ThreadGroup) -> tuple[bool, Traffic]:
        traffic = Traffic()
        mine = [my_shard(x, group.rank(), n, "zigzag") for x in (q, k, v)]
        routing = route_over(Wire(group, traffic), mine[0], mine[1], spec, layout="zigzag", pack=pack)
        return torch.equal(routing.chunk_ids, my_shard(whole.chunk_ids, group.rank(), n, "zigzag")), traffic

    found = run_threads(rank_main, n)
    owners = chunk_owners(pack, spec.chunk_size, num_ranks=n, layout="zigzag")
    of_chunk = k.shape[1] * k.shape[2]
    exchanged = (n - 1) * 4 * owners.most_whole * of_chunk + 2 * (n - 1) * 8 * len(owners.straddling) * of_chunk // n
    assert all(same for same, _ in found)
    assert {traffic.total_received() for _, traffic in found} == {exchanged}


# a2a alone would ask for a head of every rank.
WIDE = [
    ("pull", 128),
    *(pytest.param(x, 512, marks=pytest.mark.slow) for x in ("all_gather", "a2a+all_gather", "pull", "route_queries")),
]
SIZED_BY_SHAPES = {"pull": ("forward/request",), "route_queries": ("forward/counts",)}
"""Phases whose bytes follow from shapes; those of other transports all do."""


@pytest.mark.parametrize(("transport", "n"), WIDE)
def test_many_ranks_attend_like_one_and_move_the_bytes_of_the_closed_form(transport: str, n: int) -> None:
    case = Case("many ranks", (0, 1024), MoBA(8, 3), heads=(8, 8))
    inputs, pack = inputs_of(case), Pack(case.cu_seqlens)
    uniform = random_routing(case.spec, pack=pack, num_heads=8, num_kv_heads=8, seed=1, device="cpu")
    expected, _ = one_rank(case, inputs, uniform, torch.float32, "torch")

    def rank_main(group: ThreadGroup) -> tuple[float, Traffic]:
        traffic, positions = Traffic(), torch.from_numpy(cut_row(1024, n, "zigzag").positions(group.rank()))
        *leaves, dout = (my_shard(x, group.rank(), n, "zigzag").clone() for x in inputs)
        for leaf in leaves:
            leaf.requires_grad_()
        result = context_attend(
            *leaves, case.spec, layout="zigzag", group=group, transport=transport, cu_seqlens=pack, traffic=traffic,
            routing=uniform.select(positions), node_ranks=8,
        )  # fmt: skip
        found = [result.out.detach(), result.lse, *torch.autograd.grad(result.out, leaves, dout)]
        whole = [my_shard(one, group.rank(), n, "zigzag").double() for one in expected]
        return max(error_of(x, one) for x, one in zip(found, whole, strict=True)), traffic

    ranks = run_threads(rank_main, n)
    assert max(error for error, _ in ranks) < 1e-5
    heads, row = HeadShape(8, 8, 8, 8, 4), RowShape(1024, n, "zigzag")
    for exchange in transport_exchanges(transport, case.spec, heads, row, node_ranks=8):
        sent = [traffic.sent[exchange.phase] for _, traffic in ranks]
        if exchange.phase not in SIZED_BY_SHAPES.get(transport, (exchange.phase,)):  # expected of what routing asks for
            assert sum(sent) == pytest.approx(exchange.sent_N.sum(), rel=0.05), exchange.phase
        else:
            assert sent == exchange.sent_N.tolist(), exchange.phase


@pytest.mark.parametrize("layout", LAYOUTS)
def test_joined_cuts_hold_what_their_ranks_hold(layout: Layout) -> None:
    cut = cut_row(101, 12, layout)
    joined = cut.joined(4)
    assert joined.num_ranks == 3
    for node in range(3):
        of_ranks = torch.cat([torch.from_numpy(cut.positions(rank)) for rank in range(4 * node, 4 * node + 4)])
        assert torch.from_numpy(joined.positions(node)).tolist() == sorted(of_ranks.tolist())
    owner = cut.owner_of_token()
    assert all((owner[cut.positions(rank)] == rank).all() for rank in range(12))


def test_one_thread_is_one_rank() -> None:
    q, k, v, _ = inputs_of(CASES[1])

    def rank_main(group: ThreadGroup) -> torch.Tensor:
        result = context_attend(q, k, v, CASES[1].spec, layout="zigzag", group=group, cu_seqlens=CASES[1].cu_seqlens)
        return result.out

    (one,) = run_threads(rank_main, 1)
    assert torch.equal(
        one, context_attend(q, k, v, CASES[1].spec, layout="zigzag", group=None, cu_seqlens=CASES[1].cu_seqlens).out
    )
