"""The torch backend through PyTorch's CPU flash kernel: the same answers as every other way, at any size."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moba_kernels import Full, MoBA, Pack, Routing, attend, attend_partial_backward, route
from moba_kernels.attend import blocks as blocks_module
from moba_kernels.attend import cpu_flash, fused, lists
from moba_kernels.attend.blocks import causal_blocks, fitted
from moba_kernels.attend.call import AttendCall
from moba_kernels.attend.lists import average_list, chunk_lists, tile_rows_of

from .inputs import ROWS, assert_close, make_qkv
from .test_attend import SPECS, check_against_oracle, plain, run
from .test_memory import LargestTensor
from .test_partial import check_that_parts_merge_to_the_whole

torch_backend = import_module("moba_kernels.attend.torch")


pytestmark = pytest.mark.usefixtures("pytorch_alone")


@pytest.fixture(params=["lists", "tiles"])
def at_any_size(request, monkeypatch):
    """Small rows take the kernel too; picks go by lists, or by tiles after the kernel's blocks."""
    monkeypatch.setattr(fused, "MIN_KEYS", 0)
    monkeypatch.setattr(blocks_module, "MIN_QUERIES_OF_BLOCK", 0)
    monkeypatch.setattr(lists, "MIN_PAIRS_OF_LIST", 0 if request.param == "lists" else 1 << 60)


@pytest.fixture
def small_halves(monkeypatch):
    monkeypatch.setattr(blocks_module, "SMALLEST_HALF", 3)


@pytest.mark.usefixtures("at_any_size", "small_halves")
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("cu", ROWS.values(), ids=ROWS.keys())
def test_output_lse_gradients_and_pairs_are_the_oracles(cu, spec):
    check_against_oracle(cu, spec, backends=["torch"])


@pytest.mark.usefixtures("at_any_size")
@pytest.mark.parametrize("spec", [Full(), MoBA(8, 3), MoBA(8, 3, "group")], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (8, 1), (6, 2)])
def test_every_gqa_group_size(heads, kv_heads, spec):
    check_against_oracle([0, 11, 50], spec, heads=heads, kv_heads=kv_heads, dim=8, backends=["torch"])


@pytest.mark.usefixtures("at_any_size")
@pytest.mark.parametrize("scale", [-0.5, -1e-3, 0.0, 1e-60])
def test_a_softmax_scale_that_is_not_positive_is_a_scale_like_any_other(scale):
    for spec in (Full(), MoBA(8, 3)):
        check_against_oracle([0, 30, 97], spec, scale=scale, backends=["torch"])


@pytest.mark.usefixtures("at_any_size", "small_halves")
@pytest.mark.parametrize("cut", ["halves", "inside chunks", "zigzag", "random"])
@pytest.mark.parametrize("spec", [Full(), MoBA(8, 1), MoBA(8, 3), MoBA(16, 3, "group"), MoBA(100, 2)], ids=str)
def test_parts_of_queries_and_keys_merge_to_the_whole(spec, cut):
    check_that_parts_merge_to_the_whole(spec, cut, "torch")


@pytest.mark.usefixtures("at_any_size")
@pytest.mark.parametrize("backend", ["torch", "flash"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 2), (3, 1)])
def test_a_kernel_without_grouped_query_attention_serves_one_head_of_a_group_at_a_time(
    heads, kv_heads, backend, monkeypatch
):
    monkeypatch.setattr(cpu_flash, "groups_natively", lambda: False)
    forward, backward, seen = cpu_flash.forward, cpu_flash.backward, []

    def watched_forward(q, k, *rest, **named):
        seen.append((q.shape[1], k.shape[1]))
        return forward(q, k, *rest, **named)

    def watched_backward(dout, q, k, *rest, **named):
        seen.append((q.shape[1], k.shape[1]))
        return backward(dout, q, k, *rest, **named)

    monkeypatch.setattr(cpu_flash, "forward", watched_forward)
    monkeypatch.setattr(cpu_flash, "backward", watched_backward)
    for spec in (Full(), MoBA(8, 3)):
        check_against_oracle([0, 11, 50], spec, heads=heads, kv_heads=kv_heads, dim=8, backends=[backend])
    assert seen and all(q_heads == k_heads for q_heads, k_heads in seen)


def test_the_kernel_is_asked_whether_it_groups_and_not_the_version(monkeypatch):
    def without_groups(q, k, v, *rest):  # takes the memory behind a KV head for the next one
        wide = k.as_strided((1, 2, 1, 1), (2, 1, 1, 1))
        return wide.clone(), None

    assert cpu_flash.groups_natively.__wrapped__() in (True, False)
    monkeypatch.setattr(cpu_flash, "forward", without_groups)
    assert not cpu_flash.groups_natively.__wrapped__()


