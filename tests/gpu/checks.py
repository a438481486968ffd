"""Checks of one backend on one device. Each returns a line for the log and raises AssertionError when it finds fault.

Letters: T tokens, S keys at hand, H query heads, K key/value heads, D head dim, Dv value dim, C chunks.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from moba_bench.contestants import moba_contestant
from moba_bench.memory import measure_on_gpu
from moba_bench.parity import allowed_pairs, check_parity, compare_routing, make_inputs, plain_attention, run_attend
from moba_bench.shapes import Shape
from torch import Tensor

from moba_kernels import (
    Full,
    MoBA,
    Routing,
    attend,
    attend_partial,
    attend_partial_backward,
    mean_keys,
    pool_sums,
    route,
)

PEAK_LIMIT_GB = 10.7
"""At 524288 tokens, 8 heads, D 128, 8192/3: what flash attention needs (1e9 bytes); the original MoBA needs 33.5."""


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, PyTorch fills new tensors with NaN (integers with their largest value): what a kernel forgets shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about operations that have no deterministic form: not what this is for
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def check_pool(shape: Shape, device: str, backend: str) -> str:
    """Counts exactly, published means within a rounding of the reference's."""
    _, k, _, _ = make_inputs(shape, "cpu")
    options = {"pack": shape.pack, "chunk_size": shape.chunk}
    with poisoned():
        sums, counts = pool_sums(k.to(device), backend=backend, **options)
    want_sums, want_counts = pool_sums(k, backend="reference", **options)
    assert sums.dtype == torch.float64 and torch.equal(counts.cpu(), want_counts), "counts differ"
    got, want = mean_keys(sums, counts).cpu(), mean_keys(want_sums, want_counts)
    differ = int((got != want).sum())
    assert bool(((got - want).abs() <= 2.0**-23 * want.abs()).all()), "means differ by more than one rounding"
    return f"{got.numel()} means, {differ} differ in the last bit"


def check_route(shape: Shape, device: str, backend: str) -> str:
    """Small integers, on which arithmetic is exact: identical picks, ties included. Random inputs: near ties only."""
    generator = torch.Generator().manual_seed(1)
    q, k, _, _ = make_inputs(shape, "cpu")
    ties = [torch.randint(-1, 2, x.shape, generator=generator).to(x.dtype) for x in (q, k)]
    with poisoned():
        exact = route(*(x.to(device) for x in ties), shape.spec, cu_seqlens=shape.pack, backend=backend)
        random = route(q.to(device), k.to(device), shape.spec, cu_seqlens=shape.pack, backend=backend)
    want = route(*ties, shape.spec, cu_seqlens=shape.pack, backend="reference")
    wrong = int((exact.chunk_ids.cpu() != want.chunk_ids).any(-1).sum())
    assert wrong == 0, f"{wrong} rows differ on small integers"
    near_ties, problems = compare_routing(random, q, k, shape.pack, shape.spec)
    assert not problems, "; ".join(problems)
    return f"{near_ties} near ties"


def check_forward(shape: Shape, device: str, backend: str) -> str:
    """out and lse with the reference's routing forced; no backward kernel runs."""
    inputs = make_inputs(shape, "cpu")
    q, k, v, dout = (x.to(device) for x in inputs)
    ids = route(inputs[0], inputs[1], shape.spec, cu_seqlens=shape.pack, backend="reference").chunk_ids
    with poisoned(), torch.no_grad():
        routing = Routing.from_chunk_ids(ids.to(device), shape.spec, shape.pack)
        got = attend(q, k, v, shape.spec, cu_seqlens=shape.pack, routing=routing, backend=backend)
    forced = Routing.from_chunk_ids(ids, shape.spec, shape.pack)
    exact = attend(
        *(x.double() for x in inputs[:3]), shape.spec, cu_seqlens=shape.pack, routing=forced, backend="reference"
    )
    usual = next(plain_attention(q, k, v, dout, allowed_pairs(ids, shape.pack, shape.spec, shape.heads).to(device)))
    error, peer = (_gap(x, exact.out) for x in (got.out, usual[0]))
    assert error <= 2 * peer, f"out: error {error:.3g}, the plain way's is {peer:.3g}"
    lse_error = _gap(got.lse, exact.lse)
    assert lse_error <= 1e-4, f"lse: error {lse_error:.3g}"
    return f"error {error / peer:.2f}x the plain way's, lse {lse_error:.1g}"


