"""Attention by head exchange, alone and inside the nodes of a grid, equals one rank's; its bytes are those planned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moba_kernels import Full, MoBA, Pack, Routing, random_routing, route
from moba_train.parallel import context_attend
from moba_train.parallel.a2a import HeadExchange, swap_inputs
from moba_train.parallel.emulation import ThreadGroup, run_threads
from moba_train.parallel.rules import inner_ranks
from moba_train.parallel.shard import Layout, shard_length, shard_positions
from moba_train.parallel.traffic import Traffic
from moba_train.parallel.transport import ShardedCall, row_cut
from moba_train.parallel.wire import Group, Wire
from tests.distributed import run_ranks
from tests.parallel.sharded_case import (
    CASES,
    LAYOUTS,
    PACKED,
    Case,
    check_case,
    error_of,
    inputs_of,
    my_shard,
    one_rank,
)

A2A, GRID = "a2a", "a2a+all_gather"


def _head_counts(num_ranks: int) -> list[tuple[int, int]]:
    """(query heads, KV heads): one KV head a rank, two, and fewer KV heads than ranks."""
    n = num_ranks
    halves = [(2 * n, n // 2)] if n % 2 == 0 else []
    return [(n, n), (2 * n, n), (4 * n, 2 * n), (n, 1), *halves]


def _fitted(num_ranks: int, offset: int) -> list[Case]:
    """The shared cases with heads that `num_ranks` ranks can share; every case meets other heads at another offset."""
    heads = _head_counts(num_ranks)
    return [replace(case, heads=heads[(i + offset) % len(heads)]) for i, case in enumerate(CASES)]


def _check(group: Group, transport: str, node_ranks: int, dtypes: bool, which: slice = slice(None)) -> None:
    inner = group.size() if transport == A2A else node_ranks
    for offset, layout in enumerate(LAYOUTS):
        for case in _fitted(inner, offset)[which]:
            check_case(case, group, layout, torch.float32, floor=2e-6, transport=transport, node_ranks=node_ranks)
        if dtypes:
            for heads in ((2 * inner, inner), (inner, 1)):
                case = replace(CASES[1], heads=heads, dims=(8, 5))
                check_case(case, group, layout, torch.bfloat16, 1e-3, transport=transport, node_ranks=node_ranks)
                check_case(case, group, layout, torch.float64, 1e-13, transport=transport, node_ranks=node_ranks)


def _over_gloo(rank: int, n: int) -> None:
    _check(dist.group.WORLD, A2A, n, dtypes=True)
    if n == 4:
        _check(dist.group.WORLD, GRID, 2, dtypes=True)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_output_gradients_and_routing_equal_one_rank(num_ranks: int) -> None:
    run_ranks(_over_gloo, num_ranks)


@pytest.mark.parametrize(
    ("transport", "num_ranks", "node_ranks"), [(A2A, 1, 1), (A2A, 8, 8), (GRID, 8, 2), (GRID, 8, 4), (GRID, 6, 3)]
)
def test_any_grid_equals_one_rank_though_some_ranks_and_nodes_hold_no_token(
    transport: str, num_ranks: int, node_ranks: int
) -> None:
    run_threads(lambda group: _check(group, transport, node_ranks, dtypes=False, which=slice(1, 9)), num_ranks)


def _everything(
    group: Group,
    case: Case,
    transport: str,
    node_ranks: int,
    *,
    routing: Routing | None = None,
    layout: Layout = "zigzag",
) -> tuple[list[torch.Tensor], Traffic, Routing | None]:
    """([out, lse, dq, dk, dv] of this shard, traffic, routing). The backward pass runs twice and must repeat itself."""
    q, k, v, dout = (my_shard(x, group.rank(), group.size(), layout) for x in inputs_of(case))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    traffic = Traffic()
    result = context_attend(
        *leaves,  # type: ignore[arg-type]
        case.spec,
        layout=layout,
        group=group,
        transport=transport,
        cu_seqlens=Pack(case.cu_seqlens),
        routing=routing,
        node_ranks=node_ranks,
        traffic=traffic,
    )
    grads = torch.autograd.grad(result.out, leaves, dout, retain_graph=True)
    once = Traffic(traffic.sent.copy(), traffic.received.copy())
    for first, again in zip(grads, torch.autograd.grad(result.out, leaves, dout), strict=True):
        assert torch.equal(first, again)
    return [result.out.detach(), result.lse, *grads], once, result.routing


@pytest.mark.parametrize(("node_ranks", "same_as"), [(1, "all_gather"), (4, A2A)])
def test_a_grid_of_one_dimension_is_the_transport_of_that_dimension_bit_for_bit(node_ranks: int, same_as: str) -> None:
    case = replace(CASES[1], heads=(4, 2))

    def rank_main(group: ThreadGroup) -> None:
        grid, plain = (_everything(group, case, transport, node_ranks)[:2] for transport in (GRID, same_as))
        assert all(torch.equal(a, b) for a, b in zip(grid[0], plain[0], strict=True))
        assert grid[1] == plain[1]

    run_threads(rank_main, 4)


@pytest.mark.parametrize(("transport", "node_ranks"), [(A2A, 4), (GRID, 2)])
@pytest.mark.parametrize("select", ["head", "group"])
def test_a_forced_routing_is_used_as_it_is_and_recomputing_with_it_repeats_every_bit(
    transport: str, node_ranks: int, select: Any
) -> None:
    case = Case("forced", PACKED, MoBA(4, 4, select), heads=(8, 2))
    assert isinstance(case.spec, MoBA)
    drawn = random_routing(case.spec, pack=Pack(PACKED), num_heads=8, num_kv_heads=2, seed=5, device="cpu")
    # The queries of rank 0 pick nothing: they attend to their own chunks alone, while others attend to keys of rank 0.
    ids = drawn.chunk_ids.clone()
    ids[torch.from_numpy(shard_positions(61, 4, 0, "zigzag")), :, 1:] = -1
    whole = Routing.from_chunk_ids(ids, case.spec, Pack(PACKED))
    exact, _ = one_rank(case, inputs_of(case), whole, torch.float64, "reference")

    def rank_main(group: ThreadGroup) -> None:
        forced = whole.select(torch.from_numpy(shard_positions(61, 4, group.rank(), "zigzag")))
        got, traffic, used = _everything(group, case, transport, node_ranks, routing=forced)
        assert used is forced
        for mine, truth in zip(got, exact, strict=True):
            assert error_of(mine, my_shard(truth, group.rank(), 4, "zigzag")) < 1e-5
        again = _everything(group, case, transport, node_ranks, routing=used)[0]
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
        assert "forward/pooled_keys" not in traffic.sent

    run_threads(rank_main, 4)


def _arrived(group: Group, q: Any, k: Any, whole: Routing, layout: Layout) -> tuple[Any, Any, Routing]:
    """What `swap_inputs` brings to this rank: q and k of its heads and the routing."""
    n, pack = group.size(), whole.pack
    positions = torch.from_numpy(shard_positions(pack.num_tokens, n, group.rank(), layout))
    mine, cut = whole.select(positions), row_cut(pack, n, layout)
    call = ShardedCall(whole.spec, pack, cut, group.rank(), Wire(group), positions, mine, None, "auto")
    k_local = k[positions]
    q_heads, k_heads, _, routing = swap_inputs(HeadExchange(call.wire, cut), q[positions], k_local, k_local, call, None)
    assert routing is not None
    return q_heads, k_heads, routing


def _check_arrived(group: Group, case: Case, layout: Layout) -> None:
    n, (num_heads, num_kv_heads) = group.size(), case.heads
    assert isinstance(case.spec, MoBA)
    q, k, _, _ = inputs_of(case, integers=True)
    whole = route(q, k, case.spec, cu_seqlens=Pack(case.cu_seqlens))
    heads = slice(group.rank() * num_heads // n, (group.rank() + 1) * num_heads // n)
    first = group.rank() * num_kv_heads // n
    kv_heads = slice(first, first + max(1, num_kv_heads // n))
    got_q, got_k, routing = _arrived(group, q, k, whole, layout)
    assert torch.equal(got_q, q[:, heads])
    assert torch.equal(got_k, k[:, kv_heads])
    routed = heads if case.spec.select == "head" else kv_heads
    assert torch.equal(routing.chunk_ids, whole.chunk_ids[:, routed])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_and_picks_arrive_in_token_order_ties_included(layout: Layout) -> None:
    for spec in (MoBA(4, 3), MoBA(8, 2, "group"), MoBA(4, 1)):
        for heads in ((8, 2), (8, 8), (4, 1)):
            case = Case("small integers", (0, 64, 96, 101), spec, heads)
            run_threads(partial(_check_arrived, case=case, layout=layout), 4)


@pytest.mark.parametrize(("num_tokens", "dtype"), [(40_000, torch.uint16), (66_000, torch.int32)])
def test_picks_of_more_chunks_than_sixteen_bits_number_with_or_without_a_sign_arrive_whole(
    num_tokens: int, dtype: torch.dtype
) -> None:
    spec = MoBA(1, 2)
    pack = Pack([0, num_tokens])
    whole = random_routing(spec, pack=pack, num_heads=2, num_kv_heads=1, seed=1, device="cpu")
    assert whole.stored.dtype == dtype
    x = torch.zeros(num_tokens, 2, 1)

    def rank_main(group: ThreadGroup) -> None:
        _, _, routing = _arrived(group, x, x[:, :1], whole, "zigzag")
        assert torch.equal(routing.stored, whole.stored[:, group.rank() : group.rank() + 1])

    run_threads(rank_main, 2)


def exchange_bytes(case: Case, own: int, others: int, ranks: int, num_picks: int) -> dict[str, tuple[int, int]]:
    """(sent, received) by phase of a head exchange in fp32: own tokens, tokens of the node's other ranks."""
    (num_heads, num_kv_heads), (dim, value_dim) = case.heads, case.dims
    heads, kv_heads = num_heads // ranks, max(1, num_kv_heads // ranks)
    by_head = isinstance(case.spec, MoBA) and case.spec.select == "head"
    to_heads = {
        "forward/qkv": 4 * (heads * dim + kv_heads * (dim + value_dim)),
        "forward/picks": 2 * num_picks * (heads if by_head else kv_heads),
        "backward/dout": 4 * heads * (value_dim + 1),
    }
    to_tokens = {
        "forward/out": 4 * heads * (value_dim + 1),
        "backward/dqkv": 4 * heads * dim + 4 * kv_heads * (dim + value_dim),
    }
    there = {phase: ((ranks - 1) * own * width, others * width) for phase, width in to_heads.items() if width}
    return there | {phase: (others * width, (ranks - 1) * own * width) for phase, width in to_tokens.items()}


