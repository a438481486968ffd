"""The flash-attn package (2.6.3 and newer), the only file that imports it.

Its functions without autograd are called, since they return the log-sum-exp and take any. Two generations differ:
up to 2.6 the window is one pair and the forward returns 8 values, from 2.7 on it is two numbers and 4 values.

Shape letters: N query rows, M key rows, H query heads, K key/value heads, W head dim as padded.
"""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .call import with_positive_scale
from .flash_aten import device_lists
from .flash_lists import Lists

OLDEST = (2, 6, 3)
"""The first with the log-sum-exp of lists as [H,N], not padded to the longest list."""


def installed() -> bool:
    """Without importing it."""
    return find_spec("flash_attn") is not None


def refuse() -> tuple[str, ...]:
    """Why an installed flash-attn cannot be used."""
    try:
        package = import_module("flash_attn")
        import_module("flash_attn.flash_attn_interface")
    except (ImportError, OSError) as error:  # OSError: a library built for another torch
        return (f"flash-attn is installed but cannot be imported ({error}); reinstall or remove it",)
    if _version(package.__version__) < OLDEST:
        return (f"flash-attn must be 2.6.3 or newer, this is {package.__version__}; upgrade or remove it",)
    return ()


class PackageKernels:
    """flash_attn_interface._flash_attn_varlen_forward and _backward: bf16 and fp16, W <= 256, on CUDA.

    dQ is added up by atomics, in an order that varies, unless torch.use_deterministic_algorithms(True) is on.
    """

    width_multiple = 8

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def forward(self, q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float) -> tuple[Tensor, Tensor]:
        q, scale, _ = with_positive_scale(q, scale)
        results = import_module("flash_attn.flash_attn_interface")._flash_attn_varlen_forward(
            q=q, k=k, v=v, **_options(lists, scale, q.device), return_softmax=False
        )
        lse_HN = results[1] if len(results) == 4 else results[5]
        return results[0], lse_HN.transpose(0, 1)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lists: Lists, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, scale, sign = with_positive_scale(q, scale)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        import_module("flash_attn.flash_attn_interface")._flash_attn_varlen_backward(
            dout=dout,
            q=q,
            k=k,
            v=v,
            out=out,
            softmax_lse=lse.transpose(0, 1).contiguous(),
            dq=dq,
            dk=dk,
            dv=dv,
            **_options(lists, scale, q.device),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq if sign == 1 else dq * sign, dk, dv


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", text)[:3])


def _options(lists: Lists, scale: float, device: torch.device) -> dict[str, Any]:
    """Lists, mask, scale and dropout under the names that this version knows."""
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    window: dict[str, Any] = {"window_size_left": -1, "window_size_right": -1}
    if _version(import_module("flash_attn").__version__) < (2, 7):
        window = {"window_size": (-1, -1)}
    return {
        **dict(zip(names, device_lists(lists, device), strict=True)),
        "dropout_p": 0.0,
        "softmax_scale": scale,
        "causal": lists.causal,
        "softcap": 0.0,
        "alibi_slopes": None,
        **window,
    }
