"""Tile shapes of the dK/dV kernel: a pure function of head dims, dtype, target, the length of runs and the group."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..triton_math import HAS_GLUON
from .triton_config import padded


class KeyBlocks(NamedTuple):
    """Tile shapes of one launch."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    ahead: int = 1
    """How many units before their use the row ids of a list are asked for: two where that does not take the last
    registers."""
    specialised: bool = False
    """By the kernel of triton_keys_hopper.py: num_warps of each of its groups, num_stages units under way."""


def key_blocks(
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    target: int,
    keys: int,
    group: int,
    *,
    picks: bool,
    aligned: bool = True,
) -> KeyBlocks:
    """The tile for runs of about `keys` keys (a chunk, a document): shapes that compile without spills (`make aot`).

    fp32 runs on the FMA units, whose code grows with the tile and with every stage of a pipeline. aligned: rows of q
    and dout begin at multiples of 16 elements; what copies rows by itself needs that.
    """
    dim = max(padded(head_dim), padded(value_dim))
    if dtype == torch.float32:
        return KeyBlocks(32, 32, 8, 1) if dim <= 128 else KeyBlocks(16, 16, 8, 1)
    most = 64 if dim == 256 or (dim == 128 and target == 80) else 128
    block_n = min(most, max(32, padded(keys)))
    if block_n > 64 and -(-keys // 64) % 2:  # an odd number of halves: do not pad the last one
        block_n = 64
    if dim == 256:
        return KeyBlocks(32, block_n, 8, 2)
    if target == 80 and dim <= 64 and block_n > 32:
        return KeyBlocks(32, block_n, block_n // 16, 3)
    if aligned and block_n == 128 and specialises_warps(head_dim, value_dim, dtype, target):
        return KeyBlocks(64, 128, 4, 4, specialised=True)
    masked = (head_dim, value_dim) != (padded(head_dim), padded(value_dim))
    if target == 90 and picks and not masked and dim in (64, 128) and block_n >= 64:
        return _list_blocks(dim, block_n, group)
    ahead = 2 if picks and target == 90 and block_n != 64 else 1
    if block_n == 32 and (dim == 128 or (dim == 32 and target != 80)):
        return KeyBlocks(32, 32, 4, 3, ahead)
    if dim == 128 and block_n == 128 and target == 90 and (picks or masked):  # the rows of a list, masks take registers
        return KeyBlocks(32, 128, 8, 4, ahead)
    large = block_n == 128 or (block_n == 64 and (dim == 128 or (dim == 64 and target == 100)))
    return KeyBlocks(64, block_n, 8 if large else 4, 3, ahead)


def specialises_warps(head_dim: int, value_dim: int, dtype: torch.dtype, target: int) -> bool:
    """Does the kernel of triton_keys_hopper.py serve tiles of 128 keys? (With D = 64 it took twice the time.)"""
    return HAS_GLUON and target == 90 and (head_dim, value_dim) == (128, 128) and dtype != torch.float32


def _list_blocks(dim: int, block_n: int, group: int) -> KeyBlocks:
    """Tiles for lists of 64 keys and more on sm_90, as timed on an H200."""
    if dim == 64:
        return KeyBlocks(64, 64, 4, 3)
    if block_n == 128:
        return KeyBlocks(64, 128, 8, 2)
    return KeyBlocks(64, 64, 4, 2) if group > 1 else KeyBlocks(64, 64, 8, 3)
