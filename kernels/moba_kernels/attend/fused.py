"""Attention on CPU through the flash kernel that PyTorch ships, which returns the log-sum-exp.

It serves q, k and v of one head dim. What it is asked for comes in two forms:

- blocks (blocks.py): causal squares and rectangles, read through strided views of q, k and v;
- lists: the rows that picked a chunk, gathered, against the chunk's keys where they lie. A row picks a chunk at most
  once, so merging a list in place cannot collide. Lists are cut into tiles of a fixed size, the last one filled, so
  that a row's tile depends only on itself and earlier rows.

The kernel's backward takes `out` and works out delta = rowsum(dout * out) itself. Here delta is given and out is not:
`StandIn` has that row sum.

Shape letters: T queries at hand, S keys at hand, H query heads, K key/value heads, D head dim, N tiles of a list, M
rows of a tile, L keys of a chunk, B equal blocks, R = T*H query rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ranges import ranges
from . import cpu_flash
from .blocks import Block
from .lists import ChunkList, ListPart
from .rows import Rows
from .sums import Gradients, Sums, joined

# Elements of one gathered or computed tensor: 4 MB in fp32 for a list, which stays near the cores; 16 MB for blocks,
# whose inputs are read in place.
LIST_ELEMENTS = 1 << 20
BLOCK_ELEMENTS = 1 << 22
# Shorter calls gain little, and keep to GEMMs: in fp32 the kernel's dq has 1.2 times the RMS error of the plain way,
# and rows with few keys, whose gradients are the largest, show it most.
MIN_KEYS = 4096


def serves(q_THD: Tensor, v_SKD: Tensor) -> bool:
    """The kernel runs on CPU, takes one head dim for q, k and v, and is worth it from MIN_KEYS keys on."""
    return q_THD.device.type == "cpu" and q_THD.shape[2] == v_SKD.shape[2] and v_SKD.shape[0] >= MIN_KEYS


@dataclass(frozen=True)
class StandIn:
    """For the kernel's `out`: delta / dout at each row's largest |dout|, 0 elsewhere; its row sum with dout is delta.

    One product, and so one rounding; a multiple of dout would sum up D of them.
    """

    at_TH: Tensor
    """int16 index of the largest |dout|."""
    value_TH: Tensor

    @classmethod
    def of(cls, dout_THD: Tensor, delta_TH: Tensor) -> StandIn:
        at = torch.empty_like(delta_TH, dtype=torch.int16)
        value = torch.empty_like(delta_TH)
        for part in ranges(dout_THD.shape[0], LIST_ELEMENTS // max(1, dout_THD[:1].numel())):
            dout = dout_THD[part].to(delta_TH.dtype)
            index = dout.abs().argmax(-1, keepdim=True)
            top = dout.gather(-1, index).squeeze(-1)
            at[part] = index.squeeze(-1)
            value[part] = torch.where(top == 0, 0.0, delta_TH[part] / top)
        return cls(at, value)

    @staticmethod
    def fill(like: Tensor, at: Tensor, value: Tensor) -> Tensor:
        """[..., D] like `like`, from at and value [...]."""
        return torch.zeros_like(like).scatter_(-1, at.long().unsqueeze(-1), value.unsqueeze(-1))


def _ready(x: Tensor, acc: torch.dtype) -> Tensor:
    """x as the kernel takes it: in the accumulating dtype, its last dim dense."""
    x = x.to(acc)
    return x if x.stride(-1) == 1 else x.contiguous()


def view(x: Tensor, first: int, length: int, block: Block, heads: slice) -> Tensor:
    """[B, length, heads, ...] of x [tokens, heads, ...]: item i begins at token first + i * stride. A view."""
    x = x[first:, heads]
    strides = (x.stride(0) * max(1, block.stride), *x.stride())
    return x.as_strided((block.count, length, *x.shape[1:]), strides)


@dataclass(frozen=True)
class BlockViews:
    """Some of the equal blocks, under some KV heads and all query heads of their groups, or one of each."""

    block: Block
    q_heads: slice
    kv_heads: slice

    def of_queries(self, x: Tensor) -> Tensor:
        return view(x, self.block.first_query, self.block.num_queries, self.block, self.q_heads)

    def of_keys(self, x: Tensor) -> Tensor:
        return view(x, self.block.first_key, self.block.num_keys, self.block, self.kv_heads)

    def queries(self, x_THD: Tensor, acc: torch.dtype) -> Tensor:
        """[B,H,M,D] as the kernel takes it."""
        return _ready(self.of_queries(x_THD), acc).transpose(1, 2)

    def keys(self, x_SKD: Tensor, acc: torch.dtype) -> Tensor:
        """[B,K,L,D] as the kernel takes it."""
        return _ready(self.of_keys(x_SKD), acc).transpose(1, 2)


def _together(num_heads: int, num_kv_heads: int) -> int:
    """Query heads of a group in one call."""
    return num_heads // num_kv_heads if cpu_flash.groups_natively() else 1


def block_limits(num_heads: int, num_kv_heads: int, dim: int) -> tuple[int, int]:
    """(queries, keys) that a block may have for one KV head of it to stay within BLOCK_ELEMENTS."""
    max_keys = max(1, BLOCK_ELEMENTS // dim)
    return max(1, max_keys // _together(num_heads, num_kv_heads)), max_keys


def _block_views(block: Block, num_heads: int, num_kv_heads: int, dim: int) -> Iterator[BlockViews]:
    """A block in parts within BLOCK_ELEMENTS, one of one KV head at least."""
    group, together = num_heads // num_kv_heads, _together(num_heads, num_kv_heads)
    size = max(block.num_queries * together, block.num_keys) * dim
    heads = max(1, min(num_kv_heads, BLOCK_ELEMENTS // size))
    count = max(1, BLOCK_ELEMENTS // (size * heads))
    for begin in range(0, block.count, count):
        part = block.part(begin, min(block.count, begin + count))
        for first in range(0, num_kv_heads, heads):
            stop = min(num_kv_heads, first + heads)
            for member in range(0, group, together):
                yield BlockViews(
                    part, slice(first * group + member, stop * group, group // together), slice(first, stop)
                )


def forward_block(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, block: Block, scale: float, sums: Sums) -> None:
    """Write or merge one block's share of the output."""
    acc = sums.out.dtype
    out_THD, lse_TH = sums.out[:-1].view(q_THD.shape), sums.lse[:-1].view(q_THD.shape[:2])
    for views in _block_views(block, q_THD.shape[1], k_SKD.shape[1], q_THD.shape[2]):
        q, k, v = views.queries(q_THD, acc), views.keys(k_SKD, acc), views.keys(v_SKD, acc)
        out, lse = (x.transpose(1, 2) for x in cpu_flash.forward(q, k, v, block.causal, scale))
        into, into_lse = views.of_queries(out_THD), views.of_queries(lse_TH)
        if block.fresh:
            into.copy_(out)
            into_lse.copy_(lse)
        else:
            merged, share = joined(into_lse, lse)
            into.lerp_(out, share.to(acc).unsqueeze(-1))
            into_lse.copy_(merged)


