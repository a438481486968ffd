"""The paper's own algorithm on flash kernels: own chunks causal, gathered queries chunk by chunk, merged by their lse.

This is the baseline that MoBA's users know (arXiv 2502.13189, algorithm 1), right where the original is wrong: topk = 1
attends to the own chunk only, query heads share their KV head (GQA), and empty documents change nothing. The kernels
are those of the flash-attn package if it is installed, else PyTorch's built-in ones; on a CPU always the built-in ones.

Precision: the parts are merged and published in fp32 (fp64 on a CPU for fp64 inputs). Flash kernels on CUDA return each
part in the inputs' dtype, so each part's out, dq, dk and dv is rounded once more than by the other backends.

Memory: beyond inputs, results (of narrower dtypes in fp32, too) and a few numbers a token and query row, a call takes
SCRATCH_BYTES at most, on a GPU CUDA_SCRATCH_BYTES: two thirds for what a kernel call reads and writes, a third to sort
picks. Independent of the density; the tests hold every density to it.

Shape letters: T queries at hand, S keys at hand, H query heads, K key/value heads, D head dim, Dv value dim, W = max(D,
Dv) as the kernels take it, R = T*H query rows, N rows of a kernel call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..report import PairTally, Partial
from ..scatter import add_rows_
from . import flash_attn_package
from .call import AttendCall, accumulate_dtype
from .flash_aten import CpuKernels, CudaKernels
from .flash_lists import FlashKernels, Lists, causal_pieces, pick_batches

SCRATCH_BYTES = 96 << 20
# A GPU is busy only with many rows at a time.
CUDA_SCRATCH_BYTES = 1536 << 20

MAX_CUDA_DIM = 256


def kernels_for(device: torch.device) -> FlashKernels:
    """The kernels that serve a device; `refuse` says beforehand where there are none."""
    if device.type == "cpu":
        return CpuKernels()
    return flash_attn_package.PackageKernels() if flash_attn_package.installed() else CudaKernels()


def refuse(*tensors: Tensor) -> tuple[str, ...]:
    """Why flash kernels cannot serve a call on these tensors (q and v; q and the means; k alone)."""
    device, dtype = tensors[0].device, tensors[0].dtype
    if device.type == "cpu":
        return ()
    if device.type != "cuda":
        return (f"flash kernels run on CPU and CUDA, the tensors lie on {device}",)
    reasons = []
    if dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"on CUDA flash kernels take bf16 and fp16, not {dtype}")
    widest = max(x.shape[-1] for x in tensors)
    if widest > MAX_CUDA_DIM:
        reasons.append(f"on CUDA flash kernels take head dims up to {MAX_CUDA_DIM}, not {widest}")
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        reasons.append(f"flash kernels need compute capability 8.0 (Ampere), {device} has {major}.{minor}")
    if flash_attn_package.installed():
        reasons.extend(flash_attn_package.refuse())
    elif not torch.backends.cuda.is_flash_attention_available():
        reasons.append("this PyTorch was built without flash kernels; install flash-attn")
    return tuple(reasons)


@dataclass(frozen=True)
class _Kernels:
    """The kernels of one call, with what its tensors are converted to and how much goes into one kernel call."""

    flash: FlashKernels
    dtype: torch.dtype
    width: int
    causal_limit: int
    """Tokens of a causal piece."""
    pick_limit: int
    """Gathered rows and keys of a batch of picks."""
    sort_bytes: int

    def ready(self, x: Tensor) -> Tensor:
        """x in the kernels' dtype, zeros after its last dim up to their width: they change neither scores nor sums."""
        x = x if x.shape[-1] == self.width else pad(x, (0, self.width - x.shape[-1]))
        x = x.to(self.dtype)
        return x if x.stride(-1) == 1 else x.contiguous()


