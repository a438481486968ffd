"""One job at a time writes to a run folder: `RUN/lock`, held by rank 0 for as long as the job runs.

Two things say that a lock is held:

flock      the kernel lets go of it when the process ends, however it ends. On some shared file systems it counts on one
           node alone, on others there is none; where it counts on all nodes, the server of the disk keeps it for a
           while (NFS: 90 s and more) after the node of its holder has died.
heartbeat  a thread refreshes the file's time every few seconds. A lock of another machine (another boot of its kernel)
           that has not been refreshed for a while is stale: its job has died.

The file stays when the job has ended, empty; a job that died leaves its name in it. Ages are measured by the clock of
the file system, so clocks of machines need not agree. Evaluations need no lock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from moba_train.errors import CheckpointError, UserError
from moba_train.train.manifest import read_small

LOCK = "lock"
BEAT_S = 10.0
"""Seconds between two signs of life."""
STALE_S = 60.0
"""A heartbeat that is older than this has stopped."""
LEASE_S = 240.0
"""A server has let go of the lock of a dead machine when its heartbeat has stood still for this long."""
_LOCK_BYTES = 4096
_NO_FLOCK = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS}


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        boot: identifier of the machine's kernel since it was started; processes that share it share flock.
        job: Slurm's job id, or "".
        token: random, one per job.
        has_flock: False = the file system has no flock, so the heartbeat alone counts.
    """

    host: str
    boot: str
    pid: int
    job: str
    token: str
    has_flock: bool = True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (Slurm job {self.job})" if self.job else "")


class _HeldError(Exception):
    """The lock may still be held; its age is not enough to tell."""


