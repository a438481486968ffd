"""A hostile manifest, state.json or config.toml is refused, or means the same."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moba_train.config.load import load_config
from moba_train.errors import CheckpointError, ConfigError
from moba_train.train.manifest import find_damage
from moba_train.train.resume import find_start
from tests.mutations import Mutation, mutated, mutations
from tests.unit.train.hostile import FUZZ, SHARD, Hostile, little_memory


def manifest(name: str = "x", num_bytes: str = "1", sha256: str = '"' + "0" * 64 + '"') -> bytes:
    return f'{{"files": {{{json.dumps(name)}: {{"bytes": {num_bytes}, "sha256": {sha256}}}}}}}'.encode()


MANIFESTS = {
    **{
        f"the name {name[:12]!r}": manifest(name)
        for name in ("../x", "/etc/passwd", "a/b", "a\\b", "..", ".", "", "a\0b", "x" * 5000, "\ud800", "a\nb")
    },
    **{
        f"{num_bytes[:9]} bytes": manifest(num_bytes=num_bytes)
        for num_bytes in ("-1", "1.5", '"1"', "true", "null", "1e999", "NaN", "[]", "9" * 5000)
    },
    **{
        f"the hash {sha256[:9]}": manifest(sha256=sha256)
        for sha256 in ("1", "null", '""', '"' + "g" * 64 + '"', '"' + "0" * 65 + '"')
    },
    "a file twice": b'{"files": {"x": {"bytes": 1, "sha256": "%s"}, "x": {"bytes": 1, "sha256": "%s"}}}'
    % (b"0" * 64, b"1" * 64),
    "files twice": manifest()[:-1] + b"," + manifest()[1:],
    "nested lists": b"[" * 200_000,
    "nested tables": b'{"files":' * 50_000,
    "a list": b"[]",
    "a number": b"5",
    "no files": b"{}",
    "a list of files": b'{"files": ["x"]}',
    "an entry that is a list": b'{"files": {"x": []}}',
    "nothing": b"",
    "no text": b"\xff\xfe\x00",
    "a pickle": pickle.dumps({"files": {}}),
}


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_a_hostile_manifest_is_refused(hostile: Hostile, content: bytes) -> None:
    hostile.write(manifest_json=content, reseal=False)
    with little_memory():
        assert find_damage(hostile.path).startswith("manifest.json ")
    assert "manifest.json " in str(hostile.refusal().got)


def test_a_manifest_of_a_gigabyte_is_not_read(hostile: Hostile) -> None:
    os.truncate(hostile.write(reseal=False) / "manifest.json", 1 << 30)
    assert "larger than" in str(hostile.refusal().got)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", ".metadata", "common.pt", SHARD])
@pytest.mark.parametrize("kind", ["link out of the folder", "pipe", "folder", "device"])
def test_what_is_no_regular_file_is_refused_unopened(hostile: Hostile, tmp_path: Path, name: str, kind: str) -> None:
    file = hostile.write() / name
    if kind == "link out of the folder":
        shutil.move(file, tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    else:
        file.unlink()
        make: dict[str, Callable[[], None]] = {
            "pipe": lambda: os.mkfifo(file),
            "folder": file.mkdir,
            "device": lambda: file.symlink_to("/dev/zero"),
        }
        make[kind]()
    assert name in hostile.refusal().message()


def test_a_file_that_the_manifest_leaves_out_is_not_read(hostile: Hostile) -> None:
    entries = json.loads((hostile.write() / "manifest.json").read_text())["files"]
    del entries[SHARD]
    (hostile.path / "manifest.json").write_text(json.dumps({"files": entries}))
    assert SHARD in str(hostile.refusal().got)


@settings(FUZZ, max_examples=300)
@given(changes=mutations())
@example(changes=[])
def test_a_changed_manifest_is_refused_or_means_the_same(hostile: Hostile, changes: list[Mutation]) -> None:
    content = mutated(hostile.files["manifest.json"], changes)
    hostile.write(manifest_json=content, reseal=False)
    damage = find_damage(hostile.path)
    assert damage or json.loads(content)["files"].items() <= json.loads(hostile.files["manifest.json"])["files"].items()


STATES: dict[str, object] = {
    **{
        f"{key} = {value!r:.20}": {key: value}
        for key in ("step", "stage_index", "step_in_stage", "tokens", "bad_steps")
        for value in (-1, "x", None, [], {}, 1.5, True, float("inf"), 10**400)
    },
    **{f"{key} = {value!r}": {key: value} for key in ("model", "stage_rows") for value in (5, None, [], "x")},
    **{f"{key} = {value!r}": {key: value} for key in ("tokenizer", "seed") for value in (None, [], {}, "x")},
    "another step than the folder's name": {"step": 4},
}


@pytest.mark.parametrize("changed", STATES.values(), ids=STATES.keys())
def test_a_hostile_state_is_refused(hostile: Hostile, changed: dict[str, object]) -> None:
    state = json.loads(hostile.files["state.json"]) | changed
    hostile.write(state_json=json.dumps(state).encode())
    assert "state.json" in hostile.refusal().message() or "tokenizer" in changed or "seed" in changed


@pytest.mark.parametrize("content", [b"", b"[]", b"5", b"{}", b"[" * 100_000, b"\xff", b'{"step": 3, "step": 3}'])
def test_a_state_that_is_no_table_is_refused(hostile: Hostile, content: bytes) -> None:
    hostile.write(state_json=content)
    assert "state.json" in hostile.refusal().message()
    with pytest.raises(CheckpointError, match=r"state\.json"):
        find_start(hostile.path.parent.parent, "auto")


def test_a_state_of_a_gigabyte_is_not_read(hostile: Hostile) -> None:
    os.truncate(hostile.write() / "state.json", 1 << 30)
    hostile.refusal()


@FUZZ
@given(changes=mutations())
def test_a_changed_state_is_read_or_refused(hostile: Hostile, changes: list[Mutation]) -> None:
    hostile.write(state_json=mutated(hostile.files["state.json"], changes))
    try:
        hostile.load()
    except CheckpointError as error:
        assert str(hostile.path) in error.where


TOMLS = [b"a = " + b"[" * 100_000, b"\xff", b"run = 5", b"run.seed = 1e999", b"stages = [[]]", b"a.b = 1", b"=", b"\0"]


@pytest.mark.parametrize("content", TOMLS, ids=range(len(TOMLS)))
def test_a_hostile_configuration_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.toml").write_bytes(content)
    with pytest.raises(ConfigError):
        load_config(tmp_path / "config.toml")


@FUZZ
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_as_a_configuration_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        load_config(path)
