"""Tile shapes of the attention kernels: a pure function of head dims, dtype, target and the sizes of runs.

The shapes are those that compile without spills and within shared memory on each target (`make aot` lists both).
fp32 runs on the FMA units (`input_precision="ieee"`): small tiles, and two stages, as one keeps operands in registers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..triton_math import TRITON_TYPE, Variant

Kind = Literal["causal forward", "causal dq", "picks forward", "picks dq"]

# Run-time integers of the attention kernels that are not strides.
SIZES = frozenset({"num_segments", "slot", "num_slots", "num_chunks", "num_kv_heads"})
FACTORS = frozenset({"scale", "factor"})


@dataclass(frozen=True)
class Tile:
    """How one kernel is launched."""

    block_m: int
    """Query rows."""
    block_n: int
    """Keys."""
    num_warps: int
    num_stages: int


def padded(dim: int) -> int:
    """tl.arange wants powers of two."""
    return 1 << (dim - 1).bit_length()


def groups_of_variants(head_dim: int, value_dim: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Query heads of a KV head that forms are compiled for ahead of time: a GROUP is a form of its own. All usual ones
    where spills are not allowed at all and models mostly are, else one."""
    return (4, 1, 2, 8) if (head_dim, value_dim) in ((64, 64), (128, 128)) and dtype == torch.bfloat16 else (4,)


def is_short(rows: int, keys: int) -> bool:
    """Do runs of about so many query rows and keys (a chunk's, or a document's) take the small tile?

    A tile of few keys waits for its rows rather than for products: two small programs on a multiprocessor hide more.
    """
    return rows < 128 or keys < 512


def tile_of(kind: Kind, head_dim: int, value_dim: int, dtype: torch.dtype, target: int, *, short: bool) -> Tile:
    """The tile of `kind` on `target` (80, 90 or 100)."""
    dim = max(64, padded(head_dim), padded(value_dim))
    if dtype == torch.float32:
        return _WIDE[dim][kind]
    exact = padded(head_dim) == head_dim  # else loads have masks, which take the registers that are left
    if exact:
        return (_SHORT if short else _LONG)[target, dim][kind]
    tile = (_SHORT if short or target == 80 else _LONG)[target, dim][kind]
    if target == 100 and kind.startswith("picks"):
        return Tile(64, 32, 8, 2)
    if kind == "picks dq":
        return replace(tile, block_n=min(tile.block_n, 32))
    return tile


def _of(causal_forward: Tile, causal_dq: Tile, picks_forward: Tile, picks_dq: Tile) -> Mapping[Kind, Tile]:
    return {
        "causal forward": causal_forward,
        "causal dq": causal_dq,
        "picks forward": picks_forward,
        "picks dq": picks_dq,
    }


