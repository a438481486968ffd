"""What every Triton kernel of this package shares: is Triton there, can it serve a call, does the interpreter run."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .errors import BackendError

# Head dims that the kernels are compiled for; 96 and 192 are padded to the next power of two inside.
HEAD_DIMS = (32, 64, 96, 128, 192, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Before it, 3.2 has no tl.gather, and 3.3 cannot compile the attention kernels and the gate.
OLDEST_TRITON = (3, 4)
# Bytes of shared memory that one program may hold on compute capability 8.0, 9.0 and 10.0: what the GPU has for an SM,
# less what the driver keeps. Tiles are cut for it.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}

# Read once, as Triton itself does when a kernel is defined: under the interpreter kernels run on CPU tensors, in numpy.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

# Kernels in Gluon, Triton's lower layer, whose names change with every release: a version stands here once
# `make gpu-test` has passed with it. With others, and under the interpreter, the kernels in Triton proper serve.
GLUON_TRITON = ((3, 6),)


def release_of(version: str) -> tuple[int, ...]:
    """(major, minor)."""
    return tuple(int(number) for number in version.split(".")[:2])


def require_triton() -> None:
    """BackendError with an install hint when Triton cannot be imported or is too old."""
    fix = "pip install 'moba-train[triton]', or use backend='torch'"
    try:
        import triton
    except ImportError as error:
        raise BackendError("triton", [f"triton cannot be imported: {error}"], fix) from error
    if release_of(triton.__version__) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        raise BackendError("triton", [f"it needs triton >= {oldest}, this is {triton.__version__}"], fix)


def refuse(*tensors: Tensor) -> tuple[str, ...]:
    """Every reason why the Triton kernels cannot serve a call on these tensors."""
    reasons = []
    device, dtype = tensors[0].device, tensors[0].dtype
    if device.type != "cuda" and not INTERPRETED:
        reasons.append(f"it needs CUDA tensors (or TRITON_INTERPRET=1, the slow interpreter), q lies on {device}")
    if dtype not in DTYPES:
        reasons.append(f"it serves bf16, fp16 and fp32, q is {dtype}")
    if device.type == "cuda":
        reasons.extend(refuse_device(device))
    dims = sorted({x.shape[-1] for x in tensors} - set(HEAD_DIMS))
    if dims:
        reasons.append(f"it serves head dims {HEAD_DIMS}, got {dims}")
    return tuple(reasons)


def refuse_device(device: torch.device) -> tuple[str, ...]:
    """Why the kernels cannot run on this GPU: some need all the shared memory of the GPUs that they were cut for."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return (f"it needs compute capability 8.0 or higher, {device} has {major}.{minor}",)
    needed = SHARED_LIMIT[target_of_capability(major)]
    # Older PyTorch does not tell; then a kernel that does not fit raises when it is launched.
    there = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", needed)
    if there < needed:
        return (f"its tiles need up to {needed:,} bytes of shared memory a program, {device} has {there:,}",)
    return ()


def target_of_capability(major: int) -> int:
    """80, 90 or 100: the generation whose tile shapes a GPU of this compute capability takes."""
    return 80 if major < 9 else 90 if major == 9 else 100


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Inside, the GPU that x lies on is the current one: Triton launches there, wherever the arguments lie."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
