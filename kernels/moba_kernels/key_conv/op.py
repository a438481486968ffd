"""The entry: key convolution (FlashMoBA, arXiv 2511.11571): k + SiLU(causal depthwise convolution of k), before RoPE.

Shape letters: S tokens at hand, K key/value heads, D head dim, W width of the filter, P pieces that k is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..checks import check_rows
from ..derivative import refuse_second_derivative
from ..errors import BackendError, bad_argument
from ..opaque import opaque
from ..triton_support import on_device_of, refuse, require_triton

BACKENDS = ("auto", "reference", "torch", "triton")
MAX_WIDTH = 8


@opaque
def key_conv(
    k: Tensor,
    weight: Tensor,
    *,
    document_offset: Tensor,
    halos: Tensor | None = None,
    piece_lengths: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Keys after the convolution, [S,K,D] in k's dtype; differentiable (once) in k, weight and halos.

        out[t] = k[t] + SiLU(sum over lag < W of weight[:, :, W - 1 - lag] * k[t - lag])

    A tap that would reach before the token's document counts as zero. Computed in fp32 (fp64 for fp64 keys).

    Args:
        k: [S,K,D] keys before RoPE; bf16, fp16, fp32 or fp64.
        weight: [K,D,W], fp32 or k's dtype, W in 1..8. Tap W - 1 is the token itself.
        document_offset: int32 or int64 [S], tokens of the same document before each token, wherever they lie.
        halos: [P,W-1,K,D] in k's dtype, the W - 1 tokens before each piece; None = nothing lies before (zeros).
        piece_lengths: tokens of each contiguous piece that k is made of, in order; None = one piece. A shard under
            context parallelism may be two.
        backend: "auto" ("triton" for CUDA tensors that it serves, else "torch"), "reference", "torch" or "triton".
    Raises:
        ValueError for arguments that do not fit together; BackendError when the backend refuses, with every reason.
    """
    _check_keys_and_weight(k, weight)
    lengths = _lengths_of(piece_lengths, k.shape[0])
    _check_pieces(k, weight.shape[2], document_offset, halos, lengths)
    if halos is None:
        halos = k.new_zeros((len(lengths), weight.shape[2] - 1, *k.shape[1:]))
    out: Tensor = _KeyConv.apply(k, weight, halos, document_offset, lengths, _module(backend, k))  # type: ignore[no-untyped-call]
    return out


class _KeyConv(torch.autograd.Function):
    """Keeps the inputs only; the convolution is worked out again in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        k: Tensor,
        weight: Tensor,
        halos: Tensor,
        document_offset: Tensor,
        lengths: tuple[int, ...],
        form: ModuleType,
    ) -> Tensor:
        ctx.save_for_backward(k, weight, halos, document_offset)
        ctx.lengths, ctx.form = lengths, form
        with on_device_of(k):
            out: Tensor = form.convolve(k, weight, halos, document_offset, lengths)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        refuse_second_derivative("key_conv")
        k, weight, halos, document_offset = ctx.saved_tensors
        with on_device_of(k):
            dk, dweight, dhalos = ctx.form.convolve_backward(dout, k, weight, halos, document_offset, ctx.lengths)
        return dk, dweight.to(weight.dtype), dhalos.to(halos.dtype), None, None, None


def _module(backend: str, k: Tensor) -> ModuleType:
    """The form that `backend` means for these keys."""
    if backend not in BACKENDS:
        allowed = ", ".join(map(repr, BACKENDS))
        raise bad_argument(f"unknown backend; allowed: {allowed}", repr(backend), "pass backend='auto'")
    if backend == "triton":
        return _triton_form(k)
    if backend == "auto" and k.device.type == "cuda":
        try:
            return _triton_form(k)
        except BackendError:
            pass  # "auto" promises no particular backend
    from . import reference
    from . import torch as torch_form

    return reference if backend == "reference" else torch_form


def _triton_form(k: Tensor) -> ModuleType:
    require_triton()
    reasons = refuse(k)
    if reasons:
        raise BackendError("triton", reasons)
    from . import triton as triton_form

    return triton_form


def _check_tensor(what: str, x: Tensor, fix: str) -> None:
    if not isinstance(x, Tensor):
        raise bad_argument(what, type(x).__name__, fix)


def _check_keys_and_weight(k: Tensor, weight: Tensor) -> None:
    check_rows("k", k)
    what = f"weight must be [{k.shape[1]}, {k.shape[2]}, width] with a width in 1..{MAX_WIDTH}"
    fix = "pass one filter for each channel of k"
    _check_tensor(what, weight, fix)
    if weight.dim() != 3 or weight.shape[:2] != k.shape[1:] or not 1 <= weight.shape[2] <= MAX_WIDTH:
        raise bad_argument(what, tuple(weight.shape), fix)
    if weight.dtype not in (torch.float32, k.dtype):
        raise bad_argument(f"weight must be fp32 or of k's dtype {k.dtype}", weight.dtype, "cast the weight")
    if weight.device != k.device:
        raise bad_argument(f"weight must lie on k's device {k.device}", weight.device, "move it there")


def _lengths_of(piece_lengths: Sequence[int] | None, num_keys: int) -> tuple[int, ...]:
    """As integers, which add up to num_keys; None = one piece."""
    if piece_lengths is None:
        return (num_keys,)
    fix = "pass the lengths of the contiguous pieces that k is made of"
    try:
        lengths = tuple(index(length) for length in piece_lengths)  # numpy's and a tensor's, too
    except TypeError:
        raise bad_argument("piece_lengths must be a sequence of integers", repr(piece_lengths), fix) from None
    if any(length < 0 for length in lengths) or sum(lengths) != num_keys:
        raise bad_argument(f"piece_lengths must be >= 0 and add up to {num_keys}", lengths, fix)
    return lengths


def _check_pieces(
    k: Tensor, width: int, document_offset: Tensor, halos: Tensor | None, lengths: tuple[int, ...]
) -> None:
    num_keys = k.shape[0]
    what, fix = f"document_offset must be int32 or int64 [{num_keys}]", "pass one offset a row of k"
    _check_tensor(what, document_offset, fix)
    if document_offset.shape != (num_keys,) or document_offset.dtype not in (torch.int32, torch.int64):
        raise bad_argument(what, f"{document_offset.dtype} {tuple(document_offset.shape)}", fix)
    if document_offset.device != k.device:
        raise bad_argument(f"document_offset must lie on {k.device}", document_offset.device, "move it to k's device")
    if halos is None:
        return
    expected = (len(lengths), width - 1, *k.shape[1:])
    what = f"halos must be {k.dtype} {expected} on {k.device}"
    fix = "pass the width - 1 tokens before each piece (zeros where the row begins), or None"
    _check_tensor(what, halos, fix)
    if halos.shape != expected or halos.dtype != k.dtype or halos.device != k.device:
        raise bad_argument(what, f"{halos.dtype} {tuple(halos.shape)} on {halos.device}", fix)


__all__ = ["key_conv"]
