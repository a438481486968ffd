"""Attention by native.c, which this machine's C compiler makes: every pair of a call, forward and backward, on CPU.

It takes fp32, bf16 and fp16 of any head dims, any documents, positions and picks. Sizes of blocks and ranges follow
from the sizes of a call, never from the number of threads, and every sum has one order: bits are the same for any
number of threads. A row's output depends, to the bit, on itself and earlier rows alone.

Shape letters: T queries at hand, S keys at hand, H query heads, K key/value heads, D head dim, Dv value dim, R heads
that pick, P picks, C chunks, A ranges of keys.
"""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..pack import IntArray
from ..report import PairTally
from .call import AttendCall, host_positions
from .native_build import NativeUnavailable, library
from .steps import visible_keys

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# What each thread takes beyond inputs and results, and what comes with every (query, head).
SCRATCH_BYTES = 32 << 20
BYTES_OF_ROW = 32
# A block of queries under one KV head: what a thread reads and writes again and again, rows of q and out, fits its
# cache in CACHE_BYTES; the list of a chunk has LIST_ROWS rows on average, so that packing its keys pays; picks take
# BYTES_OF_ENTRY each while they are sorted, MAX_SORT_BYTES at most.
CACHE_BYTES = 1 << 19
LIST_ROWS = 48
MIN_BLOCK = 32
BYTES_OF_ENTRY = 20
MAX_SORT_BYTES = 1 << 24
# Cells of a backward pass, over all KV heads: enough ranges for as many threads to work side by side.
MAX_RANGES = 16
MIN_RANGE_KEYS = 256

_logger = logging.getLogger(__name__)


@cache
def available() -> bool:
    """Is there a compiled kernel? If not, a warning says why, once: PyTorch's own operations take its place."""
    try:
        library()
    except NativeUnavailable as error:
        _logger.warning("attention on CPU runs without its compiled kernel, at about half the speed: %s", error)
        return False
    return True


def serves(q_THD: Tensor) -> bool:
    """On CPU, in any dtype but fp64."""
    return q_THD.device.type == "cpu" and q_THD.dtype in DTYPES and available()


class _Rows(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("token", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    )


_POINTERS = (
    *("out", "lse", "dq", "dk", "dv", "delta"),
    *("own_begin", "own_end", "picks", "takes", "chunk_keys", "range_keys", "range_chunks"),
)
_SIZES = (
    *("num_queries", "num_heads", "num_kv_heads", "dim", "value_dim", "num_routed", "num_slots", "wide_picks"),
    *("query_block", "num_ranges", "num_threads", "attended", "scored"),
)


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _Rows) for name in ("q", "k", "v", "dout")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("scale", ctypes.c_double),
    )


@dataclass
class Native:
    """A call as native.c takes it; it holds on to what the call points to."""

    call: _Call = field(default_factory=_Call)
    held: list[object] = field(default_factory=list)

    def rows(self, name: str, x: Tensor) -> None:
        """[tokens, heads, dim], read where it lies if its last dim is dense."""
        x = x if x.stride(-1) == 1 else x.contiguous()
        self.held.append(x)
        setattr(self.call, name, _Rows(x.data_ptr(), x.stride(0), x.stride(1), DTYPES[x.dtype]))

    def tensor(self, name: str, x: Tensor) -> None:
        """A contiguous tensor."""
        assert x.is_contiguous()
        self.held.append(x)
        setattr(self.call, name, x.data_ptr())

    def integers(self, name: str, x: IntArray) -> None:
        x = np.ascontiguousarray(x, dtype=np.int64)
        self.held.append(x)
        setattr(self.call, name, x.ctypes.data)

    def run(self, *, backward: bool) -> None:
        if library().moba_attend(ctypes.byref(self.call), int(backward)):
            raise MemoryError("attention on CPU: no memory for what its threads work in")


def forward(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, call: AttendCall, tally: PairTally | None
) -> tuple[Tensor, Tensor]:
    """(out [T,H,Dv], lse [T,H]) in fp32."""
    out_THD = q_THD.new_empty((*q_THD.shape[:2], v_SKD.shape[2]), dtype=torch.float32)
    lse_TH = q_THD.new_empty(q_THD.shape[:2], dtype=torch.float32)
    native = _prepared(q_THD, k_SKD, v_SKD, call, backward=False)
    native.tensor("out", out_THD)
    native.tensor("lse", lse_TH)
    native.run(backward=False)
    if tally is not None:
        tally.add(native.call.attended, native.call.scored)
    return out_THD, lse_TH


