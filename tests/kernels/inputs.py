"""Inputs and comparisons that the operator's tests share."""

from __future__ import annotations

import numpy as np
import torch

from moba_kernels import MoBA, Pack, Routing

from . import oracle

# Row layouts by what they exercise.
ROWS = {
    "one document": [0, 64],
    "tail chunks": [0, 37, 90],
    "one-token and empty documents": [0, 0, 1, 2, 2, 2, 40, 41, 41],
    "odd lengths": [0, 17, 30, 63],
}


def make_qkv(cu, heads=4, kv_heads=2, dim=16, value_dim=None, dtype=torch.float64, seed=0, integers=False):
    """q [T,H,D], k [T,K,D], v [T,K,Dv], dout [T,H,Dv]; integers=True draws from -2..2."""
    generator = torch.Generator().manual_seed(seed)
    tokens, value_dim = cu[-1], value_dim or dim

    def draw(*shape):
        if integers:
            return torch.randint(-2, 3, shape, generator=generator).to(dtype)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return (
        draw(tokens, heads, dim),
        draw(tokens, kv_heads, dim),
        draw(tokens, kv_heads, value_dim),
        draw(tokens, heads, value_dim),
    )


def as_numpy(*tensors):
    return tuple(x.detach().double().numpy() for x in tensors)


def moba_tuple(spec):
    return (spec.chunk_size, spec.topk, spec.select) if isinstance(spec, MoBA) else None


def chosen_to_ids(chosen, topk):
    """The oracle's choice as chunk_ids [T,R,topk]."""
    return torch.tensor([[row + [-1] * (topk - len(row)) for row in token] for token in chosen], dtype=torch.int32)


def ids_to_chosen(routing: Routing):
    return [[[c for c in row if c >= 0] for row in token] for token in routing.chunk_ids.tolist()]


def assert_same_choice(routing: Routing, q, k, cu):
    """The oracle's picks; a difference only where the fp64 scores are as close as fp32 rounding explains."""
    spec = routing.spec
    if not cu[-1]:
        assert routing.num_queries == 0
        return
    expected = chosen_to_ids(oracle.choose(*as_numpy(q, k), cu, *moba_tuple(spec)), spec.topk)
    differs = (routing.chunk_ids != expected).any(-1)
    if not differs.any():
        return
    geometry = Pack(cu).chunks(spec.chunk_size)
    for t, r in differs.nonzero().tolist():
        kv = r * k.shape[1] // routing.num_routed_heads
        query = q[t, r].double() if spec.select == "head" else q[t].double().view(k.shape[1], -1, q.shape[2])[r].sum(0)
        for got, want in zip(routing.chunk_ids[t, r].tolist(), expected[t, r].tolist(), strict=True):
            if got == want:
                continue
            assert got >= 0 and want >= 0, f"query {t}, head {r}: {got} instead of {want}"
            terms = [
                query * k[geometry.start_C[c] : geometry.end_C[c], kv].double().mean(0).float().double()
                for c in (got, want)
            ]
            bound = 2 * q.shape[2] * 2.0**-24 * max(float(x.abs().sum()) for x in terms)
            assert abs(float(terms[0].sum() - terms[1].sum())) <= bound, f"query {t}, head {r}: {got} instead of {want}"
    assert differs.float().mean() <= 1e-4


def assert_close(got, want, tolerance):
    got = got.detach()
    want = torch.from_numpy(want) if isinstance(want, np.ndarray) else want
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    error = float((got.double() - want.detach().double()).abs().max()) if got.numel() else 0.0
    assert error <= tolerance, f"max error {error:.3g} > {tolerance:.3g}"
