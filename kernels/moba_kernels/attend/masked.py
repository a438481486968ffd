"""Documents as causal blocks under a mask of the picks: more pairs than lists, but no gathering and merging.

With small chunks and many picks a list costs more to gather and to merge than its pairs to compute. Then every query
takes all earlier keys of its document, block by block and a few heads at a time, as plain causal attention does, and a
mask that is added to the scores keeps out of the softmax what was not picked.

Shape letters: T tokens, H query heads, K key/value heads, D head dim, R heads that have masks of their own, P picks, B
equal blocks, M queries and L keys of a block, W chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from ..pack import planned_pairs_of_lengths
from ..ranges import ranges
from ..report import PairTally
from ..routing import Routing
from ..spec import Full, MoBA
from .blocks import Block, causal_blocks, cut
from .call import AttendCall
from .fused import BlockViews, StandIn, backward_views, forward_views, view
from .lists import worth_a_call
from .sums import Gradients, Sums

# Queries and keys of a block; its mask is 4 MB in fp32, and what its queries open of MAX_CHUNKS is 16 MB. The kernel
# gives a thread whole heads in its backward, so a mask for every thread, MAX_MASKS at most, goes into one call.
SIDE = 1024
MAX_CHUNKS = 4096
MAX_MASKS = 8
ROW_BLOCKS = 4
# Not -inf: a query may see no key of a block. Its weights there are wrong then, and exactly 0 once they are merged.
HIDDEN = -1e30
# What picks cost beyond their pairs, in pairs of plain causal attention (measured): a row in a list, one in the tiles
# that short lists share, and a call of the kernel for a list or a block, here for a head dim of 1.
PAIRS_OF_LISTED_ROW = 32
PAIRS_OF_TILED_ROW = 120
PAIRS_OF_CALL = 2 << 20


def split_documents(
    call: AttendCall, num_heads: int, num_kv_heads: int, dim: int
) -> tuple[list[Block], list[Block]] | None:
    """(covered documents, the others, for masks), or None where lists are expected to be faster, or tokens are missing.

    Decided by sizes known beforehand, never by the picks.
    """
    routing = call.routing
    if routing is None or call.q_positions is not None or call.k_positions is not None:
        return None
    token_T = np.arange(call.pack.num_tokens)
    documents = causal_blocks(token_T, token_T, call.pack.segments(Full(), complete=True).edges)
    if documents is None:
        return None
    chunk_T = routing.pack.chunks(routing.spec.chunk_size).chunk_of_token_T
    covered: list[Block] = []
    others: list[Block] = []
    for block in documents:
        (covered if call.segments.covered_C[chunk_T[block.first_query]] else others).append(block)
    pays = others and _pays(others, routing.spec, num_heads, num_kv_heads, dim)
    return (covered, others) if pays else None


def _pays(documents: list[Block], spec: MoBA, num_heads: int, num_kv_heads: int, dim: int) -> bool:
    lengths = np.repeat([x.num_queries for x in documents], [x.count for x in documents])
    own, planned, causal = (
        num_heads * planned_pairs_of_lengths(lengths, x) for x in (MoBA(spec.chunk_size, 1), spec, Full())
    )
    num_lists = num_kv_heads * int((-(-lengths // spec.chunk_size)).sum())
    rows = (planned - own) // spec.chunk_size
    pairs_of_call = PAIRS_OF_CALL // dim
    if worth_a_call(rows // num_lists, spec.chunk_size):
        of_lists = planned + rows * PAIRS_OF_LISTED_ROW + num_lists * pairs_of_call
    else:
        of_lists = planned + rows * PAIRS_OF_TILED_ROW
    # Long documents have too many blocks to look at.
    if causal >= of_lists or lengths.max() > MAX_CHUNKS * spec.chunk_size:
        return False
    blocks = [block for document in documents for block in cut(document, SIDE, SIDE)]
    return sum(block.pairs(num_heads)[1] + num_heads * pairs_of_call for block in blocks) < of_lists


@dataclass(frozen=True)
class Stripe:
    """Some queries of a document (of `count` equal ones) under some heads, and all keys up to them."""

    document: Block
    pieces: Sequence[Block]
    """The keys, block by block: all have the same queries."""
    routed_heads: slice
    """A mask for each: the query heads', or one that they all share."""
    q_heads: slice
    kv_heads: slice


@dataclass(frozen=True)
class Taken:
    """The chunks that the queries of a stripe take, their own among them, of the document's first `width`."""

    column_BMRX: Tensor
    """int64 [B,M,R,P+1]: 1 .. width, and 0 or width + 1 where there is no pick, stored as -1 or 65535."""
    width: int

    def count(self) -> Tensor:
        return ((self.column_BMRX > 0) & (self.column_BMRX <= self.width)).count_nonzero()

    def open_chunks(self, dtype: torch.dtype) -> Tensor:
        """[B,R,M,W]: 0 for the chunks that a query takes, else HIDDEN."""
        opened = torch.full((*self.column_BMRX.shape[:3], self.width + 2), HIDDEN, dtype=dtype)
        return opened.scatter_(3, self.column_BMRX, 0.0)[..., 1:-1].transpose(1, 2)


