"""Turn signals into a wish to stop, which the loop honours after the current step.

SIGTERM and SIGINT ask for a stop; asked for twice (more than a second apart, since a launcher and a terminal may both
deliver one and the same request) the process ends at once. SIGUSR1 only ever asks: batch systems send it ahead of the
time limit, possibly more than once.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ENDING = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Context manager that owns the handlers of SIGTERM, SIGINT and SIGUSR1 while it is open.

    Args:
        burst_s: repetitions within this time count as the same request.
    """

    def __init__(self, *, burst_s: float = 1.0) -> None:
        self._burst_s = burst_s
        self._first_seen_s: dict[int, float] = {}
        self._previous: dict[signal.Signals, Any] = {}
        self._name = ""

    @property
    def requested(self) -> str:
        """Name of the first signal that this process received, or "" for none."""
        return self._name

    def __enter__(self) -> StopSignals:
        for signum in ASKING:
            self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        first_s = self._first_seen_s.setdefault(signum, now_s)
        self._name = self._name or signal.Signals(signum).name
        if signum in ENDING and now_s - first_s > self._burst_s:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
