"""One save that is being written: the work, the thread that does it, and how it ended.

The thread is a daemon: a process whose ranks were lost ends without it. Whatever goes wrong in it, of any kind, is kept
for the main thread, which asks `failed` after every step and raises the error where it waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from moba_train.parallel.watch import is_broken_exchange


class SaveTask:
    """Does `work`, at once or in a thread.

    Args:
        name: of the checkpoint.
        work: writes and publishes; returns lines for the log.
        on_failure: told of an error at once, on the thread that meets it; not of ranks that were lost, since the main
            thread meets that as well and knows more.
        begun_s: when the save began (`time.perf_counter`).
    """

    def __init__(
        self,
        name: str,
        work: Callable[[], list[str]],
        *,
        on_failure: Callable[[BaseException], None],
        begun_s: float,
    ) -> None:
        self.name = name
        self.error: BaseException | None = None
        self.notes: list[str] = []
        self.save_s = 0.0
        self.wait_s = 0.0
        self._work = work
        self._on_failure = on_failure
        self._begun_s = begun_s
        self._over = threading.Event()

    def start(self, *, in_thread: bool) -> None:
        """Begin. The main thread has waited for this save from `begun_s` until this returns."""
        if in_thread:
            threading.Thread(target=self._run, name=f"save {self.name}", daemon=True).start()
        else:
            self._run()
            self.raise_failure()
        self.wait_s = time.perf_counter() - self._begun_s

    @property
    def is_over(self) -> bool:
        """It has been published, or has failed."""
        return self._over.is_set()

    @property
    def age_s(self) -> float:
        """Seconds since it began."""
        return time.perf_counter() - self._begun_s

    @property
    def failed(self) -> bool:
        return self.is_over and self.error is not None

    def wait(self, limit_s: float | None = None) -> bool:
        """Wait until it is over, or for `limit_s`; False = it is not."""
        return self._over.wait(limit_s)

    def raise_failure(self) -> None:
        """On the main thread: raise what went wrong, if anything did.

        Raises:
            UserError: a disk refused, on this rank or another.
            Exception: ranks lost each other, or an error of our own.
        """
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            self.notes = self._work()
            self.save_s = time.perf_counter() - self._begun_s
        except BaseException as error:  # the main thread raises it; here it would only be printed, and lost
            self.error = error
            if not is_broken_exchange(error):
                self._on_failure(error)
        finally:
            self._over.set()
