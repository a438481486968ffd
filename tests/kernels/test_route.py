"""Routing: the gate's picks, exactly, and the random control."""

from __future__ import annotations

import pytest
import torch

from moba_kernels import MoBA, Pack, Routing, mean_keys, pool_sums, random_routing, route, route_means
from moba_kernels.route import native
from moba_kernels.route.torch import sortable_

from . import oracle
from .inputs import ROWS, as_numpy, assert_same_choice, chosen_to_ids, make_qkv, moba_tuple

SPECS = [MoBA(8, 1), MoBA(8, 3), MoBA(8, 3, "group"), MoBA(5, 2), MoBA(16, 50), MoBA(200, 2)]


@pytest.fixture(params=["reference", "torch", "pytorch"])
def backend(request):
    """pytorch: the torch backend without its compiled kernels."""
    if request.param == "pytorch":
        request.getfixturevalue("pytorch_alone")
        return "torch"
    return request.param


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("cu", ROWS.values(), ids=ROWS.keys())
def test_picks_are_the_oracles(cu, spec, backend):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        q, k, _, _ = make_qkv(cu, dtype=dtype)
        assert_same_choice(route(q, k, spec, cu_seqlens=cu, backend=backend), q, k, cu)


@pytest.mark.parametrize("select", ["head", "group"])
def test_ties_of_small_integers_go_to_the_later_chunk(select, backend):
    # Power-of-two chunks of small integers: means and scores are exact, so most scores tie and all must agree.
    for seed in range(4):
        cu, spec = [0, 5, 133], MoBA(4, 4, select)
        q, k, _, _ = make_qkv(cu, heads=4, kv_heads=2, dim=4, dtype=torch.float32, seed=seed, integers=True)
        expected = chosen_to_ids(oracle.choose(*as_numpy(q, k), cu, *moba_tuple(spec)), spec.topk)
        assert torch.equal(route(q, k, spec, cu_seqlens=cu, backend=backend).chunk_ids, expected)


def test_when_all_scores_tie_the_nearest_chunks_are_picked(backend):
    q, k = torch.zeros(64, 2, 8), torch.randn(64, 1, 8)
    q[1::2] = -0.0  # -0 and 0 are one score
    ids = route(q, k, MoBA(8, 4), backend=backend).chunk_ids
    assert ids[63, 0].tolist() == [7, 6, 5, 4]
    assert ids[17, 1].tolist() == [2, 1, 0, -1]


def test_scores_sort_as_numbers_and_zeros_of_both_signs_tie():
    scores = torch.tensor([0.0, -1.5, -0.0, 3e38, -torch.inf, 1e-45, -1e-45, torch.inf])
    order = sortable_(scores, 8).argsort(descending=True).tolist()
    assert order == [7, 3, 5, 2, 0, 6, 1, 4]


@pytest.mark.parametrize("heads", [1, 4, 8])
def test_every_group_size_routes_as_the_oracle(heads, backend):
    cu = [0, 30, 95]
    for spec in (MoBA(8, 3), MoBA(8, 3, "group")):
        q, k, _, _ = make_qkv(cu, heads=heads, kv_heads=1, dtype=torch.float32)
        assert_same_choice(route(q, k, spec, cu_seqlens=cu, backend=backend), q, k, cu)


def test_group_selection_is_one_pick_for_all_heads_of_a_kv_head():
    q, k, _, _ = make_qkv([0, 64], heads=8, kv_heads=2)
    routing = route(q, k, MoBA(8, 3, "group"))
    assert routing.chunk_ids.shape == (64, 2, 3)
    repeated = routing.picks_of_heads(8)
    assert torch.equal(repeated[:, 0], repeated[:, 3]) and torch.equal(repeated[:, 4], repeated[:, 7])


