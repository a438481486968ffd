"""Random geometry: the fast CPU backends against the oracle and against splits of themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moba_kernels import Full, MoBA, Pack, attend, attend_partial, attend_partial_backward, merge_partials, route

from . import oracle
from .inputs import as_numpy, assert_close, assert_same_choice, chosen_to_ids, ids_to_chosen, make_qkv, moba_tuple

BACKENDS = ["torch", "flash"]

rows = st.lists(st.integers(0, 25), min_size=1, max_size=5).map(
    lambda lengths: [sum(lengths[:i]) for i in range(len(lengths) + 1)]
)
selects = st.sampled_from(["head", "group"])
specs = st.one_of(st.just(Full()), st.builds(MoBA, st.integers(1, 20), st.integers(1, 6), selects))
heads = st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(cu=rows, spec=specs, heads=heads, value_dim=st.integers(1, 6), seed=st.integers(0, 1000))
def test_any_geometry_gives_the_oracles_answer(backend, cu, spec, heads, value_dim, seed):
    q, k, v, dout = make_qkv(cu, *heads, dim=4, value_dim=value_dim, seed=seed)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    result = attend(*leaves, spec, cu_seqlens=cu, return_routing=True, backend=backend)
    chosen = None
    if result.routing is not None:
        assert_same_choice(result.routing, q, k, cu)
        chosen = ids_to_chosen(result.routing)
    want = oracle.attend(*as_numpy(q, k, v), cu, moba_tuple(spec), dout=dout.numpy(), chosen=chosen)
    assert_close(result.out.detach(), want.out, 1e-12)
    assert_close(result.lse, want.lse, 1e-12)
    for got, expected in zip(torch.autograd.grad(result.out, leaves, dout), (want.dq, want.dk, want.dv), strict=True):
        assert_close(got, expected, 1e-11)
    assert result.report.planned_pairs == result.report.computed_pairs == want.pairs


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    cu=rows,
    log_chunk=st.integers(0, 4),
    topk=st.integers(2, 5),
    select=selects,
    heads=heads,
    few=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_engineered_ties_go_to_the_later_chunk_and_attention_follows(
    backend, cu, log_chunk, topk, select, heads, few, seed
):
    # A few small integers for keys and chunks of a power of two: means and scores are exact, and most scores tie.
    spec = MoBA(1 << log_chunk, topk, select)
    q, k, v, _ = make_qkv(cu, *heads, dim=3, seed=seed, integers=True)
    k = k.clamp(-1, 1) if few == 3 else k.sign() * (few - 1)
    want = oracle.attend(*as_numpy(q, k, v), cu, moba_tuple(spec))
    result = attend(q, k, v, spec, cu_seqlens=cu, return_routing=True, backend=backend)
    if cu[-1]:
        assert torch.equal(result.routing.chunk_ids, chosen_to_ids(want.chosen, topk))
    assert_close(result.out, want.out, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(cu=rows, spec=specs, heads=heads, seed=st.integers(0, 1000), parts=st.integers(1, 4))
def test_any_split_of_queries_and_keys_merges_to_the_whole(backend, cu, spec, heads, seed, parts):
    q, k, v, dout = make_qkv(cu, *heads, dim=4, seed=seed)
    pack = Pack(cu)
    routing = route(q, k, spec, cu_seqlens=pack) if isinstance(spec, MoBA) else None
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    whole = attend(*leaves, spec, cu_seqlens=pack, routing=routing, backend="reference")
    want = torch.autograd.grad(whole.out, leaves, dout)
    whole_out, lse, delta = whole.out.detach(), whole.lse, (whole.out.detach() * dout).sum(-1)
    owner = torch.randint(0, parts, (2, cu[-1]), generator=torch.Generator().manual_seed(seed))
    got = [torch.zeros_like(x) for x in leaves]
    for mine in ((owner[0] == part).nonzero().flatten() for part in range(parts)):
        part_routing = routing.select(mine) if routing else None
        merged = torch.zeros_like(whole_out[mine]), torch.full_like(lse[mine], -torch.inf)
        for keys in ((owner[1] == part).nonzero().flatten() for part in range(parts)):
            at_hand = {"q_positions": mine, "k_positions": keys, "routing": part_routing}
            options = {"pack": pack, "backend": backend, **at_hand}
            merged = merge_partials(*merged, *attend_partial(q[mine], k[keys], v[keys], spec, **options))
            shares = attend_partial_backward(
                dout[mine], q[mine], k[keys], v[keys], lse[mine], delta[mine], spec, **options
            )
            for into, at, share in zip(got, (mine, keys, keys), shares, strict=True):
                into[at] += share
        assert_close(merged[0], whole_out[mine], 1e-12)
        assert_close(merged[1], lse[mine], 1e-12)
    for mine, expected in zip(got, want, strict=True):
        assert_close(mine, expected, 1e-11)
