"""A row's tensors, cut and put together again. Where each token lies is a matter of integers: `cut.py`.

Shape letters: T tokens of the row, S tokens of a shard, L tokens of the longest shard, N ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cut import (
    Cut,
    IntArray,
    Layout,
    Pieces,
    cut_row,
    longest_shard,
    num_pieces,
    piece_bounds,
    piece_owners,
    shard_length,
    shard_pieces,
    shard_positions,
)
from .wire import Group, Wire


def take_pieces(x: Tensor, dim: int, pieces: Pieces) -> Tensor:
    """The tokens of `pieces` along `dim` of `x`, which holds all T tokens there. Differentiable."""
    parts = [x.narrow(dim, start, stop - start) for start, stop in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def shard(x: Tensor, dim: int, *, num_ranks: int, rank: int, layout: Layout) -> Tensor:
    """This rank's part of `x`, which holds all T tokens along `dim`; S tokens along `dim`. Differentiable."""
    return take_pieces(x, dim, shard_pieces(x.shape[dim], num_ranks, rank, layout))


def join_shards(shards: Sequence[Tensor], dim: int, cut: Cut) -> Tensor:
    """T tokens along `dim` from the shards of all ranks of `cut`, in rank order.

    A shard may be longer than its part (padded to equal lengths, as collectives return it); the padding is dropped.
    """
    pieces: dict[int, Tensor] = {}
    for rank, x in enumerate(shards):
        offset = 0
        for start, stop in cut.pieces[rank]:
            if stop > start:
                pieces[start] = x.narrow(dim, offset, stop - start)
            offset += stop - start
    if not pieces:
        return shards[0].narrow(dim, 0, 0)
    return torch.cat([pieces[start] for start in sorted(pieces)], dim)


def unshard(shards: Sequence[Tensor], dim: int, *, num_tokens: int, layout: Layout) -> Tensor:
    """The inverse of `shard`: T tokens along `dim` from the shards of all ranks in rank order; see `join_shards`."""
    return join_shards(shards, dim, cut_row(num_tokens, len(shards), layout))


def gather_shards(x: Tensor, dim: int, *, num_tokens: int, layout: Layout, group: Group | None) -> Tensor:
    """All-gather: every rank passes its shard (S tokens along `dim`) and gets all T tokens in order. No gradient.

    Collective over `group`; None or one rank returns `x`. Bytes received: (N - 1) times the longest shard.
    """
    num_ranks = 1 if group is None else group.size()
    if group is None or num_ranks == 1:
        return x.detach()
    cut = cut_row(num_tokens, num_ranks, layout)
    sent = pad_rows(x.detach().movedim(dim, 0), cut.longest)
    received = Wire(group).all_gather(sent, phase="gather_shards").wait()
    return join_shards(received.unbind(0), 0, cut).movedim(0, dim)


def pad_rows(x: Tensor, rows: int) -> Tensor:
    """`x` [S, ...] as a contiguous [rows, ...], zeros after its S rows."""
    padded = x.new_zeros((rows, *x.shape[1:]))
    padded[: x.shape[0]] = x
    return padded


__all__ = [
    "Cut",
    "IntArray",
    "Layout",
    "cut_row",
    "gather_shards",
    "join_shards",
    "longest_shard",
    "num_pieces",
    "pad_rows",
    "piece_bounds",
    "piece_owners",
    "shard",
    "shard_length",
    "shard_pieces",
    "shard_positions",
    "take_pieces",
    "unshard",
]
