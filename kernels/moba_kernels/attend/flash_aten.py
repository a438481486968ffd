"""PyTorch's built-in flash kernels. Both return the log-sum-exp; neither needs an installation.

Shape letters: N query rows, M key rows, H query heads, K key/value heads, W head dim as padded, L rows of a list.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..errors import BackendError
from . import cpu_flash
from .call import with_positive_scale
from .flash_lists import Lists


class CpuKernels:
    """aten::_scaled_dot_product_flash_attention_for_cpu: fp32 and fp64, GQA, any head dim.

    It knows no lists: neighbours of equal lengths go together as a batch, each other list is a call of its own. bf16
    and fp16 are computed in fp32, which is faster on a CPU and exact enough to publish fp32 partials.
    """

    width_multiple = 1

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if dtype == torch.float64 else torch.float32

    def forward(self, q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:2])
        heads_at_once = _heads_at_once(q.shape[1], k.shape[1])
        for rows, keys, count in _equal_runs(lists):
            of_keys = _batch(k[keys], count), _batch(v[keys], count)
            for heads in heads_at_once:
                of_rows = _batch(q[rows, heads], count)
                out_BHLW, lse_BHL = cpu_flash.forward(of_rows, *of_keys, lists.causal, scale)
                out[rows, heads], lse[rows, heads] = _rows(out_BHLW), _rows(lse_BHL)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lists: Lists, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        heads_at_once = _heads_at_once(q.shape[1], k.shape[1])
        for rows, keys, count in _equal_runs(lists):
            of_keys = _batch(k[keys], count), _batch(v[keys], count)
            for heads in heads_at_once:
                dout_BHLW, q_BHLW, out_BHLW = (_batch(x[rows, heads], count) for x in (dout, q, out))
                lse_BHL = _batch(lse[rows, heads].unsqueeze(-1), count).squeeze(-1)
                grads = cpu_flash.backward(dout_BHLW, q_BHLW, *of_keys, out_BHLW, lse_BHL, lists.causal, scale)
                dq[rows, heads] = _rows(grads[0])
                for whole, part in zip((dk, dv), grads[1:], strict=True):
                    if heads.start:  # a further head of the group
                        whole[keys] += _rows(part)
                    else:
                        whole[keys] = _rows(part)
        return dq, dk, dv


def _heads_at_once(num_heads: int, num_kv_heads: int) -> list[slice]:
    """Query heads of each kernel call: all, or one of every group where the kernel cannot serve groups."""
    group = num_heads // num_kv_heads
    return [slice(None)] if cpu_flash.groups_natively() else [slice(i, None, group) for i in range(group)]


def _equal_runs(lists: Lists) -> Iterator[tuple[slice, slice, int]]:
    """(rows, keys, number of lists) of neighbours with equal lengths."""
    lengths = np.stack((lists.q_lengths, lists.k_lengths), 1)
    first = np.flatnonzero(np.append(True, (np.diff(lengths, axis=0) != 0).any(1)))
    for begin, end in zip(first, np.append(first[1:], len(lengths)), strict=True):
        q_edges, k_edges = lists.q_edges, lists.k_edges
        rows, keys = (slice(int(x[begin]), int(x[end])) for x in (q_edges, k_edges))
        yield rows, keys, int(end - begin)


def _batch(x_NHW: Tensor, count: int) -> Tensor:
    """[count * L, H, W] -> [count, H, L, W], a view."""
    return x_NHW.view(count, -1, *x_NHW.shape[1:]).transpose(1, 2)


def _rows(x_BHL: Tensor) -> Tensor:
    """[count, H, L, ...] -> [count * L, H, ...], the way back."""
    return x_BHL.transpose(1, 2).flatten(0, 1)


class CudaKernels:
    """aten::_flash_attention_forward and _backward: FlashAttention-2 with lists, bf16 and fp16, W <= 256.

    dQ is added up by atomics, in an order that varies, unless torch.use_deterministic_algorithms(True) is on.
    """

    width_multiple = 8

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def forward(self, q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float) -> tuple[Tensor, Tensor]:
        q, scale, _ = with_positive_scale(q, scale)
        results = torch.ops.aten._flash_attention_forward(
            q, k, v, *device_lists(lists, q.device), 0.0, lists.causal, False, scale=scale
        )
        if results[1].shape != (q.shape[1], q.shape[0]):
            reason = f"this PyTorch ({torch.__version__}) pads the log-sum-exp of lists"
            raise BackendError("flash", [reason], "take a newer PyTorch, install flash-attn, or use another backend")
        return results[0], results[1].transpose(0, 1)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lists: Lists, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, scale, sign = with_positive_scale(q, scale)
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        lse_HN = lse.transpose(0, 1).contiguous()
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, lse_HN, *device_lists(lists, q.device), 0.0, lists.causal, *no_dropout, scale=scale
        )
        return dq if sign == 1 else dq * sign, dk, dv


def device_lists(lists: Lists, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) as FlashAttention-2 takes them.

    The longest list is said to have two queries at least: for one, the kernel folds the heads of a group into the
    queries, and its log-sum-exp comes back in another order.
    """
    q_edges, k_edges = (torch.from_numpy(x.astype(np.int32)).to(device) for x in (lists.q_edges, lists.k_edges))
    return q_edges, k_edges, max(2, int(lists.q_lengths.max())), int(lists.k_lengths.max())
