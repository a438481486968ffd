"""Attention in Triton, forward and gradients, against the reference in fp64, with the routing forced."""

from __future__ import annotations

import pytest
import torch

from moba_kernels import (
    Full,
    MoBA,
    Pack,
    attend,
    attend_partial,
    attend_partial_backward,
    merge_partials,
    random_routing,
)
from moba_kernels.attend import triton_causal, triton_config, triton_lists, triton_picks
from moba_kernels.attend.call import AttendCall
from moba_kernels.attend.reference import mask_of_head
from moba_kernels.triton_row_dot import row_dot
from tests.kernels.inputs import assert_close, make_qkv

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def routing_of(spec, pack, heads, kv_heads, seed=5, rows=None):
    """Random picks: the kernels must serve any routing, and these need no gate."""
    if not isinstance(spec, MoBA):
        return None
    return random_routing(
        spec, pack=pack, num_heads=heads, num_kv_heads=kv_heads, q_positions=rows, seed=seed, device="cpu"
    )


def run(q, k, v, dout, spec, pack, routing, backend="triton"):
    """(result, dq, dk, dv) of attend."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    result = attend(*leaves, spec, cu_seqlens=pack, routing=routing, backend=backend)
    return result, *torch.autograd.grad(result.out, leaves, dout)


def plain(q, k, v, dout, mask_HTT):
    """At the inputs' own precision: one matrix product, mask, softmax, one product, and autograd."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    group = q.shape[1] // k.shape[1]
    queries, keys, values = (x.transpose(0, 1) for x in leaves)
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scores = (queries @ keys.mT * q.shape[2] ** -0.5).masked_fill(~mask_HTT, -torch.inf)
    out = (scores.softmax(-1) @ values).transpose(0, 1)
    return out, *torch.autograd.grad(out, leaves, dout)


def check(cu, spec, dtype=FP32, heads=4, kv_heads=2, dim=32, value_dim=None):
    """Errors against fp64 at most twice those of the plain way; planned pairs are the computed ones."""
    pack = Pack(cu)
    q, k, v, dout = make_qkv(cu, heads, kv_heads, dim, value_dim, dtype=dtype)
    routing = routing_of(spec, pack, heads, kv_heads)
    result, *grads = run(q, k, v, dout, spec, pack, routing)
    call = AttendCall(pack, None, None, routing, 1.0, FP32)
    mask = torch.stack([mask_of_head(call, h, heads, q.device) for h in range(heads)])
    exact = plain(*(x.double() for x in (q, k, v, dout)), mask)
    usual = plain(q, k, v, dout, mask)
    for name, got, want, peer in zip(("out", "dq", "dk", "dv"), (result.out, *grads), exact, usual, strict=True):
        assert got.dtype == dtype and torch.isfinite(got).all(), name
        error, allowed = (float((x.detach().double() - want.detach()).abs().max()) for x in (got, peer))
        # On rows this short the plain way may be exact by luck: a few roundings of fp32 are granted beyond that.
        floor = 2.0**-21 * float(want.detach().abs().max())
        assert error <= 2 * allowed + floor, f"{name}: {error:.3g}, plain {allowed:.3g}"
    reference = attend(*(x.double() for x in (q, k, v)), spec, cu_seqlens=pack, routing=routing, backend="reference")
    assert_close(result.lse, reference.lse, 4e-6)
    assert result.report.backend == "triton"
    assert result.report.computed_pairs == result.report.planned_pairs
    assert result.report.scored_pairs >= result.report.planned_pairs


SPECS = [Full(), MoBA(16, 1), MoBA(16, 3), MoBA(16, 3, "group"), MoBA(21, 4), MoBA(64, 2), MoBA(200, 2)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_packed_documents_with_tail_chunks_empty_and_one_token_documents(spec):
    check([0, 0, 1, 2, 2, 90, 150], spec)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("spec", [Full(), MoBA(64, 3), MoBA(64, 3, "group")], ids=str)
def test_precision_of_every_dtype(spec, dtype):
    check([0, 60, 250], spec, dtype, heads=2, kv_heads=1, dim=64)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 2), (3, 1), (4, 1)])
