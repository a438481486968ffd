"""Device functions of the gate: scores of a tile of queries against a block of chunks, and the running top-k list.

A pick is one int64 key: the fp32 score's bits, made to sort as integers, above the chunk's index. All keys differ. A
list holds a query's best keys so far in no order; its smallest is the floor that a new key must beat.

Shape letters: Q queries of a tile, C chunks of a block, D head dim (padded), L slots of a list.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_math import dot, narrow

# Below every score: a chunk that is no candidate, and (above an index) a slot that nothing has filled.
NOTHING: tl.constexpr = tl.constexpr(-(2**31))
LOWEST: tl.constexpr = tl.constexpr(-(2**63))
HIGHEST: tl.constexpr = tl.constexpr(2**63 - 1)


@triton.jit
def query_terms(at_QD, mask_QD, heads_summed, stride_h, TERMS: tl.constexpr):  # type: ignore[no-untyped-def]
    """bf16 [Q,D] terms that add up to the query (TERMS = 1: it is bf16), or to the sum of a group's query heads."""
    query_QD = tl.load(at_QD, mask=mask_QD, other=0.0)
    if TERMS == 1:
        return query_QD, query_QD, query_QD
    sum_QD = query_QD.to(tl.float32)
    for _ in range(1, heads_summed):
        at_QD += stride_h
        sum_QD += tl.load(at_QD, mask=mask_QD, other=0.0).to(tl.float32)
    q0_QD = narrow(sum_QD, tl.bfloat16)
    rest_QD = sum_QD - q0_QD.to(tl.float32)
    q1_QD = narrow(rest_QD, tl.bfloat16)
    q2_QD = narrow(rest_QD - q1_QD.to(tl.float32), tl.bfloat16)
    return q0_QD, q1_QD, q2_QD


