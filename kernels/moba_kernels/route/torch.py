"""The gate in bounded ranges: blocks of queries against the window of chunks that any of them may pick.

A block is some consecutive queries at hand; its window runs from the first chunk of its first query's document to
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
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..native import serves as serves_natively
from ..pack import IntArray, Pack
from ..routing import Routing, stored_picks
from ..spec import MoBA
from . import native

# Queries of a block where windows are narrow, and scores of one batch (8 MB in fp64, 8 MB more as integers): near the
# cores, and bounded however many chunks and heads there are.
MAX_BLOCK_Q = 128
SCRATCH_ELEMENTS = 1 << 20
NO_CANDIDATE = -(2**63)
# On CPU PyTorch selects up to W / 64 of W by a heap; beyond that numpy sorts all of them in less time (measured).
SELECT_UP_TO = 64


def route_means(q_THD: Tensor, mean_CKD: Tensor, spec: MoBA, *, pack: Pack, q_positions: Tensor | None) -> Routing:
    """Routing of the queries at hand given the published means. See route/README.md."""
    num_queries, num_heads, _ = q_THD.shape
    num_kv_heads = mean_CKD.shape[1]
    routed, kept = spec.routed_heads(num_heads, num_kv_heads), stored_picks(spec, pack)
    picks = Routing.unwritten(num_queries, routed, kept, spec, pack, q_THD.device)
    if kept and num_queries:
        geometry = pack.chunks(spec.chunk_size).tensors(q_THD.device)
        own_T = geometry.chunk_of_token_T if q_positions is None else geometry.chunk_of_token_T[q_positions]
        first_T = geometry.first_chunk_of_doc[geometry.doc_C[own_T]]
        if serves_natively(q_THD):
            native.pick(q_THD, mean_CKD, first_T, own_T, picks)
        else:
            picks.fill_(-1)
            own, first = own_T.cpu().numpy(), first_T.cpu().numpy()  # one host read off the CPU
            for batch in _batches(own, first, routed, q_THD.shape[2]):
                rows = slice(batch.begin, batch.begin + len(batch.low_N) * batch.block_q)
                picks[rows] = _pick(q_THD[rows], mean_CKD, spec, own_T[rows], first_T[rows], batch, kept)
    return Routing.of_bits(picks, spec, pack, q_positions, complete=True)


@dataclass(frozen=True)
class Batch:
    """Blocks of block_q consecutive queries each, from query `begin` on."""

    begin: int
    block_q: int
    low_N: IntArray
    """[N]: the first chunk that a query of the block may pick."""
    width: int
    """Chunks from low on that any query of any block may pick."""


def _batches(own: IntArray, first: IntArray, routed: int, dim: int) -> Iterator[Batch]:
    """Batches whose padded scores fit the scratch. Blocks without a candidate are left out."""
    widest = int((own - first).max())
    block_q = min(MAX_BLOCK_Q, max(1, SCRATCH_ELEMENTS // max(1, routed * widest)))
    starts = np.arange(0, len(own), block_q)
    low = first[starts]
    # Own chunks ascend, so a block's last query sees furthest.
    widths = (own[np.minimum(starts + block_q, len(own)) - 1] - low).tolist()
    whole = len(own) // block_q
    begin = 0
    while begin < len(widths):
        end, width = begin, 0
        while end < len(widths):
            wider = max(width, widths[end])
            short = end == whole  # the last block, if it is a short one, comes alone
            of_block = max(wider, dim // 4) * routed * block_q  # scores, or a quarter of the queries in fp64
            if end > begin and (short or (end + 1 - begin) * of_block > SCRATCH_ELEMENTS):
                break
            width, end = wider, end + 1
        if width:
            size = block_q if begin < whole else len(own) - begin * block_q
            yield Batch(begin * block_q, size, low[begin:end], width)
        begin = end


def _pick(
    q_THD: Tensor, mean_CKD: Tensor, spec: MoBA, own_T: Tensor, first_T: Tensor, batch: Batch, kept: int
) -> Tensor:
    """[T,R,P] picks of one batch."""
    num_blocks, block_q, width = len(batch.low_N), batch.block_q, batch.width
    scores = _scores(q_THD, mean_CKD, spec, batch)
    low_N = torch.from_numpy(batch.low_N).to(q_THD.device)
    window_N1W = (low_N[:, None] + torch.arange(width, device=low_N.device))[:, None]
    own_NQ1, first_NQ1 = (x.view(num_blocks, block_q, 1) for x in (own_T, first_T))
    outside_NQW = (window_N1W < first_NQ1) | (window_N1W >= own_NQ1)
    keys = sortable_(scores, width).masked_fill_(outside_NQW[:, :, None], NO_CANDIDATE)
    best = _largest(keys, min(kept, width))
    chunk = best.to(torch.int32).add_(low_N.to(torch.int32).view(-1, 1, 1, 1))  # the low half of a key is the index
    picks = chunk.masked_fill_(best == NO_CANDIDATE, -1)
    picks = torch.nn.functional.pad(picks, (0, kept - picks.shape[-1]), value=-1)
    return picks.permute(1, 2, 0, 3, 4).reshape(num_blocks * block_q, -1, kept)


def _largest(keys: Tensor, count: int) -> Tensor:
    """[..., count] of keys [..., W], falling. Spoils keys."""
    width = keys.shape[-1]
    if keys.device.type == "cpu" and count * SELECT_UP_TO > width:
        keys.numpy().sort(-1)
        return keys[..., width - count :].flip(-1)
    return keys.topk(count, dim=-1).values


def _scores(q_THD: Tensor, mean_CKD: Tensor, spec: MoBA, batch: Batch) -> Tensor:
    """fp32 [K,N,Q,R/K,W], contiguous: products in fp64, rounded once."""
    num_chunks, num_kv_heads, dim = mean_CKD.shape
    num_blocks, width = len(batch.low_N), batch.width
    queries = q_THD.reshape(num_blocks, batch.block_q, num_kv_heads, -1, dim)
    if spec.select == "group":
        queries = queries.sum(3, keepdim=True, dtype=torch.float64)
    lhs = queries.new_empty((num_kv_heads, *queries.shape[:2], *queries.shape[3:]), dtype=torch.float64)
    lhs.copy_(queries.permute(2, 0, 1, 3, 4))
    low = int(batch.low_N[0])
    if (batch.low_N == low).all():  # one document: all blocks share one window
        scores = torch.bmm(lhs.view(num_kv_heads, -1, dim), mean_CKD[low : low + width].double().permute(1, 2, 0))
    else:
        window_NW = torch.from_numpy(batch.low_N[:, None] + np.arange(width)).clamp_max(num_chunks - 1)
        means_KNDW = mean_CKD[window_NW.to(mean_CKD.device)].double().permute(2, 0, 3, 1)
        scores = torch.bmm(
            lhs.view(num_kv_heads * num_blocks, -1, dim), means_KNDW.reshape(num_kv_heads * num_blocks, dim, width)
        )
    return scores.float().view(*lhs.shape[:-1], width)


def sortable_(scores: Tensor, width: int) -> Tensor:
    """fp32 scores [..., width] as distinct int64: ordered by score, then by index along the last dim. Spoils scores."""
    bits = scores.add_(0.0).view(torch.int32)  # + 0.0 makes -0.0 and 0.0 the same
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)  # IEEE order as signed integers
    return bits.long().bitwise_left_shift_(32).bitwise_or_(torch.arange(width, device=scores.device))
