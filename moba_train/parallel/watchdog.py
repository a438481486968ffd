"""A limit for each part of the run: the start, a step, a save. When one is over, the rank hangs, and the run ends.

    with Watchdog(watch, config.watchdog, expire=...):      # the loop says where it is: watch.begin(..., limit="step")
        ...

A thread looks at the watch every few seconds and counts. It costs the main thread nothing, and works as long as Python
runs. Where Python itself is held, as by a page of a mapped file that a dead file system does not deliver, no thread of
Python can help: for this the thread winds up faulthandler's timer again and again, which needs no interpreter. If
nobody winds it up for the length of the limit, it prints all stacks and ends the process with code 1.

This is not `engine.timeout_s`: that one bounds how long a rank waits for another, in collectives, and is usually the
shorter. The watchdog sees what no collective sees: one rank alone, all ranks stuck alike, and the thread of a save.

Time in which the process was stopped (SIGSTOP, a debugger that is attached) counts little: a gap counts as three looks.
The timer knows nothing of this; a stop longer than the limit may end the process when it goes on.
"""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moba_train.config.schema import WatchdogConfig

from .watch import Stretch, Watch

NO_LIMITS = WatchdogConfig(start_s=0.0, step_s=0.0, save_s=0.0)
_MOST_POLL_S = 5.0
_MOST_LOOKS = 3
_STDERR = 2


class Watchdog:
    """The thread, open as a context.

    Args:
        watch: what this rank is at.
        limits: seconds, 0 = none.
        expire: called once, from the thread, with what is over; it ends the process.
        age_s: how long the start has taken already.
        grace_s: how much longer than a limit Python may be held.
    """

    def __init__(
        self,
        watch: Watch,
        limits: WatchdogConfig,
        *,
        expire: Callable[[str], object],
        age_s: float = 0.0,
        grace_s: float = 10.0,
    ) -> None:
        self._watch = watch
        self._limits = {"start": limits.start_s, "step": limits.step_s, "save": limits.save_s}
        self._expire = expire
        self._grace_s = grace_s
        self._ages: dict[Stretch, float] = {watch.stretches()[0]: age_s}
        shortest_s = min((limit_s for limit_s in self._limits.values() if limit_s > 0), default=0.0)
        self._poll_s = min(_MOST_POLL_S, shortest_s / 10)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._poll_s > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._poll_s > 0:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def look(self, passed_s: float) -> str:
        """Count `passed_s` more for everything under a limit; what is over, or "". A new stretch begins with 0."""
        self._ages = {s: self._ages.get(s, -passed_s) + passed_s for s in self._watch.stretches()}
        for stretch, age_s in sorted(self._ages.items(), key=lambda item: -item[1]):  # the oldest is the cause
            limit_s = self._limits[stretch.limit]
            if 0 < limit_s < age_s:
                return f"watchdog.{stretch.limit}_s = {limit_s:g} s is over since it began with {stretch.name}"
        return ""

    def _run(self) -> None:
        last_s = time.monotonic()
        while not self._closed.wait(self._poll_s):
            now_s = time.monotonic()
            over = self.look(min(now_s - last_s, _MOST_LOOKS * self._poll_s))
            last_s = now_s
            if over:
                faulthandler.cancel_dump_traceback_later()  # the story takes some seconds
                self._expire(over)
                return
            limit_s = self._limits[self._watch.stretches()[0].limit]
            wind_up(limit_s + self._grace_s if limit_s > 0 else 0.0)


def wind_up(limit_s: float) -> None:
    """Unless this is called again within `limit_s`, all stacks go to standard error and the process ends with code 1.

    0 = stop the timer. It works where Python is held.
    """
    faulthandler.cancel_dump_traceback_later()
    if limit_s > 0:
        faulthandler.dump_traceback_later(limit_s, exit=True, file=_STDERR)


@contextmanager
def ends_within(limit_s: float) -> Iterator[None]:
    """For what may hang before there is a watchdog: a driver, a rendezvous. The timer of `wind_up` runs inside."""
    wind_up(limit_s)
    try:
        yield
    finally:
        wind_up(0.0)


__all__ = ["NO_LIMITS", "Watchdog", "ends_within"]
