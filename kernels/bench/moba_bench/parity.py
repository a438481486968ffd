"""The gate before every figure: routing first, then attention with that routing forced. Also the core of tests/gpu.

- Routing against the reference backend. A pick may differ only where the fp64 scores are closer than fp32 rounding
  explains, 2 * D * 2^-24 * sum_d |q_d mean_d|, in at most 1e-4 of the rows (one row where there are fewer).
- out, dq, dk and dv against the reference backend in fp64: the largest error is at most twice that of the plain way
  (one matrix product, mask, softmax, one product; backward by autograd or by the formula) at the inputs' own precision.
- The pairs that the backend counted are those that were planned.

Letters: T tokens, H query heads, K key/value heads, R routing heads, D head dim, C chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moba_kernels import MoBA, Pack, Routing, attend, mean_keys, pool_sums, route

from .shapes import Shape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGEST_ERROR_RATIO = 2.0
# Room on top, in units of the largest element: the largest fp32 error sits in a few rows, and its ratio is noisy.
FP32_ULPS = 8 * 2.0**-23
LARGEST_SHARE_OF_TIES = 1e-4


@dataclass(frozen=True)
class Parity:
    """The verdict on one backend at one shape."""

    ok: bool
    problems: tuple[str, ...]
    worst_ratio: float
    """Largest error over the plain way's own error, of out, dq, dk, dv."""
    near_ties: int
    """Rows whose picks differ where fp32 rounding explains it."""

    def __str__(self) -> str:
        if not self.ok:
            return "RED: " + "; ".join(self.problems)
        return f"error {self.worst_ratio:.2f}x the plain way's, {self.near_ties} near ties"


