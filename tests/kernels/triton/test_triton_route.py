"""Pooled sums and the gate in Triton, against the reference: means, picks, ties, storage, and independence of calls."""

from __future__ import annotations

import pytest
import torch

from moba_kernels import MoBA, Pack, mean_keys, pool_sums, route, route_means
from moba_kernels.key_conv import triton as conv_form
from moba_kernels.pool import triton as pool_form
from moba_kernels.route import triton as route_form

from .. import oracle
from ..inputs import ROWS, as_numpy, assert_same_choice, chosen_to_ids, make_qkv, moba_tuple

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def triton_means(k, pack, chunk_size, k_positions=None):
    return mean_keys(*pool_sums(k, pack=pack, chunk_size=chunk_size, k_positions=k_positions, backend="triton"))


@pytest.mark.parametrize("part", [512, 8], ids="part={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cu", ROWS.values(), ids=ROWS.keys())
def test_sums_counts_and_means_are_the_references(cu, dtype, part, monkeypatch):
    monkeypatch.setattr(pool_form, "PART", part)  # 8: chunks are cut into parts
    _, k, _, _ = make_qkv(cu, dim=96, dtype=dtype)
    pack = Pack(cu)
    for chunk_size in (5, 16, 10**6):
        sums, counts = pool_sums(k, pack=pack, chunk_size=chunk_size, backend="triton")
        expected, expected_counts = pool_sums(k, pack=pack, chunk_size=chunk_size, backend="reference")
        assert torch.equal(counts, expected_counts)
        assert (sums - expected).abs().max() <= 1e-13 * (1 + expected.abs().max())
        assert torch.equal(mean_keys(sums, counts), mean_keys(expected, expected_counts))


@pytest.mark.parametrize("part", [512, 8], ids="part={}".format)
def test_sums_of_the_keys_at_hand_add_up_and_absent_chunks_give_zero(part, monkeypatch):
    monkeypatch.setattr(pool_form, "PART", part)
    cu, chunk_size = [0, 7, 7, 100], 20
    _, k, _, _ = make_qkv(cu, dim=32, dtype=torch.float32)
    pack = Pack(cu)
    whole_sum, whole_count = pool_sums(k, pack=pack, chunk_size=chunk_size, backend="triton")
    hands = (torch.arange(3, 41), torch.cat((torch.arange(3), torch.arange(41, 100))), torch.zeros(0).long())
    parts = [pool_sums(k[at], pack=pack, chunk_size=chunk_size, k_positions=at, backend="triton") for at in hands]
    assert torch.equal(sum(p[1] for p in parts), whole_count)
    assert torch.equal(mean_keys(sum(p[0] for p in parts), whole_count), mean_keys(whole_sum, whole_count))
    assert not parts[2][0].any() and not parts[0][0][4:].any()


def test_keys_that_are_views_with_strides_give_the_same_sums():
    pack = Pack([0, 40])
    _, k, v, _ = make_qkv([0, 40], dim=32, dtype=torch.bfloat16)
    fused = torch.cat((v, k), 1)
    assert torch.equal(triton_means(fused[:, 2:], pack, 8), triton_means(k, pack, 8))
    assert torch.equal(triton_means(k.mT.contiguous().mT, pack, 8), triton_means(k, pack, 8))


@pytest.mark.parametrize("spec", [MoBA(8, 3), MoBA(5, 2), MoBA(8, 3, "group"), MoBA(16, 50)], ids=str)
@pytest.mark.parametrize("cu", ROWS.values(), ids=ROWS.keys())
def test_picks_are_the_oracles(cu, spec):
    for dtype in DTYPES:
        q, k, _, _ = make_qkv(cu, dim=32, dtype=dtype)
        assert_same_choice(route(q, k, spec, cu_seqlens=cu, backend="triton"), q, k, cu)


