"""Checkpoints that were damaged after they were written: the newest whole one counts; it is said what was skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.drills.runs import Drill

NEWEST, OLDER = "step_00000004", "step_00000002"


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def shortened(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def emptied(file: Path) -> None:
    os.truncate(file, 0)


def missing(file: Path) -> None:
    file.unlink()


CASES = [(flipped, name) for name in ("__0_0.distcp", "common.pt", ".metadata", "state.json", "manifest.json")]
CASES += [(shortened, "__0_0.distcp"), (emptied, ".metadata"), (missing, "__0_0.distcp"), (missing, "manifest.json")]


@pytest.mark.parametrize(("damage", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_damaged_file_of_the_newest_checkpoint_costs_the_work_since_the_one_before(
    drill: Drill, damage: Callable[[Path], None], name: str
) -> None:
    damage(drill.checkpoints / NEWEST / name)
    log = drill.goes_on()
    assert f"skipped {NEWEST}: " in log and f"resuming from {drill.checkpoints}/{OLDER}\n" in log
    assert name in next(line for line in log.splitlines() if line.startswith("skipped"))


POINTERS: dict[str, Callable[[Path], object]] = {
    "names nothing": lambda path: path.write_text("step_00000099\n"),
    "names what was damaged": lambda path: path.write_text(OLDER + "\n"),
    "leads out of the folder": lambda path: path.write_text("../../../etc\n"),
    "is empty": lambda path: path.write_text(""),
    "is no text": lambda path: path.write_bytes(b"\xff\x00"),
    "is gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("change", POINTERS.values(), ids=POINTERS.keys())
def test_a_pointer_that_is_wrong_changes_nothing(drill: Drill, change: Callable[[Path], object]) -> None:
    change(drill.checkpoints / "latest")
    drill.goes_on()


def test_a_run_whose_checkpoints_are_all_damaged_refuses_and_says_why(drill: Drill) -> None:
    for name in (NEWEST, OLDER):
        flipped(drill.checkpoints / name / "__0_0.distcp")
    before = sorted(path.relative_to(drill.run_dir) for path in drill.run_dir.rglob("*"))
    ending = drill.go()
    assert ending.code == 2 and "no checkpoint of the run is intact" in ending.log
    for name in (NEWEST, OLDER):
        assert f"{name}: __0_0.distcp has the right size but another SHA-256" in ending.log
    assert [path for path in before if not (drill.run_dir / path).exists()] == []
    assert len((drill.run_dir / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("left", ["nothing", "a checkpoint that is being deleted", "one that was set aside"])
def test_a_run_that_had_checkpoints_never_starts_silently_from_zero(drill: Drill, left: str) -> None:
    shutil.rmtree(drill.checkpoints / OLDER)
    if left == "nothing":
        shutil.rmtree(drill.checkpoints / NEWEST)
    else:
        suffix = ".old" if "deleted" in left else ".abandoned"
        aside = (drill.checkpoints / NEWEST).rename(drill.checkpoints / (NEWEST + suffix))
        if suffix == ".old":
            (aside / "__0_0.distcp").unlink()
    ending = drill.go()
    assert ending.code == 2, ending.log
    assert NEWEST in ending.log and "fix:" in ending.log
    assert len((drill.run_dir / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_whole_checkpoint_that_was_about_to_be_replaced_gets_its_name_back(drill: Drill) -> None:
    shutil.rmtree(drill.checkpoints / OLDER)
    (drill.checkpoints / NEWEST).rename(drill.checkpoints / (NEWEST + ".old"))
    ending = drill.go()
    assert ending.code == 0 and f"restored {NEWEST}: it was being replaced by one of the same step" in ending.log
    drill.is_undisturbed()


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again_and_says_so(drill: Drill) -> None:
    drill.begin(half=False)
    number = 1 + drill.points().index("fsync step_00000002.tmp/manifest.json")
    drill.begin("killed", half=False)
    assert drill.go(fault={"kill_at": number}).was_killed
    log = drill.goes_on(keep_last=2)
    assert "starting from nothing: no checkpoint in" in log
    assert "skipped step_00000002.tmp: its save was cut short" in log
