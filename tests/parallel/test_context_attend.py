"""Attention over a sharded row equals one rank's: routing exactly, output and gradients by the 2x rule.

The 2x rule: the error against a one-rank fp64 reference, with the routing replayed, is at most twice the error of one
rank in the same precision (plus a floor far below what such an error looks like when something is wrong).
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moba_kernels import AttentionSpec, Full, MoBA, Pack, PairTally, Routing, attend, random_routing
from moba_train.parallel import context_attend, pooled_keys, route_context
from moba_train.parallel.all_gather import AllGather
from moba_train.parallel.context_attention import planned_pairs_of_shard
from moba_train.parallel.pooled_keys import chunk_owners
from moba_train.parallel.shard import Layout, shard, shard_positions
from moba_train.parallel.transport import ShardedCall
from tests.distributed import run_ranks

LAYOUTS: tuple[Layout, ...] = ("zigzag", "contiguous")


@dataclass(frozen=True)
class Case:
    """One row. Heads: H query heads on K key/value heads of dim D, values of dim Dv."""

    name: str
    cu_seqlens: tuple[int, ...]
    spec: AttentionSpec
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (8, 8)


PACKED = (0, 0, 7, 7, 8, 40, 61, 61)
CASES = (
    Case("one document, chunks that fit the shards", (0, 64), MoBA(8, 3)),
    Case("packed, empty and one-token documents, chunks across shard edges", PACKED, MoBA(6, 2)),
    Case("own chunk only", PACKED, MoBA(5, 1), heads=(2, 2)),
    Case("group selection on one KV head, values of another dim", PACKED, MoBA(4, 3, "group"), (4, 1), (8, 6)),
    Case("chunks longer than shards", (0, 50, 61), MoBA(32, 2), heads=(2, 2)),
    Case("topk beyond the chunks there are", PACKED, MoBA(8, 9)),
    Case("full attention, packed", PACKED, Full(), dims=(8, 5)),
    Case("fewer tokens than ranks", (0, 1, 3), MoBA(2, 2)),
    Case("one token", (0, 1), Full()),
    Case("no token", (0, 0), MoBA(2, 2)),
)


def _inputs(case: Case, *, integers: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of out, fp32."""
    generator = torch.Generator().manual_seed(len(case.name))
    num_tokens, (num_heads, num_kv_heads), (dim, value_dim) = case.cu_seqlens[-1], case.heads, case.dims
    shapes = ((num_heads, dim), (num_kv_heads, dim), (num_kv_heads, value_dim), (num_heads, value_dim))
    if integers:
        q, k, v, dout = (torch.randint(-2, 3, (num_tokens, *s), generator=generator).float() for s in shapes)
    else:
        q, k, v, dout = (torch.randn(num_tokens, *s, generator=generator) for s in shapes)
    return q, k, v, dout


def _one_rank(
    case: Case, inputs: tuple[Tensor, ...], routing: Routing | None, dtype: torch.dtype, backend: str
) -> tuple[list[Tensor], Routing | None]:
    q, k, v, dout = (x.to(dtype) for x in inputs)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    q, k, v = leaves
    pack = Pack(case.cu_seqlens)
    result = attend(q, k, v, case.spec, cu_seqlens=pack, routing=routing, backend=backend, return_routing=True)
    grads = torch.autograd.grad(result.out, leaves, dout)
    return [result.out.detach(), result.lse, *grads], result.routing


def _my_shard(x: Tensor, rank: int, n: int, layout: Layout) -> Tensor:
    return shard(x, 0, num_ranks=n, rank=rank, layout=layout)


def _sharded(
    case: Case, inputs: tuple[Tensor, ...], rank: int, n: int, layout: Layout, dtype: torch.dtype
) -> tuple[list[Tensor], Routing | None]:
    q, k, v, dout = (_my_shard(x.to(dtype), rank, n, layout) for x in inputs)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    q, k, v = leaves
    result = context_attend(q, k, v, case.spec, layout=layout, group=dist.group.WORLD, cu_seqlens=Pack(case.cu_seqlens))
    result.report.raise_if_different()
    grads = torch.autograd.grad(result.out, leaves, dout)
    return [result.out.detach(), result.lse, *grads], result.routing


def _error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max()) if got.numel() else 0.0