@dataclass(frozen=True)
class Masked:
    """Documents of a whole row, and its picks."""

    documents: Sequence[Block]
    routing: Routing
    chunk_T1: Tensor
    """The chunk that each token lies in."""
    num_heads: int
    num_kv_heads: int

    @classmethod
    def of(cls, documents: Sequence[Block], routing: Routing, num_heads: int, num_kv_heads: int) -> Masked:
        return cls(documents, routing, routing.own_chunks[:, None], num_heads, num_kv_heads)

    def stripes(self, dim: int) -> Iterator[Stripe]:
        """Blocks of SIDE by SIDE; equal ones together while neither mask nor rows of `dim` take more elements.

        Heads go together while their rows do not take ROW_BLOCKS times that.
        """
        threads = torch.get_num_threads()
        for document in self.documents:
            chunks = -(-document.num_queries // self.routing.spec.chunk_size)
            max_masks = min(threads, MAX_MASKS, MAX_CHUNKS // chunks)
            for _, blocks in groupby(cut(document, SIDE, SIDE), key=lambda block: block.first_query):
                pieces = list(blocks)
                widest = max(dim, *(piece.num_keys for piece in pieces))
                longest = max(pieces[0].num_queries, *(piece.num_keys for piece in pieces))
                for equal in ranges(document.count, SIDE * SIDE // (pieces[0].num_queries * widest)):
                    some, *parts = (x.part(equal.start, equal.stop) for x in (document, *pieces))
                    max_heads = ROW_BLOCKS * SIDE * SIDE // (some.count * longest * dim)
                    for heads in self._heads(max_masks, max_heads):
                        yield Stripe(some, parts, *heads)

    def _heads(self, max_masks: int, max_heads: int) -> Iterator[tuple[slice, slice, slice]]:
        """(routed, query, KV) heads that go together: max_heads with max_masks masks, one at least."""
        group, routed_of_kv = self.num_heads // self.num_kv_heads, self.routing.num_routed_heads // self.num_kv_heads
        if group == 1:
            for heads in ranges(self.num_heads, min(max_masks, max_heads)):
                yield heads, heads, heads
            return
        for kv_head in range(self.num_kv_heads):
            kv = slice(kv_head, kv_head + 1)
            for some in ranges(group, max_heads if routed_of_kv == 1 else min(max_masks, max_heads)):
                heads = slice(kv_head * group + some.start, kv_head * group + some.stop)
                yield kv if routed_of_kv == 1 else heads, heads, kv

    def views(self, stripe: Stripe, piece: Block) -> BlockViews:
        return BlockViews(piece, stripe.q_heads, stripe.kv_heads, spread=self.num_heads > self.num_kv_heads)

    def taken(self, stripe: Stripe) -> Taken:
        queries = stripe.pieces[0]
        own_BMR1 = view(self.chunk_T1, queries.first_query, queries.num_queries, queries, slice(1))[..., None]
        stored_BMRP = view(self.routing.stored, queries.first_query, queries.num_queries, queries, stripe.routed_heads)
        first_B1 = view(self.chunk_T1, stripe.document.first_key, 1, stripe.document, slice(1))[..., None]
        width = int(own_BMR1[0, -1] - first_B1[0]) + 1
        own_BMR1 = own_BMR1.expand(*stored_BMRP.shape[:3], 1)
        column_BMRX = torch.cat((stored_BMRP.long(), own_BMR1), 3).sub_(first_B1 - 1)
        return Taken(column_BMRX.clamp_(0, width + 1), width)

    def mask(self, stripe: Stripe, piece: Block, open_BRMW: Tensor, memory: Tensor) -> Tensor:
        """[B,R,M,L] to be added to the scores of a piece, in `memory`."""
        size = self.routing.spec.chunk_size
        first = piece.first_key - stripe.document.first_key
        chunk, skipped = divmod(first, size)
        chunks = open_BRMW[..., chunk : -(-(first + piece.num_keys) // size), None]
        mask = memory.resize_(*chunks.shape[:-1], size).copy_(chunks).flatten(3)
        return mask[..., skipped : skipped + piece.num_keys]

    def pairs(self, stripe: Stripe, taken: Taken) -> tuple[Tensor, int]:
        """(attended pairs, score elements): rows see all keys of their picks, and the own chunk up to themselves."""
        queries, size = stripe.pieces[0], self.routing.spec.chunk_size
        num_heads, num_masks = stripe.q_heads.stop - stripe.q_heads.start, taken.column_BMRX.shape[2]
        first = queries.first_query - stripe.document.first_query
        hidden_M = size - 1 - np.arange(first, first + queries.num_queries) % size
        attended = taken.count() * size - queries.count * num_masks * int(hidden_M.sum())
        return attended * (num_heads // num_masks), sum(piece.pairs(num_heads)[1] for piece in stripe.pieces)


def forward(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, masked: Masked, scale: float, sums: Sums, tally: PairTally | None
) -> None:
    """Write the documents' output."""
    memory = sums.out.new_empty(0)
    for stripe in masked.stripes(q_THD.shape[2]):
        taken = masked.taken(stripe)
        opened = taken.open_chunks(sums.out.dtype)
        for piece in stripe.pieces:
            mask = masked.mask(stripe, piece, opened, memory)
            views = masked.views(stripe, piece)
            forward_views(q_THD, k_TKD, v_TKD, views, scale, sums, mask)
        if tally is not None:
            tally.add(*masked.pairs(stripe, taken))


def backward(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, masked: Masked, scale: float, grads: Gradients, stand_in: StandIn
) -> None:
    """Add the documents' gradients."""
    memory = grads.dq.new_empty(0)
    for stripe in masked.stripes(q_THD.shape[2]):
        opened = masked.taken(stripe).open_chunks(grads.dq.dtype)
        for piece in stripe.pieces:
            mask = masked.mask(stripe, piece, opened, memory)
            views = masked.views(stripe, piece)
            backward_views(q_THD, k_TKD, v_TKD, views, scale, grads, stand_in, mask)
