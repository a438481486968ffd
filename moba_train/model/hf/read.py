"""Reading a Hugging Face checkpoint tensor by tensor: `model.safetensors`, or the shards that an index names.

The library checks headers and offsets of the files; here the names in the index are checked, and what the files hold is
compared with what config.json promises before anything is read. A file is opened anew for every piece: it is mapped
into memory, and pages that were touched would count for as long as it is open.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moba_train.config.schema import ModelConfig
from moba_train.errors import CheckpointError
from moba_train.model.hf.names import EMBEDDING, HEAD, Part, Place, places
from moba_train.model.hf.settings import read_json

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PIECE_BYTES = 1 << 24
"""What is read at once of a larger tensor."""

# Follows from the configuration; files of 2023 have it beside the weights. transformers does not read it either.
_DERIVED = ".self_attn.rotary_emb.inv_freq"


@dataclass(frozen=True)
class _Stored:
    """Where a tensor is, and what it is."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


class HfWeights:
    """The tensors of a checkpoint folder, which fit `model`.

    Attributes:
        dtype: of every tensor.
        num_files: safetensors files that hold them.

    Raises:
        CheckpointError: a file that is missing, damaged or outside of the folder; tensors that are missing or left
            over, or have another shape or dtype than the model.
    """

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self._folder = folder
        self._stored = _headers(folder)
        self.num_files = len({stored.path for stored in self._stored.values()})
        parts = {part.name: part for place in _bounded(places(model), len(self._stored)) for part in place.parts}
        left_over = [name for name in self._stored if name not in parts and not name.endswith(_DERIVED)]
        if model.tied_head and HEAD in left_over and self._equal(HEAD, EMBEDDING):
            left_over.remove(HEAD)
        self._refuse_strangers([name for name in parts if name not in self._stored], left_over)
        self.dtype = self._check(parts.values())

    def assembled(self, place: Place) -> Tensor:
        """A tensor in Megatron's form; it alone is in memory, with one piece of a file."""
        size = {part.name: prod(part.shape) for part in place.parts}
        make = torch.empty if sum(size.values()) == prod(place.shape) else torch.zeros
        tensor = make(place.shape, dtype=self.dtype)
        for part in place.parts:
            for source, target, rows in place.rows(part):
                for start, stop in _pieces(rows, prod(part.shape[1:]) * self.dtype.itemsize):
                    piece = self._read(part.name, source + start, source + stop)
                    tensor[target + start : target + stop] = piece
                    del piece
        return tensor

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor, copied out of the file."""
        path = self._stored[name].path
        with _opened(path) as stream:
            piece: Tensor = stream.get_slice(name)[start:stop].clone()
        return piece

    def _equal(self, name: str, other: str) -> bool:
        one, two = self._stored[name], self._stored.get(other)
        if two is None or (one.shape, one.dtype) != (two.shape, two.dtype) or one.dtype not in DTYPES or not one.shape:
            return False
        row_bytes = prod(one.shape[1:]) * DTYPES[one.dtype].itemsize
        return all(
            torch.equal(self._read(name, start, stop), self._read(other, start, stop))
            for start, stop in _pieces(one.shape[0], row_bytes)
        )

    def _refuse_strangers(self, missing: list[str], left_over: list[str]) -> None:
        if missing or left_over:
            found = [f"{len(missing)} missing: {_some(missing)}"] if missing else []
            found += [f"{len(left_over)} left over: {_some(left_over)}"] if left_over else []
            raise CheckpointError(
                "the tensors are not those of the model in config.json",
                where=str(self._folder),
                got="; ".join(found),
                allowed="exactly the tensors of that model",
                fix="Restore the files of the checkpoint, or correct config.json.",
            )

    def _check(self, parts: Iterable[Part]) -> torch.dtype:
        """Shapes are as config.json says, and there is one dtype, which is returned."""
        found: set[str] = set()
        for part in parts:
            stored = self._stored[part.name]
            found.add(stored.dtype)
            if stored.shape != part.shape:
                raise CheckpointError(
                    "a tensor has another shape than config.json says",
                    where=f"{stored.path}: {part.name}",
                    got=str(list(stored.shape)),
                    allowed=str(list(part.shape)),
                    fix="Restore config.json and the weights of one and the same model.",
                )
        if len(found) != 1 or not found <= DTYPES.keys():
            raise CheckpointError(
                "the weights have a dtype that cannot be taken over",
                where=str(self._folder),
                got=", ".join(sorted(found)),
                allowed=f"one of {', '.join(DTYPES)}, the same for all tensors",
                fix="Choose the checkpoint that is not quantised, or save it anew in one dtype with transformers.",
            )
        return DTYPES[found.pop()]


def _headers(folder: Path) -> dict[str, _Stored]:
    """What the files of a folder hold, by name; nothing but headers is read."""
    index = _index(folder)
    stored: dict[str, _Stored] = {}
    for file in sorted(set(index.values())) if index else [SINGLE]:
        path = folder / file
        with _opened(path) as stream:
            for name in stream.keys():  # noqa: SIM118 - not a dict
                if name in stored:
                    raise _bad_file(path, f"{name} is in {stored[name].path.name} too")
                if index and index.get(name) != file:
                    raise _bad_file(path, f"it holds {name}, which {INDEX} looks for in {index.get(name)}")
                item = stream.get_slice(name)
                stored[name] = _Stored(path, tuple(item.get_shape()), str(item.get_dtype()))
    absent = [name for name in index if name not in stored]
    if absent:
        raise _bad_file(folder / index[absent[0]], f"{absent[0]} is not in it, although {INDEX} says so")
    return stored


def _index(folder: Path) -> dict[str, str]:
    """Tensor -> file name, from the index; {} where one file holds all."""
    path = folder / INDEX
    if (folder / SINGLE).is_file():  # then transformers does not look at an index either
        return {}
    if not path.is_file():
        raise CheckpointError(
            "the folder holds no weights in safetensors form",
            where=str(folder),
            got=", ".join(sorted(p.name for p in folder.glob("*.bin"))[:3]) or f"neither {SINGLE} nor {INDEX}",
            allowed=f"{SINGLE}, or {INDEX} and its files (.bin files are pickles, which can run code)",
            fix="Save the model with transformers: model.save_pretrained(folder).",
        )
    weights = read_json(path).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise _bad_file(path, "weight_map is missing or empty")
    for name, file in weights.items():
        is_name = isinstance(file, str) and file.isprintable() and Path(file).name == file
        if not is_name or not file.endswith(".safetensors"):
            raise _bad_file(path, f"{name} lies in {str(file)[:80]!r}, which is not the name of a safetensors file")
    return weights


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; CheckpointError when it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as stream:
            yield stream
    except (SafetensorError, OSError) as error:
        raise _bad_file(path, str(error)) from error


def _bad_file(path: Path, got: str) -> CheckpointError:
    what, fix = "a file of the checkpoint cannot be used", "Restore the file."
    return CheckpointError(what, where=str(path), got=got, fix=fix)


def _bounded(all_places: Iterator[Place], num_tensors: int) -> Iterator[Place]:
    """At most one place more than there are tensors: config.json may promise more layers than fit into memory."""
    for count, place in enumerate(all_places):
        yield place
        if count > num_tensors:
            return


def _pieces(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(1, PIECE_BYTES // max(1, row_bytes))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