def gather_bytes(case: Case, longest: int, ranks: int, nodes: int) -> dict[str, tuple[int, int]]:
    """(sent, received) by phase of the gather across nodes in fp32; longest: tokens of the node that has most."""
    kv = 4 * (nodes - 1) * longest * max(1, case.heads[1] // ranks) * sum(case.dims)
    return dict.fromkeys(("forward/kv", "backward/kv", "backward/dkv"), (kv, kv))


BYTE_CASES = [replace(case, heads=heads) for case in (CASES[1], CASES[3], CASES[6]) for heads in _head_counts(4)]


@pytest.mark.parametrize(("transport", "node_ranks"), [(A2A, 4), (GRID, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_phase_moves_the_bytes_planned(transport: str, node_ranks: int, layout: Layout) -> None:
    def rank_main(group: ThreadGroup) -> list[Traffic]:
        traffics = []
        for case in BYTE_CASES:
            _, traffic, routing = _everything(group, case, transport, node_ranks, layout=layout)
            num_tokens = case.cu_seqlens[-1]
            held = [shard_length(num_tokens, 4, r, layout) for r in range(4)]
            of_nodes = [sum(held[first : first + node_ranks]) for first in range(0, 4, node_ranks)]
            own, node = held[group.rank()], of_nodes[group.rank() // node_ranks]
            num_picks = 0 if routing is None else routing.stored.shape[2]
            planned = exchange_bytes(case, own, node - own, node_ranks, num_picks)
            if node_ranks < 4:
                planned |= gather_bytes(case, max(of_nodes), node_ranks, 4 // node_ranks)
            of_transport = {phase for phase in traffic.sent if not phase.endswith("_keys")}
            counted = {phase: (traffic.sent[phase], traffic.received[phase]) for phase in of_transport}
            assert counted == planned, (case.name, case.heads)
            traffics.append(traffic)
        return traffics

    for traffics in zip(*run_threads(rank_main, 4), strict=True):
        assert sum(x.total_sent() for x in traffics) == sum(x.total_received() for x in traffics) > 0


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
def test_bf16_moves_the_bytes_of_the_closed_form_and_only_sums_of_copied_heads_are_fp32(
    heads: tuple[int, int],
) -> None:
    num_tokens, dim, n = 64, 16, 4
    num_heads, num_kv_heads = heads

    def rank_main(group: ThreadGroup) -> Traffic:
        shapes = ((num_heads, dim), (num_kv_heads, dim), (num_kv_heads, dim))
        q, k, v = (torch.zeros(num_tokens // n, *s, dtype=torch.bfloat16, requires_grad=True) for s in shapes)
        traffic = Traffic()
        options: dict[str, Any] = {"layout": "zigzag", "group": group, "cu_seqlens": [0, num_tokens]}
        context_attend(q, k, v, Full(), transport=A2A, traffic=traffic, **options).out.sum().backward()
        return traffic

    share, per_head = num_tokens // n * (n - 1) // n, 4 * num_heads  # lse, and delta: 4 bytes a query and head
    each_way = share * dim * 2 * (2 * num_heads + 2 * max(num_kv_heads, n))
    wider = share * dim * 2 * 2 * n if num_kv_heads < n else 0
    for traffic in run_threads(rank_main, n):
        assert traffic.total_sent("forward") == traffic.total_received("forward") == each_way + share * per_head
        assert traffic.total_sent("backward") == each_way + share * per_head + wider


def test_heads_that_do_not_divide_are_refused_with_their_numbers_and_the_grid_takes_what_fits() -> None:
    def refused(transport: str) -> Callable[[ThreadGroup], None]:
        def rank_main(group: ThreadGroup) -> None:
            x = torch.zeros(4, 6, 8)
            context_attend(x, x, x, Full(), layout="zigzag", group=group, transport=transport, cu_seqlens=[0, 16])

        return rank_main

    with pytest.raises(ValueError, match="6 query heads with 6 KV heads do not divide among 4 ranks"):
        run_threads(refused(A2A), 4)
    run_threads(refused(GRID), 4)
    assert inner_ranks(6, 6, 4, node_ranks=8) == 2
