"""The torch backend: any device, the default on CPU. Forward and backward by hand, no [T,S] tensor.

On CPU, where there is a C compiler and in any dtype but fp64, a kernel in C does all of it (native.py). Elsewhere work
comes in two parts, each done in one of two ways (attend/README.md):

    causal segments    blocks through the built-in CPU kernel (fused.py)    or masked tiles in batched GEMMs (tiles.py)
    picks              lists, chunk by chunk, through that kernel           or tiles, slot by slot, in batched GEMMs

The built-in kernel is taken on CPU where q, k and v share a head dim, for segments that are unions of blocks, and for
picks whose lists are long enough to be worth a call each.

Shape letters: T queries at hand, S keys at hand, H query heads, K key/value heads, D head dim, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ..pack import IntArray
from ..report import PairTally, Partial
from . import fused, native
from .blocks import Block, causal_blocks, fitted
from .call import AttendCall, accumulate_dtype, host_positions
from .lists import ListPart, average_list, chunk_lists, worth_a_call
from .steps import Shape, Step, causal_steps, pick_steps, visible_keys
from .sums import Gradients, Sums
from .tiles import backward_steps, forward_steps

# Memory that a call takes beyond inputs, results (in fp32 where they are narrower) and the stored routing: gathered
# rows and tiles, sorted picks, scores. Independent of the density; the tests hold every density to it. What comes with
# every (query, head) is BYTES_OF_ROW: positions, lse, delta and its stand-in in the backward. Picks that go by tiles
# (short lists, or head dims that differ) take BYTES_OF_PICK each on top.
SCRATCH_BYTES = 160 << 20
BYTES_OF_ROW = 32
BYTES_OF_PICK = 8


@dataclass(frozen=True)
class Work:
    """One call, taken apart: every pair is in exactly one of these, which run in this order."""

    blocks: Sequence[Block] = ()
    steps: Iterator[Step] | None = None
    lists: Iterator[ListPart] | None = None


def work_of(call: AttendCall, q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor) -> Work:
    """How the pairs of a call are computed."""
    shape = Shape.of(q_THD, k_SKD)
    if not shape.num_queries or not shape.num_keys:
        return Work()
    query_T = host_positions(call.q_positions, call.pack.num_tokens)
    key_S = host_positions(call.k_positions, call.pack.num_tokens)
    segments = call.segments
    steps: list[Iterator[Step]] = []
    served = fused.serves(q_THD, v_SKD)
    heads = shape.num_heads, shape.num_kv_heads
    max_queries, max_keys = fused.block_limits(*heads, q_THD.shape[2])
    blocks = causal_blocks(query_T, key_S, segments.edges) if served else None
    if blocks is None:
        edges = segments.edges
        visible_T = visible_keys(call)
        query_edges, key_edges = np.searchsorted(query_T, edges), np.searchsorted(key_S, edges)
        steps.append(causal_steps(query_edges, key_edges, visible_T, shape, q_THD.device))
    lists: Iterator[ListPart] | None = None
    if call.routing is not None and segments.any_picks:
        geometry = call.pack.chunks(call.routing.spec.chunk_size)
        key_edges_C = np.searchsorted(key_S, np.append(geometry.start_C, call.pack.num_tokens))
        chunk_T = geometry.tensors("cpu").chunk_of_token_T.numpy()[query_T]
        takes_picks_T = torch.from_numpy(~segments.covered_C[chunk_T])
        if fused.serves(q_THD, v_SKD) and _long_lists(call, shape, key_edges_C):
            lists = chunk_lists(call.routing, takes_picks_T, key_edges_C, *heads, max_keys)
        else:
            picks = call.routing.picks_of_heads(shape.num_heads)
            picks = torch.where(takes_picks_T.to(picks.device)[:, None, None], picks, -1)
            steps.append(pick_steps(picks, key_edges_C, shape, q_THD.device))
    blocks = fitted(blocks or [], max_queries, max_keys)
    return Work(blocks, chain.from_iterable(steps) if steps else None, lists)


def _long_lists(call: AttendCall, shape: Shape, key_edges_C: IntArray) -> bool:
    assert call.routing is not None
    keys_of = np.diff(key_edges_C)
    group, slots = shape.num_heads // shape.num_kv_heads, call.routing.stored.shape[2]
    if not slots:
        return False
    average = average_list(shape.num_queries, group, slots, int((keys_of > 0).sum()))
    return worth_a_call(average, int(keys_of.max()))


def attend_partial(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, call: AttendCall, tally: PairTally | None) -> Partial:
    """softmax(scale * q k^T + mask) v and its log-sum-exp."""
    acc = accumulate_dtype(q_THD)
    num_queries, num_heads, _ = q_THD.shape
    value_dim = v_SKD.shape[2]
    if num_queries and len(k_SKD) and native.serves(q_THD):
        out_THD, lse_TH = native.forward(q_THD, k_SKD, v_SKD, call, tally)
        return Partial(out_THD.to(call.result_dtype), lse_TH)
    sums = Sums.nothing(num_queries * num_heads, value_dim, q_THD, acc)
    work = work_of(call, q_THD, k_SKD, v_SKD)
    for block in work.blocks:
        fused.forward_block(q_THD, k_SKD, v_SKD, block, call.scale, sums)
        if tally is not None:
            tally.add(*block.pairs(num_heads))
    if work.steps is not None:
        forward_steps(work.steps, q_THD, k_SKD, v_SKD, call, sums, tally)
    for part in work.lists or ():
        fused.forward_lists(q_THD, k_SKD, v_SKD, part, call.scale, sums)
        if tally is not None:
            tally.add(*part.pairs())
    out_THD = sums.out[:-1].view(num_queries, num_heads, value_dim).to(call.result_dtype)
    return Partial(out_THD, sums.lse[:-1].view(num_queries, num_heads).to(acc))


def attend_partial_backward(
    dout_THD: Tensor,
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    lse_TH: Tensor,
    delta_TH: Tensor,
    call: AttendCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """This part's share of (dq, dk, dv), given the global lse and delta."""
    acc = accumulate_dtype(q_THD)
    num_queries, num_heads, dim = q_THD.shape
    lse_TH = torch.where(lse_TH == -torch.inf, 0.0, lse_TH).to(acc).contiguous()
    delta_TH = delta_TH.to(acc).contiguous()
    result = call.result_dtype
    if num_queries and len(k_SKD) and native.serves(q_THD):
        gradients = native.backward(dout_THD, q_THD, k_SKD, v_SKD, lse_TH, delta_TH, call)
        return gradients[0].to(result), gradients[1].to(result), gradients[2].to(result)
    dq = q_THD.new_zeros((num_queries * num_heads + 1, dim), dtype=acc)
    dk, dv = (torch.zeros_like(x, dtype=acc, memory_format=torch.contiguous_format) for x in (k_SKD, v_SKD))
    grads = Gradients(dout_THD, lse_TH, delta_TH, dq, dk, dv)
    work = work_of(call, q_THD, k_SKD, v_SKD)
    stand_in = fused.StandIn.of(dout_THD, grads.delta_TH)
    for block in work.blocks:
        fused.backward_block(q_THD, k_SKD, v_SKD, block, call.scale, grads, stand_in)
    if work.steps is not None:
        backward_steps(work.steps, q_THD, k_SKD, v_SKD, call, grads)
    for part in work.lists or ():
        fused.backward_lists(q_THD, k_SKD, v_SKD, part, call.scale, grads, stand_in)
    return dq[:-1].view(q_THD.shape).to(result), dk.to(result), dv.to(result)
