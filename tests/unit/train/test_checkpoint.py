from __future__ import annotations

import errno
import json
import os
import pickle
import pkgutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moba_train.errors import CheckpointError
from moba_train.parallel.topology import Topology
from moba_train.train.checkpoint import CheckpointStore, list_checkpoints, load_checkpoint, set_aside_after
from moba_train.train.manifest import find_damage
from moba_train.train.progress import Progress
from moba_train.train.resume import find_start
from tests.unit.train.toy import STAGES, ToyEngine, identity


def at(step: int) -> Progress:
    return Progress(step=step, stage_index=0, step_in_stage=step, tokens=16 * step)


def a_store(run_dir: Path, keep_last: int = 2) -> CheckpointStore:
    return CheckpointStore(run_dir, identity(), "[run]\nseed = 7\n", STAGES, keep_last)


def saved(run_dir: Path, topology: Topology, step: int = 3) -> Path:
    engine = ToyEngine(topology)
    engine.weight = torch.tensor([1.5, -2.0], dtype=torch.float64)
    return a_store(run_dir).save(engine, replace(at(step), bad_steps=1), stage_end=False)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path, topology: Topology) -> None:
    path = saved(tmp_path, topology)
    engine = ToyEngine(topology)
    progress = load_checkpoint(path, engine, identity())
    assert progress == Progress(step=3, stage_index=0, step_in_stage=3, tokens=48, bad_steps=1)
    assert engine.weight.tolist() == [1.5, -2.0]


def test_a_checkpoint_folder_is_complete_and_named(tmp_path: Path, topology: Topology) -> None:
    path = saved(tmp_path, topology)
    assert path == tmp_path / "checkpoints" / "step_00000003"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000003\n"
    assert (path / "config.toml").read_text() == "[run]\nseed = 7\n"
    state = json.loads((path / "state.json").read_text())
    assert state["mesh"] == {"tp": 1, "cp": 1, "pp": 1, "dp": 1} and state["stage_end"] is False
    listed = set(json.loads((path / "manifest.json").read_text())["files"])
    assert listed == {file.name for file in path.iterdir()} - {"manifest.json"}
    assert {"state.json", "config.toml", ".metadata", "common.pt", "__0_0.distcp"} <= listed


def test_a_small_save_takes_well_under_a_second(tmp_path: Path, topology: Topology) -> None:
    saved(tmp_path / "first", topology)  # the first one imports
    started = time.process_time()
    saved(tmp_path / "second", topology)
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize("name", ["__0_0.distcp", "common.pt", ".metadata", "state.json", "config.toml"])
@pytest.mark.parametrize("damage", ["missing", "cut", "altered"])
def test_a_damaged_file_is_named(tmp_path: Path, topology: Topology, name: str, damage: str) -> None:
    file = saved(tmp_path, topology) / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-1])
    else:
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert name in find_damage(file.parent)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(file.parent, ToyEngine(topology), identity())
    assert str(file.parent) in caught.value.where and caught.value.fix


GOOD = {"bytes": 1, "sha256": "a" * 64}


@pytest.mark.parametrize(
    "content",
    [
        *(None, "", "[]", '{"files": {}}', '{"files": []}', "[" * 100_000, "x" * ((1 << 24) + 1)),
        *(json.dumps({"files": {name: GOOD}}) for name in ("../x", "..", "", "a/b", "/x")),
        *(json.dumps({"files": {"x": GOOD | {"bytes": size}}}) for size in (-1, float("inf"), "1", True, None)),
        *(json.dumps({"files": {"x": entry}}) for entry in (1, [], {"bytes": 1}, GOOD | {"sha256": "ab"})),
    ],
)
def test_a_manifest_that_cannot_be_used_is_damage(tmp_path: Path, topology: Topology, content: str | None) -> None:
    manifest = saved(tmp_path, topology) / "manifest.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    assert "manifest.json" in find_damage(manifest.parent)


