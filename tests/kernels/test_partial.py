"""attend_partial: any split of keys and of queries, merged, is the whole; forward and backward."""

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
    route,
)

from .inputs import assert_close, make_qkv

SPECS = [Full(), MoBA(8, 1), MoBA(8, 3), MoBA(16, 3, "group"), MoBA(100, 2)]
BACKENDS = ["reference", "torch"]
CU = [0, 1, 1, 30, 97]


def pieces(num_tokens, cut):
    """Ascending positions of every part."""
    token = torch.arange(num_tokens)
    if cut == "halves":
        owner = (token >= num_tokens // 2).long()
    elif cut == "inside chunks":
        owner = (token // 5) % 3  # every chunk of 8 is spread over parts
    elif cut == "zigzag":
        owner = torch.tensor([0, 1, 1, 0])[token * 4 // num_tokens]
    else:
        owner = torch.randint(0, 4, (num_tokens,), generator=torch.Generator().manual_seed(3))
    return [(owner == part).nonzero().flatten() for part in range(int(owner.max()) + 1)]


@pytest.mark.parametrize("cut", ["halves", "inside chunks", "zigzag", "random"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_queries_and_keys_merge_to_the_whole(spec, cut, backend):
    check_that_parts_merge_to_the_whole(spec, cut, backend)


def check_that_parts_merge_to_the_whole(spec, cut, backend, dtype=torch.float64):
    pack, tolerance = Pack(CU), 1e-12 if dtype == torch.float64 else 2e-6
    q, k, v, dout = make_qkv(CU, dtype=dtype)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    routing = route(q, k, spec, cu_seqlens=pack) if isinstance(spec, MoBA) else None
    whole = attend(*leaves, spec, cu_seqlens=pack, routing=routing)
    want = torch.autograd.grad(whole.out, leaves, dout)
    delta = (whole.out.detach() * dout).sum(-1)
    got = [torch.zeros_like(x) for x in (q, k, v)]
    parts = pieces(CU[-1], cut)
    for rows in parts:
        mine = routing.select(rows) if routing else None
        out, lse = torch.zeros(len(rows), 4, 16, dtype=dtype), torch.full((len(rows), 4), -torch.inf, dtype=dtype)
        for keys in parts:
            options = {"pack": pack, "q_positions": rows, "k_positions": keys, "routing": mine, "backend": backend}
            part = attend_partial(q[rows], k[keys], v[keys], spec, **options)
            out, lse = merge_partials(out, lse, *part)
            dq, dk, dv = attend_partial_backward(
                dout[rows], q[rows], k[keys], v[keys], whole.lse[rows], delta[rows], spec, **options
            )
            got[0][rows] += dq
            got[1][keys] += dk
            got[2][keys] += dv
        assert_close(out, whole.out.detach()[rows], tolerance)
        assert_close(lse, whole.lse[rows], tolerance)
    for mine, expected in zip(got, want, strict=True):
        assert_close(mine, expected, 10 * tolerance)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_without_any_key_at_hand_gives_zero_and_minus_infinity(spec, backend):
    pack = Pack([0, 40, 64])
    q, k, v, dout = make_qkv([0, 64], dtype=torch.float32)
    routing = route(q, k, spec, cu_seqlens=pack) if isinstance(spec, MoBA) else None
    early, late = torch.arange(0, 20), torch.arange(20, 64)
    part_routing = routing.select(early) if routing else None
    options = {"pack": pack, "q_positions": early, "k_positions": late, "routing": part_routing, "backend": backend}
    part = attend_partial(q[:20], k[20:], v[20:], spec, **options)
    assert (part.out == 0).all() and (part.lse == -torch.inf).all()
    lse, delta = torch.full((20, 4), -torch.inf), torch.zeros(20, 4)
    for grad in attend_partial_backward(dout[:20], q[:20], k[20:], v[20:], lse, delta, spec, **options):
        assert (grad == 0).all()
    mixed = torch.tensor([3, 50])  # one row sees nothing, its neighbour in the tile does
    mixed_routing = routing.select(mixed) if routing else None
    options = {"pack": pack, "q_positions": mixed, "k_positions": late, "routing": mixed_routing, "backend": backend}
    part = attend_partial(q[mixed], k[20:], v[20:], spec, **options)
    assert (part.out[0] == 0).all() and (part.lse[0] == -torch.inf).all()
    assert torch.isfinite(part.lse[1]).all() and torch.isfinite(part.out).all()


@pytest.mark.parametrize("spec", [Full(), MoBA(8, 3)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_queries_or_no_keys_at_hand(spec, backend):
    pack = Pack([0, 24])
    q, k, v, dout = make_qkv([0, 24], dtype=torch.float32)
    routing = route(q, k, spec, cu_seqlens=pack) if isinstance(spec, MoBA) else None
    none = torch.zeros(0, dtype=torch.int64)
    no_keys = attend_partial(q, k[none], v[none], spec, pack=pack, k_positions=none, routing=routing, backend=backend)
    assert (no_keys.out == 0).all() and (no_keys.lse == -torch.inf).all()
    no_routing = routing.select(none) if routing else None
    no_queries = attend_partial(q[none], k, v, spec, pack=pack, q_positions=none, routing=no_routing, backend=backend)
    assert no_queries.out.shape == (0, 4, 16)
    grads = attend_partial_backward(
        dout[none], q[none], k, v, no_queries.lse, no_queries.lse, spec,
        pack=pack, q_positions=none, routing=no_routing, backend=backend,
    )  # fmt: skip
    assert [tuple(g.shape) for g in grads] == [(0, 4, 16), (24, 2, 16), (24, 2, 16)]
    assert all((g == 0).all() for g in grads)


def test_partials_and_their_gradients_are_fp32_for_bf16_inputs():
    pack = Pack([0, 40])
    q, k, v, dout = make_qkv([0, 40], dtype=torch.bfloat16, value_dim=8)
    part = attend_partial(q, k, v, Full(), pack=pack)
    assert part.out.dtype == part.lse.dtype == torch.float32
    delta = (part.out * dout).sum(-1)
    grads = attend_partial_backward(dout, q, k, v, part.lse, delta, Full(), pack=pack)
    assert [g.dtype for g in grads] == [torch.float32] * 3
    assert [tuple(g.shape) for g in grads] == [(40, 4, 16), (40, 2, 16), (40, 2, 8)]


def test_a_partial_builds_no_graph():
    q, k, v, _ = make_qkv([0, 16])
    part = attend_partial(q.requires_grad_(), k, v, Full(), pack=Pack([0, 16]))
    assert not part.out.requires_grad


def test_merging_is_safe_at_minus_infinity_and_symmetric():
    inf = torch.inf
    out_a, out_b = torch.tensor([[[2.0]], [[0.0]], [[3.0]]]), torch.tensor([[[0.0]], [[0.0]], [[5.0]]])
    lse_a, lse_b = torch.tensor([[1.5], [-inf], [0.0]]), torch.tensor([[-inf], [-inf], [0.0]])
    for merged in (merge_partials(out_a, lse_a, out_b, lse_b), merge_partials(out_b, lse_b, out_a, lse_a)):
        assert merged.out.flatten().tolist() == [2.0, 0.0, 4.0]
        assert merged.lse[:2].flatten().tolist() == [1.5, -inf]
        assert abs(float(merged.lse[2]) - 0.6931472) < 1e-6


def test_bf16_partials_are_refused():
    out, lse = torch.zeros(1, 1, 4, dtype=torch.bfloat16), torch.zeros(1, 1)
    with pytest.raises(ValueError, match="fp32"):
        merge_partials(out, lse, out, lse)


@pytest.mark.parametrize("first", range(5, 9))
def test_a_tile_whose_first_query_misses_only_the_last_key_is_masked(first):
    pack, rows, keys = Pack([0, 24]), torch.arange(first, first + 8), torch.arange(8)
    q, k, v, _ = make_qkv([0, 24])
    part = attend_partial(q[rows], k[keys], v[keys], Full(), pack=pack, q_positions=rows, k_positions=keys)
    for i, position in enumerate(rows.tolist()):
        seen = min(position + 1, 8)
        alone = attend(q[position].expand(seen, -1, -1), k[:seen], v[:seen], Full(), backend="reference")
        assert_close(part.out[i], alone.out[-1], 1e-13)
        assert_close(part.lse[i], alone.lse[-1], 1e-13)


def test_a_query_that_sees_no_key_at_hand_shares_a_tile_with_one_that_sees_many():
    rows, keys = torch.tensor([0, 590]), torch.arange(10, 590)
    q, k, v, dout = make_qkv([0, 600])
    call = {"pack": Pack([0, 600]), "q_positions": rows, "k_positions": keys}
    part = attend_partial(q[rows], k[keys], v[keys], Full(), **call)
    alone = attend_partial(q[rows[1:]], k[keys], v[keys], Full(), **{**call, "q_positions": rows[1:]})
    assert (part.out[0] == 0).all() and (part.lse[0] == -torch.inf).all()
    assert_close(part.out[1:], alone.out, 1e-13)
    delta = (part.out * dout[rows]).sum(-1)
    dq, dk, dv = attend_partial_backward(dout[rows], q[rows], k[keys], v[keys], part.lse, delta, Full(), **call)
    assert (dq[0] == 0).all() and all(torch.isfinite(x).all() for x in (dq, dk, dv))