@pytest.mark.parametrize("dim", [64, 96, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head_dim_picks_as_the_oracle(dim, dtype):
    cu = [0, 60]
    for select in ("head", "group"):
        q, k, _, _ = make_qkv(cu, dim=dim, dtype=dtype)
        assert_same_choice(route(q, k, MoBA(6, 3, select), cu_seqlens=cu, backend="triton"), q, k, cu)


@pytest.mark.parametrize("select", ["head", "group"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_of_small_integers_go_to_the_later_chunk(dtype, select):
    # Power-of-two chunks of small integers: means and scores are exact, so most scores tie and all must agree.
    cu, spec = [0, 5, 180], MoBA(2, 4, select)
    q, k, _, _ = make_qkv(cu, heads=4, kv_heads=2, dim=32, dtype=dtype, integers=True)
    q[:, :, 4:] = 0
    expected = chosen_to_ids(oracle.choose(*as_numpy(q, k), cu, *moba_tuple(spec)), spec.topk)
    assert torch.equal(route(q, k, spec, cu_seqlens=cu, backend="triton").chunk_ids, expected)


def test_when_all_scores_tie_the_nearest_chunks_are_picked():
    q, k = torch.zeros(64, 2, 32), torch.randn(64, 1, 32)
    q[1::2] = -0.0  # -0 and 0 are one score
    ids = route(q, k, MoBA(8, 4), backend="triton").chunk_ids
    assert ids[63, 0].tolist() == [7, 6, 5, 4]
    assert ids[17, 1].tolist() == [2, 1, 0, -1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_means_that_differ_in_their_last_bits_are_told_apart(dtype):
    q = torch.zeros(3, 1, 32, dtype=dtype)
    q[:, :, 0] = 1
    means = torch.zeros(3, 1, 32)
    means[:, 0, 0] = torch.tensor([1 + 2.0**-10 + 2.0**-22, 1 + 2.0**-10, 0.0])  # equal in one bf16 term, and in two
    routing = route_means(q, means, MoBA(1, 2), pack=Pack([0, 3]), backend="triton")
    assert routing.chunk_ids[2, 0].tolist() == [2, 0]


@pytest.mark.parametrize("select", ["head", "group"])
def test_queries_count_to_their_last_bit(select):
    q = torch.zeros(3, 1, 32)
    q[:, :, 0], q[:, :, 1] = 1 + 2.0**-10 + 2.0**-22, -1 - 2.0**-10
    means = torch.zeros(3, 1, 32)
    means[0, 0, :2], means[1, 0, :2] = 2, 1  # scores 2^-21 and 2^-22; both 0 with two bf16 terms
    routing = route_means(q, means, MoBA(1, 2, select), pack=Pack([0, 3]), backend="triton")
    assert routing.chunk_ids[2, 0].tolist() == [2, 0]


@pytest.mark.parametrize("topk", [2, 5, 9, 10, 17, 18, 40, 100])
def test_any_number_of_picks_is_right_in_one_pass_or_several(topk):
    cu, spec = [0, 3, 90], MoBA(2, topk)
    q, k, _, _ = make_qkv(cu, heads=2, kv_heads=1, dim=32, dtype=torch.bfloat16, integers=topk % 2 == 0)
    assert_same_choice(route(q, k, spec, cu_seqlens=cu, backend="triton"), q, k, cu)


def test_topk_one_and_no_query_need_no_kernel():
    q, k, _, _ = make_qkv([0, 20], dim=32, dtype=torch.float32)
    routing = route(q, k, MoBA(4, 1), backend="triton")
    assert routing.stored.shape == (20, 4, 0) and routing.complete
    assert route(q[:0], k[:0], MoBA(4, 3), cu_seqlens=[0, 0], backend="triton").chunk_ids.shape == (0, 4, 3)


@pytest.mark.parametrize(("before", "stored"), [(40000, torch.uint16), (66000, torch.int32)])
def test_ids_beyond_int16_and_beyond_uint16_are_stored_whole(before, stored):
    cu, spec = [0, before, before + 20], MoBA(1, 4)
    at = torch.arange(before, before + 20, 3)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(at.numel(), 2, 32, generator=generator)
    means = torch.randn(cu[-1], 1, 32, generator=generator)
    got = route_means(q, means, spec, pack=Pack(cu), q_positions=at, backend="triton")
    want = route_means(q, means, spec, pack=Pack(cu), q_positions=at, backend="torch")
    assert got.stored.dtype == stored and got.equals(want)


def test_the_same_query_gets_the_same_picks_whatever_else_is_in_the_call():
    cu, spec = [0, 100, 256], MoBA(2, 4)
    pack = Pack(cu)
    for dtype in (torch.bfloat16, torch.float32):
        q, k, _, _ = make_qkv(cu, heads=2, kv_heads=1, dim=64, dtype=dtype)
        means = triton_means(k, pack, 2)
        whole = route_means(q, means, spec, pack=pack, backend="triton")
        for step in (3, 129):
            positions = torch.arange(step // 2, cu[-1], step)
            part = route_means(q[positions], means, spec, pack=pack, q_positions=positions, backend="triton")
            assert part.equals(whole.select(positions))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_documents_in_one_tile_do_not_see_each_others_chunks(dtype):
    # Every query of the tile lies 64 chunks, a whole block, behind the first chunk that any of them may pick.
    cu, spec, at = [0, 100, 200], MoBA(1, 3), torch.arange(65, 193)
    q, k, _, _ = make_qkv(cu, heads=2, kv_heads=1, dim=32, dtype=dtype)
    pack, means = Pack(cu), mean_keys(*pool_sums(k, pack=Pack(cu), chunk_size=1))
    got = route_means(q[at], means, spec, pack=pack, q_positions=at, backend="triton")
    assert got.equals(route_means(q[at], means, spec, pack=pack, q_positions=at, backend="torch"))


def test_queries_that_are_views_with_strides_pick_the_same():
    q, k, _, _ = make_qkv([0, 40], dim=32, dtype=torch.bfloat16)
    fused = torch.cat((k, q), 1)
    for spec in (MoBA(4, 3), MoBA(4, 3, "group")):
        assert route(fused[:, 2:], k, spec, backend="triton").equals(route(q, k, spec, backend="triton"))


@pytest.mark.parametrize("form", [pool_form, route_form, conv_form], ids=lambda form: form.__name__)
def test_variants_name_every_argument_of_their_kernel(form):
    for target in (80, 90, 100):
        variants = list(form.variants([(64, 64), (64, 128), (192, 128)], DTYPES, target))
        assert len({variant.label for variant in variants}) == len(variants)
        for variant in variants:
            assert {*variant.types, *variant.constants} == set(variant.kernel.arg_names)
            assert variant.divisible_by_16 <= set(variant.types)
