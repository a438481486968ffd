"""Peak memory in fresh processes: beyond inputs and results it is bounded, falls with density, and remembers nothing.

A sparse interface that quietly ran dense was once found by its memory alone: its peak did not fall with density. So
every measurement is a process of its own, and says how many pairs were computed.

    python -m tests.kernels.test_memory_processes torch 16384 512x4 full     # as the tests call it

Shape letters: T tokens, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from moba_bench.memory import forget_peak, peak_bytes, status_bytes

from moba_kernels import Full, MoBA, Pack, attend
from moba_kernels import native as native_kernels
from moba_kernels.attend import flash, native
from moba_kernels.attend import torch as torch_backend
from moba_kernels.attend.lists import queries_at_once

TOKENS = 16384
# (query heads, KV heads, head dim)
SHAPES = {"": (4, 2, 64), "wide": (32, 8, 128), "grouped": (64, 1, 128)}
MIB = 1 << 20
# What a call may take beyond inputs and results, as each backend documents it. "pytorch": the torch backend without its
# compiled kernel.
SCRATCH = {"torch": native.SCRATCH_BYTES, "pytorch": torch_backend.SCRATCH_BYTES, "flash": flash.SCRATCH_BYTES}
# From dense to sparse.
DENSITIES = ["full", "512x16", "512x4", "512x1"]


def spec_of(name: str) -> Full | MoBA:
    """ "full", or chunk_size x topk."""
    return Full() if name == "full" else MoBA(*(int(x) for x in name.split("x")))


def forward_backward(tokens: int, name: str, backend: str) -> dict[str, float]:
    """One attention with gradients; its density and the peak beyond inputs and results, in bytes. name: a density,
    with a shape and a colon before it for many heads."""
    shape, _, density = name.rpartition(":")
    heads, kv_heads, dim = SHAPES[shape]
    pack, spec = Pack([0, tokens]), spec_of(density)
    q, dout = (torch.randn(tokens, heads, dim) for _ in range(2))
    k, v = (torch.randn(tokens, kv_heads, dim) for _ in range(2))
    results = [torch.ones_like(x) for x in (q, q[..., 0], q, k, v)]  # out, lse, dq, dk, dv
    before = status_bytes("RssAnon")
    del results
    forget_peak()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    result = attend(*leaves, spec, cu_seqlens=pack, backend=backend)
    torch.autograd.grad(result.out, leaves, dout)
    result.report.raise_if_different()
    return {"density": pack.density(spec), "bytes": peak_bytes() - before, "base": before}


def main(backend: str, tokens: str, *names: str) -> None:
    torch.manual_seed(0)
    if backend == "pytorch":
        backend = "torch"
        native_kernels.available = lambda: False
    for name in ("full", "16x4"):
        forward_backward(64, name, backend)  # libraries load, threads start
    for name in names:
        print(json.dumps(forward_backward(int(tokens), name, backend)), flush=True)


def measure(backend: str, *names: str, tokens: int = TOKENS, threads: int = 1) -> list[dict[str, float]]:
    """What a fresh process finds for these densities, one after the other."""
    root = Path(__file__).parents[2]
    # Freed memory goes back at once, so that a peak is what lives at one time and not how the heap is laid out.
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tests.kernels.test_memory_processes", backend, str(tokens), *names]
    environment = {
        **os.environ,
        **settings,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(str(root / x) for x in (".", "kernels", "kernels/bench")),
    }
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@dataclass(frozen=True)
class Measured:
    alone: dict[str, dict[str, float]]
    """By density, each in a process of its own."""
    both: dict[tuple[str, str], dict[str, float]]
    """The bytes of two densities in one process, run in this order."""
    left_behind: list[float]
    """What the second run of each pair began with beyond the first."""


@pytest.fixture(
    scope="module", params=["torch", *(pytest.param(x, marks=pytest.mark.slow) for x in ("pytorch", "flash"))]
)
def measured(request) -> tuple[str, Measured]:
    """All measurements of a backend, two processes at a time. A pair's first entry is that density alone."""
    pairs = [(DENSITIES[0], DENSITIES[-1]), (DENSITIES[-1], DENSITIES[0])]
    runs = [*pairs, *((name,) for name in DENSITIES[1:-1])]
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(runs, pool.map(lambda names: measure(request.param, *names), runs), strict=True))
    alone = {names[0]: lines[0] for names, lines in found.items()}
    both = {names: {n: line["bytes"] for n, line in zip(names, found[names], strict=True)} for names in pairs}
    left_behind = [found[names][1]["base"] - found[names][0]["base"] for names in pairs]
    return request.param, Measured(alone, both, left_behind)