def make_inputs(
    shape: Shape, device: str, seed: int = 0, value_dim: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [T,H,D], k [T,K,D], v [T,K,Dv], dout [T,H,Dv]: standard normal, so that routing spreads over all chunks.

    value_dim None: Dv = D.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(heads: int, dim: int) -> Tensor:
        size = (shape.tokens, heads, dim)
        return torch.randn(size, generator=generator, device=device, dtype=DTYPES[shape.dtype])

    dim, dim_v = shape.dim, value_dim or shape.dim
    return (
        draw(shape.heads, dim),
        draw(shape.kv_heads, dim),
        draw(shape.kv_heads, dim_v),
        draw(shape.heads, dim_v),
    )


def check_parity(shape: Shape, backend: str, device: str, seed: int = 0, value_dim: int | None = None) -> Parity:
    """Compare `backend` with the reference, both on `device`. The shape must be small: the reference is dense."""
    inputs = make_inputs(shape, "cpu", seed, value_dim)
    q, k, v, dout = (x.to(device) for x in inputs)
    pack, spec = shape.pack, shape.spec
    routing = route(q, k, spec, cu_seqlens=pack, backend=backend)
    near_ties, problems = compare_routing(routing, inputs[0], inputs[1], pack, spec)
    got, computed, planned = run_attend((q, k, v, dout), routing, backend)
    if computed != planned:
        problems.append(f"{computed} pairs were attended, {planned} planned")
    ids = routing.chunk_ids
    forced = Routing.from_chunk_ids(ids, spec, pack, validate=True)
    exact, _, _ = run_attend(tuple(x.double() for x in (q, k, v, dout)), forced, "reference")
    usual = list(plain_attention(q, k, v, dout, allowed_pairs(ids, pack, spec, shape.heads)))
    worst = 0.0
    for i, name in enumerate(("out", "dq", "dk", "dv")):
        error, *peers = (float((x[i].detach().double() - exact[i]).abs().max()) for x in (got, *usual))
        allowed = max(peers)
        worst = max(worst, error / allowed if allowed else (0.0 if error == 0 else float("inf")))
        room = FP32_ULPS * float(exact[i].abs().max())
        if not error <= LARGEST_ERROR_RATIO * allowed + room:  # NaN fails
            problems.append(f"{name}: error {error:.3g}, the plain way's is {allowed:.3g}")
    return Parity(not problems, tuple(problems), worst, near_ties)


def run_attend(inputs: tuple[Tensor, ...], routing: Routing, backend: str) -> tuple[tuple[Tensor, ...], int, int]:
    """((out, dq, dk, dv), computed pairs, planned pairs) with this routing; inputs: q, k, v, dout."""
    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    result = attend(q, k, v, routing.spec, cu_seqlens=routing.pack, routing=routing, backend=backend)
    grads = torch.autograd.grad(result.out, (q, k, v), inputs[3])
    return (result.out.detach(), *grads), result.report.computed_pairs, result.report.planned_pairs


def compare_routing(routing: Routing, q: Tensor, k: Tensor, pack: Pack, spec: MoBA) -> tuple[int, list[str]]:
    """(rows that differ in near ties, problems) against the reference backend on the CPU tensors q and k."""
    want = route(q, k, spec, cu_seqlens=pack, backend="reference").chunk_ids
    got = routing.chunk_ids.cpu()
    if got.shape != want.shape:
        return 0, [f"routing is {tuple(got.shape)} instead of {tuple(want.shape)}"]
    differs_TR = (got != want).any(-1)
    rows = differs_TR.nonzero()
    if not len(rows):
        return 0, []
    token, head = rows[:, 0], rows[:, 1]
    a, b = (ids[token, head].long() for ids in (got, want))
    if bool((((a < 0) | (a >= pack.chunks(spec.chunk_size).num_chunks)) != (b < 0)).any()):
        return 0, ["routing: another number of picks"]
    means = mean_keys(*pool_sums(k, pack=pack, chunk_size=spec.chunk_size, backend="reference")).double()
    routed, kv_heads = got.shape[1], k.shape[1]
    queries = q.double()
    if routed != q.shape[1]:
        queries = queries.view(q.shape[0], routed, -1, q.shape[2]).sum(2)
    query = queries[token, head][:, None]
    kv_head = (head * kv_heads // routed)[:, None]
    terms_a, terms_b = (query * means[x.clamp_min(0), kv_head] for x in (a, b))
    gap = (terms_a.sum(-1) - terms_b.sum(-1)).abs()
    bound = 2 * q.shape[2] * 2.0**-24 * torch.maximum(terms_a.abs().sum(-1), terms_b.abs().sum(-1))
    problems = []
    wrong = int((gap > bound).any(-1).sum())
    if wrong:
        problems.append(f"routing: {wrong} rows differ by more than fp32 rounding explains")
    if len(rows) > max(1.0, LARGEST_SHARE_OF_TIES * differs_TR.numel()):
        problems.append(f"routing: {len(rows)} of {differs_TR.numel()} rows differ")
    return len(rows), problems


def allowed_pairs(chunk_ids: Tensor, pack: Pack, spec: MoBA, heads: int) -> Tensor:
    """[H,T,T] bool: which keys each query attends to. Picks lie in the query's own document."""
    device = chunk_ids.device
    chunk_T = torch.from_numpy(pack.chunks(spec.chunk_size).chunk_of_token_T).to(device)
    ids_HTP = chunk_ids.repeat_interleave(heads // chunk_ids.shape[1], 1).transpose(0, 1)
    token = torch.arange(pack.num_tokens, device=device)
    mask = torch.zeros(heads, pack.num_tokens, pack.num_tokens, dtype=torch.bool, device=device)
    for slot in range(ids_HTP.shape[2]):
        mask |= ids_HTP[:, :, slot, None] == chunk_T
    return mask & (token[:, None] >= token)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask_HTT: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """(out, dq, dk, dv) the plain way at the inputs' own precision: the gradients by autograd, then by the formula.

    The formula, dS = P (dP - delta) with delta = rowsum(dout * out), is what every kernel works with that recomputes P.
    Where a query sees a key or two the two terms cancel; autograd's softmax cancels them exactly, no such kernel can.
    """
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    group, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    queries, keys, values = (x.transpose(0, 1) for x in leaves)
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scores = (queries @ keys.mT * scale).masked_fill(~mask_HTT, -torch.inf)
    weights = scores.softmax(-1)
    out = weights @ values
    yield out.detach().transpose(0, 1), *torch.autograd.grad(out.transpose(0, 1), leaves, dout)
    with torch.no_grad():
        dout_HTD = dout.transpose(0, 1)
        delta_HT1 = (dout_HTD * out).sum(-1, keepdim=True)
        dscores = weights * (dout_HTD @ values.mT - delta_HT1) * scale
        dk, dv = dscores.mT @ queries, weights.mT @ dout_HTD
        dk, dv = (x.view(-1, group, *x.shape[1:]).sum(1) for x in (dk, dv))
        yield tuple(x.transpose(0, 1) for x in (out, dscores @ keys, dk, dv))
