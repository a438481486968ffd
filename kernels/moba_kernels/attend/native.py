"""Attention by native/attend.c, which this machine's C compiler makes: all pairs of a call, both ways, on CPU.

It takes fp32, bf16 and fp16 of any head dims, any documents, positions and picks. Sizes of blocks and ranges follow
from the sizes of a call, never from the number of threads, and every sum has one order: bits are the same for any
number of threads. A row's output depends, to the bit, on itself and earlier rows alone, if values that have weight 0
(later ones, and those of chunks that a mask hides) are finite.

Shape letters: T queries at hand, S keys at hand, H query heads, K key/value heads, D head dim, Dv value dim, R heads
that pick, P picks, C chunks, A ranges of keys.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..native import DTYPES, Arguments, Rows
from ..native import serves as compiled
from ..pack import IntArray
from ..report import PairTally
from .call import AttendCall, host_positions
from .steps import visible_keys

# What each thread takes beyond inputs and results (head dims to 1024, fewer than a million chunks), and what comes with
# every (query, head), two heads at least.
SCRATCH_BYTES = 32 << 20
BYTES_OF_ROW = 32
# A block of queries under one KV head: what a thread reads and writes again and again, rows of q and out, fits its
# cache in CACHE_BYTES; the list of a chunk has LIST_ROWS rows on average, so that packing its keys pays; what a thread
# notes of a block, BYTES_OF_ENTRY for a pick and BYTES_OF_NOTE for a row, stays within MAX_NOTES.
CACHE_BYTES = 1 << 19
LIST_ROWS = 48
MIN_BLOCK = 32
BYTES_OF_ENTRY = 22
BYTES_OF_NOTE = 88
MAX_NOTES = 1 << 24
# Cells of a backward pass, over all KV heads: enough ranges for as many threads to work side by side.
MAX_RANGES = 16
MIN_RANGE_KEYS = 256
FORWARD, BACKWARD = 0, 1
# Ways to take picks: all of them lie in the segment, or they go by lists, or the segment is the document with a mask.
# A mask multiplies out what was not picked; lists cost what MASK_KEYS more keys in every chunk would.
PLAIN, LISTED, MASKED = range(3)
MASK_KEYS = 12
BITS_OF_WORD = 64
MAX_HEADS = 1 << 20  # a row's number keeps 20 bits for its head

_POINTERS = (
    *("out", "lse", "dq", "dk", "dv", "delta"),
    *("own_begin", "own_end", "picks", "ways", "own_chunk", "chunk_keys", "range_keys", "range_chunks"),
)
_SIZES = (
    *("num_queries", "num_heads", "num_kv_heads", "dim", "value_dim", "num_routed", "num_slots", "wide_picks"),
    *("picks_token", "picks_head"),
    *("query_block", "num_words", "num_ranges", "num_threads", "attended", "scored"),
)


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, Rows) for name in ("q", "k", "v", "dout")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("scale", ctypes.c_double),
    )


def serves(q_THD: Tensor) -> bool:
    """What compiled kernels take, of no more than MAX_HEADS heads."""
    return compiled(q_THD) and q_THD.shape[1] <= MAX_HEADS


def forward(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, call: AttendCall, tally: PairTally | None
) -> tuple[Tensor, Tensor]:
    """(out [T,H,Dv], lse [T,H]) in fp32."""
    out_THD = q_THD.new_empty((*q_THD.shape[:2], v_SKD.shape[2]), dtype=torch.float32)
    lse_TH = q_THD.new_empty(q_THD.shape[:2], dtype=torch.float32)
    arguments = _prepared(q_THD, k_SKD, v_SKD, call, backward=False)
    arguments.tensor("out", out_THD)
    arguments.tensor("lse", lse_TH)
    arguments.run("moba_attend", FORWARD)
    if tally is not None:
        tally.add(arguments.to.attended, arguments.to.scored)
    return out_THD, lse_TH


def backward(
    dout_THD: Tensor, q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, lse_TH: Tensor, delta_TH: Tensor, call: AttendCall
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in fp32. lse and delta [T,H] contiguous fp32; lse is finite."""
    gradients = tuple(
        torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format) for x in (q_THD, k_SKD, v_SKD)
    )
    arguments = _prepared(q_THD, k_SKD, v_SKD, call, backward=True)
    arguments.rows("dout", dout_THD if dout_THD.dtype in DTYPES else dout_THD.float())
    for name, x in zip(("lse", "delta", "dq", "dk", "dv"), (lse_TH, delta_TH, *gradients), strict=True):
        arguments.tensor(name, x)
    arguments.run("moba_attend", BACKWARD)
    return gradients[0], gradients[1], gradients[2]


