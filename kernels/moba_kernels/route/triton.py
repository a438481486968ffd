"""The gate on a GPU: scores on tensor cores at fp32 accuracy, and a streaming top-k; no score matrix in memory.

A program takes a tile of queries of one routing head and walks over the chunks that any of them may pick, a block at a
time. Scores are products of bf16 pieces: the fp32 mean is the sum of three bf16 terms, the query of one (bf16), two
(fp16) or three (fp32, or the sum of a group's heads); products below 2^-26 of the score are left out. A score is one
chain of fp32 additions over D in fixed order, whichever row and column of a tile it falls into, so the same query gets
the same picks in any call. See route/README.md.

Shape letters: T queries at hand, H query heads, K key/value heads, R routing heads, D head dim, C chunks, P picks; in
kernels Q queries of a tile, C chunks of a block, L slots of the list that a pass fills.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pack import Pack
from ..routing import Routing, stored_picks
from ..spec import MoBA
from ..triton_math import TRITON_TYPE, Variant, target_of
from .triton_tile import (
    NOTHING,
    below,
    empty_list,
    mean_scores,
    merge_block,
    piecewise_scores,
    query_terms,
    sortable,
    store_list,
)

# Sizes of the list that a pass fills. Larger topk takes a pass over the chunks for every MAX_SLOTS picks.
LIST_SIZES = (4, 8, 16)
MAX_SLOTS = LIST_SIZES[-1]
UNSPECIALISED = ("num_queries", "num_chunks", "heads_summed", "heads_of_kv", "num_picks", "first_slot", "words")


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNSPECIALISED)
def _pick(  # type: ignore[no-untyped-def]
    q, mean_terms, own, first, picks, last_keys, num_queries, num_chunks, heads_summed, heads_of_kv, num_picks,
    first_slot, words, stride_t, stride_h, D: tl.constexpr, BLOCK_D: tl.constexpr, TERMS: tl.constexpr,
    LATER_PASS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Picks first_slot .. first_slot + SLOTS - 1 of a tile of queries; a later pass looks below last_keys only."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest walks first
    head, num_routed = tl.program_id(1), tl.num_programs(1)
    query_Q = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside_Q = query_Q < num_queries
    own_Q = tl.load(own + query_Q, mask=inside_Q, other=0)
    first_Q = tl.load(first + query_Q, mask=inside_Q, other=0)
    column_D = tl.arange(0, BLOCK_D)
    at_QD = (
        q + query_Q.to(tl.int64)[:, None] * stride_t + head.to(tl.int64) * heads_summed * stride_h + column_D[None, :]
    )
    mask_QD = inside_Q[:, None] & (column_D < D)[None, :]
    if BLOCK_D >= D:
        q0_QD, q1_QD, q2_QD = query_terms(at_QD, mask_QD, heads_summed, stride_h, TERMS)
    term_stride = num_chunks.to(tl.int64) * D
    terms = mean_terms + (head // heads_of_kv) * 3 * term_stride
    row_Q = query_Q.to(tl.int64) * num_routed + head
    num_slots = tl.minimum(num_picks - first_slot, SLOTS)
    list_QL = empty_list(num_slots, BLOCK_Q, SLOTS)
    if LATER_PASS:
        limit_Q = tl.load(last_keys + row_Q, mask=inside_Q, other=0)
    last_first, low_own, high = tl.max(first_Q, 0), tl.min(own_Q, 0), tl.max(own_Q, 0)
    for block in range(tl.load(first + tile * BLOCK_Q), high, BLOCK_C):
        chunk_C = block + tl.arange(0, BLOCK_C)
        at_DC = terms + chunk_C.to(tl.int64)[None, :] * D + column_D[:, None]
        inside_C = chunk_C < high
        if BLOCK_D >= D:
            mask_DC = inside_C[None, :] & (column_D < D)[:, None]
            scores_QC = mean_scores(q0_QD, q1_QD, q2_QD, at_DC, mask_DC, term_stride, TERMS)
        else:
            scores_QC = piecewise_scores(
                at_QD, inside_Q, heads_summed, stride_h, at_DC, inside_C, term_stride,
                D, TERMS, BLOCK_Q, BLOCK_C, BLOCK_D,
            )  # fmt: skip
        ordered_QC = sortable(scores_QC)
        if (block < last_first) | (block + BLOCK_C > low_own):  # a chunk here is no candidate of some query
            candidate_QC = (chunk_C[None, :] >= first_Q[:, None]) & (chunk_C[None, :] < own_Q[:, None])
            ordered_QC = tl.where(candidate_QC, ordered_QC, NOTHING)
        if LATER_PASS:
            ordered_QC = tl.where(below(ordered_QC, chunk_C, limit_Q), ordered_QC, NOTHING)
        list_QL = merge_block(list_QL, ordered_QC, chunk_C, block)
    at_Q = picks + (row_Q * num_picks + first_slot) * words
    last_Q = store_list(list_QL, at_Q, inside_Q, num_slots, words, SLOTS)
    tl.store(last_keys + row_Q, last_Q, mask=inside_Q & (first_slot + SLOTS < num_picks))


@dataclass(frozen=True)
class Tile:
    """How a program is cut."""

    block_q: int
    block_c: int
    block_d: int
    """At least D: the query stays in registers or shared memory. Less, a divisor of D: it is read piece by piece."""
    num_warps: int
    num_stages: int


def tile_of(dim: int, terms: int, target: int) -> Tile:
    """The tile for a head dim and a number of query terms.

    What fits the target's shared memory and, tried out ahead of time, does not spill registers.
    """
    padded = triton.next_power_of_2(dim)
    if terms > 1 and (padded > 128 or (padded == 128 and target != 90)):
        piece = 64 if dim % 64 == 0 else 32
        return Tile(64, 64, piece, 4 if piece == 32 and target >= 100 else 8, 2)
    if padded > 128:
        return Tile(64, 32, padded, 4, 2)
    if target == 80:
        return Tile(64, 32 if padded == 32 else 64, padded, 4, 2)
    # Two programs fit a multiprocessor, so that one merges while the other multiplies; few rows would read more means.
    if terms > 1:
        return Tile(64, 64, padded, 4, 2)
    return Tile(256 if target == 90 else 128, 32, padded, 8, 2)


def terms_of(dtype: torch.dtype, summed: bool) -> int:
    """bf16 terms that a query is the exact sum of; a sum of heads is kept to fp32's 24 bits."""
    return 3 if summed else {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}[dtype]


