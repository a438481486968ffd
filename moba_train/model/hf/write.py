"""Writing safetensors files tensor by tensor: names and shapes are known beforehand, so the header comes first.

The library's `save_file` wants all tensors of a file in memory at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from moba_train.model.hf.names import Part
from moba_train.model.hf.read import DTYPES, INDEX, SINGLE

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def plan_files(parts: Sequence[Part], dtype: torch.dtype, *, max_bytes: int) -> dict[str, list[Part]]:
    """File name -> the tensors that it will hold, in the order of `parts`; only a single tensor may be larger."""
    groups: list[list[Part]] = []
    room = 0
    for part in parts:
        size = prod(part.shape) * dtype.itemsize
        if not groups or size > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(part)
        room -= size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, start=1)}


def write_files(
    folder: Path, files: dict[str, list[Part]], dtype: torch.dtype, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write the files and, where there are several, their index.

    Args:
        folder: an existing folder.
        files: as `plan_files` says.
        dtype: of every tensor.
        tensors: (name, tensor) in the order of `files`; one is held at a time.
    """
    coming = iter(tensors)
    for file, parts in files.items():
        with (folder / file).open("wb") as stream:
            stream.write(_header(parts, dtype))
            for part in parts:
                name, tensor = next(coming)
                assert (name, tuple(tensor.shape), tensor.dtype) == (part.name, part.shape, dtype)
                _write_tensor(stream, tensor)
                del tensor
            stream.flush()
            os.fsync(stream.fileno())
    if len(files) > 1:
        weight_map = {part.name: file for file, parts in files.items() for part in parts}
        total = sum(prod(part.shape) for parts in files.values() for part in parts) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header(parts: Sequence[Part], dtype: torch.dtype) -> bytes:
    """Length of the JSON as 8 bytes, little-endian, and the JSON, filled up with spaces to a multiple of 8."""
    tree: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for part in parts:
        end = offset + prod(part.shape) * dtype.itemsize
        tree[part.name] = {"dtype": _NAMES[dtype], "shape": list(part.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(stream: BinaryIO, tensor: Tensor) -> None:
    stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
