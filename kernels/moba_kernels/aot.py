"""Compile every Triton kernel ahead of time, on a machine without a GPU, and hold it to its limits.

    python -m moba_kernels.aot [--head-dims 64 128] [--targets 80 90 100]

One line a compiled form and target: registers and stack (spills) of a thread, shared memory of a program.
Exit code 1 when a limit is broken: Triton itself compiles kernels that no GPU can launch, and does not mind spills.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from .triton_support import DTYPES, HEAD_DIMS, INTERPRETED, SHARED_LIMIT, require_triton

# Each offers `variants(head_dims, dtypes, target)`.
MODULES = (
    "moba_kernels.attend.triton_causal",
    "moba_kernels.attend.triton_picks",
    "moba_kernels.attend.triton_lists",
    "moba_kernels.attend.triton_keys",
    "moba_kernels.attend.triton_key_tables",
    "moba_kernels.attend.triton_rows",
    "moba_kernels.pool.triton",
    "moba_kernels.route.triton",
    "moba_kernels.triton_row_dot",
    "moba_kernels.key_conv.triton",
)
# Head dim of q and k, of v: the usual ones, and multi-head latent attention.
ALL_HEAD_DIMS = (*((dim, dim) for dim in HEAD_DIMS), (192, 128))
TARGETS = (80, 90, 100)

# Bytes of stack a thread may have where tiles are at their largest for the dtype.
STACK_LIMIT = 256


@dataclass(frozen=True)
class Job:
    """One compiled form for one target. It names the form by its place in `variants`: a kernel cannot be pickled."""

    module: str
    head_dims: tuple[int, int]
    dtype: torch.dtype
    target: int
    index: int
    label: str


@dataclass(frozen=True)
class Compiled:
    """What became of a job."""

    job: Job
    registers: int
    stack: int
    """Bytes a thread: spilled registers, mostly."""
    shared: int
    """Bytes a program."""
    uses_tf32: bool
    uses_wgmma: bool
    stores_vectors: bool
    """16 bytes at a time, somewhere."""

    @property
    def violations(self) -> list[str]:
        """The limits that this form breaks, in words."""
        found = []
        limit = SHARED_LIMIT[self.job.target]
        if self.shared > limit:
            found.append(f"shared memory {self.shared:,} > {limit:,} bytes")
        allowed = stack_limit(self.job)
        if self.stack > allowed:
            found.append(f"stack {self.stack} > {allowed} bytes: registers are spilled")
        if self.uses_tf32:
            found.append("a .tf32 instruction: fp32 would lose 13 bits")
        return [f"sm_{self.job.target} {self.job.label}: {text}" for text in found]


Progress = Callable[[int, int, Compiled], None]


def stack_limit(job: Job) -> int:
    """No spills for bf16 and fp16 up to head dim 128, a few elsewhere."""
    return 0 if job.dtype != torch.float32 and max(job.head_dims) <= 128 else STACK_LIMIT


def jobs_of(
    head_dims: Sequence[tuple[int, int]],
    dtypes: Sequence[torch.dtype],
    targets: Sequence[int],
    modules: Sequence[str] = MODULES,
    *,
    one_of_each: bool = False,
) -> Iterator[Job]:
    """All compiled forms for all targets, each once. one_of_each: the first of a kernel, head dim and dtype only."""
    seen = set()
    for module, dims, dtype, target in _product(modules, head_dims, dtypes, targets):
        for index, variant in enumerate(import_module(module).variants([dims], [dtype], target)):
            name = (variant.kernel.__name__, target, *((dims, dtype) if one_of_each else ()))
            form = (
                *name,
                str(sorted(variant.types.items())),
                str(sorted(variant.constants.items())),
                variant.num_warps,
            )
            known = name if one_of_each else form
            if known not in seen:  # forms that depend on no head dim come with each of them
                seen.add(known)
                yield Job(module, dims, dtype, target, index, variant.label)


def _product(
    modules: Sequence[str], head_dims: Sequence[tuple[int, int]], dtypes: Sequence[torch.dtype], targets: Sequence[int]
) -> Iterator[tuple[str, tuple[int, int], torch.dtype, int]]:
    for module in modules:
        for dims in head_dims:
            for dtype in dtypes:
                for target in targets:
                    yield module, dims, dtype, target


def kernel_of(job: Job) -> Any:
    """The compiled kernel of Triton of one form."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    variants = import_module(job.module).variants([job.head_dims], [job.dtype], job.target)
    variant = next(variant for index, variant in enumerate(variants) if index == job.index)
    names = variant.kernel.arg_names
    missing = set(names) - set(variant.types) - set(variant.constants)
    if missing:
        raise ValueError(f"{job.label}: types or constants of {sorted(missing)} are missing in its Variant")
    signature = {name: "constexpr" if name in variant.constants else variant.types[name] for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible_by_16}
    language = _gluon_source() if variant.kernel.is_gluon() else ASTSource
    source = language(variant.kernel, signature, dict(variant.constants), aligned)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    if variant.max_registers is not None:
        options["maxnreg"] = variant.max_registers
    return triton.compile(source, target=GPUTarget("cuda", job.target, 32), options=options)


