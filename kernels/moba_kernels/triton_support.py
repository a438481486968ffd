"""What every Triton kernel of this package shares: is Triton there, can it serve a call, does the interpreter run."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .errors import BackendError

# Head dims that the kernels are compiled for; 96 and 192 are padded to the next power of two inside.
HEAD_DIMS = (32, 64, 96, 128, 192, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Read once, as Triton itself does when a kernel is defined: under the interpreter kernels run on CPU tensors, in numpy.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def require_triton() -> None:
    """BackendError with an install hint when Triton cannot be imported."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        reason = f"triton cannot be imported: {error}"
        raise BackendError("triton", [reason], "pip install 'moba-train[triton]', or use backend='torch'") from error


def refuse(*tensors: Tensor) -> tuple[str, ...]:
    """Every reason why the Triton kernels cannot serve a call on these tensors."""
    reasons = []
    device, dtype = tensors[0].device, tensors[0].dtype
    if device.type != "cuda" and not INTERPRETED:
        reasons.append(f"it needs CUDA tensors (or TRITON_INTERPRET=1, the slow interpreter), q lies on {device}")
    if dtype not in DTYPES:
        reasons.append(f"it serves bf16, fp16 and fp32, q is {dtype}")
    dims = sorted({x.shape[-1] for x in tensors} - set(HEAD_DIMS))
    if dims:
        reasons.append(f"it serves head dims {HEAD_DIMS}, got {dims}")
    return tuple(reasons)
