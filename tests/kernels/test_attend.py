"""attend(): values, gradients, edges, precision, causality."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from moba_kernels import (
    Full,
    MoBA,
    Pack,
    attend,
    attend_partial,
    attend_partial_backward,
    moba_attn_varlen,
    route,
)

from . import oracle
from .inputs import ROWS, as_numpy, assert_close, assert_same_choice, ids_to_chosen, make_qkv, moba_tuple

SPECS = [Full(), MoBA(8, 1), MoBA(8, 3), MoBA(8, 3, "group"), MoBA(5, 2), MoBA(16, 50), MoBA(200, 2)]
BACKENDS = ["reference", "torch"]


def run(q, k, v, dout, spec, cu, **options):
    """(result, dq, dk, dv) of attend."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    result = attend(*leaves, spec, cu_seqlens=cu, **options)
    return result, *torch.autograd.grad(result.out, leaves, dout)


def check_against_oracle(cu, spec, tolerance=1e-12, scale=None, backends=BACKENDS, **shape):
    q, k, v, dout = make_qkv(cu, **shape)
    for backend in backends:
        result, *grads = run(q, k, v, dout, spec, cu, backend=backend, softmax_scale=scale, return_routing=True)
        chosen = None
        if isinstance(spec, MoBA):
            assert_same_choice(result.routing, q, k, cu)
            chosen = ids_to_chosen(result.routing)
        want = oracle.attend(*as_numpy(q, k, v), cu, moba_tuple(spec), scale, dout.numpy(), chosen)
        assert_close(result.out, want.out, tolerance)
        assert_close(result.lse, want.lse, tolerance)
        for got, expected in zip(grads, (want.dq, want.dk, want.dv), strict=True):
            assert_close(got, expected, 10 * tolerance)
        assert result.report.backend == backend
        assert result.report.planned_pairs == result.report.computed_pairs == want.pairs
        assert result.report.scored_pairs >= want.pairs


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("cu", ROWS.values(), ids=ROWS.keys())
def test_output_lse_gradients_and_pairs_are_the_oracles(cu, spec):
    check_against_oracle(cu, spec)


@pytest.mark.parametrize("spec", [Full(), MoBA(8, 3), MoBA(8, 3, "group")], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (4, 1), (8, 1), (6, 2)])
def test_every_gqa_group_size(heads, kv_heads, spec):
    check_against_oracle([0, 11, 50], spec, heads=heads, kv_heads=kv_heads, dim=8)


@pytest.mark.parametrize("value_dim", [1, 8, 24])
def test_values_may_have_another_dim(value_dim):
    check_against_oracle([0, 50], MoBA(8, 3), dim=16, value_dim=value_dim)
    check_against_oracle([0, 50], Full(), dim=16, value_dim=value_dim)


@pytest.mark.parametrize("spec", [Full(), MoBA(8, 3)], ids=str)
def test_keys_of_192_and_values_of_128_as_in_mla(spec):
    check_against_oracle([0, 1, 50], spec, dim=192, value_dim=128, backends=[*BACKENDS, "flash"])


def test_the_softmax_scale_is_the_callers():
    check_against_oracle([0, 30], MoBA(8, 2), scale=0.7)


@pytest.mark.parametrize("spec", [Full(), MoBA(8, 3)], ids=str)
@pytest.mark.parametrize("scale", [-0.5, -1e-3, 0.0, 1e-60])
def test_a_softmax_scale_that_is_not_positive_is_a_scale_like_any_other(scale, spec):
    check_against_oracle([0, 30, 97], spec, scale=scale, backends=[*BACKENDS, "flash"])


@pytest.mark.parametrize("spec", [Full(), MoBA(96, 3), MoBA(300, 2), MoBA(512, 1)], ids=str)
def test_rows_longer_than_one_tile_of_queries_and_keys(spec):
    check_against_oracle([0, 530], spec, heads=2, kv_heads=1, dim=4)


def test_topk_one_is_the_own_chunk_only():
    cu, size = [0, 37], 8
    q, k, v, _ = make_qkv(cu)
    bounds = [*range(0, 37, size), 37]
    result = attend(q, k, v, MoBA(size, 1), cu_seqlens=cu)
    chunks_as_documents = attend(q, k, v, Full(), cu_seqlens=bounds)
    assert_close(result.out, chunks_as_documents.out, 1e-14)
    assert result.report.computed_pairs < attend(q, k, v, Full(), cu_seqlens=cu).report.computed_pairs