def _prepared(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, call: AttendCall, *, backward: bool) -> Arguments:
    (num_queries, num_heads, dim), (num_keys, num_kv_heads, value_dim) = q_THD.shape, v_SKD.shape
    arguments = Arguments(_Call())
    for name, x in (("q", q_THD), ("k", k_SKD), ("v", v_SKD)):
        arguments.rows(name, x)
    arguments.to.scale = call.scale
    arguments.sizes(
        num_queries=num_queries,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        dim=dim,
        value_dim=value_dim,
        num_threads=torch.get_num_threads(),
    )
    query_T = host_positions(call.q_positions, call.pack.num_tokens)
    key_S = host_positions(call.k_positions, call.pack.num_tokens)
    ways = _Ways.of(call, query_T, key_S)
    arguments.array("own_begin", ways.own_begin_T)
    arguments.array("own_end", visible_keys(call)[:-1])
    num_ranges = _num_ranges(num_keys, num_kv_heads) if backward else 1
    slots, lists_of_query = 0, 0.0
    if call.routing is not None and call.routing.stored.numel() and ways.way_T.any():
        geometry = call.pack.chunks(call.routing.spec.chunk_size)
        key_edges_C = np.searchsorted(key_S, np.append(geometry.start_C, call.pack.num_tokens))
        stored = call.routing.stored
        _, num_routed, slots = stored.shape
        arguments.array("ways", ways.way_T, np.uint8)
        arguments.array("own_chunk", ways.own_chunk_T)
        arguments.array("chunk_keys", key_edges_C)
        arguments.sizes(num_routed=num_routed, num_slots=slots, wide_picks=stored.dtype == torch.int32)
        arguments.sizes(num_words=ways.num_words)
        arguments.picks(stored)
        num_chunks = len(key_edges_C) - 1
        num_ranges = min(num_ranges, num_chunks)
        range_chunks = np.arange(num_ranges + 1) * num_chunks // num_ranges
        arguments.array("range_chunks", range_chunks)
        range_keys = key_edges_C[range_chunks]
        lists_of_query = num_heads // num_kv_heads * slots / num_chunks
    else:
        range_keys = np.arange(num_ranges + 1) * num_keys // num_ranges
    arguments.array("range_keys", range_keys)
    group = num_heads // num_kv_heads
    block = query_block(num_queries, num_kv_heads, group, dim + value_dim, slots, lists_of_query)
    arguments.sizes(num_ranges=num_ranges, query_block=block)
    return arguments


class _Ways(NamedTuple):
    """How queries take their picks: which keys their segments begin with, and what those lack."""

    own_begin_T: IntArray  # the key at hand from which on a query attends to all up to itself, but for a mask
    way_T: npt.NDArray[np.uint8]  # PLAIN, LISTED or MASKED
    own_chunk_T: IntArray
    num_words: int  # of a mask

    @classmethod
    def of(cls, call: AttendCall, query_T: IntArray, key_S: IntArray) -> Self:
        """In the first topk chunks of a document a query picks every chunk before its own, if it took all it could:
        that is plain causal attention from the document's first token on, whether or not the document goes on. In those
        behind them it still picks most, and where chunks are short hiding the others costs less than lists."""
        if call.routing is None:
            edges = call.segments.edges
            segment_T = np.searchsorted(edges, query_T, side="right") - 1
            none_T = np.zeros_like(query_T)
            return cls(np.searchsorted(key_S, edges)[segment_T], none_T.astype(np.uint8), none_T, 0)
        spec, slots = call.routing.spec, call.routing.stored.shape[2]
        geometry = call.pack.chunks(spec.chunk_size)
        before_C = geometry.index_in_doc_C
        every_C = before_C < (spec.topk if call.routing.complete else 1)
        masked_C = ~every_C & (before_C * spec.chunk_size <= slots * (spec.chunk_size + MASK_KEYS))
        begin_C = np.where(every_C | masked_C, call.pack.bounds[geometry.doc_C], geometry.start_C)
        way_C = np.select((every_C, masked_C), (PLAIN, MASKED), LISTED).astype(np.uint8)
        chunk_T = geometry.tensors("cpu").chunk_of_token_T.numpy()[query_T]
        most = int(before_C[masked_C].max(initial=0))
        return cls(np.searchsorted(key_S, begin_C)[chunk_T], way_C[chunk_T], chunk_T, -(-most // BITS_OF_WORD))


def _num_ranges(num_keys: int, num_kv_heads: int) -> int:
    """Ranges of keys in a backward pass: fewer where KV heads keep threads busy by themselves."""
    return max(1, min(MAX_RANGES // num_kv_heads, num_keys // MIN_RANGE_KEYS))


def query_block(num_queries: int, num_kv_heads: int, group: int, dims: int, slots: int, lists_of_query: float) -> int:
    """Queries of a block. lists_of_query: rows that a query adds to a chunk's list, on average."""
    block = max(MIN_BLOCK, CACHE_BYTES // (4 * group * dims))
    if lists_of_query:
        block = max(block, int(LIST_ROWS / lists_of_query))
    # A short row is cut into some blocks even so, one for every thread.
    block = min(block, max(MIN_BLOCK, num_queries * num_kv_heads // MAX_RANGES), num_queries)
    noted = group * (BYTES_OF_ENTRY * slots + BYTES_OF_NOTE)
    return max(1, min(block, MAX_NOTES // noted))