@pytest.mark.parametrize("select", ["head", "group"])
def test_every_group_size(heads, kv_heads, select):
    check([0, 100], MoBA(24, 3, select), heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize(("dim", "value_dim"), [(96, 96), (64, 32), (32, 96), (192, 128), (256, 256)])
def test_padded_head_dims_and_values_of_another_dim(dim, value_dim):
    check([0, 30, 100], MoBA(32, 2), BF16, heads=2, kv_heads=1, dim=dim, value_dim=value_dim)


def test_segments_longer_than_a_tile_and_documents_that_topk_covers():
    spec, cu = MoBA(70, 3), [0, 200, 230, 500]
    assert Pack(cu).segments(spec, complete=True).num_covered_documents == 2
    check(cu, spec, BF16, heads=2, kv_heads=1)


def test_more_picks_than_chunks_is_full_attention():
    q, k, v, dout = make_qkv([0, 100], dim=32, dtype=FP32)
    pack = Pack([0, 100])
    full = run(q, k, v, dout, Full(), pack, None)
    covered = run(q, k, v, dout, MoBA(16, 9), pack, routing_of(MoBA(16, 9), pack, 4, 2))
    for got, want in zip((covered[0].out, *covered[1:]), (full[0].out, *full[1:]), strict=True):
        assert_close(got, want, 2e-6)


def test_a_routing_with_fewer_picks_than_allowed():
    spec, pack = MoBA(16, 3), Pack([0, 100])
    q, k, v, dout = make_qkv([0, 100], dim=32, dtype=FP32)
    routing = routing_of(spec, pack, 4, 2)
    ids = routing.chunk_ids
    ids[::3, 1:, 1] = -1
    ids[50:, 0, 2] = -1
    forced = type(routing).from_chunk_ids(ids, spec, pack, validate=True)
    got = run(q, k, v, dout, spec, pack, forced)
    want = run(q.double(), k.double(), v.double(), dout.double(), spec, pack, forced, "reference")
    for mine, other in zip((got[0].out, *got[1:]), (want[0].out, *want[1:]), strict=True):
        assert_close(mine, other.detach(), 5e-6)


def test_a_chunk_that_every_query_picks():
    spec, pack = MoBA(16, 2), Pack([0, 128])
    q, k, v, dout = make_qkv([0, 128], dim=32, dtype=FP32)
    ids = routing_of(spec, pack, 4, 2).chunk_ids
    ids[16:, :, 1] = 0
    forced = routing_of(spec, pack, 4, 2).from_chunk_ids(ids, spec, pack, validate=True)
    got = run(q, k, v, dout, spec, pack, forced)
    want = run(q.double(), k.double(), v.double(), dout.double(), spec, pack, forced, "reference")
    for mine, other in zip((got[0].out, *got[1:]), (want[0].out, *want[1:]), strict=True):
        assert_close(mine, other.detach(), 1e-5)


@pytest.mark.parametrize("spec", [Full(), MoBA(16, 3), MoBA(16, 3, "group"), MoBA(50, 2)], ids=str)
def test_parts_of_queries_and_keys_merge_to_the_whole(spec):
    cu = [0, 1, 1, 30, 97]
    pack, token = Pack(cu), torch.arange(97)
    q, k, v, dout = make_qkv(cu, dim=32, dtype=FP32)
    routing = routing_of(spec, pack, 4, 2)
    want, *want_grads = run(q.double(), k.double(), v.double(), dout.double(), spec, pack, routing, "reference")
    delta = (want.out.detach() * dout).sum(-1).float()
    parts = [((token // 5) % 2 == part).nonzero().flatten() for part in range(2)]  # every chunk is spread over parts
    got = [torch.zeros_like(x) for x in (q, k, v)]
    for rows in parts:
        out, lse = torch.zeros(len(rows), 4, 32), torch.full((len(rows), 4), -torch.inf)
        for keys in parts:
            mine = routing.select(rows) if routing else None
            options = {"pack": pack, "q_positions": rows, "k_positions": keys, "routing": mine, "backend": "triton"}
            out, lse = merge_partials(out, lse, *attend_partial(q[rows], k[keys], v[keys], spec, **options))
            shares = attend_partial_backward(
                dout[rows], q[rows], k[keys], v[keys], want.lse[rows].float(), delta[rows], spec, **options
            )
            for whole, at, share in zip(got, (rows, keys, keys), shares, strict=True):
                whole[at] += share
        assert_close(out, want.out.detach()[rows], 3e-6)
        assert_close(lse, want.lse[rows], 3e-6)
    for mine, other in zip(got, want_grads, strict=True):
        assert_close(mine, other, 1e-5)


@pytest.mark.parametrize("spec", [Full(), MoBA(8, 3)], ids=str)
def test_a_query_without_any_key_at_hand_gives_zero_and_minus_infinity(spec):
    pack = Pack([0, 40, 64])
    q, k, v, dout = make_qkv([0, 64], dim=32, dtype=FP32)
    routing = routing_of(spec, pack, 4, 2)
    rows, late = torch.tensor([3, 50]), torch.arange(20, 64)
    mine = routing.select(rows) if routing else None
    options = {"pack": pack, "q_positions": rows, "k_positions": late, "routing": mine, "backend": "triton"}
    part = attend_partial(q[rows], k[20:], v[20:], spec, **options)
    assert (part.out[0] == 0).all() and (part.lse[0] == -torch.inf).all()
    assert torch.isfinite(part.out).all() and torch.isfinite(part.lse[1]).all()
    delta = (part.out * dout[rows]).sum(-1)
    grads = attend_partial_backward(dout[rows], q[rows], k[20:], v[20:], part.lse, delta, spec, **options)
    assert (grads[0][0] == 0).all()
    assert all(torch.isfinite(x).all() for x in grads)


def test_no_token_no_query_no_key():
    q, k, v, dout = make_qkv([0], dim=32, dtype=FP32)
    for spec in (Full(), MoBA(8, 3)):
        pack = Pack([0, 0])
        result, *grads = run(q, k, v, dout, spec, pack, routing_of(spec, pack, 4, 2))
        assert result.out.shape == (0, 4, 32) and [len(x) for x in grads] == [0, 0, 0]
        assert result.report.computed_pairs == 0
    pack, none = Pack([0, 24]), torch.zeros(0, dtype=torch.int64)
    q, k, v, dout = make_qkv([0, 24], dim=32, dtype=FP32)
    for spec in (Full(), MoBA(8, 3)):
        routing = routing_of(spec, pack, 4, 2)
        options = {"pack": pack, "backend": "triton"}
        part = attend_partial(q, k[none], v[none], spec, k_positions=none, routing=routing, **options)
        assert (part.out == 0).all() and (part.lse == -torch.inf).all()
        empty = routing_of(spec, pack, 4, 2, rows=none)
        nothing = attend_partial(q[none], k, v, spec, q_positions=none, routing=empty, **options)
        grads = attend_partial_backward(
            dout[none], q[none], k, v, nothing.lse, nothing.lse, spec, q_positions=none, routing=empty, **options
        )
        assert [tuple(x.shape) for x in grads] == [(0, 4, 32), (24, 2, 32), (24, 2, 32)]
        assert all((x == 0).all() for x in grads)


def test_lse_and_delta_in_fp64_are_taken_as_fp32():
    cu, spec, pack = [0, 90], MoBA(32, 2), Pack([0, 90])
    q, k, v, dout = make_qkv(cu, dim=32, dtype=BF16)
    options = {"pack": pack, "routing": routing_of(spec, pack, 4, 2), "backend": "triton"}
    part = attend_partial(q, k, v, spec, **options)
    delta = (dout.double() * part.out.double()).sum(-1)
    wide = attend_partial_backward(dout, q, k, v, part.lse.double(), delta, spec, **options)
    narrow = attend_partial_backward(dout, q, k, v, part.lse, delta.float(), spec, **options)
    for got, want in zip(wide, narrow, strict=True):
        assert torch.equal(got, want)


def test_running_twice_gives_the_same_bits():
    cu = [0, 25, 70]
    q, k, v, dout = make_qkv(cu, dim=32, dtype=BF16)
    for spec in (Full(), MoBA(16, 2)):
        routing = routing_of(spec, Pack(cu), 4, 2)
        first, second = (run(q, k, v, dout, spec, Pack(cu), routing) for _ in range(2))
        assert torch.equal(first[0].out, second[0].out) and torch.equal(first[0].lse, second[0].lse)
        assert all(torch.equal(a, b) for a, b in zip(first[1:], second[1:], strict=True))


@pytest.mark.parametrize("spec", [Full(), MoBA(16, 3)], ids=str)
def test_changed_future_tokens_leave_the_prefix_alone(spec):
    cu, edge = [0, 40, 150], 101
    q, k, v, _ = make_qkv(cu, dim=32, dtype=FP32)
    pack = Pack(cu)
    routing = routing_of(spec, pack, 4, 2)
    before = attend(q, k, v, spec, cu_seqlens=pack, routing=routing, backend="triton")
    for x in (q, k, v):
        x[edge:] = x[edge:].flip(0) * 3 + 1
    if routing is not None:
        other = routing_of(spec, pack, 4, 2, seed=6).chunk_ids
        other[:edge] = routing.chunk_ids[:edge]
        routing = routing.from_chunk_ids(other, spec, pack)
    after = attend(q, k, v, spec, cu_seqlens=pack, routing=routing, backend="triton")
    # Not bitwise: in numpy's matrix product a row's last bit depends on where the row stands.
    assert_close(after.out[:edge], before.out[:edge].detach(), 1e-6)
    assert_close(after.lse[:edge], before.lse[:edge], 1e-6)


@pytest.mark.parametrize("scale", [0.7, 0.0, -0.3])
def test_the_softmax_scale_is_the_callers(scale):
    cu, spec = [0, 60], MoBA(16, 3)
    pack = Pack(cu)
    q, k, v, dout = make_qkv(cu, dim=32, dtype=FP32)
    routing = routing_of(spec, pack, 4, 2)
    results = []
    for name, inputs in (("triton", (q, k, v, dout)), ("reference", tuple(x.double() for x in (q, k, v, dout)))):
        leaves = [x.clone().requires_grad_() for x in inputs[:3]]
        out = attend(*leaves, spec, cu_seqlens=pack, routing=routing, softmax_scale=scale, backend=name).out
        results.append((out.detach(), *torch.autograd.grad(out, leaves, inputs[3])))
    for got, want in zip(*results, strict=True):
        assert_close(got, want, 3e-5)


@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "dout"])
def test_tokens_so_far_apart_in_memory_that_a_block_of_keys_spans_more_than_32_bits(tmp_path, which):
    spec, pack = Full(), Pack([0, 40])
    near = make_qkv([0, 40], 2, 1, 32, dtype=BF16)
    apart, x = 2**26, near[which]
    # A file with a hole: only what is touched takes memory.
    elements = torch.from_file(str(tmp_path / "x"), shared=True, size=39 * apart + x[0].numel(), dtype=BF16)
    far = [*near]
    far[which] = elements.as_strided(x.shape, (apart, 32, 1)).copy_(x)
    results = []
    for q, k, v, dout in (near, far):
        part = attend_partial(q, k, v, spec, pack=pack, backend="triton")
        delta = row_dot(dout, part.out, FP32)
        grads = attend_partial_backward(dout, q, k, v, part.lse, delta, spec, pack=pack, backend="triton")
        results.append((part.out, part.lse, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_views_with_strides_give_the_same():
    cu, spec = [0, 40], MoBA(8, 3)
    pack = Pack(cu)
    q, k, v, dout = make_qkv(cu, dim=32, dtype=FP32)
    routing = routing_of(spec, pack, 4, 2)
    fused = torch.cat((q, k, v), 1)  # [T,H+2K,D], as a fused projection gives them
    transposed = k.transpose(1, 2).contiguous().transpose(1, 2)
    want = run(q, k, v, dout, spec, pack, routing)
    for inputs in ((fused[:, :4], fused[:, 4:6], fused[:, 6:]), (q, transposed, v)):
        # Through the partial form, which does not clone what it is given.
        part = attend_partial(*inputs, spec, pack=pack, routing=routing, backend="triton")
        assert torch.equal(part.out, want[0].out) and torch.equal(part.lse, want[0].lse)
        delta = row_dot(dout, part.out, FP32)
        grads = attend_partial_backward(
            dout, *inputs, part.lse, delta, spec, pack=pack, routing=routing, backend="triton"
        )
        assert all(torch.equal(a, b) for a, b in zip(grads, want[1:], strict=True))
    alike = dout[:1, :1, :1].expand_as(dout)  # the gradient of a sum
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, spec, cu_seqlens=pack, routing=routing, backend="triton").out
    got = torch.autograd.grad(out, leaves, alike)
    want_grads = run(q, k, v, alike.contiguous(), spec, pack, routing)[1:]
    assert all(torch.equal(a, b) for a, b in zip(got, want_grads, strict=True))


def test_keys_laid_out_head_by_head_take_no_descriptor_and_give_the_same():
    cu, spec = [0, 70], MoBA(32, 2)
    pack = Pack(cu)
    q, k, v, _ = make_qkv(cu, dim=32, dtype=BF16)
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v)]
    tile = triton_config.tile_of("causal forward", 32, 32, BF16, 90, short=True)
    assert triton_config.key_blocks(*by_head, tile, 90) == (None, None)
    described, _ = triton_config.key_blocks(k, v, tile, 90)
    assert described is None or (described.shape, described.strides) == ([70, 2 * 32], [2 * 32, 1])
    routing = routing_of(spec, pack, 4, 2)
    want = attend(q, k, v, spec, cu_seqlens=pack, routing=routing, backend="triton")
    got = attend(q, *by_head, spec, cu_seqlens=pack, routing=routing, backend="triton")
    assert torch.equal(got.out, want.out) and torch.equal(got.lse, want.lse)


def test_large_scores_neither_overflow_nor_lose_the_sum():
    q, k, v, dout = make_qkv([0, 64], dim=32, dtype=FP32)
    for spec in (Full(), MoBA(16, 3)):
        pack = Pack([0, 64])
        result, *grads = run(q * 100, k * 100, v, dout, spec, pack, routing_of(spec, pack, 4, 2))
        assert torch.isfinite(result.out).all() and torch.isfinite(result.lse).all()
        assert all(torch.isfinite(x).all() for x in grads)


@pytest.mark.parametrize("form", [triton_causal, triton_picks, triton_lists], ids=lambda form: form.__name__)
def test_variants_name_every_argument_of_their_kernel(form):
    for target in (80, 90, 100):
        variants = list(form.variants([(64, 64), (96, 96), (192, 128)], [BF16, FP32], target))
        assert len({variant.label for variant in variants}) == len(variants)
        for variant in variants:
            assert {*variant.types, *variant.constants} == set(variant.kernel.arg_names)
            assert not {*variant.types} & {*variant.constants}
            assert variant.divisible_by_16 <= set(variant.types)
