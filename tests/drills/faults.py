"""What befalls a victim, from outside the code under test: it is told to Python's audit hooks and to `os`, not to us.

A point is one moment at which the process is about to change the disk below a folder: to open a file for writing, to
flush one, to rename, delete or make something. Points are counted over all threads. At a chosen one the process is
killed, or its files may grow no further (kill: in the middle of the write; error: a full disk), or the call fails.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PATHS = {
    "os.rename": (0, 1),
    "os.remove": (0,),
    "os.mkdir": (0,),
    "os.rmdir": (0,),
    "os.truncate": (0,),
    "os.link": (0, 1),
    "os.symlink": (1,),
}
"""Audit events that change the disk -> which of their arguments are paths."""


@dataclass
class Faults:
    """Counts the points of this process below `folder`, and does what was asked at one of them.

    Attributes:
        folder: where points count.
        trace: a file that gets one line per point; None = none.
        kill_at: the point (from 1) at which the process is killed; 0 = none.
        torn_at: from this point on no file grows beyond `torn_bytes`, and the process dies in the attempt.
        full_at: the same, but writing fails with "File too large".
        fail_at: this point fails with the error number `fail_errno`.
    """

    folder: str
    trace: str | None = None
    kill_at: int = 0
    torn_at: int = 0
    torn_bytes: int = 100
    full_at: int = 0
    fail_at: int = 0
    fail_errno: int = 0
    _count: int = 0
    _lock: Any = field(default_factory=threading.RLock)

    def install(self) -> None:
        """From now on points count."""
        self.folder = os.path.realpath(self.folder)
        self._trace = os.open(self.trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if self.trace else -1
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if self.torn_at else signal.SIG_IGN)
        sys.addaudithook(self._on_event)
        os.fsync = self._counted("fsync", os.fsync)
        os.fdatasync = self._counted("fsync", os.fdatasync)

    def _counted(self, name: str, through: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            self._point(name, _path_of(descriptor))
            through(descriptor)

        return call

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, int) and (flags or 0) & WRITING:  # by number: it is open already
                self._point("open", _path_of(path))
        elif event in PATHS:
            paths = [_path_of(arguments[i]) for i in PATHS[event]]
            folder = next((a for a in arguments[len(paths) :] if isinstance(a, int) and a > 2), None)
            if folder is not None and event in ("os.remove", "os.rmdir"):  # rmtree works relative to an open folder
                paths = [os.path.join(_path_of(folder), path) for path in paths]
            self._point(event.removeprefix("os."), " -> ".join(paths))

    def _point(self, what: str, path: str) -> None:
        first = os.path.realpath(path.split(" -> ")[0])
        if not first.startswith(self.folder):
            return
        with self._lock:
            self._count += 1
            if self._trace >= 0:
                os.write(self._trace, f"{what} {path}\n".encode())
            if self._count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if self._count in (self.torn_at, self.full_at):
                self._stop_growth()
            if self._count == self.fail_at:
                raise OSError(self.fail_errno, os.strerror(self.fail_errno), path)

    def _stop_growth(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.torn_bytes, resource.RLIM_INFINITY))


def _path_of(file: Any) -> str:
    return os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.fsdecode(file)


def read_trace(trace: Path, folder: Path) -> list[str]:
    """The points of a victim in order, as "what NAME", NAME below `folder`."""
    return [line.replace(f"{folder}/", "") for line in trace.read_text().splitlines()]