def _check_case(case: Case, rank: int, n: int, layout: Layout, dtype: torch.dtype, floor: float) -> None:
    inputs = tuple(x.to(dtype).float() for x in _inputs(case))
    plain, routing = _one_rank(case, inputs, None, dtype, "torch")
    exact, _ = _one_rank(case, inputs, routing, torch.float64, "reference")
    mine, my_routing = _sharded(case, inputs, rank, n, layout, dtype)
    where = f"{case.name}, {layout}, rank {rank} of {n}"
    if isinstance(case.spec, MoBA):
        assert routing is not None and my_routing is not None
        assert torch.equal(my_routing.chunk_ids, _my_shard(routing.chunk_ids, rank, n, layout)), where
    else:
        assert my_routing is None
    for name, got, one, truth in zip(("out", "lse", "dq", "dk", "dv"), mine, plain, exact, strict=True):
        assert got.dtype == one.dtype, (where, name)
        limit = 2 * _error(one, truth) + floor
        assert _error(got, _my_shard(truth, rank, n, layout)) <= limit, (where, name)


def _all_cases(rank: int, n: int) -> None:
    for layout in LAYOUTS:
        for case in CASES:
            _check_case(case, rank, n, layout, torch.float32, floor=2e-6)
        for case in CASES[1:2]:
            _check_case(case, rank, n, layout, torch.bfloat16, floor=1e-3)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_output_gradients_and_routing_equal_one_rank(num_ranks: int) -> None:
    run_ranks(_all_cases, num_ranks)


def _eight_ranks(rank: int, n: int) -> None:
    for layout in LAYOUTS:
        for case in (CASES[1], CASES[7]):
            _check_case(case, rank, n, layout, torch.float32, floor=2e-6)


def test_eight_ranks_equal_one_rank_though_some_hold_no_token() -> None:
    run_ranks(_eight_ranks, 8)


def _integer_routing(rank: int, n: int) -> None:
    tied = 0
    for spec in (MoBA(4, 3), MoBA(8, 2), MoBA(4, 2, "group")):
        case = Case("small integers", (0, 64, 96, 101), spec)
        q, k, _, _ = _inputs(case, integers=True)
        pack = Pack(case.cu_seqlens)
        whole = route_context(q, k, spec, layout="zigzag", group=None, pack=pack)
        means = k[:96].view(-1, spec.chunk_size, 2, 8).mean(1)
        scores = torch.einsum("thd,chd->thc", q, means.repeat_interleave(2, 1))
        tied += int((scores.sort(-1).values.diff(dim=-1) == 0).sum())
        for layout in LAYOUTS:
            local = (_my_shard(x, rank, n, layout) for x in (q, k))
            routing = route_context(*local, spec, layout=layout, group=dist.group.WORLD, pack=pack)
            assert torch.equal(routing.chunk_ids, _my_shard(whole.chunk_ids, rank, n, layout)), (spec, layout)
    assert tied > 100  # the inputs do put ties to the test


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_routing_on_small_integers_is_the_same_for_any_number_of_ranks_ties_included(num_ranks: int) -> None:
    run_ranks(_integer_routing, num_ranks)


def _frozen_routing(rank: int, n: int) -> int:
    case, layout = CASES[1], LAYOUTS[0]
    q, k, v, _ = (_my_shard(x, rank, n, layout) for x in _inputs(case))
    pack, group = Pack(case.cu_seqlens), dist.group.WORLD
    assert isinstance(case.spec, MoBA)
    first = context_attend(q, k, v, case.spec, layout=layout, group=group, cu_seqlens=pack)
    exchanges = []
    pooled_keys.all_gather = lambda *args, **kwargs: exchanges.append(args)  # type: ignore[assignment]
    again = context_attend(q, k, v, case.spec, layout=layout, group=group, cu_seqlens=pack, routing=first.routing)
    assert torch.equal(first.out, again.out)
    assert again.routing is first.routing

    positions = torch.from_numpy(shard_positions(pack.num_tokens, n, rank, layout))
    options = {"num_heads": 4, "num_kv_heads": 2, "seed": 5, "device": "cpu"}
    mine = random_routing(case.spec, pack=pack, q_positions=positions, **options)  # type: ignore[arg-type]
    everyone = random_routing(case.spec, pack=pack, **options)  # type: ignore[arg-type]
    exact, _ = _one_rank(case, _inputs(case), everyone, torch.float64, "reference")
    at_random = context_attend(q, k, v, case.spec, layout=layout, group=group, cu_seqlens=pack, routing=mine)
    assert _error(at_random.out, _my_shard(exact[0], rank, n, layout)) < 1e-5
    assert _error(at_random.out, first.out.double()) > 1e-2
    return len(exchanges)