def check_whole(shape: Shape, device: str, backend: str, value_dim: int | None = None) -> str:
    """Routing, output, all gradients and the counted pairs."""
    with poisoned():
        verdict = check_parity(shape, backend, device, value_dim=value_dim)
    assert verdict.ok, str(verdict)
    return str(verdict)


def check_full(shape: Shape, device: str, backend: str) -> str:
    """Full attention is MoBA with chunks that cover every document."""
    inputs = make_inputs(shape, "cpu")
    q, k, v = (x.to(device).requires_grad_() for x in inputs[:3])
    with poisoned():
        result = attend(q, k, v, Full(), cu_seqlens=shape.pack, backend=backend)
        grads = torch.autograd.grad(result.out, (q, k, v), inputs[3].to(device))
    result.report.raise_if_different()
    wide = MoBA(max(shape.documents), 1)
    ids = route(inputs[0], inputs[1], wide, cu_seqlens=shape.pack, backend="reference").chunk_ids
    exact, _, _ = run_attend(
        tuple(x.double() for x in inputs), Routing.from_chunk_ids(ids, wide, shape.pack), "reference"
    )
    mask = allowed_pairs(ids, shape.pack, wide, shape.heads).to(device)
    usual = list(plain_attention(q.detach(), k.detach(), v.detach(), inputs[3].to(device), mask))
    worst = 0.0
    for i, (name, mine) in enumerate(zip(("out", "dq", "dk", "dv"), (result.out, *grads), strict=True)):
        error, peer = _gap(mine, exact[i]), max(_gap(x[i], exact[i]) for x in usual)
        assert error <= 2 * peer, f"{name}: error {error:.3g}, the plain way's is {peer:.3g}"
        worst = max(worst, error / peer)
    return f"error {worst:.2f}x the plain way's"


def check_strides(shape: Shape, device: str, backend: str) -> str:
    """Rows that lie apart, and begin where no 16 bytes do, give what contiguous ones give."""
    q, k, v, dout = (x.to(device) for x in make_inputs(shape, "cpu"))
    found = []
    for place in (lambda x: x, _rows_apart):
        leaves = [place(x).requires_grad_() for x in (q, k, v)]
        result = attend(*leaves, shape.spec, cu_seqlens=shape.pack, backend=backend)
        found.append((result.out.detach(), *torch.autograd.grad(result.out, leaves, place(dout))))
    errors = [_gap(x, exact.double()) / max(1e-30, float(exact.abs().max())) for exact, x in zip(*found, strict=True)]
    assert max(errors) <= 1e-2, f"relative errors of out, dq, dk, dv: {errors}"
    return f"relative error {max(errors):.1g}"


def _rows_apart(x: Tensor) -> Tensor:
    """x, as a view of wider rows that begins at their second element."""
    wide = x.new_zeros((*x.shape[:2], x.shape[2] + 3))
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


def check_repeats(shape: Shape, device: str, backend: str) -> str:
    """Two runs give the same bits: routing, out, lse, dq, dk, dv."""

    def once() -> tuple[Tensor, ...]:
        q, k, v, dout = make_inputs(shape, device)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        result = attend(*leaves, shape.spec, cu_seqlens=shape.pack, backend=backend, return_routing=True)
        assert result.routing is not None
        return (
            result.routing.chunk_ids,
            result.out.detach(),
            result.lse,
            *torch.autograd.grad(result.out, leaves, dout),
        )

    for name, a, b in zip(("routing", "out", "lse", "dq", "dk", "dv"), once(), once(), strict=True):
        assert bool(torch.isfinite(a).all()), f"{name} is not finite"
        assert torch.equal(a, b), f"{name} differs between two runs in {int((a != b).sum())} elements"
    return "bitwise equal"


