"""Steps of tiles in batched GEMMs over bounded ranges; forward and backward by hand, any device, no [T,S] tensor.

Every tile is a softmax over one slice of keys; tiles of the same row are merged in fp32 (attend/README.md). Padding
rows read a zero row and write to a spare one, so no tile needs a row mask.

Shape letters: T queries at hand, S keys at hand, H query heads, K key/value heads, D head dim, Dv value dim, R = T*H
query rows, N tiles of a batch, M rows of a tile, L key slots of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..report import PairTally
from ..scatter import add_rows_
from .call import AttendCall
from .rows import Rows
from .steps import Shape, Step, visible_keys
from .sums import Gradients, Sums

# Score elements of one batch: 1 MB in fp32, so that the passes over it stay within a core's cache.
SCRATCH_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class TileBatch:
    """Some tiles of a step, with their keys located and their mask made."""

    rows: Tensor
    """[N*M] query rows, R = padding."""
    num_tiles: int
    key_rows: Tensor
    """[N*L] rows of the keys seen as [S*K, D]; slots beyond a slice repeat its last key and are masked."""
    seen_NM1: Tensor | None
    """Keys of the slice that each row sees, None = all L."""
    length: int
    fresh: bool

    def mask_out_(self, x_NML: Tensor, value: float) -> Tensor:
        """In place: `value` where a row must not see a key."""
        if self.seen_NM1 is None:
            return x_NML
        slot_L = torch.arange(self.length, device=x_NML.device, dtype=self.seen_NM1.dtype)
        return x_NML.masked_fill_(slot_L >= self.seen_NM1, value)


def _batches(
    steps: Iterator[Step], call: AttendCall, shape: Shape, device: torch.device, tally: PairTally | None
) -> Iterator[TileBatch]:
    visible_T = torch.from_numpy(visible_keys(call)).to(device)
    for step in steps:
        num_tiles, tile_rows = step.rows_NM.shape
        size = max(1, SCRATCH_ELEMENTS // (tile_rows * step.length))
        for begin in range(0, num_tiles, size):
            batch = _batch(step, slice(begin, begin + size), visible_T, shape)
            if tally is not None:
                _count(batch, shape, tally)
            yield batch


def _batch(step: Step, tiles: slice, visible_T: Tensor, shape: Shape) -> TileBatch:
    rows_NM = step.rows_NM[tiles]
    device = rows_NM.device
    start, length_N = step.key_start_N[tiles], step.key_len_N[tiles]
    start_N1 = torch.from_numpy(start).to(device)[:, None]
    slot_L = torch.arange(step.length, device=device)
    short = bool((length_N < step.length).any())
    offset_NL = start_N1 + slot_L
    seen = None
    if short or step.causal:
        length_N1 = torch.from_numpy(length_N).to(device)[:, None]
        offset_NL = start_N1 + torch.minimum(slot_L, length_N1 - 1)
        seen = length_N1.expand(rows_NM.shape)
        if step.causal:
            seen = torch.minimum(visible_T[rows_NM // shape.num_heads] - start_N1, seen).clamp_min(0)
        seen = seen.unsqueeze(-1).to(torch.int32)
    kv_head_N1 = torch.from_numpy(step.kv_head_N[tiles]).to(device)[:, None]
    key_rows = (offset_NL * shape.num_kv_heads + kv_head_N1).flatten()
    return TileBatch(rows_NM.flatten(), rows_NM.shape[0], key_rows, seen, step.length, step.fresh)


def _count(batch: TileBatch, shape: Shape, tally: PairTally) -> None:
    real = batch.rows != shape.pad_row
    if batch.seen_NM1 is None:
        attended = real.sum() * batch.length
    else:
        attended = (batch.seen_NM1.flatten() * real).sum()
    tally.add(attended, batch.rows.numel() * batch.length)


def _gather(x_THD: Tensor, rows: Tensor, num_tiles: int, dtype: torch.dtype) -> Tensor:
    """[N, n, D]: the rows of every tile."""
    return Rows.of(x_THD).take(rows).view(num_tiles, -1, x_THD.shape[-1]).to(dtype)


def _gather_queries(x_THD: Tensor, batch: TileBatch, dtype: torch.dtype) -> Tensor:
    """[N, M, D]: the query rows of every tile, zero where a row is padding."""
    num_rows = x_THD.shape[0] * x_THD.shape[1]
    padding = batch.rows == num_rows
    tiles = _gather(x_THD, batch.rows.clamp_max(num_rows - 1), batch.num_tiles, dtype)
    return tiles.masked_fill_(padding.view(batch.num_tiles, -1, 1), 0.0)


def _scores(q_NMD: Tensor, k_NLD: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(q_NMD.new_empty(()), q_NMD, k_NLD.mT, beta=0, alpha=scale)


def forward_steps(
    steps: Iterator[Step],
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    call: AttendCall,
    sums: Sums,
    tally: PairTally | None,
) -> None:
    """softmax(scale * q k^T + mask) v and its log-sum-exp, merged tile by tile into `sums`."""
    acc = sums.out.dtype
    shape = Shape.of(q_THD, k_SKD)
    for batch in _batches(steps, call, shape, q_THD.device, tally):
        num_tiles = batch.num_tiles
        scores = _scores(_gather_queries(q_THD, batch, acc), _gather(k_SKD, batch.key_rows, num_tiles, acc), call.scale)
        batch.mask_out_(scores, -torch.inf)
        top = scores.amax(-1, keepdim=True)
        if batch.seen_NM1 is not None:  # a row that sees nothing has only -inf
            top = torch.where(top == -torch.inf, 0.0, top)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        tile_out = torch.bmm(weights, _gather(v_SKD, batch.key_rows, num_tiles, acc))
        tile_out.div_(total if batch.seen_NM1 is None else torch.where(total == 0, 1.0, total))
        tile_lse = top.double().add_(total.double().log_()).flatten()
        sums.merge_(batch.rows, tile_out.flatten(0, 1), tile_lse, fresh=batch.fresh)


def backward_steps(
    steps: Iterator[Step], q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, call: AttendCall, grads: Gradients
) -> None:
    """P = exp(scale q k^T - lse); dV = P^T dO; dS = P (dO V^T - delta); dQ = scale dS K; dK = scale dS^T Q.

    A padding row has zero q, dO, lse and delta: its P is 1, its dS and its share of dV are 0.
    """
    acc = grads.dq.dtype
    shape = Shape.of(q_THD, k_SKD)
    dk, dv = grads.dk_SKD.flatten(0, 1), grads.dv_SKD.flatten(0, 1)
    for batch in _batches(steps, call, shape, q_THD.device, None):
        num_tiles = batch.num_tiles
        q, dout = (_gather_queries(x, batch, acc) for x in (q_THD, grads.dout_THD))
        lse, delta = (_gather_queries(x.unsqueeze(-1), batch, acc) for x in (grads.lse_TH, grads.delta_TH))
        k, v = (_gather(x, batch.key_rows, num_tiles, acc) for x in (k_SKD, v_SKD))
        weights = _scores(q, k, call.scale).sub_(lse).exp_()
        batch.mask_out_(weights, 0.0)
        add_rows_(dv, batch.key_rows, torch.bmm(weights.mT, dout).flatten(0, 1))
        dscores = torch.bmm(dout, v.mT).sub_(delta).mul_(weights)
        dq_tile = torch.baddbmm(q.new_empty(()), dscores, k, beta=0, alpha=call.scale)
        grads.dq.index_add_(0, batch.rows, dq_tile.flatten(0, 1))  # rows stand once a step, the spare row aside
        dk_tile = torch.baddbmm(q.new_empty(()), dscores.mT, q, beta=0, alpha=call.scale)
        add_rows_(dk, batch.key_rows, dk_tile.flatten(0, 1))