@pytest.mark.parametrize("spec", [Full(), MoBA(16, 4), MoBA(16, 100), MoBA(64, 1), MoBA(100, 3, "group")], ids=str)
def test_topk_times_chunk_at_least_the_document_is_full_attention(spec):
    q, k, v, dout = make_qkv([0, 64], heads=4, kv_heads=2)
    result, *grads = run(q, k, v, dout, spec, None)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dense = scaled_dot_product_attention(*(x.transpose(0, 1) for x in leaves), is_causal=True, enable_gqa=True)
    dense = dense.transpose(0, 1)
    assert_close(result.out, dense.detach(), 1e-13)
    for got, want in zip(grads, torch.autograd.grad(dense, leaves, dout), strict=True):
        assert_close(got, want, 1e-12)
    assert result.report.planned_pairs == result.report.computed_pairs == 4 * 64 * 65 // 2


def test_documents_do_not_see_each_other():
    cu = [0, 20, 61]
    q, k, v, dout = make_qkv(cu)
    for spec in (Full(), MoBA(8, 2)):
        packed = run(q, k, v, dout, spec, cu)
        for a, b in pairwise(cu):
            alone = run(q[a:b], k[a:b], v[a:b], dout[a:b], spec, None)
            assert_close(packed[0].out[a:b], alone[0].out, 1e-13)
            for got, want in zip(packed[1:], alone[1:], strict=True):
                assert_close(got[a:b], want, 1e-13)


