"""Predicted bytes equal what real transports count where shapes decide, and come close where uniform routing does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from moba_kernels import AttentionSpec, Full, MoBA, Pack, random_routing
from moba_train.parallel import all_gather, context_attend, key_halo, volume
from moba_train.parallel.context_attention import planned_pairs_of_shard
from moba_train.parallel.cut import cut_row
from moba_train.parallel.emulation import ThreadGroup, run_threads
from moba_train.parallel.parts import (
    local_pairs,
    pairs_of_keys,
    pairs_of_queries,
    parts_of,
    pulled_tokens,
    sent_queries,
)
from moba_train.parallel.pooled_keys import chunk_owners
from moba_train.parallel.rules import TRANSPORT_NAMES, refusals
from moba_train.parallel.shard import Layout, shard, shard_positions
from moba_train.parallel.traffic import Traffic
from moba_train.parallel.volume import (
    Exchange,
    HeadShape,
    RowShape,
    halo_exchanges,
    routing_exchanges,
    transport_exchanges,
)
from tests.parallel.sharded_case import CASES, LAYOUTS, PACKED

MILLION = 1 << 20
LLAMA = HeadShape(num_heads=32, num_kv_heads=8, head_dim=128, value_dim=128, element_bytes=2)
SHAPES = (  # num_heads, num_kv_heads, head dim, value dim, dtype: KV heads divide, are shared, are copied
    (4, 2, 8, 8, torch.float32),
    (8, 8, 8, 6, torch.float64),
    (8, 2, 4, 4, torch.bfloat16),
)


def counted(
    transport: str,
    spec: AttentionSpec,
    shape: tuple[int, int, int, int, torch.dtype],
    row: RowShape,
    *,
    node_ranks: int = 8,
    at_random: bool = False,
) -> list[Traffic]:
    """What every rank counts in one forward and backward pass; uniform routing, given from outside, or the gate's."""
    num_heads, num_kv_heads, dim, value_dim, dtype = shape
    pack, generator = Pack(row.bounds), torch.Generator().manual_seed(1)
    sizes = ((num_heads, dim), (num_kv_heads, dim), (num_kv_heads, value_dim), (num_heads, value_dim))
    whole = [torch.randn(row.num_tokens, *size, generator=generator).to(dtype) for size in sizes]
    picks = None
    if at_random and isinstance(spec, MoBA):
        heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
        picks = random_routing(spec, pack=pack, seed=3, device="cpu", **heads)  # type: ignore[arg-type]

    def of_rank(group: ThreadGroup) -> Traffic:
        traffic, rank = Traffic(), group.rank()
        *mine, dout = (shard(x, 0, num_ranks=row.num_ranks, rank=rank, layout=row.layout) for x in whole)
        q, k, v = leaves = [x.clone().requires_grad_() for x in mine]
        positions = torch.from_numpy(shard_positions(row.num_tokens, row.num_ranks, rank, row.layout))
        options = {"layout": row.layout, "group": group, "transport": transport, "cu_seqlens": pack}
        routing = None if picks is None else picks.select(positions)
        result = context_attend(q, k, v, spec, routing=routing, node_ranks=node_ranks, traffic=traffic, **options)  # type: ignore[arg-type]
        torch.autograd.grad(result.out, leaves, dout)
        return traffic

    return run_threads(of_rank, row.num_ranks)


def check_equal(traffics: list[Traffic], exchanges: tuple[Exchange, ...], where: object) -> None:
    """Every phase of every rank, and no other phase."""
    phases = {exchange.phase for exchange in exchanges}
    for traffic in traffics:
        assert {phase for phase, size in (traffic.sent | traffic.received).items() if size} <= phases, where
    for exchange in exchanges:
        for name, planned in (("sent", exchange.sent_N), ("received", exchange.received_N)):
            got = [getattr(traffic, name)[exchange.phase] for traffic in traffics]
            assert got == np.floor(planned + 1e-6).tolist(), (where, exchange.phase, name)  # an all-reduce rounds down


def heads_of(shape: tuple[int, int, int, int, torch.dtype]) -> HeadShape:
    return HeadShape(*shape[:4], shape[4].itemsize)


@pytest.mark.parametrize("transport", ["all_gather", "a2a", "a2a+all_gather"])
def test_bytes_that_follow_from_shapes_are_predicted_exactly(transport: str) -> None:
    compared = 0
    for num_ranks, node_ranks in ((2, 8), (3, 8), (4, 2), (8, 4)):
        for i, layout in enumerate(LAYOUTS):
            for spec in (MoBA(6, 2), MoBA(4, 3, "group"), Full()):
                shape = SHAPES[(num_ranks + i) % 3]
                heads, row = heads_of(shape), RowShape(61, num_ranks, layout, PACKED)
                counts = {"num_heads": shape[0], "num_kv_heads": shape[1], "num_ranks": num_ranks}
                if refusals(transport, spec, **counts):
                    continue
                planned = transport_exchanges(transport, spec, heads, row, node_ranks=node_ranks)
                planned += routing_exchanges(spec, heads, row)
                traffics = counted(transport, spec, shape, row, node_ranks=node_ranks)
                check_equal(traffics, planned, (num_ranks, layout, spec, shape))
                compared += 1
    assert compared >= 12