@triton.jit
def mean_scores(q0_QD, q1_QD, q2_QD, at_DC, mask_DC, term_stride, TERMS: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 [Q,C] scores; at_DC points at the first of three terms of the means. Small products are added first."""
    m0_DC = tl.load(at_DC, mask=mask_DC, other=0.0)
    m1_DC = tl.load(at_DC + term_stride, mask=mask_DC, other=0.0)
    m2_DC = tl.load(at_DC + 2 * term_stride, mask=mask_DC, other=0.0)
    scores_QC = dot(q0_QD, m2_DC)
    if TERMS > 2:
        scores_QC += dot(q2_QD, m0_DC)
    if TERMS > 1:
        scores_QC += dot(q1_QD, m1_DC)
        scores_QC += dot(q1_QD, m0_DC)
    scores_QC += dot(q0_QD, m1_DC)
    scores_QC += dot(q0_QD, m0_DC)
    return scores_QC


@triton.jit
def piecewise_scores(  # type: ignore[no-untyped-def]
    at_QD, inside_Q, heads_summed, stride_h, at_DC, inside_C, term_stride, D: tl.constexpr, TERMS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """fp32 [Q,C] scores, BLOCK_D columns at a time: three terms of a wide query would not fit the registers."""
    scores_QC = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    for column in range(0, D, BLOCK_D):
        q0_QD, q1_QD, q2_QD = query_terms(at_QD + column, inside_Q[:, None], heads_summed, stride_h, TERMS)
        scores_QC += mean_scores(q0_QD, q1_QD, q2_QD, at_DC + column, inside_C[None, :], term_stride, TERMS)
    return scores_QC


@triton.jit
def sortable(scores):  # type: ignore[no-untyped-def]
    """int32 that order as the fp32 scores do; -0.0 and 0.0 are one."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def below(ordered_QC, chunk_C, limit_Q):  # type: ignore[no-untyped-def]
    """bool [Q,C]: is the key (score, chunk) smaller than the key limit_Q."""
    score_Q1 = (limit_Q >> 32).to(tl.int32)[:, None]
    chunk_Q1 = (limit_Q & 0xFFFFFFFF).to(tl.int32)[:, None]
    return (ordered_QC < score_Q1) | ((ordered_QC == score_Q1) & (chunk_C[None, :] < chunk_Q1))


@triton.jit
def empty_list(num_slots, BLOCK_Q: tl.constexpr, SLOTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """int64 [Q,L]: num_slots slots that any key beats, all different, and slots that no key beats."""
    slot_L = tl.arange(0, SLOTS).to(tl.int64)
    slots_L = tl.where(slot_L < num_slots, slot_L + LOWEST, HIGHEST)
    return tl.zeros((BLOCK_Q, SLOTS), tl.int64) + slots_L[None, :]


@triton.jit
def any_of(condition_Q):  # type: ignore[no-untyped-def]
    """Does it hold anywhere in the tile. Through [1,Q]: Triton 3.6 fails on a [Q] reduction of scores on sm_100."""
    return tl.max(tl.max(condition_Q.to(tl.int32)[None, :], 1), 0) > 0


@triton.jit
def beats(best_Q, floor_Q, block):  # type: ignore[no-untyped-def]
    """Does the best score that is left in a block beat the floor.

    At equal scores it does if the floor's chunk lies before the block; one of this block was taken out earlier, so it
    is the later one.
    """
    score_Q, chunk_Q = (floor_Q >> 32).to(tl.int32), (floor_Q & 0xFFFFFFFF).to(tl.int32)
    return (best_Q > NOTHING) & ((best_Q > score_Q) | ((best_Q == score_Q) & (chunk_Q < block)))


@triton.jit
def merge_block(list_QL, ordered_QC, chunk_C, block):  # type: ignore[no-untyped-def]
    """The list after the block of chunks from `block` on: best scores are taken out of it until none beats a floor."""
    floor_Q = tl.min(list_QL, 1)
    best_Q = tl.max(ordered_QC, 1)
    beats_Q = beats(best_Q, floor_Q, block)
    # Inside an `if`, because Triton pipelines the loads of a loop only when no other loop stands directly in it.
    if any_of(beats_Q):
        while any_of(beats_Q):
            pick_Q = tl.max(tl.where(ordered_QC == best_Q[:, None], chunk_C[None, :], -1), 1)
            ordered_QC = tl.where(chunk_C[None, :] == pick_Q[:, None], NOTHING, ordered_QC)
            key_Q = (best_Q.to(tl.int64) << 32) | pick_Q.to(tl.int64)
            replaced_QL = (list_QL == floor_Q[:, None]) & beats_Q[:, None]
            list_QL = tl.where(replaced_QL, key_Q[:, None], list_QL)
            floor_Q = tl.min(list_QL, 1)
            best_Q = tl.max(ordered_QC, 1)
            beats_Q = beats(best_Q, floor_Q, block)
    return list_QL


@triton.jit
def store_list(list_QL, at_Q, inside_Q, num_slots, words, SLOTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the chunks of a list by falling key, -1 = none, and give back the smallest key that was written.

    at_Q points at int16 words. words = 2 stores int32, low half first, through the same compiled form.
    """
    slot_L = tl.arange(0, SLOTS)
    list_QL = tl.where(slot_L[None, :] < num_slots, list_QL, LOWEST)
    last_Q = tl.max(list_QL, 1)
    for slot in tl.static_range(SLOTS):
        top_Q = tl.max(list_QL, 1)
        list_QL = tl.where(list_QL == top_Q[:, None], LOWEST, list_QL)
        chunk_Q = tl.where((top_Q >> 32) > NOTHING, top_Q, -1).to(tl.int32)
        wanted_Q = inside_Q & (slot < num_slots)
        last_Q = tl.where(wanted_Q, top_Q, last_Q)
        tl.store(at_Q + slot * words, chunk_Q.to(tl.int16), mask=wanted_Q)
        tl.store(at_Q + slot * words + 1, (chunk_Q >> 16).to(tl.int16), mask=wanted_Q & (words == 2))
    return last_Q
