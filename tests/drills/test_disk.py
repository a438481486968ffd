"""Disks that are full, read-only or broken: an error in the log and the exit code; the checkpoint before is whole."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.drills.runs import Drill

BEFORE = ["step_00000002", "step_00000004"]


def refuses(drill: Drill, reason: str, **options: object) -> str:
    """A run that cannot save: code 2, and a message with the reason and the checkpoint. Returns the log."""
    ending = drill.go(stop_after_steps=2, **options)
    assert ending.code == 2, ending.log
    assert reason in ending.log and "step_00000006" in ending.log
    assert "Traceback" not in ending.log
    assert drill.whole() == BEFORE and (drill.checkpoints / "latest").read_text() == "step_00000004\n"
    return ending.log


@contextmanager
def mounted(*words: str, at: Path) -> Iterator[bool]:
    """Mount a file system; False where this process may not."""
    done = subprocess.run(["mount", *words, str(at)], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"mount {' '.join(words)} is not permitted here: {done.stderr.strip()}")
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", str(at)], check=True)


def test_a_disk_that_fills_up_at_any_file_ends_the_run_with_an_error(drill: Drill) -> None:
    moments = drill.points(stop_after_steps=2)
    for number, moment in enumerate(moments, start=1):
        large = moment.endswith((".distcp", "common.pt", ".metadata.tmp", "state.json", "manifest.json"))
        if moment.startswith("open ") and large:
            drill.begin(f"full_at_{number}")
            log = refuses(drill, os.strerror(errno.EFBIG), fault={"full_at": number})
            assert "ERROR: step_00000006 was not saved" in log
            drill.goes_on()


def test_a_small_file_system_that_is_full_ends_the_run_with_an_error(drill: Drill) -> None:
    drill.begin("small", half=False)
    drill.run_dir.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=128k", "tmpfs", at=drill.run_dir) as is_small:
        subprocess.run(["cp", "-r", f"{drill.half}/.", str(drill.run_dir)], check=True)
        filler = drill.run_dir / "filler"
        if is_small:
            free = os.statvfs(drill.run_dir)
            filler.write_bytes(b"\0" * (free.f_bavail * free.f_frsize - 4 * 4096))
        reason = errno.ENOSPC if is_small else errno.EFBIG
        log = refuses(drill, os.strerror(reason), fault={} if is_small else {"full_at": 1})
        assert "ERROR: step_00000006 was not saved" in log
        filler.unlink(missing_ok=True)
        drill.goes_on()


def test_a_read_only_file_system_ends_the_run_with_an_error(drill: Drill) -> None:
    with mounted("--bind", str(drill.checkpoints), at=drill.checkpoints) as is_bound:
        if is_bound:
            subprocess.run(["mount", "-o", "remount,ro,bind", str(drill.checkpoints)], check=True)
        fault = {} if is_bound else {"fail_at": 1, "fail_errno": errno.EROFS}
        refuses(drill, os.strerror(errno.EROFS), fault=fault)
    drill.goes_on()


def test_a_read_only_run_folder_is_refused_at_once(drill: Drill) -> None:
    with mounted("--bind", str(drill.run_dir), at=drill.run_dir) as is_bound:
        if is_bound:
            subprocess.run(["mount", "-o", "remount,ro,bind", str(drill.run_dir)], check=True)
        fault = {} if is_bound else {"folder": str(drill.run_dir), "fail_at": 1, "fail_errno": errno.EROFS}
        ending = drill.go(fault=fault)
        assert ending.code == 2 and os.strerror(errno.EROFS) in ending.log and "Traceback" not in ending.log
    drill.goes_on()


def fail_at(drill: Drill, number: int, moments: list[str]) -> None:
    """Let one call fail: an error of the save, or, once it has begun to delete, a warning."""
    moment = moments[number - 1]
    drill.begin(f"failed_at_{number}")
    ending = drill.go(stop_after_steps=2, fault={"fail_at": number, "fail_errno": errno.EIO})
    is_pruning = number > moments.index("rename step_00000002 -> step_00000002.old")
    assert ending.code == (0 if is_pruning else 2), f"{moment}: {ending.log}"
    assert os.strerror(errno.EIO) in ending.log and "Traceback" not in ending.log, f"{moment}: {ending.log}"
    assert ("WARNING: " if is_pruning else "ERROR: step_00000006 was not saved") in ending.log
    assert drill.whole()[-1] >= BEFORE[-1], moment
    drill.goes_on()


REPRESENTATIVES = (
    *("mkdir step_00000006.tmp", "fsync step_00000006.tmp/__0_0.distcp", "fsync step_00000006.tmp"),
    *("rename step_00000006.tmp -> step_00000006", "fsync latest.tmp", "rename latest.tmp -> latest"),
    *("rename step_00000002 -> step_00000002.old", "remove step_00000002.old/manifest.json"),
)


def test_a_call_that_the_disk_refuses_is_an_error_and_in_pruning_a_warning(drill: Drill) -> None:
    moments = drill.points(stop_after_steps=2)
    for moment in REPRESENTATIVES:
        fail_at(drill, 1 + moments.index(moment), moments)


@pytest.mark.slow
def test_any_call_that_the_disk_refuses_is_an_error_and_in_pruning_a_warning(drill: Drill) -> None:
    moments = drill.points(stop_after_steps=2)
    for number, moment in enumerate(moments, start=1):
        if not (moment.startswith("mkdir") and moment in moments[: number - 1]):  # to make what is there may fail
            fail_at(drill, number, moments)