def test_ranks_share_the_hashing(tmp_path: Path, topology: Topology) -> None:
    path = saved(tmp_path, topology)
    file = path / "config.toml"
    file.write_bytes(file.read_bytes().replace(b"7", b"8"))
    found = [find_damage(path, part=part, parts=3) for part in range(3)]
    assert sorted(map(bool, found)) == [False, False, True]


def test_another_models_checkpoint_is_refused_by_field(tmp_path: Path, topology: Topology) -> None:
    path = saved(tmp_path, topology)
    other = identity(model=identity().model | {"num_layers": 4})
    with pytest.raises(CheckpointError, match="another model") as caught:
        load_checkpoint(path, ToyEngine(topology), other)
    assert caught.value.got == "model.num_layers = 2 in the checkpoint"
    assert caught.value.allowed == "model.num_layers = 4 in this run"


def test_another_vocabulary_is_refused(tmp_path: Path, topology: Topology) -> None:
    path = saved(tmp_path, topology)
    with pytest.raises(CheckpointError, match="another vocabulary") as caught:
        load_checkpoint(path, ToyEngine(topology), identity(tokenizer="cd" * 32))
    assert "data.tokenizer" in caught.value.fix


def test_another_seed_is_refused_because_rows_would_repeat(tmp_path: Path, topology: Topology) -> None:
    path = saved(tmp_path, topology)
    with pytest.raises(CheckpointError, match=r"run\.seed") as caught:
        load_checkpoint(path, ToyEngine(topology), identity(seed=8))
    assert caught.value.allowed == "run.seed = 7"


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path, topology: Topology) -> None:
    path = saved(tmp_path, topology)
    engine = ToyEngine(topology)
    engine.weight = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(CheckpointError, match="does not fit this model") as caught:
        load_checkpoint(path, engine, identity())
    assert "weight" in str(caught.value.got)


class Malice:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("import pathlib; pathlib.Path('pwned').touch()",)


def reseal(path: Path) -> None:
    """Make the manifest agree with the files, as an attacker would."""
    from moba_train.train.manifest import seal_files, write_manifest

    write_manifest(path, seal_files(file for file in path.iterdir() if file.name != "manifest.json"))


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_a_checkpoint_cannot_run_code(
    tmp_path: Path, topology: Topology, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, topology)
    monkeypatch.chdir(tmp_path)
    if name == ".metadata":
        (path / name).write_bytes(pickle.dumps(Malice()))
    else:
        torch.save({"content": Malice()}, path / name)
    reseal(path)
    with pytest.raises(CheckpointError):
        load_checkpoint(path, ToyEngine(topology), identity())
    assert not (tmp_path / "pwned").exists()


def test_only_the_newest_and_the_ends_of_stages_are_kept(tmp_path: Path, topology: Topology) -> None:
    store, engine = a_store(tmp_path, keep_last=2), ToyEngine(topology)
    for step in range(1, 7):
        store.save(engine, at(step), stage_end=step == 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002", "step_00000005", "step_00000006"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()) == [
        path.name for path in list_checkpoints(tmp_path)
    ]


