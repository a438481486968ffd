"""What is timed against what: our operator, the paper's algorithm, dense attention by PyTorch's kernels.

Letters: T tokens, L tokens of a document, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from moba_kernels import BackendError, attend

from .shapes import Shape

OURS, PAPER = "moba", "paper"
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Contestant:
    """`forward` runs without a graph; `both` is forward and backward, from fresh leaves to all three gradients."""

    name: str
    forward: Callable[[], object]
    both: Callable[[], object]


def moba_contestant(name: str, backend: str, shape: Shape, inputs: Inputs) -> Contestant:
    """Our operator with `backend`: pooling, gate and attention, as a training step calls it."""
    q, k, v, dout = inputs
    pack, spec = shape.pack, shape.spec
    leaves = q.detach().requires_grad_(), k.detach().requires_grad_(), v.detach().requires_grad_()

    def forward() -> None:
        with torch.no_grad():
            attend(q, k, v, spec, cu_seqlens=pack, backend=backend)

    def both() -> None:
        out = attend(leaves[0], leaves[1], leaves[2], spec, cu_seqlens=pack, backend=backend).out
        torch.autograd.grad(out, leaves, dout)

    return Contestant(name, forward, both)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, *, only: Callable[[], AbstractContextManager[object]], native_gqa: bool
) -> Tensor:
    """Causal attention of one document, [1,H,L,D]."""
    with only():
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=native_gqa)


def dense_contestant(
    name: str,
    shape: Shape,
    inputs: Inputs,
    only: Callable[[], AbstractContextManager[object]],
    *,
    native_gqa: bool,
) -> Contestant:
    """Dense attention, one call a document. Without native GQA keys and values are repeated before the clock runs."""
    edges = shape.pack.cu_seqlens
    group = 1 if native_gqa else shape.heads // shape.kv_heads
    repeats = (1, group, group, 1)
    wide = [x if n == 1 else x.repeat_interleave(n, 1) for x, n in zip(inputs, repeats, strict=True)]
    run = partial(_dense, only=only, native_gqa=native_gqa and shape.heads != shape.kv_heads)
    documents = [
        [x[a:b].transpose(0, 1).unsqueeze(0).detach().requires_grad_() for x in wide]
        for a, b in pairwise(edges)
        if b > a
    ]

    def forward() -> None:
        with torch.no_grad():
            for q, k, v, _ in documents:
                run(q, k, v)

    def both() -> None:
        for q, k, v, dout in documents:
            torch.autograd.grad(run(q, k, v), (q, k, v), dout.detach())

    return Contestant(name, forward, both)


def dense_contestants(shape: Shape, inputs: Inputs) -> Iterator[tuple[str, Contestant | str]]:
    """(name, contestant or why it cannot run). On a GPU the flash and the cuDNN kernels, each on its own; the faster
    one is "dense" in the figures."""
    if inputs[0].device.type != "cuda":
        yield "dense", dense_contestant("dense", shape, inputs, nullcontext, native_gqa=True)
        return
    for name, kernel in (("dense-flash", SDPBackend.FLASH_ATTENTION), ("dense-cudnn", SDPBackend.CUDNN_ATTENTION)):
        yield name, _dense_on_gpu(name, shape, inputs, partial(sdpa_kernel, [kernel]))


def _dense_on_gpu(
    name: str, shape: Shape, inputs: Inputs, only: Callable[[], AbstractContextManager[object]]
) -> Contestant | str:
    """Tried on a short piece first: which kernels know GQA depends on the PyTorch release."""
    short = Shape((min(256, shape.tokens),), shape.heads, shape.kv_heads, shape.dim, 1, 1, dtype=shape.dtype)
    piece = tuple(x[: short.tokens] for x in inputs)
    reason = "it did not run"
    for native_gqa in (True, False):
        try:
            dense_contestant(name, short, piece, only, native_gqa=native_gqa).both()  # type: ignore[arg-type]
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
        else:
            return dense_contestant(name, shape, inputs, only, native_gqa=native_gqa)
    return reason


def contestants(
    shape: Shape, inputs: Inputs, backend: str, *, dense: bool, paper: bool
) -> tuple[list[Contestant], dict[str, str]]:
    """(those that can run, reasons of those that cannot). Ours is always the first of the list."""
    able, unable = [moba_contestant(OURS, backend, shape, inputs)], {}
    if dense:
        for name, made in dense_contestants(shape, inputs):
            if isinstance(made, str):
                unable[name] = made
            else:
                able.append(made)
    if paper and backend != "flash":
        reason = why_not("flash", inputs)
        if reason is None:
            able.append(moba_contestant(PAPER, "flash", shape, inputs))
        else:
            unable[PAPER] = reason
    return able, unable


def why_not(backend: str, inputs: Inputs) -> str | None:
    """The reason why a backend cannot serve these tensors, or None."""
    from moba_kernels.dispatch import resolve

    try:
        resolve(backend, *inputs[:3])
    except (BackendError, ImportError) as error:
        return str(error).strip().splitlines()[0]
    return None
