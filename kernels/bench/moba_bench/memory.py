"""Peak memory of forward and backward: on a CPU in a process of its own, on a GPU by the allocator's count.

`python -m moba_bench.memory '<shape as JSON>' BACKEND THREADS` measures one shape on the CPU and prints JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from .contestants import Contestant, moba_contestant
from .parity import make_inputs
from .shapes import Shape, small_of

Bytes = dict[str, int]
"""total: inputs, outputs, gradients and scratch; beyond: without the inputs."""


def status_bytes(field: str) -> int:
    """A field of /proc/self/status. Not ru_maxrss: a child inherits that high-water mark from the process that started
    it, and a small run after a large one would seem as large."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory on a CPU is measured on Linux only")


def forget_peak() -> None:
    """VmHWM becomes what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most that was resident at once since `forget_peak`, without files: pages of libraries that were read in
    meanwhile, more or fewer by what the machine had in its cache, are nobody's scratch."""
    return status_bytes("VmHWM") - status_bytes("RssFile")


def measure_here(shape: Shape, backend: str) -> Bytes:
    """In this process, which should have done nothing else."""
    small = small_of(shape, 64)
    moba_contestant("warm-up", backend, small, make_inputs(small, "cpu")).both()  # the libraries' own allocations
    library = status_bytes("RssAnon")
    inputs = make_inputs(shape, "cpu")
    with_inputs = status_bytes("RssAnon")
    forget_peak()
    moba_contestant("moba", backend, shape, inputs).both()
    peak = peak_bytes()
    return {"total": peak - library, "beyond": peak - with_inputs}


def measure_in_child(shape: Shape, backend: str, threads: int) -> Bytes:
    """RuntimeError with the child's last words when it fails."""
    folder = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "moba_bench.memory", json.dumps(shape.as_json()), backend, str(threads)]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the memory run ended with exit code {done.returncode}: {words}")
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def measure_on_gpu(contestant: Contestant, held_by_inputs: int) -> Bytes:
    """held_by_inputs: bytes of q, k, v and dout, which are allocated already."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    contestant.both()
    torch.cuda.synchronize()
    beyond = torch.cuda.max_memory_allocated() - before
    return {"total": held_by_inputs + beyond, "beyond": beyond}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(measure_here(Shape.from_json(json.loads(sys.argv[1])), sys.argv[2])))
