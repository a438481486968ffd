"""Every check with its shapes, most important first: kernels one by one, then what they must all serve."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from moba_bench.shapes import Shape

from moba_kernels import Full

from . import checks, context

HEAD_DIMS = (32, 64, 96, 128, 192, 256)


@dataclass(frozen=True)
class Case:
    """`run(device, backend)` returns a line for the log, or raises."""

    name: str
    run: Callable[[str, str], str]


def _case(kind: str, check: Callable[..., str], shape: Shape, label: str = "", **options: object) -> Case:
    name = " ".join(filter(None, (kind, label, shape.name)))
    return Case(name, lambda device, backend: check(shape, device, backend, **options))


def all_cases(device: str, *, toy: bool) -> list[Case]:
    """toy: small enough for the interpreter and a slow CPU. Memory and long rows need a GPU."""
    base = (
        Shape((150, 83), 4, 2, 64, 32, 3, dtype="bf16") if toy else Shape((900, 483), 8, 2, 128, 128, 4, dtype="bf16")
    )
    cases = [*_smoke(base), *_long_lists(base, toy)]
    if device == "cuda" and not toy:
        cases += _on_gpu(base)
    cases += [*_ranks(base, toy), *_dtypes(base), *_heads(base), *_dims(base, toy), *_rows(base, toy), *_partials(base)]
    return [*cases, *_other_backends(base), *_grid(toy)]


def _smoke(base: Shape) -> Iterator[Case]:
    """Each kernel alone, so that the first failure names it."""
    yield _case("pool", checks.check_pool, base)
    yield _case("route", checks.check_route, base)
    yield _case("forward", checks.check_forward, base)
    yield _case("backward", checks.check_whole, base)
    yield _case("strides", checks.check_strides, base)
    for width in (3, 5):
        run = partial(checks.check_key_conv, 200, base.kv_heads, base.dim, width, "bf16")
        yield Case(f"key conv of width {width}", lambda device, backend, run=run: run(device, backend))  # type: ignore[misc]


def _long_lists(base: Shape, toy: bool) -> Iterator[Case]:
    """Chunks and documents that take the tile of long runs."""
    long = base if toy else replace(base, documents=(2700, 300), chunk=512, topk=3)
    for select in ("head", "group"):
        yield _case("long lists", checks.check_whole, replace(long, select=select))
    yield _case("scales", checks.check_scales, long)


def _dtypes(base: Shape) -> Iterator[Case]:
    for dtype in ("fp32", "fp16"):
        shape = replace(base, dtype=dtype)
        yield _case("dtype", checks.check_whole, shape)
        yield _case("dtype: routing", checks.check_route, shape)
        run = partial(checks.check_key_conv, 200, base.kv_heads, base.dim, 3, dtype)
        yield Case(f"dtype: key conv {dtype}", lambda device, backend, run=run: run(device, backend))  # type: ignore[misc]
    yield _case("full attention", checks.check_full, base)
    yield _case("two runs", checks.check_repeats, base)


def _dims(base: Shape, toy: bool) -> Iterator[Case]:
    for dim in (32,) if toy else HEAD_DIMS:
        if dim != base.dim:
            yield _case("head dim", checks.check_whole, replace(base, dim=dim))
    if not toy:
        yield _case("head dim", checks.check_whole, replace(base, dim=192), label="MLA, values of 128", value_dim=128)
        yield _case("head dim", checks.check_whole, replace(base, dim=64, dtype="fp32"))
        yield _case("head dim", checks.check_whole, replace(base, dim=256, dtype="fp32"))


def _heads(base: Shape) -> Iterator[Case]:
    for heads, kv_heads in ((2, 2), (4, 1), (8, 1), (6, 2), (16, 2)):
        yield _case("GQA", checks.check_whole, replace(base, heads=heads, kv_heads=kv_heads))
    for heads, kv_heads in ((8, 2), (8, 1), (6, 2)):
        yield _case("selection", checks.check_whole, replace(base, heads=heads, kv_heads=kv_heads, select="group"))


def _rows(base: Shape, toy: bool) -> Iterator[Case]:
    """Documents and chunks of every kind."""
    n = 20 if toy else 128
    for documents in ((5 * n + 7,), (0, 1, 1, 0, 6 * n + 3, 0), (3 * n, 2, 4 * n + 1, n - 1, n), (1, 2 * n)):
        yield _case("documents", checks.check_whole, replace(base, documents=documents))
    for chunk, topk in ((16, 4), (16, 1), (50, 3), (100, 2), (n, 20), (10 * n, 2)):
        yield _case("chunks", checks.check_whole, replace(base, chunk=chunk, topk=topk))


def _partials(base: Shape) -> Iterator[Case]:
    small = replace(base, documents=(150, 1, 83), chunk=32, topk=3)
    yield _case("parts", checks.check_parts, replace(small, dtype="fp32"))
    yield _case("parts", checks.check_parts, small)
    yield _case("parts", checks.check_parts, replace(small, select="group"))
    yield _case("parts, full attention", checks.check_parts, replace(small, dtype="fp32"), spec=Full())


def _ranks(base: Shape, toy: bool) -> Iterator[Case]:
    """Ranks that share the device, on packed rows whose chunks straddle shards."""
    small = replace(base, documents=(150, 1, 83), dim=16, chunk=32) if toy else base
    for ranks in (2, 4):
        yield _case(f"{ranks} ranks", context.check_context, small, num_ranks=ranks)
    yield _case("2 ranks", context.check_context, replace(small, dtype="fp32", select="group"), num_ranks=2)
    yield _case("2 ranks, full attention", context.check_context, small, num_ranks=2, spec=Full())


def _on_gpu(base: Shape) -> Iterator[Case]:
    row = Shape((40000, 25000), 8, 2, 128, 512, 4, dtype="bf16")
    yield _case("no host read", checks.check_no_host_read, row)
    yield Case("groups of one rank over NCCL", lambda device, backend: context.check_nccl(row, backend))
    for ranks in (2, 4):
        yield _case(f"{ranks} ranks over NCCL", context.check_context, base, num_ranks=ranks, exchange="nccl")
    whole = Full()
    yield _case("2 ranks over NCCL, full", context.check_context, base, num_ranks=2, spec=whole, exchange="nccl")
    heads = replace(row, heads=8, kv_heads=4)
    yield Case("exchange beside products", lambda device, backend: context.check_overlap(heads, backend))
    for chunk, topk, select in ((128, 8, "head"), (512, 4, "head"), (512, 4, "group")):
        yield _case("two runs", checks.check_repeats, replace(row, chunk=chunk, topk=topk, select=select))  # type: ignore[arg-type]
    yield _case("scratch", checks.check_scratch, Shape((131072,), 8, 2, 128, 512, 4, dtype="bf16"))
    yield _case("peak memory", checks.check_peak_memory, Shape((524288,), 8, 8, 128, 8192, 3, dtype="bf16"))
    yield _case("long chunks", checks.check_long_row, Shape((70000,), 8, 2, 128, 16384, 3, dtype="bf16"))
    yield _case("beyond 32-bit indices", checks.check_long_row, Shape((1 << 20,), 32, 8, 128, 4096, 3, dtype="bf16"))
    head_major = Shape((1 << 20,), 18, 1, 128, 4096, 3, dtype="bf16")
    yield _case("beyond 32-bit indices, head-major", checks.check_long_row, head_major, head_major=True)


def _other_backends(base: Shape) -> Iterator[Case]:
    """The paper's algorithm, which the benchmark compares with, and the torch backend serve the same device."""
    for name in ("flash", "torch"):
        for shape in (base, replace(base, select="group", documents=(1, 0, 300))):
            run = partial(_check_backend, checks.check_whole, name, shape)
            yield Case(f"{name} backend {shape.name}", run)
        yield Case(f"{name} backend, scales", partial(_check_backend, checks.check_scales, name, base))
        small = replace(base, documents=(150, 1, 83), chunk=32, topk=3)
        yield Case(f"{name} backend, parts {small.name}", partial(_check_backend, checks.check_parts, name, small))


def _check_backend(check: Callable[..., str], name: str, shape: Shape, device: str, backend: str) -> str:
    return check(shape, device, name)


def _grid(toy: bool) -> Iterator[Case]:
    """The parity grid of tests/kernels/parity.py in a drawn order, since time hardly allows all of it."""
    try:
        from tests.kernels import parity
    except ImportError as error:
        message = f"the parity grid cannot be imported: {error}"

        def missing(device: str, backend: str) -> str:
            raise AssertionError(message)

        yield Case("parity grid", missing)
        return
    grid = list(parity.cases())
    random.Random(0).shuffle(grid)
    for point in grid[:1] if toy else grid:
        yield Case(f"parity grid {point}", partial(_check_point, parity.check, point))


def _check_point(check: Callable[..., object], point: object, device: str, backend: str) -> str:
    return str(check(point, (backend,), device)).splitlines()[-1]
