"""The gate in bounded ranges: blocks of queries against the window of chunks that any of them may pick.

A block is BLOCK_Q consecutive queries at hand; its window runs from the first chunk of its first query's document to
the last query's own chunk. Blocks are batched while the padded scores stay within SCRATCH_ELEMENTS, so nothing of size
[T,C,H] exists and short documents never meet each other's chunks.

Products are taken in fp64 and rounded to fp32 once: then the score does not depend on how many rows a call has (an fp32
GEMM does), and the routing not on the number of ranks. Score and chunk are compared as one integer, which makes ties go
to the later chunk on every device.

Shape letters: T queries at hand, H query heads, K key/value heads, R routing heads, D head dim, C chunks, N blocks of a
batch, Q queries of a block, W chunks of a window, P picks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..pack import IntArray, Pack
from ..routing import Routing, stored_picks
from ..spec import MoBA

BLOCK_Q = 128
# Scores of one batch (fp64 and int64 copies: 16 MB each).
SCRATCH_ELEMENTS = 1 << 20
NO_CANDIDATE = -(2**63)


def route_means(q_THD: Tensor, mean_CKD: Tensor, spec: MoBA, *, pack: Pack, q_positions: Tensor | None) -> Routing:
    """Routing of the queries at hand given the published means. See route/README.md."""
    num_queries, num_heads, _ = q_THD.shape
    num_kv_heads = mean_CKD.shape[1]
    routed, kept = spec.routed_heads(num_heads, num_kv_heads), stored_picks(spec, pack)
    picks = torch.full((num_queries, routed, kept), -1, dtype=torch.int32, device=q_THD.device)
    if kept and num_queries:
        geometry = pack.chunks(spec.chunk_size).tensors(q_THD.device)
        own_T = geometry.chunk_of_token_T if q_positions is None else geometry.chunk_of_token_T[q_positions]
        first_T = geometry.first_chunk_of_doc[geometry.doc_C[own_T]]
        low_B, high_B = _windows(own_T, first_T)
        for begin, end, width in _batches(low_B, high_B, BLOCK_Q * routed):
            rows = slice(begin * BLOCK_Q, min(end * BLOCK_Q, num_queries))
            low_N = torch.from_numpy(low_B[begin:end]).to(q_THD.device)
            picks[rows] = _pick(q_THD[rows], mean_CKD, spec, own_T[rows], first_T[rows], low_N, width, kept)
    return Routing(picks, spec, pack, q_positions, complete=True)


def _windows(own_T: Tensor, first_T: Tensor) -> tuple[IntArray, IntArray]:
    """Per block: the first chunk that a query of it may pick, and one past the last. One host read off the CPU."""
    first, own = first_T.cpu().numpy(), own_T.cpu().numpy()
    return first[::BLOCK_Q].copy(), own[
        np.minimum(np.arange(BLOCK_Q - 1, len(own) + BLOCK_Q - 1, BLOCK_Q), len(own) - 1)
    ]


def _batches(low_B: IntArray, high_B: IntArray, rows_of_block: int) -> Iterator[tuple[int, int, int]]:
    """(first block, one past the last, window width) of batches whose padded scores fit the scratch."""
    widths = (high_B - low_B).tolist()
    begin = 0
    while begin < len(widths):
        end, width = begin, 0
        while end < len(widths):
            wider = max(width, widths[end])
            if end > begin and (end + 1 - begin) * wider * rows_of_block > SCRATCH_ELEMENTS:
                break
            width, end = wider, end + 1
        if width:
            yield begin, end, width
        begin = end


def _pick(
    q_THD: Tensor, mean_CKD: Tensor, spec: MoBA, own_T: Tensor, first_T: Tensor, low_N: Tensor, width: int, kept: int
) -> Tensor:
    """[T,R,P] picks of one batch of blocks (its last block may be short)."""
    num_queries, num_heads, dim = q_THD.shape
    num_chunks, num_kv_heads, _ = mean_CKD.shape
    num_blocks, heads_of_kv = low_N.numel(), num_heads // num_kv_heads
    padding = num_blocks * BLOCK_Q - num_queries
    queries = q_THD.double().view(num_queries, num_kv_heads, heads_of_kv, dim)
    if spec.select == "group":
        queries = queries.sum(2, keepdim=True)
    queries = torch.nn.functional.pad(queries, (0, 0, 0, 0, 0, 0, 0, padding))
    rows_of_kv = queries.shape[2]
    lhs = queries.view(num_blocks, BLOCK_Q, num_kv_heads, rows_of_kv, dim).permute(0, 2, 1, 3, 4)
    window_NW = low_N[:, None] + torch.arange(width, device=low_N.device)
    means = mean_CKD[window_NW.clamp_max(num_chunks - 1)].double()  # [N,W,K,D]
    scores = torch.bmm(
        lhs.reshape(num_blocks * num_kv_heads, BLOCK_Q * rows_of_kv, dim),
        means.permute(0, 2, 3, 1).reshape(num_blocks * num_kv_heads, dim, width),
    )
    scores = scores.float().view(num_blocks, num_kv_heads, BLOCK_Q, rows_of_kv, width)
    window_NQW = window_NW[:, None]
    own_NQ1 = torch.nn.functional.pad(own_T, (0, padding)).view(num_blocks, BLOCK_Q, 1)
    first_NQ1 = torch.nn.functional.pad(first_T, (0, padding)).view(num_blocks, BLOCK_Q, 1)
    candidate_NQW = (window_NQW >= first_NQ1) & (window_NQW < own_NQ1)
    keys = torch.where(candidate_NQW[:, None, :, None], sortable(scores, width), NO_CANDIDATE)
    best, index = keys.topk(min(kept, width), dim=-1)
    picks = torch.where(best == NO_CANDIDATE, -1, index + low_N.view(-1, 1, 1, 1, 1))
    picks = torch.nn.functional.pad(picks, (0, kept - picks.shape[-1]), value=-1)
    return picks.permute(0, 2, 1, 3, 4).reshape(num_blocks * BLOCK_Q, -1, kept)[:num_queries].to(torch.int32)


def sortable(scores: Tensor, width: int) -> Tensor:
    """fp32 scores [..., width] as distinct int64: ordered by score, then by index along the last dim."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 makes -0.0 and 0.0 the same
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # IEEE order as signed integers
    return (ordered.long() << 32) | torch.arange(width, device=scores.device)
