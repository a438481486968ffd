"""One job at a time writes to a run folder."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from moba_train.errors import CheckpointError
from moba_train.train.run_lock import Holder, RunLock

ME = Holder(host="node1", boot="boot-a", pid=1, job="", token="one")
OTHER = Holder(host="node2", boot="boot-b", pid=2, job="77", token="two")
HOLD = """
import sys, time
from pathlib import Path
from moba_train.train.run_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
assert "torch" not in sys.modules
"""


def no_flock(descriptor: int, operation: int) -> None:
    raise OSError(errno.ENOTSUP, "Operation not supported")


def left_by(holder: Holder, run_dir: Path, *, age_s: float) -> Path:
    """A lock file whose last sign of life is `age_s` old."""
    path = run_dir / "lock"
    path.write_text(json.dumps(asdict(holder)))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_a_second_job_is_refused_and_told_who_holds_the_folder(tmp_path: Path) -> None:
    first = RunLock(tmp_path, replace(ME, pid=4711, job="12"))
    assert first.attempt() == (True, "")
    with pytest.raises(CheckpointError, match="another job is writing") as caught:
        RunLock(tmp_path, replace(ME, token="two")).attempt()
    assert caught.value.got == "held by process 4711 on node1 (Slurm job 12)"
    first.check()
    first.release()
    second = RunLock(tmp_path, OTHER)
    assert second.attempt() == (True, "")  # given up in good order: there is nothing to say
    second.release()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        with pytest.raises(CheckpointError) as caught:
            RunLock(tmp_path, replace(ME, boot=boot)).attempt()
        assert f"process {process.pid} on " in str(caught.value.got)
        process.send_signal(signal.SIGKILL)
    lock = RunLock(tmp_path, replace(ME, boot=boot))
    is_ours, line = lock.attempt()
    assert is_ours and line.startswith(f"took over the run folder from process {process.pid} on ")
    assert line.endswith("which has died")
    lock.release()


def test_the_lock_of_another_machine_counts_until_its_heartbeat_is_stale(tmp_path: Path) -> None:
    path = left_by(OTHER, tmp_path, age_s=20.0)
    lock = RunLock(tmp_path, ME)
    is_ours, line = lock.attempt()
    assert not is_ours
    assert line.startswith("the run folder was held 20 s ago by process 2 on node2 (Slurm job 77); waiting for 60 s")
    assert lock.attempt()[0] is False
    left_by(OTHER, tmp_path, age_s=61.0)
    stale = RunLock(tmp_path, replace(ME, token="three"), flock=lambda *_: None)
    is_ours, line = stale.attempt()
    assert is_ours and "has given no sign of life for 61 s" in line
    assert json.loads(path.read_text())["token"] == "three"
    stale.release()


def test_a_job_of_another_machine_that_shows_life_is_not_waited_for(tmp_path: Path) -> None:
    path = left_by(OTHER, tmp_path, age_s=20.0)
    lock = RunLock(tmp_path, ME)
    assert lock.attempt()[0] is False
    os.utime(path)
    with pytest.raises(CheckpointError, match="another job") as caught:
        lock.attempt()
    assert "node2" in str(caught.value.got) and path.read_text() == json.dumps(asdict(OTHER))


def taken(descriptor: int, operation: int) -> None:
    raise OSError(errno.EAGAIN, "Resource temporarily unavailable")


def test_a_lock_that_a_server_keeps_for_a_dead_machine_is_waited_for(tmp_path: Path) -> None:
    left_by(OTHER, tmp_path, age_s=100.0)
    kept = [taken, taken, lambda *_: None]
    lock = RunLock(tmp_path, ME, flock=lambda descriptor, operation: kept.pop(0)(descriptor, operation))
    for _ in range(2):
        is_ours, line = lock.attempt()
        assert not is_ours and "locked by process 2 on node2 (Slurm job 77), whose last sign of life was 100 s" in line
    is_ours, line = lock.attempt()
    assert is_ours and "has given no sign of life for 100 s" in line
    lock.release()


def test_a_lock_that_a_server_keeps_is_refused_when_its_holder_lives_or_after_a_while(tmp_path: Path) -> None:
    path = left_by(OTHER, tmp_path, age_s=5.0)
    lock = RunLock(tmp_path, ME, flock=taken)
    assert lock.attempt()[0] is False
    os.utime(path)
    with pytest.raises(CheckpointError, match="another job"):
        lock.attempt()
    left_by(OTHER, tmp_path, age_s=241.0)
    with pytest.raises(CheckpointError, match="another job") as caught:
        RunLock(tmp_path, ME, flock=taken).attempt()
    assert str(caught.value.got).endswith("(Slurm job 77), which has given no sign of life for 241 s")
    with pytest.raises(CheckpointError, match="another job"):  # this kernel knows its own processes
        RunLock(tmp_path, OTHER, flock=taken).attempt()


def test_where_there_is_no_flock_the_heartbeat_counts_alone(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, ME, beat_s=0.05, stale_s=0.5, flock=no_flock)
    is_ours, line = lock.attempt()
    assert is_ours and line == "the file system has no flock: only the heartbeat keeps a second job away"
    second = RunLock(tmp_path, replace(ME, token="two"), stale_s=0.5, flock=no_flock)
    assert second.attempt()[0] is False
    time.sleep(0.2)
    with pytest.raises(CheckpointError, match="another job"):
        second.attempt()
    lock.release()
    assert RunLock(tmp_path, OTHER, flock=no_flock).attempt()[0]


def test_a_job_that_stood_still_finds_out_that_its_lock_is_gone_and_leaves_it_alone(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, ME, beat_s=0.02, flock=no_flock)
    lock.attempt()
    path = left_by(OTHER, tmp_path, age_s=30.0)
    before = path.stat().st_mtime_ns
    with pytest.raises(CheckpointError, match="taken over") as caught:
        lock.check()
    assert caught.value.got == f"held by {OTHER}"
    time.sleep(0.1)
    lock.release()
    assert path.stat().st_mtime_ns == before and path.read_text() == json.dumps(asdict(OTHER))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"host": 1}', "x" * 5000, "\udcff"])
def test_a_lock_that_says_nothing_is_free_once_the_kernel_says_so(tmp_path: Path, content: str) -> None:
    (tmp_path / "lock").write_bytes(content.encode("utf-8", "surrogateescape"))
    lock = RunLock(tmp_path, ME)
    assert lock.attempt() == (True, "")
    lock.release()


def test_a_link_in_place_of_the_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("text")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(CheckpointError, match="cannot be locked"):
        RunLock(tmp_path, ME).attempt()
    assert (tmp_path / "precious").read_text() == "text"


def test_a_folder_that_was_made_for_the_lock_goes_with_it_unless_something_came_into_it(tmp_path: Path) -> None:
    for used in (False, True):
        lock = RunLock(tmp_path / "run", ME)
        assert lock.attempt() == (True, "")
        if used:
            (tmp_path / "run" / "config.toml").touch()
        lock.release()
        assert (tmp_path / "run").exists() is used