def backward_block(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, block: Block, scale: float, grads: Gradients, stand_in: StandIn
) -> None:
    """Add one block's share of the gradients."""
    acc = grads.dq.dtype
    for views in _block_views(block, q_THD.shape[1], k_SKD.shape[1], q_THD.shape[2]):
        q, k, v = views.queries(q_THD, acc), views.keys(k_SKD, acc), views.keys(v_SKD, acc)
        dout = views.queries(grads.dout_THD, acc)
        out = StandIn.fill(dout, *(views.of_queries(x).transpose(1, 2) for x in (stand_in.at_TH, stand_in.value_TH)))
        lse = views.of_queries(grads.lse_TH).transpose(1, 2).contiguous()
        dq, dk, dv = cpu_flash.backward(dout, q, k, v, out, lse, block.causal, scale)
        views.of_queries(grads.dq[:-1].view(q_THD.shape)).add_(dq.transpose(1, 2))
        views.of_keys(grads.dk_SKD).add_(dk.transpose(1, 2))
        views.of_keys(grads.dv_SKD).add_(dv.transpose(1, 2))


def _pieces(of: ChunkList, dim: int, tile_rows: int) -> Iterator[tuple[slice, int]]:
    """A list in pieces whose rows stay within LIST_ELEMENTS, and dk, which every tile has one of, in BLOCK_ELEMENTS."""
    max_tiles = max(1, BLOCK_ELEMENTS // (of.num_keys * dim))
    return of.pieces(min(LIST_ELEMENTS // dim, max_tiles * tile_rows), tile_rows)


def forward_lists(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, part: ListPart, scale: float, sums: Sums) -> None:
    """Merge what the rows of lists get from their chunks."""
    acc, dim = sums.out.dtype, q_THD.shape[2]
    tile = (-1, 1, part.tile_rows, dim)
    q_rows, k_SD, v_SD = Rows.of(q_THD), k_SKD[:, part.kv_head], v_SKD[:, part.kv_head]
    for of in part.lists:
        keys = slice(of.first_key, of.first_key + of.num_keys)
        k_LD, v_LD = _ready(k_SD[keys], acc), _ready(v_SD[keys], acc)
        for piece, num_rows in _pieces(of, dim, part.tile_rows):
            rows = part.rows_M[piece]
            q = q_rows.take(rows).to(acc).view(tile)
            k, v = (x.expand(len(q), 1, -1, -1) for x in (k_LD, v_LD))  # the same memory for every tile
            out, lse = cpu_flash.forward(q, k, v, False, scale)
            # With one head the kernel's [N,M,1,D] is [N,1,M,D] as it lies.
            sums.merge_(rows[:num_rows], out.reshape(-1, dim)[:num_rows], lse.reshape(-1)[:num_rows])


def backward_lists(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, part: ListPart, scale: float, grads: Gradients, stand_in: StandIn
) -> None:
    """Add what the rows of lists and their chunks give each other."""
    acc, dim = grads.dq.dtype, q_THD.shape[2]
    tile = (-1, 1, part.tile_rows, dim)
    q_rows, dout_rows = Rows.of(q_THD), Rows.of(grads.dout_THD)
    k_SD, v_SD, dk_SD, dv_SD = (x[:, part.kv_head] for x in (k_SKD, v_SKD, grads.dk_SKD, grads.dv_SKD))
    at_M, value_M, lse_M = (
        x.flatten().index_select(0, part.rows_M) for x in (stand_in.at_TH, stand_in.value_TH, grads.lse_TH)
    )
    for of in part.lists:
        keys = slice(of.first_key, of.first_key + of.num_keys)
        k_LD, v_LD = _ready(k_SD[keys], acc), _ready(v_SD[keys], acc)
        for piece, num_rows in _pieces(of, dim, part.tile_rows):
            rows = part.rows_M[piece]
            q, dout = (x.take(rows).to(acc).view(tile) for x in (q_rows, dout_rows))
            dout.view(-1, dim)[num_rows:] = 0  # padding gives nothing
            at, value, lse = (x[piece].view(tile[:3]) for x in (at_M, value_M, lse_M))
            out = StandIn.fill(dout, at, value)
            k, v = (x.expand(len(q), 1, -1, -1) for x in (k_LD, v_LD))
            dq, dk, dv = cpu_flash.backward(dout, q, k, v, out, lse, False, scale)
            # Each row stands once: the same as index_add_, which one thread does row by row.
            row_dq = grads.dq.index_select(0, rows[:num_rows]).add_(dq.reshape(-1, dim)[:num_rows])
            grads.dq.index_copy_(0, rows[:num_rows], row_dq)
            dk_SD[keys] += dk.sum((0, 1))
            dv_SD[keys] += dv.sum((0, 1))