def test_bytes_of_pull_are_exact_where_nothing_is_picked() -> None:
    for num_ranks in (2, 3, 8):
        for i, layout in enumerate(LAYOUTS):
            for spec in (Full(), MoBA(5, 1)):
                shape, row = SHAPES[i], RowShape(61, num_ranks, layout, PACKED)
                planned = transport_exchanges("pull", spec, heads_of(shape), row, node_ranks=8)
                planned += routing_exchanges(spec, heads_of(shape), row)
                check_equal(counted("pull", spec, shape, row), planned, (num_ranks, layout, spec))


UNIFORM = (
    # few enough draws that many chunks stay unpicked; documents; chunks longer than shards, which several ranks share
    (MoBA(8, 2), (1, 1, 8, 8, torch.float32), RowShape(2048, 32, "zigzag")),
    (MoBA(8, 3, "group"), (4, 2, 8, 4, torch.float32), RowShape(1500, 16, "contiguous", (0, 600, 1500))),
    (MoBA(100, 3), (2, 1, 8, 8, torch.bfloat16), RowShape(2048, 8, "zigzag", (0, 300, 2048))),
    (MoBA(96, 3), (2, 1, 4, 4, torch.float32), RowShape(1024, 32, "contiguous")),
)


@pytest.mark.parametrize("transport", ["pull", "route_queries"])
def test_bytes_under_uniform_routing_are_predicted_within_three_per_cent(transport: str) -> None:
    for spec, shape, row in UNIFORM:
        planned = transport_exchanges(transport, spec, heads_of(shape), row, node_ranks=8)
        traffics = counted(transport, spec, shape, row, at_random=True)
        for exchange in planned:
            where = (transport, spec, row, exchange.phase)
            sent = np.array([traffic.sent[exchange.phase] for traffic in traffics])
            received = np.array([traffic.received[exchange.phase] for traffic in traffics])
            assert sent.sum() == pytest.approx(exchange.sent_N.sum(), rel=0.03), where
            for got, expected in ((sent, exchange.sent_N), (received, exchange.received_N)):
                assert np.abs(got - expected).max() <= 0.25 * expected.max() + 1, where  # a rank's share scatters more
        assert {exchange.phase for exchange in planned} == {phase for traffic in traffics for phase in traffic.sent}


def test_the_halo_of_a_key_convolution_is_predicted_exactly() -> None:
    for layout in LAYOUTS:
        row = RowShape(61, 3, layout, PACKED)

        def of_rank(group: ThreadGroup, layout: Layout = layout) -> Traffic:
            traffic = Traffic()
            x = torch.ones(len(shard_positions(61, 3, group.rank(), layout)), 2, 8, requires_grad=True)
            halo = key_halo(x, 4, num_tokens=61, layout=layout, group=group, traffic=traffic)
            torch.autograd.grad(halo.sum(), x)
            return traffic

        check_equal(run_threads(of_rank, 3), halo_exchanges(4, heads_of(SHAPES[0]), row), layout)


def sent_by_phase(transport: str, spec: AttentionSpec, num_ranks: int) -> Mapping[str, float]:
    """GB that a rank sends on average at a million tokens, Llama's heads, bf16."""
    row = RowShape(MILLION, num_ranks, "zigzag")
    found = transport_exchanges(transport, spec, LLAMA, row, node_ranks=8)
    return {exchange.phase: float(exchange.sent_N.mean()) / 1e9 for exchange in found}


@pytest.mark.parametrize(("num_ranks", "published"), [(8, 11.3), (256, 12.8)])
def test_an_all_gather_moves_the_known_bytes_and_half_as_many_again_of_gradients_in_fp32(
    num_ranks: int, published: float
) -> None:
    # Known: K and V forward, backward, and dK, dV in bf16: 6*T*K*D*e. Ours adds dK, dV up in fp32: 8.
    by_phase = sent_by_phase("all_gather", MoBA(4096, 12), num_ranks)
    assert sum(by_phase.values()) - by_phase["backward/dkv"] / 2 == pytest.approx(published, abs=0.06)
    assert by_phase["backward/dkv"] == pytest.approx(2 * by_phase["backward/kv"])


@pytest.mark.parametrize(("num_ranks", "published", "copied"), [(8, 4.7, 0.0), (16, 3.0, 1.0), (32, 2.1, 1.0)])
def test_swapping_heads_moves_the_known_bytes_and_fp32_gradients_of_copied_heads(
    num_ranks: int, published: float, copied: float
) -> None:
    # Known: q, k, v, out and their gradients in bf16. Ours adds lse and delta, and copied heads' dK, dV travel in fp32.
    by_phase = sent_by_phase("a2a", Full(), num_ranks)
    own = MILLION / num_ranks
    lse_delta = 2 * (MILLION - own) * 32 / num_ranks * 4 / 1e9
    wider = copied * (MILLION - own) * 2 * 128 * 2 / 1e9
    assert sum(by_phase.values()) - lse_delta - wider == pytest.approx(published, abs=0.06)


