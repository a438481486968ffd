"""Causal segments as dense blocks: a causal square on the diagonal, rectangles of earlier keys that all queries see.

A pure function of positions and segment edges. A block stands for `count` equal ones, `stride` tokens apart.

    one segment, all at hand    queries from the middle on      a square of up to 2048 tokens, halved
    q |\\                        q |####\\                        q |\\
      | \\                         |#####\\                         |#\\
      +--- k                       +-------- k                     |##\\  (the second half's rectangle)

What is longer than a call may take is cut: squares along the diagonal, and before each a rectangle of earlier keys.

Shape letters: T queries at hand, S keys at hand, G segments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..pack import IntArray
from ..ranges import ranges

# The built-in CPU kernel takes so many keys at a time, masked ones included: below HALVE_UP_TO tokens a square wastes
# so much of that that halving it pays; at SMALLEST_HALF and less the halves cost more than they save (measured).
KEYS_AT_ONCE = 512
HALVE_UP_TO = 2048
SMALLEST_HALF = 256
# Fewer queries a block than this on average, and every block costs a call for little: tiles do better then.
MIN_QUERIES_OF_BLOCK = 64


@dataclass(frozen=True)
class Block:
    """Queries first_query + i * stride .. + num_queries - 1 against keys first_key + i * stride .. + num_keys - 1."""

    first_query: int
    first_key: int
    num_queries: int
    num_keys: int
    causal: bool
    """A square whose query j sees keys 0 .. j; otherwise every query sees every key."""
    fresh: bool
    """The first block of its queries: it writes, all others merge."""
    stride: int = 0
    count: int = 1

    def pairs(self, num_heads: int) -> tuple[int, int]:
        """(attended pairs, score elements) of all `count`: the kernel takes KEYS_AT_ONCE keys, masked or not."""
        attended = self.num_queries * (self.num_queries + 1) // 2 if self.causal else self.num_queries * self.num_keys
        scored = min(attended + self.num_queries * (KEYS_AT_ONCE // 2), self.num_queries * self.num_keys)
        return self.count * num_heads * attended, self.count * num_heads * scored

    def part(self, begin: int, end: int) -> Block:
        """Blocks begin .. end - 1 of the `count`."""
        offset = begin * self.stride
        return replace(
            self, first_query=self.first_query + offset, first_key=self.first_key + offset, count=end - begin
        )


def causal_blocks(query_T: IntArray, key_S: IntArray, edges: IntArray) -> list[Block] | None:
    """Every query against the keys at hand of its segment up to itself; None where that is no union of blocks, or of
    too many.

    query_T, key_S: ascending positions at hand. edges [G+1] segment edges. It is one when, for every run of consecutive
    queries in a segment, all keys of the run's own tokens are at hand, or none.
    """
    if not len(query_T) or not len(key_S):
        return []
    segment_T = np.searchsorted(edges, query_T, side="right")
    starts = np.flatnonzero((np.diff(query_T, prepend=-2) != 1) | (np.diff(segment_T, prepend=0) != 0))
    lengths = np.diff(np.append(starts, len(query_T)))
    first_token = query_T[starts]
    first_key = np.searchsorted(key_S, edges[segment_T[starts] - 1])
    own_key = np.searchsorted(key_S, first_token)
    num_own = np.searchsorted(key_S, first_token + lengths) - own_key
    if bool(((num_own != 0) & (num_own != lengths)).any()):
        return None
    runs = zip(*(x.tolist() for x in (starts, lengths, first_key, own_key, num_own)), strict=True)
    blocks: list[Block] = []
    for query, length, key, own, square in runs:
        if square:
            blocks.append(Block(query, own, length, length, causal=True, fresh=True))
        if own > key:
            blocks.append(Block(query, key, length, own - key, causal=False, fresh=not square))
    grouped = list(_grouped(blocks))
    if len(grouped) * MIN_QUERIES_OF_BLOCK > len(query_T):
        return None
    return grouped


def _grouped(blocks: list[Block]) -> Iterator[Block]:
    """Neighbours of one shape, equally far apart, as one."""
    group: Block | None = None
    for block in blocks:
        if group is not None and (group.num_queries, group.num_keys, group.causal, group.fresh) == (
            block.num_queries, block.num_keys, block.causal, block.fresh,
        ):  # fmt: skip
            step = block.first_query - group.first_query - (group.count - 1) * group.stride
            key_step = block.first_key - group.first_key - (group.count - 1) * group.stride
            if step == key_step and (group.count == 1 or step == group.stride):
                group = replace(group, stride=step, count=group.count + 1)
                continue
        if group is not None:
            yield group
        group = block
    if group is not None:
        yield group


def fitted(blocks: list[Block], max_queries: int, max_keys: int) -> list[Block]:
    """The same pairs in blocks of max_queries queries and max_keys keys at most, squares halved where that pays."""
    return [half for block in blocks for piece in cut(block, max_queries, max_keys) for half in _halved(piece)]


def cut(block: Block, max_queries: int, max_keys: int) -> Iterator[Block]:
    """A block in pieces of bounded size, the one that writes a query first."""
    for queries in ranges(block.num_queries, max_queries):
        length = queries.stop - queries.start
        piece = replace(block, first_query=block.first_query + queries.start, num_queries=length)
        if block.causal:
            yield replace(piece, first_key=block.first_key + queries.start, num_keys=length)
        for keys in ranges(queries.start if block.causal else block.num_keys, max_keys):
            yield replace(
                piece,
                first_key=block.first_key + keys.start,
                num_keys=keys.stop - keys.start,
                causal=False,
                fresh=piece.fresh and not block.causal and not keys.start,
            )


def _halved(block: Block) -> Iterator[Block]:
    """A square as two squares and the rectangle between them, and so on down to SMALLEST_HALF."""
    if not block.causal or not SMALLEST_HALF < block.num_queries <= HALVE_UP_TO:
        yield block
        return
    half = -(-block.num_queries // 2)
    rest = block.num_queries - half
    yield from _halved(replace(block, num_queries=half, num_keys=half))
    second = replace(block, first_query=block.first_query + half, num_queries=rest)
    yield from _halved(replace(second, first_key=block.first_key + half, num_keys=rest))
    yield replace(second, num_keys=half, causal=False, fresh=False)