@pytest.mark.parametrize("spec", [Full(), MoBA(16, 3), MoBA(16, 3, "group"), MoBA(16, 1), MoBA(100, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_perturbed_future_tokens_leave_the_prefix_bitwise_the_same(spec, dtype):
    cu = [0, 100, 700]
    q, k, v, _ = make_qkv(cu, heads=4, kv_heads=2, dim=32, dtype=dtype)
    before = attend(q, k, v, spec, cu_seqlens=cu)
    for edge in (50, 301, 699):
        changed = [x.clone() for x in (q, k, v)]
        for i, x in enumerate(changed):
            x[edge:] = x[edge:].flip(0) * (3 + i) + 1
        after = attend(*changed, spec, cu_seqlens=cu)
        assert torch.equal(after.out[:edge], before.out[:edge])
        assert torch.equal(after.lse[:edge], before.lse[:edge])


@pytest.mark.parametrize("spec", [Full(), MoBA(4, 2), MoBA(4, 3, "group"), MoBA(4, 1), MoBA(5, 9)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_with_frozen_routing(spec, backend):
    cu = [0, 3, 3, 17]
    q, k, v, _ = make_qkv(cu, heads=2, kv_heads=1, dim=4, value_dim=3)
    routing = route(q, k, spec, cu_seqlens=cu) if isinstance(spec, MoBA) else None
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def out_of(q, k, v):
        return attend(q, k, v, spec, cu_seqlens=cu, routing=routing, backend=backend).out

    assert torch.autograd.gradcheck(out_of, leaves, eps=1e-6, atol=1e-7)


def plain(q, k, v, dout, mask):
    """The plain way at the inputs' own precision: one matrix product, mask, softmax, one product, and autograd."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    group = q.shape[1] // k.shape[1]
    queries, keys, values = (x.transpose(0, 1) for x in leaves)
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scores = (queries @ keys.mT * q.shape[2] ** -0.5).masked_fill(~mask, -torch.inf)
    out = (scores.softmax(-1) @ values).transpose(0, 1)
    return out, *torch.autograd.grad(out, leaves, dout)


@pytest.mark.parametrize("spec", [Full(), MoBA(16, 4), MoBA(16, 4, "group")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_at_most_twice_that_of_the_plain_same_precision_way(spec, dtype):
    cu = [0, 90, 256]
    q, k, v, dout = make_qkv(cu, heads=4, kv_heads=2, dim=32, dtype=dtype)
    result, *grads = run(q, k, v, dout, spec, cu, return_routing=True)
    chosen = ids_to_chosen(result.routing) if result.routing else None
    mask = torch.from_numpy(oracle.allowed_pairs(cu, cu[-1], 4, moba_tuple(spec), chosen))
    exact = plain(*(x.double() for x in (q, k, v, dout)), mask)
    usual = plain(q, k, v, dout, mask)
    assert result.out.dtype == dtype and result.lse.dtype == torch.float32
    for name, got, want, peer in zip(("out", "dq", "dk", "dv"), (result.out, *grads), exact, usual, strict=True):
        assert got.dtype == dtype
        error, allowed = (float((x.detach().double() - want.detach()).abs().max()) for x in (got, peer))
        assert error <= 2 * allowed, f"{name}: {error:.3g}, plain {allowed:.3g}"


def check_under_a_bias_of_the_keys(spec, backend):
    """All scores of a query are large then, and no query's dq is: what forward and backward round apart shows in it."""
    cu = [0, 192]
    q, k, v, dout = make_qkv(cu, heads=4, kv_heads=2, dim=32, dtype=torch.float32)
    k += 100
    result, *grads = run(q, k, v, dout, spec, cu, backend=backend, return_routing=True)
    chosen = ids_to_chosen(result.routing) if result.routing else None
    mask = torch.from_numpy(oracle.allowed_pairs(cu, cu[-1], 4, moba_tuple(spec), chosen))
    exact = plain(*(x.double() for x in (q, k, v, dout)), mask)
    usual = plain(q, k, v, dout, mask)
    for name, got, want, peer in zip(("out", "dq", "dk", "dv"), (result.out, *grads), exact, usual, strict=True):
        error, allowed = (float((x.detach().double() - want.detach()).square().mean().sqrt()) for x in (got, peer))
        assert error <= 2 * allowed, f"{name}: {error:.3g}, plain {allowed:.3g}"


@pytest.mark.parametrize("spec", [Full(), MoBA(8, 4), MoBA(8, 4, "group"), MoBA(64, 2)], ids=str)
def test_a_bias_of_the_keys_costs_gradients_no_more_than_in_the_plain_way(spec):
    check_under_a_bias_of_the_keys(spec, "torch")


@pytest.mark.usefixtures("pytorch_alone")
@pytest.mark.parametrize("spec", [Full(), MoBA(8, 4), MoBA(8, 4, "group"), MoBA(64, 2)], ids=str)
def test_a_bias_of_the_keys_costs_no_more_without_compiled_kernels(spec):
    check_under_a_bias_of_the_keys(spec, "torch")


def test_a_bias_of_the_keys_costs_no_more_in_the_built_in_flash_kernel():
    check_under_a_bias_of_the_keys(Full(), "flash")


def test_large_scores_neither_overflow_nor_lose_the_sum():
    q, k, v, dout = make_qkv([0, 64], dtype=torch.float32)
    for spec in (Full(), MoBA(8, 3)):
        result, *grads = run(q * 100, k * 100, v, dout, spec, None)
        assert torch.isfinite(result.out).all() and torch.isfinite(result.lse).all()
        assert all(torch.isfinite(x).all() for x in grads)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_row_gives_empty_results_and_gradients(spec, backend):
    q, k, v, dout = make_qkv([0], dtype=torch.float32)
    for cu in ([0], [0, 0, 0], None):
        result, *grads = run(q, k, v, dout, spec, cu, backend=backend)
        assert result.out.shape == (0, 4, 16) and result.lse.shape == (0, 4)
        assert [tuple(g.shape) for g in grads] == [(0, 4, 16), (0, 2, 16), (0, 2, 16)]
        assert result.report.computed_pairs == result.report.planned_pairs == 0


def test_no_gradient_flows_to_keys_that_nobody_chose():
    cu, spec = [0, 64], MoBA(4, 2)
    q, k, v, dout = make_qkv(cu, heads=1, kv_heads=1)
    dout[:60] = 0  # only the four queries of the last chunk speak
    result, _, dk, dv = run(q, k, v, dout, spec, cu, return_routing=True)
    chosen = set(result.routing.chunk_ids[60:].flatten().tolist())
    for chunk in range(16):
        silent = bool((dk[chunk * 4 : chunk * 4 + 4] == 0).all() and (dv[chunk * 4 : chunk * 4 + 4] == 0).all())
        assert silent == (chunk not in chosen)
    assert 15 in chosen and 2 <= len(chosen) <= 5


def test_lse_takes_no_gradient():
    q, k, v, _ = make_qkv([0, 16])
    result = attend(q.requires_grad_(), k, v, MoBA(4, 2))
    assert result.out.requires_grad and not result.lse.requires_grad


@pytest.mark.parametrize("spec", [Full(), MoBA(4, 2)])
def test_a_second_derivative_is_refused_and_not_silently_left_out(spec):
    q, k, v, _ = make_qkv([0, 16])
    q.requires_grad_()
    out = attend(q, k, v, spec).out
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(out.sum() + q.pow(2).sum(), q, create_graph=True)  # the penalty of a gradient's norm


def test_inputs_that_are_views_with_strides_give_the_same():
    cu = [0, 40]
    q, k, v, dout = make_qkv(cu)
    fused = torch.cat((q, k, v), 1)  # [T,H+2K,D], as a fused projection gives them
    views = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    for spec in (Full(), MoBA(8, 2)):
        plain_result, view_result = run(q, k, v, dout, spec, cu), run(*views, dout, spec, cu)
        assert torch.equal(plain_result[0].out, view_result[0].out)
        assert all(torch.equal(a, b) for a, b in zip(plain_result[1:], view_result[1:], strict=True))


@pytest.mark.parametrize("backend", [*BACKENDS, "flash"])
@pytest.mark.parametrize("spec", [Full(), MoBA(16, 3)], ids=str)
def test_autocast_changes_nothing(spec, backend):
    cu = [0, 100, 300]
    q, k, v, dout = make_qkv(cu, dtype=torch.float32, value_dim=8)
    usual = run(q, k, v, dout, spec, cu, backend=backend)
    delta, options = (dout * usual[0].out).sum(-1), {"pack": Pack(cu), "backend": backend}
    options["routing"] = route(q, k, spec, cu_seqlens=cu) if isinstance(spec, MoBA) else None
    part = attend_partial(q, k, v, spec, **options)
    grads = attend_partial_backward(dout, q, k, v, part.lse, delta, spec, **options)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = run(q, k, v, dout, spec, cu, backend=backend)
        if isinstance(spec, MoBA):
            assert route(q, k, spec, cu_seqlens=cu, backend=backend).equals(options["routing"])
        assert all(torch.equal(a, b) for a, b in zip(part, attend_partial(q, k, v, spec, **options), strict=True))
        rounded_grads = attend_partial_backward(dout, q, k, v, part.lse, delta, spec, **options)
    assert torch.equal(usual[0].out, rounded[0].out) and torch.equal(usual[0].lse, rounded[0].lse)
    for got, want in zip((*rounded[1:], *rounded_grads), (*usual[1:], *grads), strict=True):
        assert torch.equal(got, want)


def test_running_twice_gives_the_same_bits():
    cu = [0, 100, 300]
    q, k, v, dout = make_qkv(cu, dtype=torch.float32)
    for spec in (Full(), MoBA(16, 3)):
        first, second = run(q, k, v, dout, spec, cu), run(q, k, v, dout, spec, Pack(cu))
        assert torch.equal(first[0].out, second[0].out)
        assert all(torch.equal(a, b) for a, b in zip(first[1:], second[1:], strict=True))


def test_the_signature_of_the_original_counts_the_own_chunk_and_allows_gqa():
    cu = torch.tensor([0, 30, 70], dtype=torch.int32)
    q, k, v, _ = make_qkv(cu.tolist())
    for topk in (1, 3):
        out = moba_attn_varlen(q, k, v, cu, 40, 8, topk)
        want = oracle.attend(*as_numpy(q, k, v), cu.tolist(), (8, topk, "head"))
        assert_close(out, want.out, 1e-12)
    cu[1] = 20  # edited in place: the next call must see it
    want = oracle.attend(*as_numpy(q, k, v), cu.tolist(), (8, 3, "head"))
    assert_close(moba_attn_varlen(q, k, v, cu, 50, 8, 3), want.out, 1e-12)
    with pytest.raises(ValueError, match="max_seqlen"):
        moba_attn_varlen(q, k, v, cu, 40, 8, 3)


def test_the_oracle_itself_agrees_with_a_dense_masked_softmax():
    cu, moba = [0, 9, 40], (8, 2, "head")
    q, k, v, dout = make_qkv(cu)
    want = oracle.attend(*as_numpy(q, k, v), cu, moba, dout=dout.numpy())
    mask = torch.from_numpy(oracle.allowed_pairs(cu, 40, 4, moba, want.chosen))
    out, dq, dk, dv = plain(q, k, v, dout, mask)
    for got, expected in ((out, want.out), (dq, want.dq), (dk, want.dk), (dv, want.dv)):
        assert_close(got.detach(), expected, 1e-12)
    assert int(mask.sum()) == want.pairs
    assert np.isfinite(want.lse).all()
