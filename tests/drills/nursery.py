"""A process that has torch, Megatron and this project imported, and forks a victim for every job that it is sent.

    with Nursery() as nursery:
        ending = nursery.run(Job(run_dir, log))

It has one thread, so that a fork is safe; a victim starts its own. The two sides speak in lines of JSON.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.drills.victim import Job

ROOT = Path(__file__).parents[2]
PR_SET_PDEATHSIG = 1
LOG_BYTES = 1 << 20
"""What a victim may say. It goes into a pipe, not a file, since a drill may let no file grow."""


@dataclass(frozen=True)
class Ending:
    """How a victim ended.

    Attributes:
        code: exit code, or minus the number of the signal.
        log: its standard output and error.
    """

    code: int
    log: str

    @property
    def was_killed(self) -> bool:
        return self.code in (-signal.SIGKILL, -signal.SIGXFSZ)


class Nursery:
    """The test's side."""

    def __enter__(self) -> Nursery:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.drills.nursery"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._logs: dict[int, str] = {}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def start(self, job: Job) -> int:
        """Fork a victim; its process id."""
        pid = int(self._ask({"job": job.to_json()}))
        self._logs[pid] = job.log
        return pid

    def wait(self, pid: int, *, limit_s: float = 120.0) -> Ending:
        """Wait for a victim; one that takes longer than `limit_s` is killed, and the test fails."""
        code = int(self._ask({"wait": pid, "limit_s": limit_s}))
        log = Path(self._logs.pop(pid)).read_text(errors="replace")
        assert code != -signal.SIGALRM, f"still running after {limit_s} s:\n{log}"
        return Ending(code, log)

    def run(self, job: Job, *, limit_s: float = 120.0) -> Ending:
        """Fork a victim and wait for it."""
        return self.wait(self.start(job), limit_s=limit_s)

    def _ask(self, message: dict[str, Any]) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(message), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the nursery has died"
        return answer


def serve() -> None:
    """The nursery's side: fork and wait as told, until the test closes the pipe."""
    from tests.drills import victim

    import_module("tests.preload")

    logs: dict[int, tuple[int, str]] = {}
    for line in sys.stdin:
        message = json.loads(line)
        if "job" in message:
            job = victim.Job(**json.loads(message["job"]))
            reader, writer = os.pipe()
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, LOG_BYTES)
            pid = os.fork()
            if pid == 0:
                _live(job, writer)
            os.close(writer)
            logs[pid] = (reader, job.log)
            print(pid, flush=True)
        else:
            code = _ending(message["wait"], message["limit_s"])
            reader, path = logs.pop(message["wait"])
            os.set_blocking(reader, False)  # a thread of a victim's own may live on for a moment
            with open(reader, "rb") as pipe:
                Path(path).write_bytes(pipe.read() or b"")
            print(code, flush=True)


def _live(job: Job, log: int) -> None:
    """The life of a victim; it does not return."""
    from tests.drills import victim

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a test that fails leaves nothing running
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, target)
    code = 1
    try:
        code = victim.run(job)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # a victim that fails in another way than it should must say so in its log
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _ending(pid: int, limit_s: float) -> int:
    deadline_s = time.monotonic() + limit_s
    while time.monotonic() < deadline_s:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -signal.SIGALRM


if __name__ == "__main__":
    serve()
