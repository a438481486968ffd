"""Turn signals into a wish to stop, which the loop honours after the current step.

SIGTERM and SIGINT ask for a stop; asked for twice (more than a second apart, since a launcher and a terminal may both
deliver one and the same request) the process ends at once. It need not be the same signal: torchrun passes a first
ctrl-C on as SIGINT, and a second one as SIGTERM. SIGUSR1 only ever asks: batch systems send it ahead of the
time limit, possibly more than once.

Python runs a handler between two instructions of the main thread, and that may wait in a collective for minutes. So a
thread of its own hears every signal as it comes, through a pipe, and ends the process where the main thread does not.
Processes that are forked from this one would write to the same pipe; nothing here forks.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ENDING = (signal.SIGTERM, signal.SIGINT)
_MAIN_THREAD_S = 0.5
"""Seconds that the main thread gets to die of a second signal, as the shell expects it; then the thread ends it."""


class StopSignals:
    """Context manager that owns the handlers of SIGTERM, SIGINT and SIGUSR1 while it is open. For the main thread.

    Args:
        burst_s: repetitions within this time count as the same request.
        say: told at once, in the thread, what a first signal leads to: the step under way may take minutes, and who
            believes that ctrl-C went unheard asks again.
    """

    def __init__(self, *, burst_s: float = 1.0, say: Callable[[str], None] | None = None) -> None:
        self._burst_s = burst_s
        self._say = say
        self._first_s = math.inf
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_fd = -1
        self._name = ""
        self._ends_now = False

    @property
    def requested(self) -> str:
        """Name of the first signal that this process received, or "" for none."""
        return self._name

    def __enter__(self) -> StopSignals:
        self._heard, self._told = socket.socketpair()
        self._told.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        for signum in ASKING:
            self._previous[signum] = signal.signal(signum, self._handle)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._told.close()  # the thread reads the end, and ends
        self._thread.join()
        self._heard.close()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        """In the main thread, as soon as it gets to it."""
        self._name = self._name or signal.Signals(signum).name
        if self._ends_now:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def _listen(self) -> None:
        """In the thread: hear signals until the pipe is closed."""
        while heard := self._heard.recv(64):
            for signum in heard:
                self._hear(signum)
                self._tell(signum)

    def _tell(self, signum: int) -> None:
        if self._say is None or signum not in ASKING:
            return
        say, self._say = self._say, None
        told = (
            f"{signal.Signals(signum).name}: the run saves and stops after the step under way; a second SIGTERM or "
            "SIGINT ends it at once, without a save"
        )

        def tell() -> None:
            with suppress(OSError):  # a terminal that has gone
                say(told)

        # in a thread of its own: where nobody reads what is printed, the second signal must be heard all the same
        threading.Thread(target=tell, name="answer to a signal", daemon=True).start()

    def _hear(self, signum: int) -> None:
        if signum not in ENDING:
            return
        now_s = time.monotonic()
        self._first_s = min(self._first_s, now_s)
        if now_s - self._first_s > self._burst_s:
            self._ends_now = True
            signal.pthread_kill(threading.main_thread().ident or 0, signum)  # its handler finds `_ends_now`
            time.sleep(_MAIN_THREAD_S)
            os._exit(128 + signum)


@contextmanager
def interrupting() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 raise KeyboardInterrupt, as ctrl-C does: for work that may break off anywhere."""
    previous = {signum: signal.signal(signum, _interrupt) for signum in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(signal.Signals(signum).name)


__all__ = ["StopSignals", "interrupting"]
