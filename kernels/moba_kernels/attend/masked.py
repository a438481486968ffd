"""Documents as causal blocks under a mask of the picks: more pairs than lists, but no gathering and merging.

With small chunks and many picks a list costs more to gather and to merge than its pairs to compute. Then every query
takes all earlier keys of its document, block by block and head by head, as plain causal attention does, and a mask that
is added to the scores keeps out of the softmax what was not picked.

Shape letters: T tokens, H query heads, K key/value heads, D head dim, R routing heads, P picks, B equal blocks, M
queries and L keys of a block, W chunks that the keys of a block lie in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..pack import planned_pairs_of_lengths
from ..report import PairTally
from ..routing import Routing
from ..spec import Full, MoBA
from .blocks import Block, causal_blocks, cut
from .call import AttendCall
from .fused import BlockViews, StandIn, backward_views, forward_views, view
from .sums import Gradients, Sums

# Queries and keys of a block; its mask is 4 MB in fp32.
SIDE = 1024
# Not -inf: a query may see no key of a block. Its weights there are wrong then, and exactly 0 once they are merged.
HIDDEN = -1e30
# What picks cost beyond their pairs, in pairs of plain causal attention (measured): a row in a list, one in the tiles
# that short lists share, and a call of the kernel for a list or a block.
PAIRS_OF_LISTED_ROW = 24
PAIRS_OF_TILED_ROW = 72
PAIRS_OF_CALL = 24 << 10


def split_documents(
    call: AttendCall, num_heads: int, num_kv_heads: int, min_pairs_of_list: int
) -> tuple[list[Block], list[Block]] | None:
    """(covered documents, the others, for masks), or None where lists are expected to be faster, or tokens are missing.

    Decided by sizes known beforehand, never by the picks. Lists of fewer pairs than
    min_pairs_of_list go by tiles.
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
    pays = others and _pays(others, routing.spec, num_heads, num_kv_heads, min_pairs_of_list)
    return (covered, others) if pays else None


def _pays(documents: list[Block], spec: MoBA, num_heads: int, num_kv_heads: int, min_pairs_of_list: int) -> bool:
    lengths = np.repeat([x.num_queries for x in documents], [x.count for x in documents])
    own, planned, causal = (
        num_heads * planned_pairs_of_lengths(lengths, x) for x in (MoBA(spec.chunk_size, 1), spec, Full())
    )
    num_lists = num_kv_heads * int((-(-lengths // spec.chunk_size)).sum())
    rows = (planned - own) // spec.chunk_size
    if planned - own >= num_lists * min_pairs_of_list:
        of_lists = planned + rows * PAIRS_OF_LISTED_ROW + num_lists * PAIRS_OF_CALL
    else:
        of_lists = planned + rows * PAIRS_OF_TILED_ROW
    if causal >= of_lists:  # long documents have too many blocks to look at
        return False
    blocks = [block for document in documents for block in cut(document, SIDE, SIDE)]
    return sum(block.pairs(num_heads)[1] + num_heads * PAIRS_OF_CALL for block in blocks) < of_lists


@dataclass(frozen=True)
class Masked:
    """Documents of a whole row, and its picks."""

    documents: Sequence[Block]
    picks_TRP: Tensor
    num_heads: int
    num_kv_heads: int
    chunk_size: int
    chunk_T: Tensor
    """[T,1] the chunk that each token lies in."""
    start_C: Tensor

    @classmethod
    def of(cls, documents: Sequence[Block], routing: Routing, num_heads: int, num_kv_heads: int) -> Masked:
        size = routing.spec.chunk_size
        geometry = routing.pack.chunks(size).tensors("cpu")
        chunk_T = geometry.chunk_of_token_T[:, None]
        return cls(documents, routing.picks, num_heads, num_kv_heads, size, chunk_T, geometry.start_C)

    def parts(self, dim: int) -> Iterator[BlockViews]:
        """The documents in blocks of SIDE by SIDE and rows of `dim` within as many elements, one query head each."""
        group = self.num_heads // self.num_kv_heads
        for block in (small for document in self.documents for small in cut(document, SIDE, SIDE)):
            count = max(1, SIDE * SIDE // (block.num_queries * max(block.num_keys, dim)))
            for begin in range(0, block.count, count):
                part = block.part(begin, min(block.count, begin + count))
                for head in range(self.num_heads):
                    yield BlockViews(part, slice(head, head + 1), slice(head // group, head // group + 1))

    def open_chunks(self, views: BlockViews, dtype: torch.dtype) -> Tensor:
        """[B,M,W]: 0 for the query's own chunk and those that it picked, of those that the keys lie in, else HIDDEN."""
        block, head = views.block, views.q_heads.start * self.picks_TRP.shape[1] // self.num_heads
        of_queries = block.first_query, block.num_queries, block
        own_BM1 = view(self.chunk_T, *of_queries, slice(1))
        picks_BMP = view(self.picks_TRP, *of_queries, slice(head, head + 1)).squeeze(2)
        first_B11 = view(self.chunk_T, block.first_key, 1, block, slice(1))
        width = int(self.chunk_T[block.first_key + block.num_keys - 1] - self.chunk_T[block.first_key]) + 1
        place = torch.cat((picks_BMP, own_BM1), 2).sub_(first_B11 - 1).clamp_(0, width + 1)  # the ends take the others
        chunks = torch.full((*place.shape[:2], width + 2), HIDDEN, dtype=dtype)
        return chunks.scatter_(2, place, 0.0)[:, :, 1:-1]

    def mask(self, views: BlockViews, open_BMW: Tensor) -> Tensor:
        """[B,1,M,L] to be added to scores."""
        first, num_keys = views.block.first_key, views.block.num_keys
        skipped = first - int(self.start_C[self.chunk_T[first]])  # the first chunk may begin before the keys
        keys = open_BMW.unsqueeze(-1).expand(-1, -1, -1, self.chunk_size).flatten(2)
        return keys[:, None, :, skipped : skipped + num_keys]

    def pairs(self, views: BlockViews, open_BMW: Tensor) -> tuple[Tensor, int]:
        """(attended pairs, score elements)."""
        block, num_chunks = views.block, open_BMW.shape[2]
        first_chunk = int(self.chunk_T[block.first_key])
        start_W = self.start_C[first_chunk : first_chunk + num_chunks] - block.first_key
        end_1W = (start_W + self.chunk_size).clamp_max(block.num_keys)[None]
        if block.causal:
            end_1W = torch.minimum(end_1W, torch.arange(1, block.num_queries + 1)[:, None])
        keys_MW = (end_1W - start_W.clamp_min(0)).clamp_min(0)
        return ((open_BMW == 0) * keys_MW).sum(), block.pairs(1)[1]


def forward(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, masked: Masked, scale: float, sums: Sums, tally: PairTally | None
) -> None:
    """Write the documents' output."""
    for views in masked.parts(q_THD.shape[2]):
        opened = masked.open_chunks(views, sums.out.dtype)
        forward_views(q_THD, k_TKD, v_TKD, views, scale, sums, masked.mask(views, opened))
        if tally is not None:
            tally.add(*masked.pairs(views, opened))


def backward(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, masked: Masked, scale: float, grads: Gradients, stand_in: StandIn
) -> None:
    """Add the documents' gradients."""
    for views in masked.parts(q_THD.shape[2]):
        mask = masked.mask(views, masked.open_chunks(views, grads.dq.dtype))
        backward_views(q_THD, k_TKD, v_TKD, views, scale, grads, stand_in, mask)