def test_a_disk_that_refuses_leaves_the_previous_checkpoint(
    tmp_path: Path, topology: Topology, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    saved(tmp_path, topology)
    with monkeypatch.context() as patch:
        patch.setattr("moba_train.train.checkpoint.seal_files", full)
        with pytest.raises(CheckpointError, match="could not be written") as caught:
            a_store(tmp_path).save(ToyEngine(topology), at(4), stage_end=False)
    assert str(caught.value.got) == "rank 0: [Errno 28] No space left on device"
    assert "moba-train (rank 0): ERROR: step_00000004 was not saved" in capfd.readouterr().err
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000003"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000003\n"
    a_store(tmp_path).save(ToyEngine(topology), at(4), stage_end=False)
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


def test_nothing_is_deleted_before_the_pointer_names_the_new_checkpoint(
    tmp_path: Path, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    pointed_to = []

    def note(path: Path) -> None:
        pointed_to.append((path.name, (tmp_path / "checkpoints" / "latest").read_text()))

    monkeypatch.setattr("moba_train.train.checkpoint.delete_checkpoint", note)
    for step in (1, 2):
        a_store(tmp_path, keep_last=1).save(ToyEngine(topology), at(step), stage_end=False)
    assert pointed_to == [("step_00000001", "step_00000002\n")]


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_only_regular_files_belong_to_a_checkpoint(tmp_path: Path, topology: Topology, kind: str) -> None:
    file = saved(tmp_path, topology) / "config.toml"
    content = file.read_bytes()
    file.unlink()
    if kind == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        file.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.mkdir()
    assert find_damage(file.parent) == "config.toml is no regular file"


def test_the_same_step_may_be_saved_again(tmp_path: Path, topology: Topology) -> None:
    saved(tmp_path, topology)
    engine = ToyEngine(topology)
    engine.weight = torch.tensor([9.0, 9.0], dtype=torch.float64)
    path = a_store(tmp_path).save(engine, at(3), stage_end=False)
    other = ToyEngine(topology)
    load_checkpoint(path, other, identity())
    assert other.weight.tolist() == [9.0, 9.0]
    assert not list((tmp_path / "checkpoints").glob("*.old"))


def test_a_branch_that_is_left_is_set_aside_and_not_deleted(tmp_path: Path, topology: Topology) -> None:
    store = a_store(tmp_path, keep_last=9)
    for step in (1, 2, 3):
        store.save(ToyEngine(topology), at(step), stage_end=False)
    assert set_aside_after(tmp_path, 1) == ["step_00000002", "step_00000003"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001"]
    assert find_damage(tmp_path / "checkpoints" / "step_00000003.abandoned") == ""
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000001\n"


def test_ranks_that_write_to_different_disks_are_found_out(
    tmp_path: Path, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = {"__1_0.distcp": {"bytes": 1, "sha256": "00"}}
    monkeypatch.setattr(
        "moba_train.parallel.ranks.gather_all", lambda value, group: [value] + [elsewhere] * isinstance(value, dict)
    )
    with pytest.raises(CheckpointError, match="not all ranks see the same run folder") as caught:
        saved(tmp_path, topology)
    assert "__1_0.distcp" in str(caught.value.got)
    assert list_checkpoints(tmp_path) == []


class Killed(Exception):
    """Stands for the end of the process."""


POINTS = (
    *("checkpoint.write_durably", "checkpoint.seal_files", "checkpoint.write_manifest", "checkpoint.os.replace"),
    *("checkpoint.fsync_path", "checkpoint.write_latest", "manifest.os.replace", "manifest.os.fsync"),
    *("run_folder.os.replace", "run_folder.shutil.rmtree", "run_folder.fsync_path"),
)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("call", [1, 2])
def test_a_process_killed_at_any_point_of_a_save_leaves_an_intact_checkpoint(
    tmp_path: Path, topology: Topology, monkeypatch: pytest.MonkeyPatch, point: str, call: int
) -> None:
    engine = ToyEngine(topology)
    for step in (1, 2):
        a_store(tmp_path, keep_last=2).save(engine, at(step), stage_end=False)
    calls = 0

    def dies(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return original(*args, **kwargs)

    target = f"moba_train.train.{point}"
    original = pkgutil.resolve_name(target)
    with monkeypatch.context() as patch:
        patch.setattr(target, dies)
        try:
            a_store(tmp_path, keep_last=2).save(engine, at(3), stage_end=False)
        except Killed:
            pass
        else:
            assert calls < call  # this point is passed less often than that
    found = find_start(tmp_path, "auto")
    assert found.path is not None and found.path.name in ("step_00000002", "step_00000003")
    assert load_checkpoint(found.path, ToyEngine(topology), identity()).step in (2, 3)
    a_store(tmp_path, keep_last=2).save(engine, at(4), stage_end=False)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.suffix] == []  # leftovers are cleared