def check_parts(shape: Shape, device: str, backend: str, spec: Full | MoBA | None = None) -> str:
    """attend_partial and its backward, for every pair of a part of the queries and a part of the keys.

    The parts cut chunks, and some queries see no key at all.
    """
    spec = spec if spec is not None else shape.spec
    pack = shape.pack
    inputs = make_inputs(shape, "cpu")
    exact_inputs = [x.double() for x in inputs]
    routing = None
    if isinstance(spec, MoBA):
        routing = route(inputs[0], inputs[1], spec, cu_seqlens=pack, backend="reference")
    whole = attend(*exact_inputs[:3], spec, cu_seqlens=pack, routing=routing, backend="reference")
    delta = (whole.out * exact_inputs[3]).sum(-1)
    token = torch.arange(pack.num_tokens)
    owners = ((token // 5) % 2, token * 2 // pack.num_tokens)
    worst = 0.0
    for rows in ((owners[0] == part).nonzero().flatten() for part in range(2)):
        mine = routing.select(rows) if routing is not None else None
        for keys in ((owners[1] == part).nonzero().flatten() for part in range(2)):
            results = []
            for name, where, tensors in (("reference", "cpu", exact_inputs), (backend, device, inputs)):
                results.append(_part(name, where, tensors, rows, keys, whole.lse, delta, spec, mine, shape))
            for label, want, got in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
                empty = want == -torch.inf
                assert torch.equal(empty, got.cpu() == -torch.inf), f"{label}: other rows see nothing"
                error = _gap(got.cpu()[~empty], want[~empty]) / max(1e-30, float(want[~empty].abs().max()))
                limit = 2e-5 if shape.dtype == "fp32" else 2e-2
                assert error <= limit, f"{label}: relative error {error:.3g}, allowed {limit:g}"
                worst = max(worst, error)
    return f"relative error {worst:.1g}"


def _part(
    backend: str,
    device: str,
    tensors: list[Tensor] | tuple[Tensor, ...],
    rows: Tensor,
    keys: Tensor,
    lse: Tensor,
    delta: Tensor,
    spec: Full | MoBA,
    routing: Routing | None,
    shape: Shape,
) -> tuple[Tensor, ...]:
    """(out, lse, dq, dk, dv) of the queries `rows` over the keys `keys`, given the whole row's lse and delta."""
    q, k, v, dout = (x[i].to(device) for x, i in zip(tensors, (rows, keys, keys, rows), strict=True))
    ids = routing.chunk_ids.to(device) if routing is not None else None
    there = Routing.from_chunk_ids(ids, routing.spec, shape.pack, rows.to(device)) if routing is not None else None
    options = {
        "pack": shape.pack,
        "q_positions": rows.to(device),
        "k_positions": keys.to(device),
        "routing": there,
        "backend": backend,
    }
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    with poisoned():
        out, part_lse = attend_partial(q, k, v, spec, **options)
        grads = attend_partial_backward(
            dout, q, k, v, lse[rows].to(device, acc), delta[rows].to(device, acc), spec, **options
        )
    return (out, part_lse, *grads)


def check_key_conv(tokens: int, kv_heads: int, dim: int, width: int, dtype: str, device: str, backend: str) -> str:
    """The key convolution, forward and backward, against its fp64 reference."""
    from moba_kernels.key_conv import key_conv

    shape = Shape((tokens - tokens // 3, tokens // 3), kv_heads, kv_heads, dim, 1, 1, dtype=dtype)  # type: ignore[arg-type]
    _, k, _, dout = make_inputs(shape, "cpu")
    weight = torch.randn(kv_heads, dim, width, generator=torch.Generator().manual_seed(2)).to(k.dtype)
    offset = torch.cat([torch.arange(n) for n in shape.documents])

    def run(name: str, where: str, kind: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(where, kind).requires_grad_() for x in (k, weight)]
        out = key_conv(*leaves, document_offset=offset.to(where), backend=name)
        return (out.detach(), *torch.autograd.grad(out, leaves, dout.to(where, kind)))

    with poisoned():
        got = run(backend, device, k.dtype)
    worst = 0.0
    for name, mine, want in zip(("out", "dk", "dweight"), got, run("reference", "cpu", torch.float64), strict=True):
        error = _gap(mine, want) / float(want.abs().max())
        limit = 1e-5 if k.dtype == torch.float32 else 1e-2
        assert error <= limit, f"{name}: relative error {error:.3g}, allowed {limit:g}"
        worst = max(worst, error)
    return f"relative error {worst:.1g}"


def check_peak_memory(shape: Shape, device: str, backend: str) -> str:
    """Forward and backward, with inputs, outputs and gradients: at most what flash attention needs."""
    assert device == "cuda", "peak memory is read from the CUDA allocator"
    inputs = make_inputs(shape, device)
    held = sum(x.numel() * x.element_size() for x in inputs)
    peak_gb = measure_on_gpu(moba_contestant("moba", backend, shape, inputs), held)["total"] / 1e9
    assert peak_gb <= PEAK_LIMIT_GB, f"{peak_gb:.2f} GB, allowed {PEAK_LIMIT_GB}"
    return f"{peak_gb:.2f} GB"


def check_scales(shape: Shape, device: str, backend: str) -> str:
    """Softmax scales that are negative, or nothing."""
    inputs = make_inputs(shape, "cpu")
    ids = route(inputs[0], inputs[1], shape.spec, cu_seqlens=shape.pack, backend="reference").chunk_ids
    worst = 0.0
    for scale in (-0.125, 0.0):
        found = []
        for where, how, dtype in ((device, backend, inputs[0].dtype), ("cpu", "reference", torch.float64)):
            *leaves, dout = (x.to(where, dtype) for x in inputs)
            for leaf in leaves:
                leaf.requires_grad_()
            routing = Routing.from_chunk_ids(ids.to(where), shape.spec, shape.pack)
            options = {"cu_seqlens": shape.pack, "routing": routing, "softmax_scale": scale, "backend": how}
            result = attend(*leaves, shape.spec, **options)
            found.append((result.out, result.lse, *torch.autograd.grad(result.out, leaves, dout)))
        for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), *found, strict=True):
            error = _gap(got, want) / max(1.0, float(want.abs().max()))
            assert error <= 2e-2, f"{name} at scale {scale}: relative error {error:.3g}, allowed 0.02"
            worst = max(worst, error)
    return f"relative error {worst:.1g}"


def check_no_host_read(shape: Shape, device: str, backend: str) -> str:
    """Forward and backward of a row whose tables are there: the host never waits for the device."""
    assert device == "cuda", "only there does PyTorch notice"
    contestant = moba_contestant("moba", backend, shape, make_inputs(shape, device))
    contestant.both()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        contestant.both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "the host does not wait"


def check_scratch(shape: Shape, device: str, backend: str) -> str:
    """Beyond inputs, results and the stored routing at most SCRATCH_BYTES, whatever the density."""
    from moba_kernels.attend.triton import SCRATCH_BYTES

    assert device == "cuda" and backend == "triton", "the bound is that of the triton backend, read from the allocator"
    extra = []
    for topk in (2, shape.topk, 4 * shape.topk):
        denser = replace(shape, topk=topk)
        inputs = make_inputs(denser, device)
        results = sum(x.numel() * x.element_size() for x in (inputs[0], *inputs[:3]))  # out; dq, dk, dv
        per_row = 4 + 2 * denser.spec.num_picks + 4  # lse, picks, delta
        known = results + denser.tokens * denser.heads * per_row
        contestant = moba_contestant("moba", backend, denser, inputs)
        contestant.both()
        extra.append(measure_on_gpu(contestant, 0)["beyond"] - known)
        assert extra[-1] <= SCRATCH_BYTES, f"topk {topk}: {extra[-1] / 2**20:.0f} MiB, allowed {SCRATCH_BYTES >> 20}"
    return "MiB: " + ", ".join(f"{size / 2**20:.0f}" for size in extra)


def check_long_row(shape: Shape, device: str, backend: str, *, head_major: bool = False) -> str:
    """Rows with more elements than a 32-bit index reaches: the last tokens against the torch backend.

    The last tokens' keys are read by the last tokens only, so a short backward gives their dk and dv. head_major: q and
    dout lie in memory head by head.
    """
    q, k, v, dout = make_inputs(shape, device)
    if head_major:
        q, dout = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, dout))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    result = attend(*leaves, shape.spec, cu_seqlens=shape.pack, backend=backend, return_routing=True)
    grads = torch.autograd.grad(result.out, leaves, dout)
    result.report.raise_if_different()
    assert result.routing is not None
    last = torch.arange(shape.tokens - min(64, shape.chunk), shape.tokens, device=device)
    options = {
        "pack": shape.pack,
        "q_positions": last,
        "routing": result.routing.select(last),
        "backend": "torch",
    }
    some = [x.detach()[last] for x in (q, dout, result.out)]
    part = attend_partial(some[0], k.detach(), v.detach(), shape.spec, **options)
    delta = (some[1].float() * some[2].float()).sum(-1)
    want = attend_partial_backward(some[1], some[0], k.detach(), v.detach(), part.lse, delta, shape.spec, **options)
    for name, got, exact in (
        ("out", some[2], part.out),
        ("lse", result.lse[last], part.lse),
        ("dq", grads[0][last], want[0]),
        ("dk", grads[1][last], want[1][last]),
        ("dv", grads[2][last], want[2][last]),
    ):
        error = _gap(got, exact.cpu().double()) / float(exact.abs().max())
        assert error <= 3e-2, f"{name}: relative error {error:.3g}, allowed 0.03"
    return f"{q.numel():.3g} elements in q"


def _gap(got: Tensor, want: Tensor) -> float:
    """Largest difference; NaN where got has one, which no limit lets through."""
    return float((got.detach().cpu().double() - want.detach().cpu().double()).abs().max()) if got.numel() else 0.0
