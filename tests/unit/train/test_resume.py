from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from moba_train.errors import CheckpointError
from moba_train.parallel.topology import Topology
from moba_train.train.checkpoint import CheckpointStore, list_checkpoints
from moba_train.train.progress import Progress
from moba_train.train.resume import find_start, newest_step, resolve_checkpoint
from tests.unit.train.toy import STAGES, ToyEngine, ToyRun, identity


@pytest.fixture
def run_dir(tmp_path: Path, topology: Topology) -> Path:
    """A run with checkpoints after 2, 4 and 6 steps."""
    for step in (2, 4, 6):
        store = CheckpointStore(tmp_path / "run", identity(), "", STAGES, keep_last=9)
        store.save(ToyEngine(topology), Progress(step, 0, step, 16 * step), stage_end=False)
    return tmp_path / "run"


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def test_auto_takes_the_newest(run_dir: Path) -> None:
    assert find_start(run_dir, "auto").path == checkpoint(run_dir, 6)


def test_auto_skips_damaged_checkpoints_and_says_why(run_dir: Path) -> None:
    (checkpoint(run_dir, 6) / "__0_0.distcp").unlink()
    (checkpoint(run_dir, 4) / "state.json").write_text("{}")
    start = find_start(run_dir, "auto")
    assert start.path == checkpoint(run_dir, 2)
    assert start.notes[0] == "skipped step_00000006: __0_0.distcp is missing"
    assert start.notes[1].startswith("skipped step_00000004: state.json has 2 bytes instead of")


def test_auto_starts_from_nothing_only_where_there_is_nothing(tmp_path: Path, run_dir: Path) -> None:
    assert find_start(tmp_path / "new", "auto").path is None
    for step in (2, 4, 6):
        (checkpoint(run_dir, step) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint of the run is intact") as caught:
        find_start(run_dir, "auto")
    assert str(caught.value.got).count("manifest.json is missing") == 3


def test_a_half_written_checkpoint_is_invisible(run_dir: Path) -> None:
    shutil.copytree(checkpoint(run_dir, 6), run_dir / "checkpoints" / "step_00000008.tmp")
    assert find_start(run_dir, "auto").path == checkpoint(run_dir, 6)


def test_what_was_cut_short_and_a_pointer_to_nothing_are_told_of(tmp_path: Path, run_dir: Path) -> None:
    (run_dir / "checkpoints" / "step_00000008.tmp").mkdir()
    (run_dir / "checkpoints" / "latest").write_text("step_00000009\n")
    start = find_start(run_dir, "auto")
    assert start.path == checkpoint(run_dir, 6)
    assert start.notes[0] == "skipped step_00000008.tmp: its save was cut short"
    assert start.notes[1].startswith("checkpoints/latest names 'step_00000009', which is not there")
    (tmp_path / "killed" / "checkpoints" / "step_00000002.tmp").mkdir(parents=True)
    killed = find_start(tmp_path / "killed", "auto")
    assert killed.path is None and killed.notes[0] == "skipped step_00000002.tmp: its save was cut short"
    assert killed.notes[1].startswith("starting from nothing: no checkpoint in")


def test_auto_does_not_start_over_where_checkpoints_were_set_aside(run_dir: Path) -> None:
    for step in (2, 4, 6):
        checkpoint(run_dir, step).rename(run_dir / "checkpoints" / f"step_{step:08d}.abandoned")
    with pytest.raises(CheckpointError, match="set aside") as caught:
        find_start(run_dir, "auto")
    named = run_dir / "checkpoints" / "step_00000006.abandoned"
    assert f"--resume {named}" in caught.value.fix
    assert find_start(run_dir, str(named)).path == named


def test_the_position_is_known_before_the_files_are_compared(run_dir: Path, tmp_path: Path) -> None:
    (checkpoint(run_dir, 6) / "state.json").unlink()
    for path, step in (("auto", 4), ("never", 0), (str(checkpoint(run_dir, 2)), 2), (str(run_dir / "checkpoints"), 4)):
        assert newest_step(run_dir, path) == step
    assert newest_step(tmp_path / "none", "auto") == newest_step(run_dir, "/no/such/path") == 0


def test_never_refuses_a_folder_that_holds_a_run(tmp_path: Path, run_dir: Path) -> None:
    assert find_start(tmp_path / "new", "never").path is None
    with pytest.raises(CheckpointError, match="already holds a run") as caught:
        find_start(run_dir, "never")
    assert "--resume auto" in caught.value.fix
    (tmp_path / "unsaved").mkdir()
    (tmp_path / "unsaved" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(CheckpointError, match="already holds a run"):
        find_start(tmp_path / "unsaved", "never")


def test_a_path_may_be_a_run_its_checkpoints_or_one_of_them(run_dir: Path, tmp_path: Path) -> None:
    for path in (run_dir, run_dir / "checkpoints"):
        assert find_start(tmp_path / "other", str(path)).path == checkpoint(run_dir, 6)
        assert resolve_checkpoint(path).path == checkpoint(run_dir, 6)
    assert find_start(tmp_path / "other", str(checkpoint(run_dir, 2))).path == checkpoint(run_dir, 2)


def test_a_path_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        find_start(tmp_path, str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint") as caught:
        find_start(tmp_path, str(tmp_path / "empty"))
    assert caught.value.got == "an empty folder"


def test_a_named_checkpoint_must_be_intact(run_dir: Path) -> None:
    (checkpoint(run_dir, 4) / "common.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged") as caught:
        find_start(run_dir, str(checkpoint(run_dir, 4)))
    assert "common.pt has 0 bytes" in str(caught.value.got)


def test_going_back_to_an_older_checkpoint_sets_the_newer_ones_aside(tmp_path: Path, topology: Topology) -> None:
    ToyRun(tmp_path, topology, keep_last=9).go()
    back = ToyRun(tmp_path, topology, resume=str(checkpoint(tmp_path, 2)), stop_after_steps=1, keep_last=9)
    back.go()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]
    assert any("set aside step_00000007.abandoned" in note for note in back.notes)
    again = ToyRun(tmp_path, topology)
    again.go()
    assert again.asked()[0] == (0, 6)


def test_a_change_within_a_stage_is_told_at_the_start_and_stays_what_it_was_once_the_stage_is_over(
    tmp_path: Path, topology: Topology
) -> None:
    ToyRun(tmp_path, topology, stop_after_steps=2).go()
    full = (replace(STAGES[0], attention="full"), STAGES[1])
    run = ToyRun(tmp_path, topology, stages=full)
    run.go()
    assert "stage 'short' changes from step 3: attention 'moba' -> 'full'" in run.notes
    again = ToyRun(tmp_path, topology, stages=full)
    again.go()
    assert len(again.notes) == 1, "the checkpoint is where it comes from"
    with pytest.raises(CheckpointError, match="changes stages that are over: 'short'"):
        ToyRun(tmp_path, topology).go()
