"""Lies in `.metadata`, and programs that do more than build its tables, are refused before they cost memory."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from enum import Enum
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata

from moba_train.errors import CheckpointError
from moba_train.train.shard_checks import covers_once
from tests.unit.train.hostile import SHARD, Hostile, Malice, little_memory, metadata_of, place


def change(at: str, **values: object) -> Callable[[Metadata], None]:
    """Set fields of weight's table: its "tensor", the only "piece" of it, or the "place" of that."""

    def apply(metadata: Metadata) -> None:
        tensor = metadata.state_dict_metadata["weight"]
        part = {"tensor": tensor, "piece": tensor.chunks[0], "place": place(metadata, "weight")}[at]
        for name, value in values.items():
            object.__setattr__(part, name, value)

    return apply


def pieces(*boxes: tuple[int, int]) -> Callable[[Metadata], None]:
    return change("tensor", chunks=[ChunkStorageMetadata(torch.Size([at]), torch.Size([n])) for at, n in boxes])


def placed_like_momentum(metadata: Metadata) -> None:
    place(metadata, "weight").offset = place(metadata, "momentum").offset


def without_place(metadata: Metadata) -> None:
    metadata.storage_data = {index: at for index, at in metadata.storage_data.items() if index.fqn != "weight"}


TABLES: dict[str, tuple[Callable[[Metadata], None], str]] = {
    "a path out of the folder": (change("place", relative_path="../../x"), "no shard of this checkpoint"),
    "an absolute path": (change("place", relative_path="/etc/passwd"), "no shard of this checkpoint"),
    "a path with a NUL": (change("place", relative_path=SHARD + "\0"), "no shard of this checkpoint"),
    "a path that is no text": (change("place", relative_path=7), "no shard of this checkpoint"),
    "another file of the folder": (change("place", relative_path="state.json"), "no shard of this checkpoint"),
    "a shard that is not there": (change("place", relative_path="__1_0.distcp"), "no shard of this checkpoint"),
    "an offset past the end": (change("place", offset=1 << 40), "reach beyond"),
    "a length past the end": (change("place", length=1 << 40), "reach beyond"),
    "a negative offset": (change("place", offset=-8), "whole number"),
    "a negative length": (change("place", length=-1), "whole number"),
    "an offset that is no number": (change("place", offset="0"), "whole number"),
    "an offset beyond int64": (change("place", offset=1 << 90), "whole number"),
    "a length shorter than the content": (change("place", length=8), "has 8 bytes"),
    "a compressed piece": (change("place", transform_descriptors=["zstd"]), "compressed"),
    "two pieces in one place": (placed_like_momentum, "overlap"),
    "a piece without a place": (without_place, "lies nowhere"),
    "places that are no table": (lambda m: setattr(m, "storage_data", [1]), "list of places"),
    "tensors that are no table": (lambda m: setattr(m, "state_dict_metadata", None), "NoneType|list of tensors"),
    "a shape of terabytes": (change("tensor", size=torch.Size([1 << 42])), "cover"),
    "a negative shape": (change("tensor", size=torch.Size([-2])), "whole number"),
    "a shape that is no shape": (change("tensor", size="2"), "shape of tensor weight"),
    "a hundred dims": (change("tensor", size=torch.Size([1] * 100)), "shape of tensor weight"),
    "a huge piece": (pieces((0, 1 << 42)), "cover"),
    "a piece of negative size": (pieces((0, -2)), "whole number"),
    "overlapping pieces": (pieces((0, 2), (1, 1)), "cover"),
    "the same piece twice": (pieces((0, 1), (0, 1)), "cover"),
    "a missing piece": (pieces((0, 1)), "cover"),
    "no piece": (pieces(), "cover"),
    "pieces of terabytes that agree with the shape": (
        lambda m: (change("tensor", size=torch.Size([1 << 42]))(m), pieces((0, 1 << 42))(m))[0],
        "or the tensor has no such piece",
    ),
    "no dtype": (lambda m: setattr(m.state_dict_metadata["weight"].properties, "dtype", "float64"), "dtype"),
    "a tensor that is a number": (lambda m: m.state_dict_metadata.update(weight=5), "no tensor"),
    "a name that is a number": (lambda m: m.state_dict_metadata.update({5: 5}), "no tensor"),
}


@pytest.mark.parametrize(("lie", "reason"), TABLES.values(), ids=TABLES.keys())
def test_a_lie_in_the_tables_of_metadata_is_refused(
    hostile: Hostile, lie: Callable[[Metadata], None], reason: str
) -> None:
    metadata = metadata_of(hostile)
    lie(metadata)
    hostile.write(_metadata=pickle.dumps(metadata, protocol=4))
    error = hostile.refusal()
    assert error.where.endswith(".metadata")
    assert any(part in str(error.got) for part in reason.split("|")), error.message()