def route_means(q_THD: Tensor, mean_CKD: Tensor, spec: MoBA, *, pack: Pack, q_positions: Tensor | None) -> Routing:
    """Routing of the queries at hand given the published means. No host sync. See route/README.md.

    Scratch: 6 bytes an element of the means, two int32 a query; with more than MAX_SLOTS picks 8 bytes a routed row.
    """
    num_queries, num_heads, _ = q_THD.shape
    num_kv_heads = mean_CKD.shape[1]
    routed, kept = spec.routed_heads(num_heads, num_kv_heads), stored_picks(spec, pack)
    stored = Routing.unwritten(num_queries, routed, kept, spec, pack, q_THD.device)
    words = 1 if stored.dtype == torch.int16 else 2
    if stored.numel():
        geometry = pack.chunks(spec.chunk_size).tensors(q_THD.device)
        own_T = geometry.chunk_of_token_T if q_positions is None else geometry.chunk_of_token_T[q_positions]
        first_T = geometry.first_chunk_of_doc[geometry.doc_C[own_T]]
        heads = (num_heads // routed, routed // num_kv_heads)
        _launch(q_THD, split_means(mean_CKD), own_T.int(), first_T.int(), stored, heads, words)
    return Routing.of_bits(stored, spec, pack, q_positions, complete=True)


def split_means(mean_CKD: Tensor) -> Tensor:
    """bf16 [K,3,C,D]: terms that add up to the fp32 means, large to small."""
    rest_KCD = mean_CKD.transpose(0, 1)
    terms = []
    for _ in range(3):
        terms.append(rest_KCD.bfloat16())
        rest_KCD = rest_KCD - terms[-1].float()
    return torch.stack(terms, 1)


def _launch(
    q_THD: Tensor, terms: Tensor, own_T: Tensor, first_T: Tensor, stored: Tensor, heads: tuple[int, int], words: int
) -> None:
    """heads: query heads summed in a routing head, routing heads of a KV head."""
    queries = q_THD if q_THD.stride(2) == 1 else q_THD.contiguous()
    num_queries, routed, num_picks = stored.shape
    dim = q_THD.shape[2]
    query_terms = terms_of(q_THD.dtype, heads[0] > 1)
    tile = tile_of(dim, query_terms, target_of(q_THD.device))
    last_keys = torch.empty(stored.shape[:2] if num_picks > MAX_SLOTS else 1, dtype=torch.int64, device=q_THD.device)
    for first_slot in range(0, num_picks, MAX_SLOTS):
        _pick[(triton.cdiv(num_queries, tile.block_q), routed)](
            queries,
            terms,
            own_T,
            first_T,
            stored.view(torch.int16),
            last_keys,
            num_queries,
            terms.shape[2],
            *heads,
            num_picks,
            first_slot,
            words,
            queries.stride(0),
            queries.stride(1),
            **_constants(dim, query_terms, tile, min(num_picks, MAX_SLOTS), later_pass=first_slot > 0),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def _constants(dim: int, terms: int, tile: Tile, num_slots: int, *, later_pass: bool) -> dict[str, int | bool]:
    return {
        "D": dim,
        "BLOCK_D": tile.block_d,
        "TERMS": terms,
        "LATER_PASS": later_pass,
        "BLOCK_Q": tile.block_q,
        "BLOCK_C": tile.block_c,
        "SLOTS": next(size for size in LIST_SIZES if size >= num_slots),
    }


def variants(head_dims: Iterable[tuple[int, int]], dtypes: Iterable[torch.dtype], target: int) -> Iterator[Variant]:
    """The compiled forms that `route_means` launches for queries of these head dims (D, Dv) and dtypes."""
    dtypes = tuple(dtypes)
    for dim in sorted({dim for dim, _ in head_dims}):
        for dtype in dtypes:
            for summed in (False, True):
                terms = terms_of(dtype, summed)
                if summed and terms == terms_of(dtype, False):
                    continue
                tile = tile_of(dim, terms, target)
                for slots, later in ((4, False), (8, False), (16, False), (16, True)):
                    yield _variant(dim, dtype, terms, tile, slots, later)


def _variant(dim: int, dtype: torch.dtype, terms: int, tile: Tile, slots: int, later: bool) -> Variant:
    types = {"q": f"*{TRITON_TYPE[dtype]}", "mean_terms": "*bf16", "own": "*i32", "first": "*i32", "picks": "*i16"}
    types |= {"last_keys": "*i64"} | dict.fromkeys((*UNSPECIALISED, "stride_t", "stride_h"), "i32")
    aligned = frozenset({"q", "mean_terms", "own", "first", "picks", "last_keys", "stride_t", "stride_h"})
    constants = _constants(dim, terms, tile, slots, later_pass=later)
    label = f"gate D={dim} {TRITON_TYPE[dtype]} terms={terms} slots={slots}{' later' if later else ''}"
    return Variant(label, _pick, types, constants, tile.num_warps, tile.num_stages, dim, dtype, aligned)
