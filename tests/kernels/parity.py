"""The parity grid: every backend against a dense fp64 softmax, over documents, heads, lengths, chunks, picks, dtypes.

`cases()` lists the grid, a pure generator; `check(case, backends, device)` raises AssertionError or returns what it
found. Routing is compared first: of small integers, whose scores are exact and often tie, every pick must be the same;
of random numbers, all but near ties. Then attention with that routing forced: its error against fp64 is at most twice
that of the same formulas written down in plain PyTorch at the inputs' dtype.

    python -m tests.kernels.parity --device cuda            # the whole grid; needs torch and numpy, on a GPU triton
    python -m tests.kernels.parity --sample 24

Shape letters: T tokens, H query heads, K key/value heads, D head dim, C chunks, P picks.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moba_kernels import MoBA, Pack, Routing, attend, route

NAMES = ("out", "lse", "dq", "dk", "dv")
# The largest error sits in one of a few rows with few keys, so its ratio is noisy in fp32: eight units in the last
# place of the tensor's largest element are let through on top (PyTorch's flash kernel for CPU takes an exp that is off
# by two, and its dq was seen more than four such units beyond twice the plain error). The ratio of the root mean
# squares is steady and must hold as it is.
ULPS = 8 * 2.0**-23


@dataclass(frozen=True)
class Case:
    cu: tuple[int, ...]
    heads: int
    kv_heads: int
    spec: MoBA
    dtype: torch.dtype
    seed: int
    dim: int = 128

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def __str__(self) -> str:
        spec, dtype = self.spec, str(self.dtype).removeprefix("torch.")
        heads = f"H{self.heads}/K{self.kv_heads}"
        return f"{len(self.cu) - 1}docs-{heads}-T{self.cu[-1]}-{spec.chunk_size}x{spec.topk}-{spec.select}-{dtype}"


def cases() -> Iterator[Case]:
    """The whole grid; boundaries, groups and selection are drawn by a seed, the same on every machine."""
    documents, heads, lengths = (1, 4, 7), (1, 2, 4, 8), (512, 1024, 2048)
    chunks, topks, dtypes = (128, 256, 1024), (1, 2, 3, 4), (torch.float32, torch.bfloat16)
    grid = itertools.product(documents, heads, lengths, chunks, topks, dtypes)
    for seed, (num_documents, num_heads, num_tokens, chunk_size, topk, dtype) in enumerate(grid):
        draw = random.Random(seed)
        cuts = sorted(draw.randint(0, num_tokens) for _ in range(num_documents - 1))  # equal cuts: an empty document
        group = draw.choice([g for g in (1, 2, 4) if num_heads % g == 0])
        spec = MoBA(chunk_size, topk, draw.choice(("head", "head", "group")))
        yield Case((0, *cuts, num_tokens), num_heads, num_heads // group, spec, dtype, seed)


def inputs(case: Case, device: str, *, integers: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [T,H,D], k and v [T,K,D], dout [T,H,D]; integers: of -2 .. 2, so that scores are exact and often tie."""
    generator = torch.Generator().manual_seed(case.seed)

    def draw(num_heads: int) -> Tensor:
        shape = (case.cu[-1], num_heads, case.dim)
        drawn = (
            torch.randint(-2, 3, shape, generator=generator) if integers else torch.randn(shape, generator=generator)
        )
        return drawn.to(case.dtype).to(device)

    return draw(case.heads), draw(case.kv_heads), draw(case.kv_heads), draw(case.heads)