def _kernels(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor) -> _Kernels:
    flash = kernels_for(q_THD.device)
    unit = flash.width_multiple
    width = -(-max(q_THD.shape[2], v_SKD.shape[2]) // unit) * unit
    scratch = SCRATCH_BYTES if q_THD.device.type == "cpu" else CUDA_SCRATCH_BYTES
    sort_bytes = scratch // 3
    budget = scratch - sort_bytes
    # At most eight rows as wide as a head, counted in the accumulating dtype, are alive for a row or key in a call:
    # q, dout, the stand-in of out and its making, dq; k, v, dk, dv and their copies.
    row_bytes = 8 * width * accumulate_dtype(q_THD).itemsize
    causal = budget // (row_bytes * (q_THD.shape[1] + k_SKD.shape[1]))
    whole_tiles = max(1, causal // 128) * 128 if causal >= 128 else max(1, causal)
    dtype, picks = flash.compute_dtype(q_THD.dtype), max(2, budget // row_bytes)
    return _Kernels(flash, dtype, width, whole_tiles, picks, sort_bytes)


class _Merge:
    """Running softmax over parts: out = sum exp(lse_i - top) out_i, total = sum exp(lse_i - top), top = max lse_i."""

    def __init__(self, like: Tensor, num_rows: int, value_dim: int, dtype: torch.dtype) -> None:
        self.out_RDv = like.new_zeros((num_rows, value_dim), dtype=dtype)
        self.top_R = like.new_full((num_rows,), -torch.inf, dtype=dtype)
        self.total_R = like.new_zeros((num_rows,), dtype=dtype)

    def add(self, rows: slice, out_NDv: Tensor, lse_N: Tensor) -> None:
        """One part of consecutive rows."""
        top = torch.maximum(self.top_R[rows], lse_N)
        keep, weight = torch.exp(self.top_R[rows] - top), torch.exp(lse_N - top)
        self.out_RDv[rows].mul_(keep.unsqueeze(-1)).addcmul_(out_NDv.to(keep.dtype), weight.unsqueeze(-1))
        self.total_R[rows].mul_(keep).add_(weight)
        self.top_R[rows] = top

    def add_gathered(self, row_N: Tensor, out_NDv: Tensor, lse_N: Tensor) -> None:
        """Parts of any rows; a row may stand more than once, with another part each time.

        The first writes of a row's copies all write the same value, the additions run in a fixed order: the result does
        not depend on threads.
        """
        old = self.top_R.index_select(0, row_N)
        self.top_R.scatter_reduce_(0, row_N, lse_N, "amax")
        top = self.top_R.index_select(0, row_N)
        keep, weight = torch.exp(old - top), torch.exp(lse_N - top)
        kept = self.out_RDv.index_select(0, row_N).mul_(keep.unsqueeze(-1))
        self.out_RDv.index_copy_(0, row_N, kept)
        self.total_R.index_copy_(0, row_N, self.total_R.index_select(0, row_N).mul_(keep))
        add_rows_(self.out_RDv, row_N, torch.mul(out_NDv, weight.unsqueeze(-1), out=kept))
        add_rows_(self.total_R, row_N, weight)

    def finish(self) -> tuple[Tensor, Tensor]:
        """(out, lse); rows without any part give 0 and -inf."""
        self.out_RDv.div_(torch.where(self.total_R == 0, 1.0, self.total_R).unsqueeze(-1))
        return self.out_RDv, self.top_R.add_(self.total_R.log())


def _count(tally: PairTally | None, lists: Lists, num_heads: int) -> None:
    if tally is not None:
        tally.add(lists.num_pairs * num_heads, lists.num_scored * num_heads)


def attend_partial(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, call: AttendCall, tally: PairTally | None) -> Partial:
    """softmax(scale * q k^T + mask) v and its log-sum-exp, part by part."""
    acc = accumulate_dtype(q_THD)
    num_queries, num_heads, _ = q_THD.shape
    num_kv_heads, value_dim = v_SKD.shape[1:]
    kernels = _kernels(q_THD, k_SKD, v_SKD)
    merge = _Merge(q_THD, num_queries * num_heads, value_dim, acc)
    for piece in causal_pieces(call, kernels.causal_limit):
        q, k, v = (kernels.ready(x) for x in (q_THD[piece.queries], k_SKD[piece.keys], v_SKD[piece.keys]))
        out, lse = kernels.flash.forward(q, k, v, piece.lists, call.scale)
        rows = slice(piece.queries.start * num_heads, piece.queries.stop * num_heads)
        merge.add(rows, out[..., :value_dim].flatten(0, 1), lse.flatten())
        _count(tally, piece.lists, num_heads)
    for batch in pick_batches(call, num_heads, num_kv_heads, kernels.pick_limit, kernels.sort_bytes):
        q = kernels.ready(q_THD[batch.token_N, batch.head_N].unsqueeze(1))
        k, v = (kernels.ready(x[batch.keys, batch.kv_head].unsqueeze(1)) for x in (k_SKD, v_SKD))
        out, lse = kernels.flash.forward(q, k, v, batch.lists, call.scale)
        row_N = batch.token_N * num_heads + batch.head_N
        merge.add_gathered(row_N, out[:, 0, :value_dim], lse.flatten())
        _count(tally, batch.lists, 1)
    out_RDv, lse_R = merge.finish()
    out_THDv = out_RDv.view(num_queries, num_heads, value_dim)
    return Partial(out_THDv.to(call.result_dtype), lse_R.view(num_queries, num_heads))


def stand_in(dout: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """Some out' with rowsum(dout * out') = delta: the flash kernels' backward asks for out, a partial call has delta.

    out' is zero but at the largest |dout| of a row, where it is delta / dout: one product of the size of delta, so the
    kernel's sum is off by the rounding of delta itself, whatever the size of the gradient, and no terms cancel. Where
    out' is published in 16 bits, the second and third largest take what the rounding left over. A row of zeros has
    delta 0 and gets zeros.

    Args: dout [..., W]; delta [...]; dtype: of the kernels. Returns out' [..., W]; delta is met to 2^-23 of itself as
    long as a 16-bit row has three elements to share.
    """
    acc = accumulate_dtype(dout)
    largest = torch.finfo(dtype).max
    terms = 1 if dtype == acc else min(3, dout.shape[-1])
    at = dout.abs().topk(terms, -1).indices
    left = delta.to(acc).unsqueeze(-1)
    made = torch.zeros_like(dout, dtype=dtype, memory_format=torch.contiguous_format)
    for i in range(terms):
        factor = dout.gather(-1, at[..., i : i + 1]).to(acc)
        share = torch.where(factor == 0, 0.0, left / factor).clamp(-largest, largest).to(dtype)
        made.scatter_(-1, at[..., i : i + 1], share)
        left = left - factor * share
    return made


def attend_partial_backward(
    dout_THDv: Tensor,
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    lse_TH: Tensor,
    delta_TH: Tensor,
    call: AttendCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """P = exp(scale q k^T - lse) with the global lse, part by part; shares add up in a fixed order."""
    acc = accumulate_dtype(q_THD)
    num_heads, num_kv_heads, value_dim = q_THD.shape[1], k_SKD.shape[1], v_SKD.shape[2]
    dim = q_THD.shape[2]
    kernels = _kernels(q_THD, k_SKD, v_SKD)
    dq, dk, dv = (torch.zeros(x.shape, dtype=acc, device=x.device) for x in (q_THD, k_SKD, v_SKD))
    dq_RD = dq.view(-1, dim)

    def grads_of(
        q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, lists: Lists
    ) -> tuple[Tensor, Tensor, Tensor]:
        ready = kernels.ready(dout)
        of_out = stand_in(ready, delta, kernels.dtype)
        q, k, v = (kernels.ready(x) for x in (q, k, v))
        got = kernels.flash.backward(ready, q, k, v, of_out, lse.to(acc), lists, call.scale)
        return got[0][..., :dim], got[1][..., :dim], got[2][..., :value_dim]

    for piece in causal_pieces(call, kernels.causal_limit):
        at, keys = piece.queries, piece.keys
        part = grads_of(q_THD[at], k_SKD[keys], v_SKD[keys], dout_THDv[at], lse_TH[at], delta_TH[at], piece.lists)
        for whole, rows, share in zip((dq, dk, dv), (at, keys, keys), part, strict=True):
            whole[rows] += share
    for batch in pick_batches(call, num_heads, num_kv_heads, kernels.pick_limit, kernels.sort_bytes):
        k, v = (x[batch.keys, batch.kv_head].unsqueeze(1) for x in (k_SKD, v_SKD))
        of_rows = (x[batch.token_N, batch.head_N].unsqueeze(1) for x in (q_THD, dout_THDv, lse_TH, delta_TH))
        q, dout, lse, delta = of_rows
        part = grads_of(q, k, v, dout, lse, delta, batch.lists)
        add_rows_(dq_RD, batch.token_N * num_heads + batch.head_N, part[0].squeeze(1).to(acc))
        dk[batch.keys, batch.kv_head] += part[1].squeeze(1)
        dv[batch.keys, batch.kv_head] += part[2].squeeze(1)
    return tuple(x.to(call.result_dtype) for x in (dq, dk, dv))  # type: ignore[return-value]
