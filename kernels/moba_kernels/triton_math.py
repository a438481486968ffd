"""Small device functions that all Triton kernels share, and what a compiled form of a kernel is. Imports triton."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .triton_support import GLUON_TRITON, INTERPRETED, release_of, target_of_capability

# Kernels read it as a compile-time constant.
_INTERPRETED = tl.constexpr(INTERPRETED)

# Are there kernels in Gluon to take?
HAS_GLUON = not INTERPRETED and release_of(triton.__version__) in GLUON_TRITON

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)

TRITON_TYPE: Mapping[torch.dtype, str] = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@triton.jit
def dot(a, b):  # type: ignore[no-untyped-def]
    """a @ b accumulated in fp32, never in plain TF32.

    The interpreter multiplies the bit patterns of bf16 (seen in Triton 3.6 and 3.9), so there bf16 goes through fp32,
    where its products are exact, as they are on a tensor core.
    """
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def add_dot(acc, a, b):  # type: ignore[no-untyped-def]
    """acc + a @ b in fp32. A product of fp32 is rounded by itself before it is added.

    The compiler would make one chain of additions of acc and all products, whose rounding errors grow with the number
    of keys or queries; a product of narrower operands has larger errors of its own, and goes to a tensor core's adder.
    """
    if a.dtype == tl.float32:
        acc -= dot(-a, b)  # a sum would be taken for an accumulator, a difference is not
    else:
        acc += dot(a, b)
    return acc


@triton.jit
def narrow(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 in a narrower dtype, rounded to nearest even; by hand under the interpreter, which truncates bf16."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel, as a call launches it: what `make aot` compiles for every target."""

    label: str
    """For people: kernel, head dim, dtype and whatever else tells it from its siblings."""
    kernel: Any
    """The JITFunction."""
    types: Mapping[str, str]
    """Triton type of every run-time argument, e.g. {"q": "*bf16", "num_rows": "i32", "scale": "fp32"}."""
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    head_dim: int
    dtype: torch.dtype
    divisible_by_16: frozenset[str] = frozenset()
    """Run-time arguments (pointers, strides) that a launch on aligned tensors specialises on."""
    max_registers: int | None = None
    """Of a thread, where the launch says so."""


def target_of(device: torch.device) -> int:
    """80, 90 or 100: the generation whose tile shapes a launch on `device` takes (the interpreter takes Hopper's)."""
    if device.type != "cuda":
        return 90
    return target_of_capability(torch.cuda.get_device_capability(device)[0])
