"""Attention on CPU through the flash kernel that PyTorch ships, which returns the log-sum-exp.

It serves q, k and v of one head dim. What it is asked for comes in two forms, both without a mask of ours:

- blocks (blocks.py): causal squares and rectangles, read through strided views of q, k and v;
- lists: the rows that picked a chunk, gathered, against the chunk's keys where they lie. A row picks a chunk at most
  once, so merging a list in place cannot collide. Lists are cut into tiles of a fixed size, zero-padded, so that a
  row's tile depends only on itself and earlier rows.

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
from .lists import ChunkList
from .rows import take_rows
from .sums import Gradients, Sums

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
    for views in _block_views(block, q_THD.shape[1], k_SKD.shape[1], q_THD.shape[2]):
        forward_views(q_THD, k_SKD, v_SKD, views, scale, sums)


def forward_views(
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    views: BlockViews,
    scale: float,
    sums: Sums,
    mask: Tensor | None = None,
) -> None:
    """One call of the kernel; mask [B,1 or heads,M,L] is added to the scores."""
    acc, block = sums.out.dtype, views.block
    out_THD, lse_TH = sums.out[:-1].view(q_THD.shape), sums.lse[:-1].view(q_THD.shape[:2])
    q = _ready(views.of_queries(q_THD), acc).transpose(1, 2)
    k, v = (_ready(views.of_keys(x), acc).transpose(1, 2) for x in (k_SKD, v_SKD))
    out, lse = (x.transpose(1, 2) for x in cpu_flash.forward(q, k, v, block.causal, scale, mask))
    into, into_lse = views.of_queries(out_THD), views.of_queries(lse_TH)
    if block.fresh:
        into.copy_(out)
        into_lse.copy_(lse)
        return
    merged = torch.logaddexp(into_lse, lse)
    into.mul_(torch.exp(into_lse - merged).unsqueeze(-1)).addcmul_(out, torch.exp(lse - merged).unsqueeze(-1))
    into_lse.copy_(merged)


def backward_block(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, block: Block, scale: float, grads: Gradients, stand_in: StandIn
) -> None:
    """Add one block's share of the gradients."""
    for views in _block_views(block, q_THD.shape[1], k_SKD.shape[1], q_THD.shape[2]):
        backward_views(q_THD, k_SKD, v_SKD, views, scale, grads, stand_in)


def backward_views(
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    views: BlockViews,
    scale: float,
    grads: Gradients,
    stand_in: StandIn,
    mask: Tensor | None = None,
) -> None:
    """One call of the kernel, as in `forward_views`."""
    acc = grads.dq.dtype
    q, dout = (_ready(views.of_queries(x), acc).transpose(1, 2) for x in (q_THD, grads.dout_THD))
    k, v = (_ready(views.of_keys(x), acc).transpose(1, 2) for x in (k_SKD, v_SKD))
    out = StandIn.fill(dout, *(views.of_queries(x).transpose(1, 2) for x in (stand_in.at_TH, stand_in.value_TH)))
    lse = views.of_queries(grads.lse_TH).transpose(1, 2).contiguous()
    dq, dk, dv = cpu_flash.backward(dout, q, k, v, out, lse, views.block.causal, scale, mask)
    views.of_queries(grads.dq[:-1].view(q_THD.shape)).add_(dq.transpose(1, 2))
    views.of_keys(grads.dk_SKD).add_(dk.transpose(1, 2))
    views.of_keys(grads.dv_SKD).add_(dv.transpose(1, 2))


def _pieces(of: ChunkList, dim: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A list in pieces whose rows stay within LIST_ELEMENTS, and dk, which every tile has one of, in BLOCK_ELEMENTS."""
    max_tiles = max(1, BLOCK_ELEMENTS // (of.num_keys * dim))
    return of.pieces(min(LIST_ELEMENTS // dim, max_tiles * of.tile_rows))


def _tiles(x: Tensor, rows: Tensor, num_tiles: int, acc: torch.dtype) -> Tensor:
    """[N,1,M,D]: the rows of a list, padded with its first row."""
    return take_rows(x, rows).to(acc).view(num_tiles, 1, -1, x.shape[-1])


def _chunk(x: Tensor, of: ChunkList, num_tiles: int, acc: torch.dtype) -> Tensor:
    """[N,1,L,D]: the chunk's keys, the same memory for every tile."""
    keys = _ready(x[of.first_key : of.first_key + of.num_keys, of.kv_head], acc)
    return keys[None, None].expand(num_tiles, 1, -1, -1)


def forward_list(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, of: ChunkList, scale: float, sums: Sums) -> None:
    """Merge what the rows of a list get from their chunk."""
    acc, dim = sums.out.dtype, q_THD.shape[2]
    for real, padded in _pieces(of, dim):
        num_tiles = len(padded) // of.tile_rows
        q = _tiles(q_THD, padded, num_tiles, acc)
        k, v = (_chunk(x, of, num_tiles, acc) for x in (k_SKD, v_SKD))
        out, lse = cpu_flash.forward(q, k, v, False, scale)
        # With one head the kernel's [N,M,1,D] is [N,1,M,D] as it lies.
        sums.merge_(real, out.reshape(-1, dim)[: len(real)], lse.reshape(-1)[: len(real)])


def backward_list(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, of: ChunkList, scale: float, grads: Gradients, stand_in: StandIn
) -> None:
    """Add what the rows of a list and their chunk give each other."""
    acc, dim = grads.dq.dtype, q_THD.shape[2]
    keys = slice(of.first_key, of.first_key + of.num_keys)
    for real, padded in _pieces(of, dim):
        num_tiles = len(padded) // of.tile_rows
        q, dout = (_tiles(x, padded, num_tiles, acc) for x in (q_THD, grads.dout_THD))
        dout.view(-1, dim)[len(real) :] = 0  # padding gives nothing
        at, value, lse = (
            x.flatten().index_select(0, padded).view(num_tiles, 1, -1)
            for x in (stand_in.at_TH, stand_in.value_TH, grads.lse_TH)
        )
        out = StandIn.fill(dout, at, value)
        k, v = (_chunk(x, of, num_tiles, acc) for x in (k_SKD, v_SKD))
        dq, dk, dv = cpu_flash.backward(dout, q, k, v, out, lse, False, scale)
        grads.dq.index_add_(0, real, dq.reshape(-1, dim)[: len(real)])
        grads.dk_SKD[keys, of.kv_head] += dk.sum((0, 1))
        grads.dv_SKD[keys, of.kv_head] += dv.sum((0, 1))