# fp32, on any target.
_WIDE: Mapping[int, Mapping[Kind, Tile]] = {
    64: _of(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    128: _of(Tile(32, 16, 8, 2), Tile(32, 32, 8, 2), Tile(32, 16, 8, 2), Tile(32, 32, 8, 2)),
    256: _of(Tile(16, 32, 8, 2), Tile(16, 32, 8, 2), Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
}

# (target, the larger of the padded head dims, 64 at least) -> tiles of bf16 and fp16.
_LONG: Mapping[tuple[int, int], Mapping[Kind, Tile]] = {
    (80, 64): _of(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
    (80, 128): _of(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    (80, 256): _of(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
    (90, 64): _of(Tile(64, 32, 4, 3), Tile(64, 64, 4, 3), Tile(64, 32, 4, 3), Tile(64, 64, 4, 3)),
    (90, 128): _of(Tile(128, 32, 8, 3), Tile(64, 64, 4, 2), Tile(64, 32, 4, 3), Tile(64, 64, 4, 2)),
    (90, 256): _of(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
    (100, 64): _of(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    (100, 128): _of(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    (100, 256): _of(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
}
_SHORT: Mapping[tuple[int, int], Mapping[Kind, Tile]] = {
    (80, 64): _of(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2), Tile(64, 32, 4, 2)),
    (80, 128): _of(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    (80, 256): _of(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
    (90, 64): _of(Tile(64, 32, 4, 3), Tile(64, 64, 4, 3), Tile(64, 32, 4, 3), Tile(64, 64, 4, 3)),
    (90, 128): _of(Tile(64, 32, 4, 3), Tile(64, 32, 4, 2), Tile(64, 32, 4, 3), Tile(64, 32, 4, 2)),
    (90, 256): _of(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    (100, 64): _of(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
    (100, 128): _of(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    (100, 256): _of(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
}


def uses_descriptors(head_dim: int, value_dim: int, dtype: torch.dtype, target: int) -> bool:
    """Do whole key blocks come through tensor descriptors (TMA)? Their columns are exactly a head's."""
    exact = head_dim == padded(head_dim) and value_dim == padded(value_dim)
    return target >= 90 and exact and dtype != torch.float32


def key_blocks(k: Tensor, v: Tensor, tile: Tile, target: int) -> tuple[Any, Any]:
    """Tensor descriptors of k [S,K,D] and v [S,K,V], or (None, None) where they do not serve: then pointers do."""
    if not uses_descriptors(k.shape[2], v.shape[2], k.dtype, target) or not (_is_matrix(k) and _is_matrix(v)):
        return None, None
    return tuple(  # type: ignore[return-value]
        TensorDescriptor(
            x,
            shape=[x.shape[0], _columns(x)],
            strides=[x.stride(0), 1],
            block_shape=[tile.block_n, x.shape[2]],
        )
        for x in (k, v)
    )


def _columns(x: Tensor) -> int:
    """From the first head's first column to one past the last head's last."""
    return (x.shape[1] - 1) * x.stride(1) + x.shape[2]


def _is_matrix(x: Tensor) -> bool:
    """Is x [tokens, heads, dim] a matrix of token rows that a descriptor can hold.

    Its rows must not overlap: of keys laid out head by head the columns would span all tokens, and a head's first
    column may not fit the 32 bits of a coordinate.
    """
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return x.shape[0] > 0 and aligned and x.stride(1) >= x.shape[2] and _columns(x) <= x.stride(0)


def variant(
    kernel: Any,
    pointers: Mapping[str, str],
    constants: Mapping[str, int],
    tile: Tile,
    dtype: torch.dtype,
    target: int,
    general: Collection[str],
    label: str,
) -> Variant:
    """The compiled form of an attention kernel. pointers: element types; pointers that are not named hold int32.

    general: arguments that launches do not specialise on. The others are multiples of 16: strides, as head dims are,
    and addresses of tensors and of their heads. (Other strides work, too; their form compiles when it is met.)
    """
    types, aligned = {}, set()
    descriptors = uses_descriptors(constants["D"], constants["V"], dtype, target)
    blocks = {"k_blocks": constants["D"], "v_blocks": constants["V"]}
    for name in kernel.arg_names:
        if name in constants or name in blocks:
            if name in blocks and descriptors:
                types[name] = f"tensordesc<{TRITON_TYPE[dtype]}[{tile.block_n}, {blocks[name]}]>"
            continue
        if name in FACTORS:
            types[name] = "fp32"
        elif name.startswith("stride_") or name in SIZES:
            types[name] = "i32"
        else:
            types[name] = "*" + pointers.get(name, "i32")
        if name not in general and name not in FACTORS:
            aligned.add(name)
    head_dim = constants["D"]
    everything: dict[str, int | None] = {**constants, **({} if descriptors else dict.fromkeys(blocks, None))}
    return Variant(
        label=f"{kernel.__name__} {head_dim}/{constants['V']} {TRITON_TYPE[dtype]} {label}",
        kernel=kernel, types=types, constants=everything, num_warps=tile.num_warps, num_stages=tile.num_stages,
        head_dim=head_dim, dtype=dtype, divisible_by_16=frozenset(aligned),
    )  # fmt: skip