class RunLock:
    """The lock of one run folder, for rank 0.

    Args:
        run_dir: made if it is not there, and removed again if nothing but the lock has come into it.
        me: who asks for the lock.
        beat_s, stale_s, lease_s: see BEAT_S, STALE_S and LEASE_S.
        flock: `fcntl.flock` (tests pass one of a lesser file system).
    """

    def __init__(
        self,
        run_dir: Path,
        me: Holder,
        *,
        beat_s: float = BEAT_S,
        stale_s: float = STALE_S,
        lease_s: float = LEASE_S,
        flock: Callable[[int, int], None] = fcntl.flock,
    ) -> None:
        self._path = run_dir / LOCK
        self._me = me
        self._beat_s = beat_s
        self._stale_s = stale_s
        self._lease_s = lease_s
        self._flock = flock
        self._file = -1
        self._has_made_folder = False
        self._seen: tuple[Holder, int] | None = None
        self._closed = threading.Event()

    def attempt(self) -> tuple[bool, str]:
        """Try to take the lock. Returns (is it ours, a line for the log or "").

        False = call again in a second: the heartbeat of a job on another machine has to be watched.

        Raises:
            CheckpointError: another job holds it, or the folder cannot be written to.
        """
        try:
            while self._file < 0:
                self._open()
            before = _read(self._path)
            line = self._judge(before) if before is not None else ""
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json.dumps(asdict(self._me)).encode(), 0)
            os.fsync(self._file)
        except _HeldError as error:
            return False, str(error)
        except OSError as error:
            self._let_go()
            raise CheckpointError(
                "the run folder cannot be locked",
                where=str(self._path),
                got=str(error),
                fix="Check permissions and free space, or choose another --run-dir.",
            ) from error
        except CheckpointError:
            self._let_go()
            raise
        if not self._me.has_flock:
            line += "; " * bool(line) + "the file system has no flock: only the heartbeat keeps a second job away"
        threading.Thread(target=self._beat, name="heartbeat of the run lock", daemon=True).start()
        return True, line

    def check(self) -> None:
        """Raise CheckpointError unless the lock is still ours: a machine that stood still may have lost it."""
        holder = _read(self._path)
        if holder is None or holder.token != self._me.token:
            raise CheckpointError(
                "another job has taken over the run folder",
                where=str(self._path),
                got=f"held by {holder}" if holder is not None else "an empty lock",
                fix=f"Let one job write to a run folder. This one gave no sign of life for {self._stale_s:.0f} s.",
            )

    def release(self) -> None:
        """Give the lock up in good order."""
        if self._closed.is_set() or self._file < 0:
            return
        self._closed.set()
        with suppress(OSError, CheckpointError):  # a lock that is lost, or a disk that is gone: nothing is left to do
            self.check()
            os.ftruncate(self._file, 0)
            if self._has_made_folder and os.listdir(self._path.parent) == [LOCK]:
                self._path.unlink()
                self._path.parent.rmdir()
        self._let_go()

    def _open(self) -> None:
        """Open the file and take its flock. The file may be removed in between, by a job that ends."""
        if not self._path.parent.is_dir():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._has_made_folder = True
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        self._ask_kernel()
        if not (self._path.exists() and os.path.samefile(self._path, self._file)):
            self._let_go()

    def _ask_kernel(self) -> None:
        """Take the flock. CheckpointError when a living process has it."""
        try:
            self._flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_FLOCK:
                self._me = replace(self._me, has_flock=False)
            elif error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                self._hope_for_lease(_read(self._path))
            else:
                raise

    def _hope_for_lease(self, holder: Holder | None) -> None:
        """The flock is taken. _HeldError where that may be what a dead machine has left, else CheckpointError."""
        if holder is None or holder.boot == self._me.boot:
            raise self._refusal(holder)
        age_s = self._silence_s(holder)
        if age_s > self._lease_s:
            raise self._refusal(holder, f", which has given no sign of life for {age_s:.0f} s")
        self._let_go()  # the next attempt asks again
        raise _HeldError(
            f"the run folder is locked by {holder}, whose last sign of life was {max(0.0, age_s):.0f} s ago; waiting "
            "for another one, or for the file system to give the lock up"
        )

    def _judge(self, before: Holder) -> str:
        """The line that says that `before` is dead. _HeldError while it may live, CheckpointError when it does."""
        if before.boot == self._me.boot and before.has_flock and self._me.has_flock:
            return f"took over the run folder from {before}, which has died"
        age_s = self._silence_s(before)
        if age_s < self._stale_s:
            raise _HeldError(
                f"the run folder was held {max(0.0, age_s):.0f} s ago by {before}; waiting for {self._stale_s:.0f} s "
                "without a sign of life"
            )
        return f"took over the run folder from {before}, which has given no sign of life for {age_s:.0f} s"

    def _silence_s(self, holder: Holder) -> float:
        """Seconds since its last sign of life. CheckpointError if there was one since the last attempt."""
        beat_ns = self._path.stat().st_mtime_ns
        if self._seen is not None and self._seen != (holder, beat_ns):
            raise self._refusal(holder)
        self._seen = (holder, beat_ns)
        return (_folder_time_ns(self._path.parent) - beat_ns) / 1e9

    def _refusal(self, holder: Holder | None, since: str = "") -> CheckpointError:
        return CheckpointError(
            "another job is writing to the run folder",
            where=str(self._path),
            got=f"held by {holder or 'a process that has not said its name yet'}{since}",
            allowed="one job at a time",
            fix="Stop that job, or choose another --run-dir (--resume PATH reads this run from there).",
        )

    def _let_go(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _beat(self) -> None:
        """A sign of life every few seconds, until the lock is given up or another job has it."""
        while not self._closed.wait(self._beat_s):
            try:
                self.check()
                os.utime(self._path)
            except CheckpointError:
                return  # the next save finds out as well, and says so
            except OSError:
                continue  # a file system may be away for a while; if that lasts, the lock is lost, as it should be


@contextmanager
def run_lock(run_dir: Path, *, say: Callable[[str], None]) -> Iterator[tuple[Callable[[], None], tuple[str, ...]]]:
    """Hold the lock of a run folder; collective over all ranks.

    Args:
        say: prints a line at once, on rank 0, when there is something to wait for.

    Yields:
        (a check for rank 0 that raises CheckpointError if the lock is lost, lines for the log).

    Raises:
        CheckpointError: another job holds it; on every rank.
    """
    from moba_train.parallel import ranks  # brings torch, which `checkpoint prune` does without

    lock = RunLock(run_dir, _myself())
    notes: tuple[str, ...] = ()
    is_first = True
    while True:
        # a collective each second, so that ranks may wait for longer than a collective may take
        is_ours, line = ranks.from_rank_0(lock.attempt)
        if is_ours:
            notes = (line,) if line else ()
            break
        if is_first and ranks.rank() == 0:
            say(line)
        is_first = False
        time.sleep(1.0)
    try:
        yield lock.check, notes
    except UserError:  # after any other error a save may still be in flight, for as long as this process lives
        lock.release()
        raise
    lock.release()


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run folder, as a process of its own (`checkpoint prune`).

    Raises:
        CheckpointError: a job holds it, or may do so.
    """
    lock = RunLock(run_dir, _myself())
    is_ours, line = lock.attempt()
    if not is_ours:
        raise CheckpointError("a job may be writing to the run folder", where=str(run_dir / LOCK), got=line)
    try:
        yield
    finally:
        lock.release()


def _read(path: Path) -> Holder | None:
    """Who wrote their name into a lock file; None = nobody, or it cannot be read."""
    try:
        said = json.loads(read_small(path, _LOCK_BYTES))
        names = {name: str(said[name])[:200] for name in ("host", "boot", "job", "token")}
        return Holder(pid=int(said["pid"]), has_flock=bool(said["has_flock"]), **names)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _folder_time_ns(folder: Path) -> int:
    """What time it is by the clock of the file system that holds a folder."""
    probe = folder / f".{LOCK}.{os.getpid()}"
    try:
        with probe.open("wb") as stream:
            return os.fstat(stream.fileno()).st_mtime_ns
    finally:
        probe.unlink(missing_ok=True)


def _myself() -> Holder:
    job = os.environ.get("SLURM_JOB_ID", "")
    return Holder(socket.gethostname(), _boot(), os.getpid(), job, os.urandom(8).hex())


def _boot() -> str:
    """Identifier of the running kernel; containers of one machine share it, machines of one name do not."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