def test_a_frozen_or_random_routing_is_used_as_it_is_and_no_keys_are_pooled() -> None:
    assert run_ranks(_frozen_routing, 2) == [0, 0]


def _strides(rank: int, n: int) -> None:
    for case in (CASES[1], CASES[3], CASES[6]):
        inputs = _inputs(case)
        plain, routing = _one_rank(case, inputs, None, torch.float32, "torch")
        q, k, v, dout = (_my_shard(x, rank, n, "zigzag") for x in inputs)
        positions = torch.from_numpy(shard_positions(case.cu_seqlens[-1], n, rank, "zigzag"))
        mine = None if routing is None else routing.select(positions)
        call = ShardedCall(case.spec, Pack(case.cu_seqlens), "zigzag", dist.group.WORLD, positions, mine, None, "auto")
        one_head_at_a_time = AllGather(stride_bytes=1)
        assert one_head_at_a_time.stride(61, k, v) == 1
        out, lse = one_head_at_a_time.forward(q, k, v, call, PairTally())
        grads = one_head_at_a_time.backward(dout, q, k, v, lse, (dout * out).sum(-1), call)
        for got, whole in zip((out, lse, *grads), plain, strict=True):
            assert _error(got, _my_shard(whole, rank, n, "zigzag").double()) < 1e-5, case.name


def test_one_kv_head_at_a_time_gives_the_same() -> None:
    run_ranks(_strides, 2)


def test_the_stride_fits_its_buffer_and_is_at_least_one_head() -> None:
    k, v = torch.zeros(1, 8, 64), torch.zeros(1, 8, 32)
    bytes_of_head = 1000 * (64 + 32) * 4
    assert AllGather(stride_bytes=3 * bytes_of_head).stride(1000, k, v) == 3
    assert AllGather(stride_bytes=100 * bytes_of_head).stride(1000, k, v) == 8
    assert AllGather(stride_bytes=1).stride(1000, k, v) == 1


def _bytes_of_routing(rank: int, n: int) -> tuple[int, int]:
    """(bytes sent, bytes planned) by the exchange of a routing."""
    case = CASES[1]
    assert isinstance(case.spec, MoBA)
    sent = 0
    all_gather, all_reduce = pooled_keys.all_gather, dist.all_reduce

    def counted_gather(received: Tensor, x: Tensor, *, group: dist.ProcessGroup) -> dist.Work:
        nonlocal sent
        sent += x.numel() * x.element_size()
        return all_gather(received, x, group=group)

    def counted_reduce(x: Tensor, *, group: dist.ProcessGroup, async_op: bool) -> dist.Work:
        nonlocal sent
        sent += x.numel() * x.element_size()
        return all_reduce(x, group=group, async_op=async_op)

    pooled_keys.all_gather = counted_gather
    dist.all_reduce = counted_reduce
    pack = Pack(case.cu_seqlens)
    q, k, _, _ = (_my_shard(x, rank, n, "zigzag") for x in _inputs(case))
    route_context(q, k, case.spec, layout="zigzag", group=dist.group.WORLD, pack=pack)
    owners = chunk_owners(pack, case.spec.chunk_size, num_ranks=n, layout="zigzag")
    return sent, (owners.most_whole * 4 + len(owners.straddling) * 8) * k.shape[1] * k.shape[2]


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
    inputs = _inputs(case)
    expected, _ = _one_rank(case, inputs, None, torch.float32, "torch")
    q, k, v, _ = (_my_shard(x, rank, n, "contiguous") for x in inputs)
    result = context_attend(q, k, v, case.spec, layout="contiguous", group=dist.group.WORLD)
    assert _error(result.out, _my_shard(expected[0], rank, n, "contiguous").double()) < 1e-5
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