@pytest.mark.timeout(900)
def test_memory_stays_under_the_documented_scratch_at_every_density(measured):
    backend, found = measured
    for name in DENSITIES:
        assert found.alone[name]["bytes"] <= SCRATCH[backend], f"{name}: {found.alone[name]['bytes'] / MIB:.1f} MiB"


@pytest.mark.timeout(900)
def test_memory_falls_with_the_density_of_moba(measured):
    _, found = measured
    sparse = [found.alone[name] for name in DENSITIES[1:]]
    assert [x["density"] for x in sparse] == sorted((x["density"] for x in sparse), reverse=True)
    for denser, sparser in pairwise(sparse):
        assert sparser["bytes"] <= denser["bytes"] + MIB
    assert sparse[-1]["bytes"] < 0.8 * sparse[0]["bytes"]


@pytest.mark.timeout(900)
def test_the_order_of_running_does_not_matter(measured):
    _, found = measured
    one_way, other_way = found.both.values()
    for name, taken in one_way.items():
        other = other_way[name]
        assert abs(taken - other) <= MIB, f"{name}: {taken / MIB:.1f} and {other / MIB:.1f} MiB"
    # Nor does a run leave anything behind: the second one, with inputs as large, begins where the first began.
    assert max(found.left_behind) <= MIB


@pytest.mark.parametrize("name", [pytest.param("wide:512x4", id="lists"), pytest.param("wide:16x4", id="tiles")])
def test_scratch_of_a_wide_model_stays_under_the_documented_bound(name):
    tokens, heads, picks = 4096, SHAPES["wide"][0], spec_of(name.removeprefix("wide:")).num_picks
    (line,) = measure("pytorch", name, tokens=tokens)
    of_pick = torch_backend.BYTES_OF_PICK if name == "wide:16x4" else 0
    of_rows = tokens * heads * (torch_backend.BYTES_OF_ROW + picks * (2 + of_pick))
    assert line["bytes"] <= torch_backend.SCRATCH_BYTES + of_rows
    # A copy of q, or scores of all queries and chunks, would be 64 MiB and more beyond what it takes.
    assert line["bytes"] >= 16 * MIB


@pytest.mark.parametrize(
    ("name", "threads"), [("wide:16x64", 1), ("wide:16x64", 8), pytest.param("grouped:full", 1, marks=pytest.mark.slow)]
)
def test_every_thread_of_the_compiled_kernel_stays_under_the_documented_bound(name, threads):
    tokens, (heads, _, _) = 4096, SHAPES[name.partition(":")[0]]
    (line,) = measure("torch", name, tokens=tokens, threads=threads)
    picks = getattr(spec_of(name.partition(":")[2]), "num_picks", 0)
    of_rows = tokens * heads * (native.BYTES_OF_ROW + 2 * picks)
    # A copy of q alone would be 64 MiB; what threads work in is a few MiB each.
    assert line["bytes"] <= min(threads * native.SCRATCH_BYTES, 48 * MIB) + of_rows


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_as_many_picks_as_are_sorted_at_once_stay_under_the_documented_bound():
    tokens, (heads, kv_heads, _), picks = 131072, SHAPES[""], spec_of("512x12").num_picks
    assert queries_at_once(heads // kv_heads, picks) < tokens
    (line,) = measure("pytorch", "512x12", tokens=tokens)
    assert line["bytes"] <= torch_backend.SCRATCH_BYTES + tokens * heads * (torch_backend.BYTES_OF_ROW + 2 * picks)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [pytest.param("full", marks=pytest.mark.slow), "1024x4"])
def test_many_query_heads_of_one_kv_head_over_a_long_segment_stay_under_the_documented_bound(name):
    tokens, heads = 4096, SHAPES["grouped"][0]
    (line,) = measure("pytorch", f"grouped:{name}", tokens=tokens)
    # All queries of the segment at once would be 128 MiB for each of dq and what stands in for out.
    assert line["bytes"] <= torch_backend.SCRATCH_BYTES + tokens * heads * torch_backend.BYTES_OF_ROW


def test_the_meter_sees_a_dense_score_matrix():
    """What the tests guard against must show: the reference makes [T,T] tensors."""
    (line,) = measure("reference", "512x4", tokens=2048)
    assert line["bytes"] >= 3 * 2048**2 * 8


if __name__ == "__main__":
    main(*sys.argv[1:])