def _gluon_source() -> Any:
    """What `ASTSource` is to a kernel in Gluon. It has no public name."""
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def compile_job(job: Job) -> Compiled:
    """Compile one form and read what it takes."""
    compiled = kernel_of(job)
    registers, stack = _resources(compiled.asm["cubin"], compiled.metadata.name)
    ptx = compiled.asm["ptx"]
    return Compiled(
        job,
        registers,
        stack,
        compiled.metadata.shared,
        uses_tf32=".tf32" in ptx,
        uses_wgmma="wgmma.mma_async" in ptx,
        stores_vectors=re.search(r"st\.global[.\w]*\.v4\.b32", ptx) is not None,
    )


def _resources(cubin: bytes, name: str) -> tuple[int, int]:
    """(registers, stack bytes) of a thread of kernel `name`, from the cuobjdump that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(rf"Function {re.escape(name)}:\s+REG:(\d+) STACK:(\d+)", shown)
    if found is None:
        raise RuntimeError(f"{tool} says nothing about {name}: {shown}")
    return int(found[1]), int(found[2])


def compile_all(
    head_dims: Sequence[tuple[int, int]] = ALL_HEAD_DIMS,
    dtypes: Sequence[torch.dtype] = DTYPES,
    targets: Sequence[int] = TARGETS,
    modules: Sequence[str] = MODULES,
    *,
    workers: int = 2,
    progress: Progress | None = None,
) -> list[Compiled]:
    """Compile every form of every kernel for all targets; see `compile_jobs`."""
    return compile_jobs(list(jobs_of(head_dims, dtypes, targets, modules)), workers=workers, progress=progress)


def compile_jobs(jobs: Sequence[Job], *, workers: int = 2, progress: Progress | None = None) -> list[Compiled]:
    """Compile in `workers` processes (1 = this one), in order. Triton keeps what it compiled: a second run is quick.

    Raises what a compilation raises. progress: called with (done, total, result) after each.
    """
    done: list[Compiled] = []
    with contextlib.ExitStack() as stack:
        results: Iterator[Compiled] = map(compile_job, jobs)
        if workers > 1:
            # A fork would copy the threads' locks of torch.
            pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
            results = stack.enter_context(pool).map(compile_job, jobs)
        for compiled in results:
            done.append(compiled)
            if progress is not None:
                progress(len(done), len(jobs), compiled)
    return done


def violations_of(compiled: Sequence[Compiled]) -> list[str]:
    """All broken limits, in words."""
    return [text for one in compiled for text in one.violations]


def table_of(compiled: Sequence[Compiled]) -> str:
    """One line a form and target."""
    width = max((len(one.job.label) for one in compiled), default=0)
    lines = [f"{'kernel':<{width}}  target  registers  stack   shared"]
    for one in compiled:
        target = f"sm_{one.job.target}"
        mark = "  <- too much" if one.violations else ""
        line = f"{one.job.label:<{width}}  {target:<6}  {one.registers:>9}  {one.stack:>5}  {one.shared:>7,}{mark}"
        lines.append(line)
    return "\n".join(lines)


def _show_progress(done: int, total: int, compiled: Compiled) -> None:
    """One line that is written over, for a person who waits."""
    print(
        f"\r\033[K{done}/{total} sm_{compiled.job.target} {compiled.job.label}"[:120],
        end="",
        file=sys.stderr,
        flush=True,
    )
    if done == total:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m moba_kernels.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--head-dims", type=int, nargs="+", choices=HEAD_DIMS, help="default: all, and 192/128")
    parser.add_argument("--targets", type=int, nargs="+", choices=TARGETS, default=TARGETS, help="default: all")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile (default: 2)")
    chosen = parser.parse_args(arguments)
    require_triton()
    if INTERPRETED:
        print("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it", file=sys.stderr)
        return 2
    head_dims = tuple((dim, dim) for dim in chosen.head_dims) if chosen.head_dims else ALL_HEAD_DIMS
    progress = _show_progress if sys.stderr.isatty() else None
    compiled = compile_all(head_dims, targets=chosen.targets, workers=chosen.workers, progress=progress)
    print(table_of(compiled))
    broken = violations_of(compiled)
    print(f"\n{len(compiled)} compiled forms, {len(broken)} broken limits")
    for text in broken:
        print(f"  {text}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
