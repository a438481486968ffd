"""Random geometry: the torch backend against the oracle and against splits of itself."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moba_kernels import Full, MoBA, Pack, attend, attend_partial, merge_partials, route

from . import oracle
from .inputs import as_numpy, assert_close, assert_same_choice, ids_to_chosen, make_qkv, moba_tuple

rows = st.lists(st.integers(0, 25), min_size=1, max_size=5).map(
    lambda lengths: [sum(lengths[:i]) for i in range(len(lengths) + 1)]
)
specs = st.one_of(
    st.just(Full()), st.builds(MoBA, st.integers(1, 20), st.integers(1, 6), st.sampled_from(["head", "group"]))
)
heads = st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cu=rows, spec=specs, heads=heads, value_dim=st.integers(1, 6), seed=st.integers(0, 1000))
def test_any_geometry_gives_the_oracles_answer(cu, spec, heads, value_dim, seed):
    q, k, v, dout = make_qkv(cu, *heads, dim=4, value_dim=value_dim, seed=seed)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    result = attend(*leaves, spec, cu_seqlens=cu, return_routing=True)
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


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cu=rows, spec=specs, heads=heads, seed=st.integers(0, 1000), parts=st.integers(1, 4))
def test_any_split_of_the_keys_merges_to_the_whole(cu, spec, heads, seed, parts):
    q, k, v, _ = make_qkv(cu, *heads, dim=4, seed=seed)
    pack = Pack(cu)
    routing = route(q, k, spec, cu_seqlens=pack) if isinstance(spec, MoBA) else None
    whole = attend(q, k, v, spec, cu_seqlens=pack, routing=routing)
    owner = torch.randint(0, parts, (cu[-1],), generator=torch.Generator().manual_seed(seed))
    out, lse = torch.zeros_like(whole.out), torch.full_like(whole.lse, -torch.inf)
    for part in range(parts):
        keys = (owner == part).nonzero().flatten()
        piece = attend_partial(q, k[keys], v[keys], spec, pack=pack, k_positions=keys, routing=routing)
        out, lse = merge_partials(out, lse, *piece)
    assert_close(out, whole.out, 1e-12)
    assert_close(lse, whole.lse, 1e-12)
