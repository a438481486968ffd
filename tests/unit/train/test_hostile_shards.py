"""Hostile shards, common.pt and names of the format are refused; whatever is changed, what loads is right."""

from __future__ import annotations

import io
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given

from moba_train.errors import CheckpointError
from tests.mutations import Mutation, mutated, mutations
from tests.unit.train.hostile import FUZZ, SHARD, WEIGHT, Hostile, Malice, as_word, metadata_of, place
from tests.unit.train.toy import ToyEngine


def saved(value: object, *, old_format: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not old_format)
    return stream.getvalue()


def packed(content: bytes, **changed: bytes) -> bytes:
    """An archive of torch.save with compressed entries, and others in the place of some."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            last = entry.filename.partition("/")[2]
            new.writestr(entry.filename, changed.get(as_word(last).replace("/", "_"), old.read(entry)))
    return stream.getvalue()


COMMONS = {
    "code": (saved({"content": Malice()}), "exec"),
    "a name outside tensors": (saved({"content": Path("x")}), "pathlib"),
    "the old format": (saved({}, old_format=True), "not an archive"),
    "a bare pickle": (pickle.dumps({}), "not an archive"),
    "a bomb": (packed(saved({}), version=b"0" * (64 << 20)), "compressed"),
    "a foreign entry": (
        packed(saved({})).replace(b"byteorder", b"constants"),
        "archive holds",
    ),
    "bytes behind the archive": (saved({}) + b"x", "does not"),
    "a second archive behind the first": (saved({}) + saved({"content": Malice()}), "does not end|exec"),
    "no table": (saved([1]), "no table"),
    "a model that is a number": (saved({"model": 5}), ""),
    "nothing": (b"", "not an archive"),
}


@pytest.mark.parametrize(("content", "reason"), COMMONS.values(), ids=COMMONS.keys())
def test_hostile_common_values_are_refused(
    hostile: Hostile, content: bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # the user's, for another program
    hostile.write(common_pt=content)
    error = hostile.refusal()
    assert any(part in error.message() for part in reason.split("|")), error.message()
    assert list(tmp_path.iterdir()) == []


class Counting(ToyEngine):
    """Like a real engine, it also takes over values that are no tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.steps = int(state["optimizer"]["param_groups"][0]["step"])


@pytest.mark.parametrize("groups", [None, [], 5, [{}], [{"step": "x"}], [{"step": None}]], ids=str)
def test_values_that_an_engine_cannot_take_are_refused(hostile: Hostile, groups: object) -> None:
    strict = replace(hostile, engine=Counting)
    strict.write(common_pt=saved({"optimizer": {"param_groups": groups}}))
    assert "does not fit this model" in strict.refusal().what
    strict.write(common_pt=saved({"optimizer": {"param_groups": [{"step": 3}]}}))
    assert strict.load().step == 3


def with_weight(hostile: Hostile, content: bytes) -> None:
    """Put another archive where weight's piece was, behind the rest of the shard."""
    metadata = metadata_of(hostile)
    shard = hostile.files[SHARD]
    at = place(metadata, "weight")
    at.offset, at.length = len(shard), len(content)
    hostile.write(_metadata=pickle.dumps(metadata, protocol=4), **{as_word(SHARD): shard + content})


DOUBLES = saved(torch.tensor(WEIGHT, dtype=torch.float64))
PIECES = {
    "code": (saved(Malice()), "exec"),
    "the old format": (saved(torch.zeros(2, dtype=torch.float64), old_format=True), "not an archive"),
    "a compressed piece": (packed(DOUBLES), "compressed"),
    "a bomb": (packed(DOUBLES, data_0=b"\0" * (64 << 20)), "compressed"),
    "another shape": (saved(torch.zeros(1, dtype=torch.float64)), "8 bytes instead of 16"),
    "no tensor": (saved({"a": list(range(9))}), ""),
    "noise": (b"PK\x03\x04" + bytes(range(256)), "does not"),
}


@pytest.mark.parametrize(("content", "reason"), PIECES.values(), ids=PIECES.keys())
def test_a_hostile_piece_of_a_tensor_is_refused(hostile: Hostile, content: bytes, reason: str) -> None:
    with_weight(hostile, content)
    error = hostile.refusal()
    assert any(part in error.message() for part in reason.split("|")), error.message()


def test_a_piece_that_torch_saved_is_read(hostile: Hostile) -> None:
    with_weight(hostile, DOUBLES)
    assert hostile.load().step == 3


FORMATS = [
    *(b"{}", b"[]", b"5", b"null", b"[" * 100_000, b'{"sharded_backend": "zarr"}', b'{"sharded_backend": ["x"]}'),
    b'{"sharded_backend": "torch_dist", "common_backend": "../../x"}',
    b'{"sharded_backend": "torch_dist", "x": 1}',
]


@pytest.mark.parametrize("content", FORMATS, ids=range(len(FORMATS)))
def test_a_hostile_name_of_the_format_is_refused(hostile: Hostile, content: bytes) -> None:
    hostile.write(metadata_json=content)
    assert hostile.refusal().where.endswith("metadata.json")


@pytest.mark.parametrize("name", [".metadata", SHARD, "common.pt", "metadata.json"])
@FUZZ
@given(changes=mutations())
@example(changes=[])
def test_a_changed_file_whose_manifest_agrees_loads_or_is_refused(
    hostile: Hostile, name: str, changes: list[Mutation]
) -> None:
    hostile.write(**{as_word(name): mutated(hostile.files[name], changes)})
    try:
        # Whoever changes the manifest too may change a number: nothing vouches for numbers but the manifest.
        assert hostile.load(same_values=name != SHARD).step == 3
    except CheckpointError as error:
        assert str(hostile.path) in error.where
        assert changes
