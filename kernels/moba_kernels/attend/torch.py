"""Partial attention in batched GEMMs over bounded ranges of tiles; forward and backward by hand, no [T,S] tensor.

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

from ..report import PairTally, Partial
from ..scatter import add_rows_
from .call import AttendCall, accumulate_dtype
from .steps import Shape, Step, steps_of, visible_keys

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


def _batches(call: AttendCall, shape: Shape, device: torch.device, tally: PairTally | None) -> Iterator[TileBatch]:
    visible_T = torch.from_numpy(visible_keys(call)).to(device)
    for step in steps_of(call, shape, device):
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


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[T,H,D] -> [T*H + 1, D] in `dtype`, with a zero row for the padding."""
    rows = x.new_zeros((x.shape[0] * x.shape[1] + 1, *x.shape[2:]), dtype=dtype)
    rows[:-1] = x.flatten(0, 1)
    return rows


def _gather(rows: Tensor, index: Tensor, num_tiles: int, dtype: torch.dtype) -> Tensor:
    """[N, n, D]: rows of every tile."""
    return rows.index_select(0, index).view(num_tiles, -1, rows.shape[-1]).to(dtype)


def _scores(q_NMD: Tensor, k_NLD: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(q_NMD.new_empty(()), q_NMD, k_NLD.mT, beta=0, alpha=scale)


def attend_partial(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, call: AttendCall, tally: PairTally | None) -> Partial:
    """softmax(scale * q k^T + mask) v and its log-sum-exp, tile by tile."""
    acc = accumulate_dtype(q_THD)
    num_queries, num_heads, _ = q_THD.shape
    shape = Shape(num_queries, k_SKD.shape[0], num_heads, k_SKD.shape[1])
    queries, keys, values = _rows(q_THD, acc), k_SKD.flatten(0, 1), v_SKD.flatten(0, 1)
    out = q_THD.new_zeros((shape.pad_row + 1, v_SKD.shape[2]), dtype=acc)
    lse = q_THD.new_full((shape.pad_row + 1,), -torch.inf, dtype=acc)
    for batch in _batches(call, shape, q_THD.device, tally):
        num_tiles = batch.num_tiles
        scores = _scores(
            _gather(queries, batch.rows, num_tiles, acc), _gather(keys, batch.key_rows, num_tiles, acc), call.scale
        )
        batch.mask_out_(scores, -torch.inf)
        top = scores.amax(-1, keepdim=True)
        if batch.seen_NM1 is not None:  # a row that sees nothing has only -inf
            top = torch.where(top == -torch.inf, 0.0, top)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        tile_out = torch.bmm(weights, _gather(values, batch.key_rows, num_tiles, acc))
        tile_out.div_(total if batch.seen_NM1 is None else torch.where(total == 0, 1.0, total))
        tile_lse = top.add_(total.log()).flatten()
        _merge_(out, lse, tile_out.flatten(0, 1), tile_lse, batch)
    out_THD = out[:-1].view(num_queries, num_heads, v_SKD.shape[2]).to(call.result_dtype)
    return Partial(out_THD, lse[:-1].view(num_queries, num_heads))


def _merge_(out: Tensor, lse: Tensor, tile_out: Tensor, tile_lse: Tensor, batch: TileBatch) -> None:
    """Fold a batch into the running (out, lse) of its rows, in place (merge.py has the formula)."""
    if batch.fresh:
        out.index_copy_(0, batch.rows, tile_out)
        lse.index_copy_(0, batch.rows, tile_lse)
        return
    old_lse = lse.index_select(0, batch.rows)
    new_lse = torch.logaddexp(old_lse, tile_lse)
    base = torch.where(new_lse == -torch.inf, 0.0, new_lse)
    tile_out.mul_(torch.exp(tile_lse - base).unsqueeze(-1))
    tile_out.addcmul_(out.index_select(0, batch.rows), torch.exp(old_lse - base).unsqueeze(-1))
    out.index_copy_(0, batch.rows, tile_out)
    lse.index_copy_(0, batch.rows, new_lse)


def attend_partial_backward(
    dout_THD: Tensor,
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    lse_TH: Tensor,
    delta_TH: Tensor,
    call: AttendCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """P = exp(scale q k^T - lse); dV = P^T dO; dS = P (dO V^T - delta); dQ = scale dS K; dK = scale dS^T Q.

    A padding row has zero q, dO, lse and delta: its P is 1, its dS and its share of dV are 0.
    """
    acc = accumulate_dtype(q_THD)
    num_queries, num_heads, _ = q_THD.shape
    shape = Shape(num_queries, k_SKD.shape[0], num_heads, k_SKD.shape[1])
    queries, douts = _rows(q_THD, acc), _rows(dout_THD, acc)
    # A row with no key at all has lse -inf; 0 keeps its (masked) weights finite.
    lse = _rows(torch.where(lse_TH == -torch.inf, 0.0, lse_TH).unsqueeze(-1), acc)
    delta = _rows(delta_TH.unsqueeze(-1), acc)
    keys, values = k_SKD.flatten(0, 1), v_SKD.flatten(0, 1)
    dq = torch.zeros_like(queries)
    dk, dv = torch.zeros_like(keys, dtype=acc), torch.zeros_like(values, dtype=acc)
    for batch in _batches(call, shape, q_THD.device, None):
        num_tiles = batch.num_tiles
        q, dout = (_gather(x, batch.rows, num_tiles, acc) for x in (queries, douts))
        k, v = (_gather(x, batch.key_rows, num_tiles, acc) for x in (keys, values))
        weights = _scores(q, k, call.scale).sub_(_gather(lse, batch.rows, num_tiles, acc)).exp_()
        batch.mask_out_(weights, 0.0)
        add_rows_(dv, batch.key_rows, torch.bmm(weights.mT, dout).flatten(0, 1))
        dscores = torch.bmm(dout, v.mT).sub_(_gather(delta, batch.rows, num_tiles, acc)).mul_(weights)
        dq_tile = torch.baddbmm(q.new_empty(()), dscores, k, beta=0, alpha=call.scale)
        dq.index_add_(0, batch.rows, dq_tile.flatten(0, 1))  # rows stand once a step, the spare row aside
        dk_tile = torch.baddbmm(q.new_empty(()), dscores.mT, q, beta=0, alpha=call.scale)
        add_rows_(dk, batch.key_rows, dk_tile.flatten(0, 1))
    whole = dq[:-1].view(q_THD.shape), dk.view(k_SKD.shape), dv.view(v_SKD.shape)
    return tuple(x.to(call.result_dtype) for x in whole)  # type: ignore[return-value]
