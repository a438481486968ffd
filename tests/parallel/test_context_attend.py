"""Attention over a sharded row equals one rank's: routing exactly, output and gradients by the 2x rule."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moba_kernels import Full, MoBA, Pack, PairTally, Partial, Routing, random_routing
from moba_train.parallel import a2a, all_gather, context_attend, route_context
from moba_train.parallel.all_gather import AllGather
from moba_train.parallel.context_attention import TRANSPORTS, planned_pairs_of_shard
from moba_train.parallel.emulation import ThreadGroup, run_threads
from moba_train.parallel.pooled_keys import chunk_owners, route_over
from moba_train.parallel.shard import Layout, shard_positions
from moba_train.parallel.traffic import Traffic
from moba_train.parallel.transport import ShardedCall, row_cut
from moba_train.parallel.wire import Wire
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


def _all_cases(rank: int, n: int) -> None:
    for layout in LAYOUTS:
        for case in CASES:
            check_case(case, dist.group.WORLD, layout, torch.float32, floor=2e-6, transport="all_gather")
        for case in CASES[1:2]:
            check_case(case, dist.group.WORLD, layout, torch.bfloat16, floor=1e-3, transport="all_gather")


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_output_gradients_and_routing_equal_one_rank(num_ranks: int) -> None:
    run_ranks(_all_cases, num_ranks)


def _eight_ranks(rank: int, n: int) -> None:
    for layout in LAYOUTS:
        for case in (CASES[1], CASES[7]):
            check_case(case, dist.group.WORLD, layout, torch.float32, floor=2e-6, transport="all_gather")


def test_eight_ranks_equal_one_rank_though_some_hold_no_token() -> None:
    run_ranks(_eight_ranks, 8)


def _integer_routing(rank: int, n: int) -> None:
    tied = 0
    for spec in (MoBA(4, 3), MoBA(8, 2), MoBA(4, 2, "group")):
        case = Case("small integers", (0, 64, 96, 101), spec)
        q, k, _, _ = inputs_of(case, integers=True)
        pack = Pack(case.cu_seqlens)
        whole = route_context(q, k, spec, layout="zigzag", group=None, pack=pack)
        means = k[:96].view(-1, spec.chunk_size, 2, 8).mean(1)
        scores = torch.einsum("thd,chd->thc", q, means.repeat_interleave(2, 1))
        tied += int((scores.sort(-1).values.diff(dim=-1) == 0).sum())
        for layout in LAYOUTS:
            local = (my_shard(x, rank, n, layout) for x in (q, k))
            routing = route_context(*local, spec, layout=layout, group=dist.group.WORLD, pack=pack)
            assert torch.equal(routing.chunk_ids, my_shard(whole.chunk_ids, rank, n, layout)), (spec, layout)
    assert tied > 100  # the inputs do put ties to the test


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_routing_on_small_integers_is_the_same_for_any_number_of_ranks_ties_included(num_ranks: int) -> None:
    run_ranks(_integer_routing, num_ranks)


def _frozen_routing(rank: int, n: int) -> set[str]:
    case, layout = CASES[1], LAYOUTS[0]
    q, k, v, _ = (my_shard(x, rank, n, layout) for x in inputs_of(case))
    pack, group = Pack(case.cu_seqlens), dist.group.WORLD
    assert isinstance(case.spec, MoBA)
    options = {"layout": layout, "group": group, "cu_seqlens": pack, "transport": "all_gather"}
    first = context_attend(q, k, v, case.spec, **options)  # type: ignore[arg-type]
    options["routing"] = first.routing
    traffic = Traffic()
    again = context_attend(q, k, v, case.spec, traffic=traffic, **options)  # type: ignore[arg-type]
    assert torch.equal(first.out, again.out)
    assert again.routing is first.routing

    positions = torch.from_numpy(shard_positions(pack.num_tokens, n, rank, layout))
    drawn = {"num_heads": 4, "num_kv_heads": 2, "seed": 5, "device": "cpu"}
    mine = random_routing(case.spec, pack=pack, q_positions=positions, **drawn)  # type: ignore[arg-type]
    everyone = random_routing(case.spec, pack=pack, **drawn)  # type: ignore[arg-type]
    exact, _ = one_rank(case, inputs_of(case), everyone, torch.float64, "reference")
    at_random = context_attend(q, k, v, case.spec, layout=layout, group=group, cu_seqlens=pack, routing=mine)
    assert error_of(at_random.out, my_shard(exact[0], rank, n, layout)) < 1e-5
    assert error_of(at_random.out, first.out.double()) > 1e-2
    return set(traffic.sent)


def test_a_frozen_or_random_routing_is_used_as_it_is_and_no_keys_are_pooled() -> None:
    assert run_ranks(_frozen_routing, 2) == [{"forward/kv"}] * 2


def _strides(rank: int, n: int) -> None:
    for case in (CASES[1], CASES[3], CASES[6]):
        inputs = inputs_of(case)
        plain, routing = one_rank(case, inputs, None, torch.float32, "torch")
        q, k, v, dout = (my_shard(x, rank, n, "zigzag") for x in inputs)
        positions = torch.from_numpy(shard_positions(case.cu_seqlens[-1], n, rank, "zigzag"))
        mine = None if routing is None else routing.select(positions)
        pack = Pack(case.cu_seqlens)
        call = ShardedCall(
            case.spec, pack, row_cut(pack, n, "zigzag"), rank, Wire(dist.group.WORLD), positions, mine, None, "auto"
        )
        one_head_at_a_time = AllGather(stride_bytes=1)
        assert one_head_at_a_time.stride(61, k, v) == 1
        out, lse, saved, kept = one_head_at_a_time.forward(q, k, v, call, PairTally())
        grads = one_head_at_a_time.backward(dout, (dout * out).sum(-1), saved, kept, call)
        for got, whole in zip((out, lse, *grads), plain, strict=True):
            assert error_of(got, my_shard(whole, rank, n, "zigzag").double()) < 1e-5, case.name


def test_one_kv_head_at_a_time_gives_the_same() -> None:
    run_ranks(_strides, 2)


def test_the_stride_fits_its_buffer_and_is_at_least_one_head() -> None:
    k, v = torch.zeros(1, 8, 64), torch.zeros(1, 8, 32)
    bytes_of_head = 1000 * (64 + 32) * 4
    assert AllGather(stride_bytes=3 * bytes_of_head).stride(1000, k, v) == 3
    assert AllGather(stride_bytes=100 * bytes_of_head).stride(1000, k, v) == 8
    assert AllGather(stride_bytes=1).stride(1000, k, v) == 1


_GATHERED = [
    *("start forward/kv", "wait forward/kv", "start forward/kv", "attend", "wait forward/kv", "attend"),
    *("start backward/kv", "wait backward/kv", "start backward/kv", "gradients", "start backward/dkv"),
    *("wait backward/kv", "gradients", "wait backward/dkv", "start backward/dkv", "wait backward/dkv"),
]
_SWAPPED_IN = ["start forward/qkv", "start forward/picks", "wait forward/qkv", "wait forward/picks"]
_SWAPPED_OUT = ["start forward/out", "wait forward/out", "start backward/dout", "wait backward/dout"]
_SWAPPED_BACK = ["start backward/dqkv", "wait backward/dqkv"]
_ACROSS = ["start backward/kv", "wait backward/kv", "gradients", "start backward/dkv", "wait backward/dkv"]
IN_TURN = {
    "all_gather": _GATHERED,
    "a2a": [*_SWAPPED_IN, "attend", *_SWAPPED_OUT, "gradients", *_SWAPPED_BACK],
    "a2a+all_gather": [
        *(*_SWAPPED_IN, "start forward/kv", "wait forward/kv", "attend"),
        *(*_SWAPPED_OUT, *_ACROSS, *_SWAPPED_BACK),
    ],
}


@pytest.mark.parametrize(("transport", "num_ranks"), [("all_gather", 2), ("a2a", 2), ("a2a+all_gather", 4)])
def test_the_next_gather_runs_beside_this_one_s_attention_and_the_host_reads_nothing(
    monkeypatch: pytest.MonkeyPatch, transport: str, num_ranks: int
) -> None:
    logs: tuple[list[str], ...] = tuple([] for _ in range(num_ranks))

    def log(what: str) -> None:
        logs[int(threading.current_thread().name.split()[1])].append(what)

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Partial:
        log("attend")
        return Partial(q.new_zeros((*q.shape[:2], v.shape[2])), q.new_zeros(q.shape[:2]))

    def attend_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        log("gradients")
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

    for module in (all_gather, a2a):
        monkeypatch.setattr(module, "attend_partial", attend)
        monkeypatch.setattr(module, "attend_partial_backward", attend_backward)
    case = replace(CASES[1], heads=(4, 4))
    inputs = inputs_of(case)
    _, whole = one_rank(case, inputs, None, torch.float32, "torch")
    assert whole is not None

    def rank_main(group: ThreadGroup) -> None:
        q, k, v, dout = (my_shard(x, group.rank(), num_ranks, "zigzag") for x in inputs)
        cut = row_cut(whole.pack, num_ranks, "zigzag")
        positions, wire = torch.from_numpy(cut.positions(group.rank())), LoggingWire(group, logs=logs)
        mine = whole.select(positions)
        call = ShardedCall(case.spec, whole.pack, cut, group.rank(), wire, positions, mine, None, "auto", node_ranks=2)
        served = AllGather(2 * 61 * 16 * 4) if transport == "all_gather" else TRANSPORTS[transport]  # 2 KV heads
        with NoHostRead():  # type: ignore[no-untyped-call]
            _, lse, saved, kept = served.forward(q, k, v, call, PairTally())
            served.backward(dout, lse, saved, kept, call)

    run_threads(rank_main, num_ranks)
    assert logs == (IN_TURN[transport],) * num_ranks


def _bytes_of_routing(rank: int, n: int) -> tuple[int, int]:
    """(bytes sent, bytes planned) by the exchange of a routing."""
    case = CASES[1]
    assert isinstance(case.spec, MoBA)
    pack, traffic = Pack(case.cu_seqlens), Traffic()
    q, k, _, _ = (my_shard(x, rank, n, "zigzag") for x in inputs_of(case))
    route_over(Wire(dist.group.WORLD, traffic), q, k, case.spec, layout="zigzag", pack=pack)
    owners = chunk_owners(pack, case.spec.chunk_size, num_ranks=n, layout="zigzag")
    of_chunk = k.shape[1] * k.shape[2]
    gathered = (n - 1) * 4 * owners.most_whole * of_chunk
    reduced = 2 * (n - 1) * 8 * len(owners.straddling) * of_chunk // n
    return traffic.total_sent(), gathered + reduced


def test_routing_sends_means_of_whole_chunks_and_sums_of_straddling_ones_and_nothing_else() -> None:
    for sent, planned in run_ranks(_bytes_of_routing, 2):
        assert sent == planned > 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_ranks", [1, 3, 8, 64])
def test_planned_pairs_of_all_shards_add_up_to_those_of_the_row(num_ranks: int, layout: Layout) -> None:
    for case in CASES:
        pack = Pack(case.cu_seqlens)
        shares = [
            planned_pairs_of_shard(pack, case.spec, num_ranks=num_ranks, rank=rank, layout=layout)
            for rank in range(num_ranks)
        ]
        assert sum(shares) == pack.planned_pairs(case.spec), case.name
        assert min(shares) >= 0


def _without_documents(rank: int, n: int) -> None:
    case = CASES[0]
    inputs = inputs_of(case)
    expected, _ = one_rank(case, inputs, None, torch.float32, "torch")
    q, k, v, _ = (my_shard(x, rank, n, "contiguous") for x in inputs)
    result = context_attend(q, k, v, case.spec, layout="contiguous", group=dist.group.WORLD)
    assert error_of(result.out, my_shard(expected[0], rank, n, "contiguous").double()) < 1e-5
    as_tensor = torch.tensor(case.cu_seqlens)
    other = context_attend(q, k, v, case.spec, layout="contiguous", group=dist.group.WORLD, cu_seqlens=as_tensor)
    assert torch.equal(result.out, other.out)


def test_no_documents_means_one_document_and_a_tensor_of_lengths_will_do() -> None:
    run_ranks(_without_documents, 2)


def _wrong_shard(rank: int, n: int) -> str:
    x = torch.zeros(5, 2, 8)
    with pytest.raises(ValueError, match="q must be") as error:
        context_attend(x, x, x, Full(), layout="zigzag", group=dist.group.WORLD, cu_seqlens=[0, 12])
    return str(error.value)


def test_a_shard_that_does_not_fit_the_row_is_refused_before_anything_is_sent() -> None:
    messages = run_ranks(_wrong_shard, 2)
    assert "q must be [6, heads, dim]: the zigzag shard of rank 1 of 2 in a row of 12 tokens" in messages[1]


def _wrong_routings(rank: int, n: int) -> None:
    x, spec, group = torch.randn(8, 2, 8, requires_grad=True), MoBA(4, 2), dist.group.WORLD
    mine, other = (torch.from_numpy(shard_positions(16, n, r, "zigzag")) for r in (rank, 1 - rank))
    picks = torch.full((8, 2, 1), -1)
    right, pack = Routing(picks, spec, Pack([0, 16]), mine), [0, 16]
    for routing, cu_seqlens, message in (
        (right, [0, 7, 16], "was made for Pack"),
        (Routing(picks, spec, Pack(pack), other), pack, "made for other queries"),
    ):
        with pytest.raises(ValueError, match=message):
            context_attend(x, x, x, spec, layout="zigzag", group=group, cu_seqlens=cu_seqlens, routing=routing)
    out = context_attend(x, x, x, spec, layout="zigzag", group=group, cu_seqlens=pack, routing=right).out
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(out.sum() + x.sum(), x, create_graph=True)


def test_a_routing_of_another_row_or_shard_and_a_second_derivative_are_refused() -> None:
    run_ranks(_wrong_routings, 2)


def test_an_unknown_transport_is_refused_with_the_allowed_ones() -> None:
    x = torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match=r"unknown transport; got 'pigeon'; allowed: 'auto', 'all_gather'"):
        context_attend(x, x, x, Full(), layout="zigzag", group=None, transport="pigeon")