def test_the_same_query_gets_the_same_picks_whatever_else_is_in_the_call(backend):
    cu, spec = [0, 300, 1000], MoBA(16, 4)
    q, k, _, _ = make_qkv(cu, dtype=torch.float32, heads=4, kv_heads=2, dim=64)
    pack = Pack(cu)
    means = mean_keys(*pool_sums(k, pack=pack, chunk_size=16))
    whole = route_means(q, means, spec, pack=pack, backend=backend)
    for step in (1, 3, 7, 129):
        positions = torch.arange(step // 2, cu[-1], step)
        part = route_means(q[positions], means, spec, pack=pack, q_positions=positions, backend=backend)
        assert part.equals(whole.select(positions))


def test_sums_of_parts_publish_the_same_means_as_the_whole():
    cu, chunk_size = [0, 7, 7, 100], 16
    _, k, _, _ = make_qkv(cu, dtype=torch.bfloat16)
    pack = Pack(cu)
    whole_sum, whole_count = pool_sums(k, pack=pack, chunk_size=chunk_size)
    owner = torch.randint(0, 3, (cu[-1],), generator=torch.Generator().manual_seed(1))
    parts = []
    for rank in range(3):
        positions = (owner == rank).nonzero().flatten()
        parts.append(pool_sums(k[positions], pack=pack, chunk_size=chunk_size, k_positions=positions))
    merged = sum(p[0] for p in parts), sum(p[1] for p in parts)
    assert torch.equal(merged[1], whole_count)
    assert torch.equal(mean_keys(*merged), mean_keys(whole_sum, whole_count))
    assert whole_sum.dtype == torch.float64 and mean_keys(*merged).dtype == torch.float32
    reference = pool_sums(k, pack=pack, chunk_size=chunk_size, backend="reference")
    assert torch.equal(mean_keys(*reference), mean_keys(whole_sum, whole_count))


def test_a_chunk_that_is_not_at_hand_sums_to_zero():
    positions = torch.arange(20, 30)
    sums, counts = pool_sums(torch.ones(10, 1, 4), pack=Pack([0, 40]), chunk_size=8, k_positions=positions)
    assert counts.tolist() == [0, 0, 4, 6, 0]
    assert sums[:, 0, 0].tolist() == [0, 0, 4, 6, 0]
    assert mean_keys(sums, counts)[:, 0, 0].tolist() == [0, 0, 1, 1, 0]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_keys_without_heads_have_sums_without_heads(backend):
    sums, counts = pool_sums(torch.ones(10, 0, 4), pack=Pack([0, 10]), chunk_size=8, backend=backend)
    assert sums.shape == (2, 0, 4) and counts.tolist() == [8, 2]


def test_future_queries_and_keys_do_not_move_earlier_picks():
    cu, spec = [0, 40, 400], MoBA(8, 4)
    q, k, _, _ = make_qkv(cu, dtype=torch.float32)
    before = route(q, k, spec, cu_seqlens=cu).chunk_ids
    q[200:] *= -3
    k[200:] += 5
    assert torch.equal(route(q, k, spec, cu_seqlens=cu).chunk_ids[:200], before[:200])


def test_ids_beyond_32767_survive_the_narrow_storage_and_wide_ids_the_wide_one():
    for chunks, dtype in ((65000, torch.uint16), (70000, torch.int32)):
        pack, spec = Pack([0, chunks]), MoBA(1, 3)
        positions = torch.tensor([40000, chunks - 1])
        ids = torch.tensor([[[40000, 39999, -1]], [[chunks - 1, 2, chunks - 2]]])
        routing = Routing.from_chunk_ids(ids, spec, pack, positions, validate=True)
        assert routing.stored.dtype == dtype
        assert torch.equal(routing.chunk_ids, ids.int())
        assert torch.equal(routing.select(torch.tensor([1])).chunk_ids, ids[1:].int())
        assert Routing.of_bits(routing.bits, spec, pack, positions).equals(routing)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[[1, 2]]], "not a candidate"),  # later than the own chunk
        ([[[1, 1]]], "not a candidate"),  # the own chunk again
        ([[[0, -1]]], "slot 0"),
    ],
)
def test_a_forced_routing_is_validated_on_request(ids, message):
    with pytest.raises(ValueError, match=message):
        Routing.from_chunk_ids(torch.tensor(ids), MoBA(8, 2), Pack([0, 32]), torch.tensor([12]), validate=True)


@pytest.mark.parametrize(
    ("num_chunks", "picks"),
    [(4, (1 + 2**16, 1 - 2**16, 1 + 2**32)), (70000, (1 + 2**32, 1 - 2**32))],
    ids=["uint16", "int32"],
)
def test_a_pick_that_is_no_chunk_does_not_wrap_to_one(num_chunks, picks):
    pack, last = Pack([0, num_chunks]), torch.tensor([num_chunks - 1])
    Routing(torch.tensor([[[1]]]), MoBA(1, 2), pack, last).validate()
    for pick in picks:
        with pytest.raises(ValueError, match="not a candidate"):
            Routing(torch.tensor([[[pick]]]), MoBA(1, 2), pack, last).validate()


def test_a_forced_routing_with_a_repeated_or_foreign_pick_is_refused():
    pack, at = Pack([0, 16, 64]), torch.tensor([50])
    with pytest.raises(ValueError, match="twice"):
        Routing.from_chunk_ids(torch.tensor([[[6, 3, 3]]]), MoBA(8, 3), pack, at, validate=True)
    with pytest.raises(ValueError, match="not a candidate"):
        Routing.from_chunk_ids(torch.tensor([[[6, 1, 3]]]), MoBA(8, 3), pack, at, validate=True)


