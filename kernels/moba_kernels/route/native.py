"""The gate by native/gate.c, which this machine's C compiler makes.

A score is one chain of products in fp64, rounded to fp32 once: it depends on the query and the mean alone. How the work
is cut into blocks follows from the sizes of a call, and picks do not depend on it.

Shape letters: T queries at hand, H query heads, K key/value heads, R routing heads, D head dim, C chunks, P picks.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..native import Arguments, Rows

# What each thread takes beyond inputs and picks (head dims to 1024, 64 query heads a KV head, 16384 picks a query).
SCRATCH_BYTES = 32 << 20
# A block of queries under one KV head: rows that share the conversion of a chunk's mean, fewer where each keeps more
# keys than KEPT_KEYS allows; several blocks even of a short row, so that threads share it.
BLOCK_ROWS = 512
KEPT_KEYS = 1 << 17
MIN_BLOCKS = 16


class _Gate(ctypes.Structure):
    _fields_ = (
        *((name, Rows) for name in ("q", "means")),
        *((name, ctypes.c_void_p) for name in ("first", "own", "picks")),
        *((name, ctypes.c_int64) for name in ("num_queries", "num_heads", "num_kv_heads", "num_routed", "num_slots")),
        *((name, ctypes.c_int64) for name in ("dim", "wide_picks", "query_block", "num_threads")),
    )


def pick(q_THD: Tensor, mean_CKD: Tensor, first_T: Tensor, own_T: Tensor, picks_TRP: Tensor) -> None:
    """Write the picks by falling score, -1 = none, into picks (int16 or int32), contiguous.

    A query's candidates are chunks first .. own - 1, both ascending int64 [T].
    """
    (num_queries, num_heads, dim), num_kv_heads = q_THD.shape, mean_CKD.shape[1]
    _, num_routed, num_slots = picks_TRP.shape
    arguments = Arguments(_Gate())
    arguments.rows("q", q_THD)
    arguments.rows("means", mean_CKD)
    for name, x in (("first", first_T), ("own", own_T), ("picks", picks_TRP)):
        arguments.tensor(name, x)
    arguments.sizes(
        num_queries=num_queries,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        num_routed=num_routed,
        num_slots=num_slots,
        dim=dim,
        wide_picks=picks_TRP.dtype == torch.int32,
        query_block=query_block(num_queries, num_kv_heads, num_routed // num_kv_heads, num_slots),
        num_threads=torch.get_num_threads(),
    )
    arguments.run("moba_gate")


def query_block(num_queries: int, num_kv_heads: int, rows_of_query: int, num_slots: int) -> int:
    """Queries of a block."""
    rows = min(BLOCK_ROWS, KEPT_KEYS // num_slots)
    return max(1, min(rows // rows_of_query, -(-num_queries * num_kv_heads // MIN_BLOCKS)))
