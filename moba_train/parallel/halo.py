"""The few tokens before each piece of a shard: what a causal convolution over a sharded row needs from its neighbours.

Every rank puts the last `halo` tokens of each of its pieces into one small table, the table is all-gathered, and each
piece takes the tokens before it from there (from several pieces where some are shorter than the halo; zeros before the
row begins). Backward, gradients of the table are added up in fp32 over all ranks and end with the tokens' owner.
Documents do not matter here: the convolution masks what lies in another document, as it does inside a shard.

Shape letters: S tokens of the shard, P pieces of a shard (1 contiguous, 2 zigzag), W tokens of the halo, N ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moba_kernels import Pack
from moba_kernels.derivative import refuse_second_derivative
from moba_kernels.pack import device_copy

from .cut import IntArray, Layout, piece_bounds, piece_owners, shard_length, shard_pieces
from .traffic import Traffic
from .watch import Watch
from .wire import Group, Wire


@dataclass(frozen=True)
class HaloPlan:
    """Where halo tokens come from, for one rank; a pure function of the row and its cut."""

    sent: IntArray
    """[P*W] local rows that this rank puts into the table, -1 = no such token (the piece is shorter than the halo)."""
    taken: IntArray
    """[P*W] rows of the gathered table [N*P*W] that make up this rank's halos, -1 = before the row begins."""


def halo_plan(num_tokens: int, halo: int, *, num_ranks: int, rank: int, layout: Layout) -> HaloPlan:
    """The plan of `rank`. Slot w of a piece's entry in the table holds the token `halo - w` before the piece's end."""
    bounds = piece_bounds(num_tokens, num_ranks, layout)
    owners = piece_owners(num_ranks, layout)
    pieces_of_rank = len(owners) // num_ranks
    pieces = shard_pieces(num_tokens, num_ranks, rank, layout)
    sent, taken, offset = [], [], 0
    for start, stop in pieces:
        back = np.arange(halo, 0, -1)
        sent.append(np.where(back <= stop - start, offset + (stop - start) - back, -1))
        token = start - back
        piece = np.clip(np.searchsorted(bounds, token, side="right") - 1, 0, len(owners) - 1)
        owner = owners[piece]
        index_of_piece = (piece != owner).astype(np.int64)  # a rank's first piece is the one with its own number
        slot = halo - (bounds[piece + 1] - token)
        taken.append(np.where(token >= 0, (owner * pieces_of_rank + index_of_piece) * halo + slot, -1))
        offset += stop - start
    return HaloPlan(np.concatenate(sent).astype(np.int64), np.concatenate(taken).astype(np.int64))


@dataclass(frozen=True)
class _Rows:
    """Rows of a table on the device: out[slots] = x[rows], zeros elsewhere."""

    slots: Tensor
    rows: Tensor
    num_slots: int

    def taken_from(self, x: Tensor) -> Tensor:
        """[num_slots, ...]"""
        taken = x.new_zeros((self.num_slots, *x.shape[1:]))
        taken[self.slots] = x[self.rows]
        return taken

    def add_to_(self, x: Tensor, values: Tensor) -> None:
        """x[rows] += values[slots] in place. A row stands twice only where two halos of one rank overlap."""
        x.index_add_(0, self.rows, values[self.slots])


def _on_device(plan: HaloPlan, device: torch.device) -> tuple[_Rows, _Rows]:
    """(sent, taken) of the plan."""

    def copied(rows: IntArray) -> _Rows:
        slots = np.flatnonzero(rows >= 0)
        return _Rows(device_copy(slots, device), device_copy(rows[slots], device), len(rows))

    return copied(plan.sent), copied(plan.taken)


def key_halo(
    x: Tensor,
    halo: int,
    *,
    num_tokens: int,
    layout: Layout,
    group: Group | None,
    pack: Pack | None = None,
    layer: int | None = None,
    traffic: Traffic | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """The `halo` tokens before each piece of this rank's shard. Collective over `group`; differentiable in `x`.

    Args:
        x: [S, ...] this rank's shard of a row of `num_tokens` tokens (keys, before the convolution); S may be 0.
        halo: tokens wanted before each piece, >= 0: the width of the convolution - 1.
        group: context-parallel group; None or one rank: the halo of a piece is the end of the piece before it.
        pack: the row's documents; what follows from the row alone is kept there, so that no further layer copies it to
            the device. None = copied for this call.
        layer: named if the exchange breaks off.
        traffic: counts the bytes.
        watch: is told which exchange this rank waits for.
    Returns:
        [P, halo, ...] in x's dtype, pieces in token order as `shard_pieces` lists them; zeros before the row begins.
        Gradients reach the rank that owns the token, added up in fp32.
    Raises ValueError when x does not have the length of this rank's shard.
    """
    num_ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    expected = shard_length(num_tokens, num_ranks, rank, layout)
    if x.shape[0] != expected or halo < 0:
        raise ValueError(
            f"x must be the {layout} shard of rank {rank} of {num_ranks}, {expected} of {num_tokens} tokens, and halo "
            f"at least 0; got {tuple(x.shape)}, halo {halo}; fix: cut the row with moba_train.parallel.shard.shard"
        )
    if halo == 0:
        return x.new_empty((len(shard_pieces(num_tokens, num_ranks, rank, layout)), 0, *x.shape[1:]))

    def build() -> tuple[_Rows, _Rows]:
        plan = halo_plan(num_tokens, halo, num_ranks=num_ranks, rank=rank, layout=layout)
        return _on_device(plan, x.device)

    known = ("halo", num_tokens, halo, num_ranks, rank, layout, x.device)
    rows = build() if pack is None else pack.derived(known, build)
    wire = None
    if group is not None and num_ranks > 1:
        wire = Wire(group, Traffic() if traffic is None else traffic, "halo", layer, watch=watch)
    out: Tensor = _KeyHalo.apply(x, *rows, halo, wire)  # type: ignore[no-untyped-call]
    return out


class _KeyHalo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent_rows: _Rows, taken_rows: _Rows, halo: int, wire: Wire | None) -> Tensor:
        ctx.sent_rows, ctx.taken_rows, ctx.wire, ctx.shape, ctx.dtype = sent_rows, taken_rows, wire, x.shape, x.dtype
        sent = sent_rows.taken_from(x)
        table = sent
        if wire is not None and sent.numel():
            table = wire.all_gather(sent, phase="forward/halo").wait().flatten(0, 1)
        return taken_rows.taken_from(table).view(taken_rows.num_slots // halo, halo, *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, dhalo: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("key_halo")
        wire = ctx.wire
        num_ranks = 1 if wire is None else wire.size
        accumulate = torch.float64 if ctx.dtype == torch.float64 else torch.float32
        dtable = dhalo.new_zeros((num_ranks * ctx.sent_rows.num_slots, *ctx.shape[1:]), dtype=accumulate)
        ctx.taken_rows.add_to_(dtable, dhalo.flatten(0, 1).to(accumulate))
        dsent = dtable
        if wire is not None and dtable.numel():
            dsent = wire.reduce_scatter(dtable.view(num_ranks, -1, *ctx.shape[1:]), phase="backward/halo").wait()
        dx = dhalo.new_zeros(ctx.shape, dtype=accumulate)
        ctx.sent_rows.add_to_(dx, dsent)
        return dx.to(ctx.dtype), None, None, None, None