@pytest.mark.usefixtures("at_any_size")
def test_work_cut_into_small_pieces_is_the_same(monkeypatch):
    monkeypatch.setattr(fused, "LIST_ELEMENTS", 1)
    monkeypatch.setattr(fused, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(lists, "RANGE_ENTRIES", 7)
    for spec in (Full(), MoBA(8, 3), MoBA(8, 3, "group")):
        check_against_oracle([0, 37, 90], spec, backends=["torch"])


def test_a_covered_document_is_plain_causal_attention_and_the_report_says_so(monkeypatch):
    cu = [0, 4096, 4100, 9000]
    q, k, v, _ = make_qkv(cu, heads=2, kv_heads=1, dim=8, dtype=torch.float32)
    seen = []
    real = fused.forward_block
    monkeypatch.setattr(
        fused, "forward_block", lambda q, k, v, block, *rest: (seen.append(block), real(q, k, v, block, *rest))
    )
    report = attend(q, k, v, MoBA(1024, 4), cu_seqlens=cu).report
    assert report.covered_documents == 2  # the last one is longer than 4 chunks
    assert (seen[0].num_queries, seen[0].num_keys, seen[0].causal) == (4096, 4096, True)
    report.raise_if_different()
    assert attend(q, k, v, Full(), cu_seqlens=cu).report.covered_documents == 3


def test_a_forced_routing_with_missing_picks_is_never_taken_for_full_attention(monkeypatch):
    monkeypatch.setattr(fused, "MIN_KEYS", 0)
    q, k, v, _ = make_qkv([0, 32])
    spec, pack = MoBA(8, 4), Pack([0, 32])
    whole = route(q, k, spec)
    ids = whole.chunk_ids.clone()
    ids[24:, :, 1:] = -1
    result = attend(q, k, v, spec, routing=Routing.from_chunk_ids(ids, spec, pack))
    assert result.report.covered_documents == 0 and attend(q, k, v, spec, routing=whole).report.covered_documents == 1
    own = attend(q[24:], k[24:], v[24:], Full())
    assert_close(result.out[24:], own.out, 1e-14)


def pairs_of(block):
    for i in range(block.count):
        for j in range(block.num_queries):
            seen = min(j + 1, block.num_keys) if block.causal else block.num_keys
            for key in range(seen):
                yield block.first_query + i * block.stride + j, block.first_key + i * block.stride + key


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_blocks_hold_every_visible_pair_once_or_are_refused(data):
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    edges = np.cumsum([0, *lengths])
    tokens = list(range(edges[-1]))
    queries = np.array(
        data.draw(st.one_of(st.just(tokens), st.lists(st.sampled_from(tokens), unique=True).map(sorted))),
        dtype=np.int64,
    )
    keys = np.array(
        data.draw(st.one_of(st.just(tokens), st.lists(st.sampled_from(tokens), unique=True).map(sorted))),
        dtype=np.int64,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks_module, "SMALLEST_HALF", data.draw(st.integers(1, 5)))
        patch.setattr(blocks_module, "MIN_QUERIES_OF_BLOCK", 0)
        max_queries = data.draw(st.integers(1, 9))
        max_keys = data.draw(st.integers(max_queries, 12))
        blocks = causal_blocks(queries, keys, edges)
        blocks = None if blocks is None else fitted(blocks, max_queries, max_keys)
    if blocks is None:
        assert len(keys) < edges[-1]  # with all keys at hand there are always blocks
        return
    segment = np.searchsorted(edges, np.arange(edges[-1]), side="right")
    want = {(i, j) for i, t in enumerate(queries) for j, s in enumerate(keys) if s <= t and segment[s] == segment[t]}
    assert all(block.num_queries <= max_queries and block.num_keys <= max_keys for block in blocks)
    got = [pair for block in blocks for pair in pairs_of(block)]
    assert len(got) == len(set(got)) and set(got) == want
    first = set()
    for block in blocks:
        rows = {block.first_query + i * block.stride + j for i in range(block.count) for j in range(block.num_queries)}
        assert not (rows & first if block.fresh else rows - first)  # a fresh block is the first of its rows
        first |= rows


def way_of_picks(cu, spec, heads, kv_heads, q_positions=None, value_dim=64):
    """What `work_of` takes for the picks of a call of head dim 64 on a whole row, or of some queries."""
    pack, rows = Pack(cu), cu[-1] if q_positions is None else len(q_positions)
    picks = torch.full((rows, spec.routed_heads(heads, kv_heads), spec.num_picks), -1)
    routing = Routing(picks, spec, pack, q_positions, complete=True)
    call = AttendCall(pack, q_positions, None, routing, 1.0, torch.float32)
    q, k, v = torch.empty(rows, heads, 64), torch.empty(cu[-1], kv_heads, 64), torch.empty(cu[-1], kv_heads, value_dim)
    work = torch_backend.work_of(call, q, k, v)
    return "lists" if work.lists else "tiles"


def test_picks_go_by_lists_where_these_are_long_and_q_k_and_v_share_a_head_dim():
    row, many = [0, 4096], MoBA(16, 100)
    assert [way_of_picks(row, MoBA(16, topk), 8, 2) for topk in (6, 16, 64)] == ["tiles", "lists", "lists"]
    assert way_of_picks([*range(0, 4097, 256)], MoBA(32, 3), 8, 2) == "tiles"
    assert way_of_picks(row, many, 8, 2, torch.arange(4095)) == "lists"  # a shard
    assert way_of_picks(row, many, 8, 2, value_dim=32) == "tiles"  # not for that kernel


def test_scattered_queries_and_tiny_documents_are_no_union_of_blocks():
    token = np.arange(8192)
    assert causal_blocks(token[::2], token, np.array([0, 8192])) is None
    uneven = np.cumsum([0, *np.random.default_rng(0).integers(1, 20, 800)])
    assert causal_blocks(np.arange(uneven[-1]), np.arange(uneven[-1]), uneven) is None


def test_equal_segments_share_one_block():
    token = np.arange(64)
    (block,) = causal_blocks(token, token, np.arange(0, 65, 8))
    assert (block.count, block.stride, block.num_queries) == (8, 8, 8)
    assert block.pairs(num_heads=2)[0] == 2 * 8 * 36


@pytest.mark.parametrize("select", ["head", "group"])
def test_lists_hold_every_pick_once_with_rows_ascending(select):
    cu, spec = [0, 30, 100], MoBA(8, 3, select)
    q, k, _, _ = make_qkv(cu, heads=4, kv_heads=2)
    pack = Pack(cu)
    routing = route(q, k, spec, cu_seqlens=pack)
    takes = torch.ones(100, dtype=torch.bool)
    takes[:30] = False
    edges = np.append(pack.chunks(8).start_C, 100)
    got, before = [], []
    parts = list(chunk_lists(routing, takes, edges, 4, 2, max_keys=5))
    for part, of in [(x, of) for x in parts for of in x.lists]:
        chunk = int(np.searchsorted(edges, of.first_key, side="right")) - 1
        tiles = part.rows_M[of.rows].tolist()
        rows = tiles[: of.num_rows]
        assert tiles[of.num_rows :] == rows[:1] * (-of.num_rows % part.tile_rows)
        if of.first_key > edges[chunk]:  # the rest of a chunk, for the same rows
            assert rows == before and of.first_key == edges[chunk] + 5 and of.num_keys == 3
            continue
        assert of.num_keys == 5
        before = rows
        assert rows == sorted(set(rows)) and all(row % 4 // 2 == part.kv_head for row in rows)
        got += [(row, chunk) for row in rows]
    picks = routing.picks_of_heads(4)
    want = [(t * 4 + h, c) for t in range(30, 100) for h in range(4) for c in picks[t, h].tolist() if c >= 0]
    assert sorted(got) == sorted(want)


@pytest.mark.parametrize("tokens", [40000, 70000], ids=["16 bits", "32 bits"])
def test_lists_of_any_number_of_chunks_stand_in_the_order_of_the_chunks(tokens):
    pack, rows = Pack([0, tokens]), torch.arange(tokens - 3, tokens)
    chunks = [[1, 257, tokens - 9], [0, 256, 39999], [2, 255, 32768]]
    routing = Routing(torch.tensor(chunks, dtype=torch.int32)[:, None], MoBA(1, 4), pack, rows)
    (part,) = chunk_lists(routing, torch.ones(3, dtype=torch.bool), np.arange(tokens + 1), 1, 1, max_keys=8)
    got = [(of.first_key, part.rows_M[of.rows][: of.num_rows].tolist()) for of in part.lists]
    assert got == sorted((chunk, [row]) for row, picked in enumerate(chunks) for chunk in picked)


def test_tiles_are_a_quarter_of_the_average_list_within_limits():
    assert tile_rows_of(average_list(32768, 4, 3, 64)) == 256  # 6144 rows
    assert tile_rows_of(100) == 32
    assert tile_rows_of(0) == 16


def test_long_rows_are_sorted_in_ranges_that_leave_lists_long():
    # 1M tokens, 32 heads in groups of 4, 128/8: all KV heads at once would leave an eighth of it.
    assert average_list(1 << 20, 4, 7, 8192) == 255


def test_a_long_chunk_of_few_queries_stays_within_the_scratch(monkeypatch):
    monkeypatch.setattr(fused, "BLOCK_ELEMENTS", 1 << 18)
    tokens, spec, rows = 20000, MoBA(8000, 2), torch.arange(19000, 19512)
    q, k, v, dout = make_qkv([0, tokens], heads=1, kv_heads=1, dim=8, dtype=torch.float32)
    routing = route(q, k, spec).select(rows)
    options = {"pack": Pack([0, tokens]), "q_positions": rows, "routing": routing}
    lse, delta = torch.zeros(512, 1), torch.zeros(512, 1)
    with LargestTensor() as largest:
        attend_partial_backward(dout[rows], q[rows], k, v, lse, delta, spec, **options)
    assert largest.num_elements <= 1 << 18  # a dk for each of 8 tiles would be twice that


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_stand_in_has_the_row_sum_that_was_asked_for_at_any_scale(size):
    dout = torch.randn(50, 2, 8, generator=torch.Generator().manual_seed(0)) * size
    dout[3] = 0
    delta = torch.randn(50, 2) * size
    delta[3] = 0
    stand_in = fused.StandIn.of(dout, delta)
    out = fused.StandIn.fill(dout, stand_in.at_TH, stand_in.value_TH)
    assert torch.isfinite(out).all()
    row_sum = (dout.double() * out.double()).sum(-1)
    assert ((row_sum - delta).abs() <= 1e-7 * delta.abs()).all()


@pytest.mark.parametrize("spec", [Full(), MoBA(1024, 2), MoBA(512, 3, "group"), MoBA(300, 4), MoBA(16, 100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_perturbed_future_tokens_leave_the_prefix_bitwise_the_same(spec, dtype):
    cu = [0, 700, 4500]
    q, k, v, _ = make_qkv(cu, heads=4, kv_heads=2, dim=16, dtype=dtype)
    before = attend(q, k, v, spec, cu_seqlens=cu)
    for edge in (300, 2001, 4499):
        changed = [x.clone() for x in (q, k, v)]
        for i, x in enumerate(changed):
            x[edge:] = x[edge:].flip(0) * (3 + i) + 1
        after = attend(*changed, spec, cu_seqlens=cu)
        assert torch.equal(after.out[:edge], before.out[:edge])
        assert torch.equal(after.lse[:edge], before.lse[:edge])


@pytest.mark.parametrize("spec", [Full(), MoBA(512, 3), MoBA(256, 4, "group")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_error_is_at_most_twice_that_of_the_plain_same_precision_way(spec, dtype, monkeypatch):
    cu, tokens = [0, 1000, 3000], 3000
    monkeypatch.setattr(fused, "MIN_KEYS", tokens)
    q, k, v, dout = make_qkv(cu, heads=2, kv_heads=1, dim=32, dtype=dtype)
    result, *grads = run(q, k, v, dout, spec, cu, return_routing=True)
    token = torch.arange(tokens)
    document = torch.searchsorted(torch.tensor(cu), token, right=True)
    mask = ((document[:, None] == document) & (token <= token[:, None])).expand(2, tokens, tokens)
    if result.routing is not None:
        chunk = torch.from_numpy(Pack(cu).chunks(spec.chunk_size).chunk_of_token_T)
        ids = result.routing.chunk_ids.repeat_interleave(2 // result.routing.num_routed_heads, 1)
        mask = mask & torch.stack([(ids[:, h, :, None] == chunk).any(1) for h in range(2)])
    exact = plain(*(x.double() for x in (q, k, v, dout)), mask)
    usual = plain(q, k, v, dout, mask)
    for name, got, want, peer in zip(("out", "dq", "dk", "dv"), (result.out, *grads), exact, usual, strict=True):
        error, allowed = (float((x.detach().double() - want.detach()).square().mean().sqrt()) for x in (got, peer))
        assert error <= 2 * allowed, f"{name}: {error:.3g}, plain {allowed:.3g}"


def test_the_kernels_backward_gives_zero_where_a_row_saw_no_key():
    pack = Pack([0, 5000])
    q, k, v, dout = make_qkv([0, 5000], heads=2, kv_heads=1, dim=8, dtype=torch.float32)
    early, late = torch.arange(0, 500), torch.arange(500, 5000)
    lse, delta = torch.full((500, 2), -torch.inf), torch.zeros(500, 2)
    for grad in attend_partial_backward(
        dout[:500], q[:500], k[500:], v[500:], lse, delta, Full(), pack=pack, q_positions=early, k_positions=late
    ):
        assert (grad == 0).all()