@pytest.mark.parametrize("select", ["head", "group"])
def test_random_routing_is_identical_under_any_split_of_the_queries(select):
    pack, spec = Pack([0, 33, 33, 300]), MoBA(8, 5, select)
    whole = random_routing(spec, pack=pack, num_heads=4, num_kv_heads=2, seed=7, device="cpu")
    owner = torch.randint(0, 4, (300,), generator=torch.Generator().manual_seed(0))
    for rank in range(4):
        rows = (owner == rank).nonzero().flatten()
        part = random_routing(spec, pack=pack, num_heads=4, num_kv_heads=2, q_positions=rows, seed=7, device="cpu")
        assert part.equals(whole.select(rows))
    other = random_routing(spec, pack=pack, num_heads=4, num_kv_heads=2, seed=8, device="cpu")
    assert not other.equals(whole)


@pytest.mark.parametrize("select", ["head", "group"])
def test_random_routing_is_identical_under_any_split_of_the_heads(select):
    pack, spec = Pack([0, 33, 300]), MoBA(8, 5, select)
    whole = random_routing(spec, pack=pack, num_heads=8, num_kv_heads=4, seed=7, device="cpu")
    for rank in range(2):
        offset = rank * spec.routed_heads(4, 2)
        part = random_routing(
            spec, pack=pack, num_heads=4, num_kv_heads=2, seed=7, head_offset=offset, device="cpu"
        )  # fmt: skip
        assert part.equals(whole.of_kv_heads(2 * rank, 2 * rank + 2, 4))


def test_random_routing_picks_as_many_as_the_gate_and_only_candidates():
    cu, spec = [0, 1, 50, 50, 200], MoBA(8, 4)
    q, k, _, _ = make_qkv(cu)
    pack = Pack(cu)
    gate = route(q, k, spec, cu_seqlens=pack).chunk_ids
    control = random_routing(spec, pack=pack, num_heads=4, num_kv_heads=2, seed=-1, device="cpu")
    assert torch.equal((control.chunk_ids >= 0).sum(-1), (gate >= 0).sum(-1))
    Routing.from_chunk_ids(control.chunk_ids, spec, pack, validate=True)


def test_random_routing_is_uniform_over_the_candidates():
    pack, spec = Pack([0, 40]), MoBA(4, 4)
    counts = torch.zeros(10)
    draws = 400
    for seed in range(draws):
        picks = random_routing(
            spec, pack=pack, num_heads=8, num_kv_heads=8, q_positions=torch.tensor([39]), seed=seed, device="cpu"
        ).picks
        counts += torch.bincount(picks.flatten().long(), minlength=10)
    share = counts[:9] / (draws * 8)  # 3 of 9 candidates: a third each; standard error 0.0083
    assert counts[9] == 0
    assert (share - 1 / 3).abs().max() < 0.04


def test_no_query_no_routing():
    routing = route(torch.zeros(0, 2, 8), torch.zeros(0, 1, 8), MoBA(4, 3), cu_seqlens=[0, 0])
    assert routing.chunk_ids.shape == (0, 2, 3)
    pack = Pack([0, 16])
    empty = random_routing(
        MoBA(4, 3), pack=pack, num_heads=2, num_kv_heads=1, q_positions=torch.zeros(0).long(), seed=0, device="cpu"
    )
    assert empty.chunk_ids.shape == (0, 2, 3)


def test_the_stored_routing_of_a_layer_with_a_million_tokens_stays_below_0_8_gb():
    q, k, _, _ = make_qkv([0, 256], heads=32, kv_heads=8, dim=4, dtype=torch.float32)
    stored = route(q, k, MoBA(16, 12)).stored
    assert stored.shape == (256, 32, 11)  # the own chunk follows from the position
    million = Routing(
        torch.empty(0, 32, 11, dtype=torch.int32), MoBA(4096, 12), Pack([0, 1 << 20]), torch.empty(0, dtype=torch.int64)
    )
    assert million.stored.dtype == stored.dtype == torch.uint16
    assert (1 << 20) * stored[0].numel() * stored.element_size() <= 0.8e9


def test_a_block_of_the_compiled_gate_follows_from_sizes():
    block = native.query_block
    assert block(32768, 2, 4, 3) == 128  # 512 rows
    assert block(1 << 20, 2, 1, 1023) == 128  # rows that keep many keys
    assert block(1 << 20, 2, 4, 65000) == 1
    assert block(100, 1, 1, 3) == 7  # a short row, for more threads than one
    assert block(1, 8, 1, 3) == 1