@pytest.mark.parametrize(
    ("topk", "published"), [(3, (7.1, 4.0, 2.1, 1.1, 0.5, 0.3)), (12, (23.4, 16.6, 9.9, 5.4, 2.9, 1.5))]
)
def test_routed_queries_fall_with_ranks_as_known_with_partials_and_dq_in_fp32(
    topk: int, published: tuple[float, ...]
) -> None:
    # Known: q, out, dout, dq in bf16, 8*D bytes, to d = (N-1)(1-(1-1/N)^(topk-1)) ranks. Ours sends out and dq in fp32,
    # and lse, delta, the place and the picks: 12*D + 16 + 2*(topk-1). It goes to fewer ranks: queries look back only.
    # Chunks of 1024 tokens here: from N = 256 on one of 4096 lies on several ranks, and more than doubles the bytes.
    of_query = (12 * 128 + 16 + 2 * (topk - 1)) / (8 * 128)
    shares = []
    for num_ranks, known in zip((8, 16, 32, 64, 128, 256), published, strict=True):
        destinations = (num_ranks - 1) * (1 - (1 - 1 / num_ranks) ** (topk - 1))
        formula = MILLION / num_ranks * 32 * 8 * 128 * destinations / 1e9
        assert formula == pytest.approx(known, rel=0.03, abs=0.06)
        by_phase = sent_by_phase("route_queries", MoBA(1024, topk), num_ranks)
        shares.append((sum(by_phase.values()) - by_phase["forward/counts"]) / of_query / formula)
    assert shares == sorted(shares)
    assert 0.75 < shares[0] < 0.9 and 0.97 < shares[-1] < 1.0
    assert sum(sent_by_phase("route_queries", MoBA(4096, topk), 256).values()) > 2 * sum(by_phase.values())


@pytest.mark.parametrize("num_ranks", [2, 8, 100, 256])
def test_pooled_keys_of_a_million_tokens_take_about_a_megabyte_and_little_for_straddled_edges(num_ranks: int) -> None:
    for layout in LAYOUTS:
        row = RowShape(MILLION, num_ranks, layout)
        received = sum(exchange.received_N.max() for exchange in routing_exchanges(MoBA(4096, 12), LLAMA, row))
        straddled = int(row.parts(MoBA(4096, 12)).straddling_C().sum())
        assert received <= 1.1e6 + 16 * 8 * 128 * straddled
        if num_ranks in (2, 8):
            assert straddled == 0  # 256 chunks, and 2N pieces of whole chunks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_of_a_row_agree_with_what_ranks_plan_and_hold(layout: Layout) -> None:
    for num_ranks in (1, 3, 8, 64):
        for case in CASES:
            pack, spec = Pack(case.cu_seqlens), case.spec
            parts = parts_of(cut_row(pack.num_tokens, num_ranks, layout), case.cu_seqlens, spec)
            planned = [
                planned_pairs_of_shard(pack, spec, num_ranks=num_ranks, rank=rank, layout=layout)
                for rank in range(num_ranks)
            ]
            assert pairs_of_queries(parts).tolist() == planned, (case.name, num_ranks)
            assert pairs_of_keys(parts).sum() == pytest.approx(sum(planned))
            assert (local_pairs(parts) <= np.array(planned) + 1e-9).all()
            if isinstance(spec, MoBA):
                owners = chunk_owners(pack, spec.chunk_size, num_ranks=num_ranks, layout=layout)
                assert parts.straddling_C().sum() == len(owners.straddling)
                assert parts.most_whole() == owners.most_whole


def test_keys_that_all_queries_pick_for_certain_are_all_wanted_and_all_asked() -> None:
    row = RowShape(64, 4, "contiguous")
    parts = row.parts(MoBA(4, 100))  # every query picks all chunks before its own
    before = np.triu(np.ones((4, 4)), 1)  # a rank lacks all that the ranks before it hold
    assert pulled_tokens(parts, 1).tolist() == (16 * before).tolist()
    assert sent_queries(parts).tolist() == (16 * before.T).tolist()
    assert local_pairs(parts).tolist() == [16 * 17 / 2] * 4


def test_message_sizes_are_those_of_the_transports() -> None:
    k = torch.empty(1, 8, 128, dtype=torch.bfloat16, device="meta")
    for num_tokens in (1000, 30_000, MILLION):
        stride = all_gather.AllGather().stride(num_tokens, k, k)
        assert volume.num_strides(num_tokens, LLAMA) == -(-8 // stride)


def test_one_rank_and_an_empty_row_move_nothing() -> None:
    for name in TRANSPORT_NAMES:
        spec = MoBA(4, 2)
        assert transport_exchanges(name, spec, LLAMA, RowShape(64, 1, "zigzag"), node_ranks=8) == ()
        assert transport_exchanges(name, spec, LLAMA, RowShape(0, 4, "zigzag"), node_ranks=8) == ()


def test_the_cost_model_loads_without_torch() -> None:
    code = "import sys, moba_train.parallel.cost, moba_train.model.transport_plan; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