def backward(
    dout_THD: Tensor, q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, lse_TH: Tensor, delta_TH: Tensor, call: AttendCall
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in fp32. lse and delta [T,H] contiguous fp32; lse is finite."""
    gradients = tuple(
        torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format) for x in (q_THD, k_SKD, v_SKD)
    )
    native = _prepared(q_THD, k_SKD, v_SKD, call, backward=True)
    native.rows("dout", dout_THD if dout_THD.dtype in DTYPES else dout_THD.float())
    for name, x in zip(("lse", "delta", "dq", "dk", "dv"), (lse_TH, delta_TH, *gradients), strict=True):
        native.tensor(name, x)
    native.run(backward=True)
    return gradients[0], gradients[1], gradients[2]


def _prepared(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, call: AttendCall, *, backward: bool) -> Native:
    (num_queries, num_heads, dim), (num_keys, num_kv_heads, value_dim) = q_THD.shape, v_SKD.shape
    native = Native()
    for name, x in (("q", q_THD), ("k", k_SKD), ("v", v_SKD)):
        native.rows(name, x)
    to = native.call
    to.num_queries, to.num_heads, to.num_kv_heads, to.dim, to.value_dim = (
        num_queries,
        num_heads,
        num_kv_heads,
        dim,
        value_dim,
    )
    to.num_threads, to.scale = torch.get_num_threads(), call.scale
    query_T = host_positions(call.q_positions, call.pack.num_tokens)
    key_S = host_positions(call.k_positions, call.pack.num_tokens)
    edges = call.segments.edges
    native.integers("own_begin", np.searchsorted(key_S, edges)[np.searchsorted(edges, query_T, side="right") - 1])
    native.integers("own_end", visible_keys(call)[:-1])
    num_ranges = _num_ranges(num_keys, num_kv_heads) if backward else 1
    lists_of_query = 0.0
    if call.routing is not None and call.segments.any_picks and call.routing.stored.numel():
        geometry = call.pack.chunks(call.routing.spec.chunk_size)
        key_edges_C = np.searchsorted(key_S, np.append(geometry.start_C, call.pack.num_tokens))
        chunk_T = geometry.tensors("cpu").chunk_of_token_T.numpy()[query_T]
        takes_T = np.ascontiguousarray(~call.segments.covered_C[chunk_T])
        stored = call.routing.stored.contiguous()
        native.held.append(takes_T)
        native.tensor("picks", stored)
        to.takes, to.wide_picks = takes_T.ctypes.data, stored.dtype == torch.int32
        to.num_routed, to.num_slots = stored.shape[1], stored.shape[2]
        native.integers("chunk_keys", key_edges_C)
        num_chunks = len(key_edges_C) - 1
        num_ranges = min(num_ranges, num_chunks)
        range_chunks = np.arange(num_ranges + 1) * num_chunks // num_ranges
        native.integers("range_chunks", range_chunks)
        range_keys = key_edges_C[range_chunks]
        lists_of_query = num_heads // num_kv_heads * stored.shape[2] / num_chunks
    else:
        range_keys = np.arange(num_ranges + 1) * num_keys // num_ranges
    native.integers("range_keys", range_keys)
    to.num_ranges = num_ranges
    to.query_block = query_block(
        num_queries, num_kv_heads, num_heads // num_kv_heads, dim + value_dim, to.num_slots, lists_of_query
    )
    return native


def _num_ranges(num_keys: int, num_kv_heads: int) -> int:
    """Ranges of keys in a backward pass: fewer where KV heads keep threads busy by themselves."""
    return max(1, min(MAX_RANGES // num_kv_heads, num_keys // MIN_RANGE_KEYS))


def query_block(num_queries: int, num_kv_heads: int, group: int, dims: int, slots: int, lists_of_query: float) -> int:
    """Queries of a block. lists_of_query: rows that a query adds to a chunk's list, on average."""
    block = CACHE_BYTES // (4 * group * dims)
    if lists_of_query:
        block = min(max(block, int(LIST_ROWS / lists_of_query)), MAX_SORT_BYTES // (BYTES_OF_ENTRY * group * slots))
    # A short row is cut into some blocks even so, one for every thread.
    return max(1, min(max(MIN_BLOCK, block), max(MIN_BLOCK, num_queries * num_kv_heads // MAX_RANGES), num_queries))