class EarlyPickler(pickle.Pickler):
    """Members of enumerations as Python 3.11.0 to 3.11.3 write them."""

    def reducer_override(self, x: object) -> object:
        return (getattr, (type(x), x.name)) if isinstance(x, Enum) else NotImplemented


def test_metadata_is_read_as_every_python_writes_it(hostile: Hostile) -> None:
    file = io.BytesIO()
    EarlyPickler(file, protocol=4).dump(metadata_of(hostile))
    assert b"getattr" in file.getvalue()
    hostile.write(_metadata=file.getvalue())
    hostile.load()


def test_pieces_that_cover_a_tensor_are_told_from_those_that_do_not() -> None:
    grid = [((i, j), (2, 3)) for i in (0, 2) for j in (0, 3)]
    assert covers_once((4, 6), grid) and covers_once((), [((), ())]) and covers_once((0, 5), [])
    windmill = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((1, 0), (2, 1)), ((2, 1), (1, 2)), ((1, 1), (1, 1))]
    assert covers_once((3, 3), windmill)
    assert not covers_once((3, 3), windmill[:-1])  # a hole
    assert not covers_once((4, 6), [*grid, grid[0]]) and not covers_once((4, 6), [*grid[:3], grid[0]])
    assert not covers_once((4, 6), [*grid[:3], ((2, 4), (2, 3))])  # the right volume, in the wrong place
    assert not covers_once((), [])


def laughs(depth: int) -> bytes:
    """(x, x) where x = (y, y) and so on: few bytes, and hashing it takes for ever."""
    return b"\x80\x04}(" + b")\x94" + b"".join(b"h" + bytes([i]) + b"\x86\x94" for i in range(depth)) + b"Nu."


PROGRAMS = {
    "code": (pickle.dumps(Malice(), protocol=4), "exec"),
    "code in an old protocol": (pickle.dumps(Malice(), protocol=0), "no metadata needs"),
    "a name outside the list": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
    "a name below an allowed module": (b"\x80\x04\x8c\x05torch\x8c\x04load\x93.", "torch.load"),
    "a dotted name": (b"\x80\x04\x8c\x07pathlib\x8c\x10PosixPath.unlink\x93.", "PosixPath.unlink"),
    "an attribute of a class": (
        b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93\x8c\x07pathlib\x8c\x09PosixPath\x93\x8c\x06unlink\x86R.",
        "no member of an enumeration",
    ),
    "a method of an enumeration": (
        b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93\x8c%btorch.distributed.checkpoint.metadata"
        b"\x8c\x14_MEM_FORMAT_ENCODING\x93\x8c\x03mro\x86R." % bytes([len("torch.distributed.checkpoint.metadata")]),
        "no member of an enumeration",
    ),
    "a memo of 64 GB": (b"\x80\x04Nr\xff\xff\xff\xff.", "LONG_BINPUT"),
    "bytes of terabytes": (b"\x80\x04\x8e" + (1 << 42).to_bytes(8, "little") + b".", "not a pickle|needs"),
    "a text of terabytes": (b"\x80\x04\x8d" + (1 << 42).to_bytes(8, "little") + b".", "not a pickle|needs"),
    "a frame of terabytes": (b"\x80\x04\x95" + (1 << 42).to_bytes(8, "little") + b"N.", "UnpicklingError|SuspectFile"),
    "a class that is changed": (
        b"\x80\x04\x8c\x07pathlib\x8c\x09PosixPath\x93N}\x8c\x04openNs\x86b.",
        "it changes a class",
    ),
    "a value that is called": (b"\x80\x04K\x01)R.", "it calls a value"),
    "persistent objects": (b"\x80\x04K\x01Q.", "BINPERSID"),
    "a registered extension": (b"\x80\x04\x82\x01.", "EXT1"),
    "a value that repeats itself": (laughs(60), "repeats itself"),
    "nothing": (b"", "not a pickle"),
    "a table": (pickle.dumps({}, protocol=4), "holds a dict"),
    "missing operands": (b"\x80\x04R.", "not a pickle"),
    "an empty Metadata": (
        b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x08Metadata\x93)\x81.",
        "",
    ),
}


@pytest.mark.parametrize(("program", "reason"), PROGRAMS.values(), ids=PROGRAMS.keys())
def test_metadata_that_does_more_than_build_tables_is_refused(
    hostile: Hostile, program: bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hostile.write(_metadata=program)
    error = hostile.refusal()
    assert error.where.endswith(".metadata")
    assert any(part in str(error.got) for part in reason.split("|")), error.message()
    assert list(tmp_path.iterdir()) == []


def test_metadata_of_two_gigabytes_is_not_read(hostile: Hostile) -> None:
    os.truncate(hostile.write() / ".metadata", 2 << 30)
    entries = json.loads((hostile.path / "manifest.json").read_text())["files"]
    with pytest.raises(CheckpointError, match="larger than") as caught:
        from moba_train.train.megatron_io import read_metadata

        with little_memory():
            read_metadata(hostile.path)
    assert entries and caught.value.where.endswith(".metadata")