def expected_picks(q: Tensor, k: Tensor, case: Case) -> Tensor:
    """[T,R,topk] chunk ids: own chunk, then the document's earlier ones by fp64 score (rounded), ties later first."""
    table = Pack(case.cu).chunks(case.spec.chunk_size)
    geometry = table.tensors(q.device)
    queries = q.double() if case.spec.select == "head" else q.double().unflatten(1, (case.kv_heads, -1)).sum(2)
    own_T = geometry.chunk_of_token_T
    chunk_C = torch.arange(table.num_chunks, device=q.device)
    candidate_TC = (chunk_C < own_T[:, None]) & (geometry.doc_C[own_T][:, None] == geometry.doc_C)
    ids = torch.full((*queries.shape[:2], case.spec.topk), -1, dtype=torch.int32, device=q.device)
    ids[:, :, 0] = own_T[:, None]
    wanted = min(case.spec.topk - 1, table.num_chunks)
    for head in range(queries.shape[1]):
        mean_CD = means_of(k, case, head * case.kv_heads // queries.shape[1])
        score_TC = (queries[:, head] @ mean_CD.T).float().masked_fill(~candidate_TC, -torch.inf)
        order = table.num_chunks - 1 - score_TC.flip(1).sort(dim=1, descending=True, stable=True).indices[:, :wanted]
        ids[:, head, 1 : 1 + wanted] = torch.where(candidate_TC.gather(1, order), order, -1)
    return ids


def means_of(k: Tensor, case: Case, kv_head: int) -> Tensor:
    """[C,D] fp64 of the published fp32 means of one KV head."""
    geometry = Pack(case.cu).chunks(case.spec.chunk_size)
    edges = zip(geometry.start_C.tolist(), geometry.end_C.tolist(), strict=True)
    means = [k[a:b, kv_head].double().mean(0).float() for a, b in edges]
    return torch.stack(means).double()


def compare_routing(got: Tensor, q: Tensor, k: Tensor, case: Case) -> int:
    """Rows [T,R] that picked otherwise, each a near tie: the fp64 gap is within 2 * D * 2^-24 * sum |q_d * mean_d|."""
    want = expected_picks(q, k, case)
    differs = got != want
    for t, r, slot in differs.nonzero().tolist():
        kv_head = r * case.kv_heads // got.shape[1]
        heads = slice(r, r + 1) if case.spec.select == "head" else slice(r * case.group, (r + 1) * case.group)
        query = q[t, heads].double().sum(0)
        pair = [int(x[t, r, slot]) for x in (got, want)]
        assert min(pair) >= 0, f"{case}: query {t}, head {r} picked {pair[0]} instead of {pair[1]}"
        terms = means_of(k, case, kv_head)[pair] * query
        bound = 2 * case.dim * 2.0**-24 * float(terms.abs().sum(1).max())
        gap = abs(float(terms[0].sum() - terms[1].sum()))
        assert gap <= bound, f"{case}: query {t}, head {r} picked {pair[0]} instead of {pair[1]}, {gap:.3g} apart"
    rows = int(differs.any(-1).sum())
    assert rows <= 1e-4 * got.shape[0] * got.shape[1], f"{case}: {rows} near ties picked otherwise"
    return rows


def mask_of_head(ids: Tensor, head: int, case: Case) -> Tensor:
    """[T,T] bool."""
    geometry = Pack(case.cu).chunks(case.spec.chunk_size)
    chunk_of_T = geometry.tensors(ids.device).chunk_of_token_T
    chosen = ids[:, head * ids.shape[1] // case.heads].long()
    open_TC = torch.zeros(len(chunk_of_T), geometry.num_chunks + 1, dtype=torch.bool, device=ids.device)
    open_TC.scatter_(1, torch.where(chosen < 0, geometry.num_chunks, chosen), True)
    token = torch.arange(len(chunk_of_T), device=ids.device)
    return open_TC[:, chunk_of_T] & (token <= token[:, None])


def dense(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, ids: Tensor, case: Case, dtype: torch.dtype) -> list[Tensor]:
    """(out, lse, dq, dk, dv) by the formulas of attend/README.md, head by head, each result rounded to `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = ((q, dtype), (q[..., 0], wide), (q, dtype), (k, wide), (v, wide))
    out, lse, dq, dk, dv = (torch.zeros_like(x, dtype=kind) for x, kind in shapes)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a.to(wide) @ b.to(wide)).to(dtype)

    for head in range(case.heads):
        kv_head = head // case.group
        q_TD, k_TD, v_TD, dout_TD = (x.to(dtype) for x in (q[:, head], k[:, kv_head], v[:, kv_head], dout[:, head]))
        scores = (
            (product(q_TD, k_TD.T) * case.dim**-0.5).to(wide).masked_fill_(~mask_of_head(ids, head, case), -torch.inf)
        )
        lse[:, head] = scores.logsumexp(1)
        p = scores.sub_(lse[:, head, None]).exp_().to(dtype)
        out[:, head] = product(p, v_TD)
        delta = (out[:, head].to(wide) * dout_TD).sum(1, keepdim=True)
        ds = ((product(dout_TD, v_TD.T) - delta).to(dtype) * p) * case.dim**-0.5
        dq[:, head] = product(ds, k_TD)
        dk[:, kv_head] += product(ds.T, q_TD)
        dv[:, kv_head] += product(p.T, dout_TD)
    return [out, lse, dq, dk.to(dtype), dv.to(dtype)]


def run(case: Case, backend: str, routing: Routing, *tensors: Tensor) -> list[Tensor]:
    """(out, lse, dq, dk, dv) of a backend with a forced routing; strict about the pairs."""
    q, k, v, dout = tensors
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    result = attend(*leaves, case.spec, cu_seqlens=Pack(case.cu), backend=backend, routing=routing)
    result.report.raise_if_different()
    assert result.report.backend == backend
    return [result.out.detach(), result.lse, *torch.autograd.grad(result.out, leaves, dout)]


@dataclass
class Found:
    """What a check, or many, came upon: errors divided by those of the plain way, by backend and result."""

    rows: int = 0
    near_ties: int = 0
    worst: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    """(ratio of largest errors, ratio of root mean squares)."""

    def note(self, backend: str, name: str, ratios: tuple[float, float]) -> None:
        known = self.worst.get((backend, name), (0.0, 0.0))
        self.worst[backend, name] = (max(known[0], ratios[0]), max(known[1], ratios[1]))

    def add(self, other: Found) -> None:
        self.rows, self.near_ties = self.rows + other.rows, self.near_ties + other.near_ties
        for (backend, name), ratios in other.worst.items():
            self.note(backend, name, ratios)

    def __str__(self) -> str:
        backends = dict.fromkeys(backend for backend, _ in self.worst)
        worst = "; ".join(
            f"{b} " + " ".join(f"{n} {self.worst[b, n][0]:.2f}/{self.worst[b, n][1]:.2f}" for n in NAMES)
            for b in backends
        )
        return f"{self.near_ties} near ties in {self.rows} rows; error / plain error (max/rms): {worst}"


def compare(got: Tensor, exact: Tensor, plain: Tensor, what: str) -> tuple[float, float]:
    """Both ratios; AssertionError where either is above its bound."""
    assert torch.isfinite(got).all(), f"{what}: not finite"
    error, usual = got.double() - exact, plain.double() - exact
    largest, allowed = float(error.abs().max()), float(usual.abs().max())
    floor = ULPS * float(exact.abs().max())
    assert largest <= 2 * allowed + floor, f"{what}: max error {largest:.3g}, plain {allowed:.3g}, floor {floor:.3g}"
    mean, usual_mean = (float(x.square().mean().sqrt()) for x in (error, usual))
    assert mean <= 2 * usual_mean, f"{what}: rms error {mean:.3g}, plain {usual_mean:.3g}"
    tiny = torch.finfo(torch.float64).tiny
    return largest / max(allowed, tiny), mean / max(usual_mean, tiny)


def check(case: Case, backends: Iterable[str], device: str) -> Found:
    """Routing, then attention, of every backend. AssertionError says which case, backend and result is off."""
    found = Found()
    q, k, _, _ = inputs(case, device, integers=True)
    exact_picks = expected_picks(q, k, case)
    tensors = inputs(case, device)
    ids, exact, plain = None, [], []
    for backend in backends:
        of_integers = route(q, k, case.spec, cu_seqlens=Pack(case.cu), backend=backend).chunk_ids
        assert torch.equal(of_integers, exact_picks), f"{case}, {backend}: picks of small integers differ"
        routing = route(*tensors[:2], case.spec, cu_seqlens=Pack(case.cu), backend=backend)
        found.near_ties += compare_routing(routing.chunk_ids, *tensors[:2], case)
        found.rows += routing.num_queries * routing.num_routed_heads
        if ids is None or not torch.equal(ids, routing.chunk_ids):
            ids = routing.chunk_ids
            exact, plain = (dense(*tensors, ids, case, dtype) for dtype in (torch.float64, case.dtype))
        results = run(case, backend, routing, *tensors)
        for name, got, want, usual in zip(NAMES, results, exact, plain, strict=True):
            found.note(backend, name, compare(got, want, usual, f"{case}, {backend}: {name}"))
    return found


def backends_of(case: Case, device: str) -> tuple[str, ...]:
    """The fast backends that serve a case: flash kernels on a GPU take 16 bits only."""
    if device == "cpu":
        return ("torch", "flash")
    return ("triton", "torch") if case.dtype == torch.float32 else ("triton", "torch", "flash")


def check_all(chosen: Iterable[Case], device: str, title: str) -> Found:
    """Check case after case; prints a line now and then and a summary. AssertionError at the end, with all failures."""
    found, started, told = Found(), time.monotonic(), time.monotonic()
    listed, failures = list(chosen), []
    for i, case in enumerate(listed, 1):
        try:
            found.add(check(case, backends_of(case, device), device))
        except AssertionError as error:
            failures.append(str(error))
            print(f"parity {title}: {error}", flush=True)
        if time.monotonic() - told > 20:
            told = time.monotonic()
            print(f"parity {title}: {i} of {len(listed)} cases, {told - started:.0f} s", flush=True)
    print(f"parity {title}: {len(listed)} cases, {time.monotonic() - started:.0f} s; {found}", flush=True)
    assert not failures, f"{len(failures)} of {len(listed)} cases: " + "; ".join(failures)
    return found


def sample(count: int, seed: int = 0) -> list[Case]:
    """Some cases of the grid, the same ones for a seed."""
    return random.Random(seed).sample(list(cases()), count)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--sample", type=int, default=0, help="so many cases, drawn by a seed; 0 = the whole grid")
    options = parser.parse_args()
    chosen = sample(options.sample) if options.sample else list(cases())
    try:
        check_all(chosen, options.device, f"on {options.device}")
    except AssertionError as error:
        print(f"parity FAILED: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
