"""When ranks lose each other: find out which rank is gone, which stalled and which only waited, and end all of them.

A broken collective tells a rank little: its neighbour closed the connection, or nothing came in time. The neighbour may
be dead, or may have given up itself because of a third rank. So

1. a rank that breaks off leaves a line on the job's board (its key-value store) and raises the alarm there;
2. a thread on every rank looks for the alarm about once a second. It answers with what its rank is at, also when the
   rank cannot: it waits in a collective, or does something else;
3. whoever has not answered within a few seconds is gone. Every rank says so and ends: the main thread by an
   ExchangeError, or the thread itself, where the main thread does not come back.

The store may be lost as well, with the process or the node that keeps it. A process that is stopped, or a node without
power, lets whoever asks it wait for ever; so every question has a time limit and a thread of its own.

On CUDA the host does not wait for an exchange, and PyTorch's watchdog would end the process without saying what it was
in. There the thread raises the alarm by itself, earlier than the watchdog, once the device is late (watch.py).

An alarm because of a hang (a timeout, or a limit of our own watchdog, watchdog.py) asks for more: every rank that still
can writes down the stacks of its threads before it answers (stacks.py).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moba_train import last_words
from moba_train.config.schema import WatchdogConfig
from moba_train.errors import EXIT_RANKS, ExchangeError, UserError

from .stacks import Stacks, waiting_beside, waiting_collective
from .story import Line, story
from .watch import Watch, is_broken_exchange, is_timeout, plain_text
from .watchdog import NO_LIMITS, Watchdog

_MOST_TEXT = 1000
"""Characters of a line on the board: all ranks read all lines at once, from one store."""


def answer_time_s(timeout_s: float) -> float:
    """How long ranks are waited for once one has raised the alarm: part of the timeout, at most 5 s."""
    return min(5.0, timeout_s / 4)


def collective_timeout_s(timeout_s: float) -> float:
    """What a collective may take, so that all ranks have spoken and ended within `timeout_s`."""
    return timeout_s - 1.5 * answer_time_s(timeout_s)


def device_timeout_s(timeout_s: float, device: torch.device) -> float:
    """The timeout of a group of this device. NCCL's counts from where an exchange was started, some host time before
    the sentry's, and ends the process without a word: it is there for ranks whose sentry cannot speak."""
    return timeout_s if device.type == "cuda" else collective_timeout_s(timeout_s)


class Board:
    """Lines that ranks leave for each other in a key-value store; RuntimeError when it is out of reach.

    All lines stand under one key, so that a thousand ranks can read what a thousand ranks left.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        # a connection of its own, where PyTorch offers one: the main thread may be waiting on the other
        own = store.clone() if hasattr(store, "clone") else store
        # A process may be guarded several times over one store, all ranks as often: what an earlier time left is old.
        times = own.add(f"moba sentry of rank {rank}", 1)
        self._store: Any = dist.PrefixStore(f"moba sentry {times}", own)  # type: ignore[attr-defined]
        self.rank, self.world_size = rank, world_size

    def post(self, line: Line) -> None:
        """Leave a line; it takes the place of what this rank left before."""
        self._store.append("lines", json.dumps([self.rank, line.kind, line.text[:_MOST_TEXT]]) + "\n")

    def raise_alarm(self, *, hang: bool = False) -> None:
        """`hang`: nobody has died, as far as is known; ranks write down their stacks."""
        if hang:
            self._store.set("hang", str(self.rank))
        self._store.set("alarm", str(self.rank))

    def is_hang(self) -> bool:
        return bool(self._store.check(["hang"]))

    def is_alarm(self) -> bool:
        return bool(self._store.check(["alarm"]))

    def lines(self) -> dict[int, Line]:
        """What has been left so far, by rank."""
        if not self._store.check(["lines"]):
            return {}
        left = (json.loads(line) for line in self._store.get("lines").decode().splitlines())
        return {rank: Line(kind, text) for rank, kind, text in left}


class Sentry:
    """The thread of one rank, open as a context.

    Args:
        watch: what this rank is at.
        board: where ranks leave lines.
        timeout_s: within which all ranks end.
        stacks: writes them down when ranks hang; None = to standard error.
        say, end: print a message; end the process with a code.
    """

    def __init__(
        self,
        watch: Watch,
        board: Board,
        *,
        timeout_s: float,
        stacks: Stacks | None = None,
        say: Callable[[str], None] | None = None,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self._watch, self._board = watch, board
        self._answer_s = answer_time_s(timeout_s)
        self._late_s = collective_timeout_s(timeout_s) - 2 * self._answer_s
        self._poll_s = self._answer_s / 5
        self._stacks = stacks or Stacks(board.rank, None)
        self._say, self._end = say or self._print, end
        self._lines: dict[int, Line] = {}
        self._alarm_s: float | None = None
        self._heard_s = 0.0
        self._unheard = ""
        self._lost = ""
        self._main_tells = False
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sentry", daemon=True)

    def __enter__(self) -> Sentry:
        self._watch.is_read = True
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.is_read = False
        self._closed.set()
        self._thread.join(self._poll_s)  # it may be asking a store that does not answer

    def explain(self, line: Line, *, hang: bool = False) -> str:
        """From the main thread or the watchdog's: leave `line`, raise the alarm, hear the others; all as a message."""
        with self._lock:
            another_tells, self._main_tells = self._main_tells, True
        if another_tells:
            time.sleep(3 * self._answer_s)  # the thread that tells ends the process; if not, this one does
        self._alarm_s = self._alarm_s or time.monotonic()
        deadline_s = self._alarm_s + self._answer_s
        self._unheard = self._ask(lambda: self._alarm(line, hang), deadline_s - time.monotonic())
        if not self._unheard:
            self._hear_out(deadline_s)
        if self._board.rank == 0:
            time.sleep(2 * self._poll_s)  # it may keep the store: the others must have read it before this process ends
        return self._story(line)

    def expire(self, what: str) -> None:
        """From the thread of a watchdog: a limit is over on this rank. Writes the stacks, and ends the process."""
        with self._lock:
            if self._main_tells:
                return
        self._stacks.dump(what)
        self._tell_and_end(self.explain(Line("hung", f"{what}; {self._answer().text}"), hang=True))

    def leave_word(self, line: Line) -> None:
        """Leave a line for whoever misses this rank; no alarm, since all ranks may have come to the same end."""
        self._main_tells = True  # the thread does not speak over it
        self._ask(lambda: self._board.post(line), self._answer_s)

    def look(self) -> bool:
        """One round of the thread; True = it has ended the process."""
        late = self._watch.late(self._late_s)
        if late:
            line = Line("broke off", f"{late}: nothing came for {self._late_s:.0f} s, in {self._watch.doing()}")
            with self._lock:
                if self._main_tells:
                    return False
            self._stacks.dump(line.text)
            self._tell_and_end(self.explain(line, hang=True))
            return True
        if self._alarm_s is None:
            # An unheard one is no alarm: the store is gone, and so is whoever kept it, as the next exchange shows.
            self._ask(self._answer_alarm, self._answer_s / 2)
            return False
        self._unheard = self._ask(self._read, self._answer_s / 2)
        if time.monotonic() < self._alarm_s + self._answer_s:
            return False
        with self._lock:
            if self._main_tells:
                return False
            self._main_tells = True  # whatever it meets from here on, the story is told
        self._tell_and_end(self._story(self._answer()))
        return True

    def _run(self) -> None:
        while not self._closed.wait(self._poll_s):
            if self.look():
                return

    def _answer(self) -> Line:
        exchange = self._watch.in_exchange() or waiting_collective()
        doing = self._watch.doing() + waiting_beside()
        return Line("waits", f"{exchange}, in {doing}") if exchange else Line("busy", doing)

    def _alarm(self, line: Line, hang: bool) -> None:
        self._board.post(line)
        self._board.raise_alarm(hang=hang)

    def _answer_alarm(self) -> None:
        """Say what this rank is at, if there is an alarm and the main thread says nothing itself."""
        if self._board.is_alarm():
            self._alarm_s = self._alarm_s or time.monotonic()
            if not self._main_tells:
                answer = self._answer()
                if self._board.is_hang():
                    self._stacks.dump("ranks hang")
                self._board.post(answer)

    def _hear_out(self, deadline_s: float) -> None:
        """Collect lines until all ranks have left one, the time is up, or the board is out of reach."""
        while not self._unheard and len(self._lines) < self._board.world_size:
            self._unheard = self._ask(self._read, deadline_s - time.monotonic())
            if time.monotonic() >= deadline_s:
                break
            time.sleep(self._poll_s / 2)

    def _read(self) -> None:
        self._lines = self._board.lines()
        self._heard_s = time.monotonic()

    def _story(self, line: Line) -> str:
        """A store that went when the others had spoken is not worth a word."""
        assert self._alarm_s is not None
        heard_late = self._heard_s >= self._alarm_s + self._answer_s - 2 * self._poll_s
        unreachable = "" if heard_late or len(self._lines) == self._board.world_size else self._unheard
        return story(self._board.rank, self._board.world_size, line, self._lines, self._answer_s, unreachable)

    def _tell_and_end(self, message: str) -> None:
        last_words.leave(message, where=self._watch.doing(), code=EXIT_RANKS)
        self._say(message)
        self._end(EXIT_RANKS)

    def _print(self, message: str) -> None:
        print(f"moba-train (rank {self._board.rank}): error: {message}", file=sys.stderr, flush=True)

    def _ask(self, ask: Callable[[], object], within_s: float) -> str:
        """Ask the board something, one question at a time; why there was no answer `within_s`, or "".

        A store that was lost does not come back, and PyTorch prints its own stack for every question after that.
        """
        if self._lost:
            return self._lost
        deadline_s = time.monotonic() + max(within_s, self._poll_s)
        failed = ["it does not answer"]
        if not self._turn.acquire(timeout=max(within_s, self._poll_s)):
            return failed[0]  # an earlier question is still open

        def run() -> None:
            try:
                ask()
                failed[0] = ""
            except RuntimeError as error:
                failed[0] = self._lost = plain_text(error)
            finally:
                self._turn.release()

        thread = threading.Thread(target=run, name="sentry asks", daemon=True)
        thread.start()
        thread.join(max(0.0, deadline_s - time.monotonic()))
        return failed[0]


def _outlast_the_launcher() -> None:
    """torchrun asks all ranks to end (SIGTERM) as soon as one has died, and the story takes some seconds."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def guarded(
    watch: Watch,
    *,
    timeout_s: float,
    limits: WatchdogConfig = NO_LIMITS,
    age_s: float = 0.0,
    run_dir: Path | None = None,
) -> Iterator[None]:
    """Inside, ranks that lose each other end within `timeout_s` and say why. For ranks that have met.

    Args:
        limits: of the watchdog, which holds for a rank alone too.
        age_s: how long the start of this process has taken already.
        run_dir: where stacks of ranks that hang are written.

    Raises ExchangeError with the whole story where a collective broke off. A UserError passes (all ranks raise it, or
    the others will miss this one and find its word); any other error passes once the others know.
    """
    stacks = Stacks(dist.get_rank(), run_dir)
    if dist.get_world_size() == 1:
        with Watchdog(watch, limits, expire=lambda what: _end_alone(watch, stacks, what), age_s=age_s):
            yield
        return
    board = Board(dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size())
    with (
        Sentry(watch, board, timeout_s=timeout_s, stacks=stacks) as sentry,
        Watchdog(watch, limits, expire=sentry.expire, age_s=age_s),
    ):
        try:
            yield
        except UserError as error:
            sentry.leave_word(Line("failed", f"{error.what}, in {watch.doing()}"))
            raise
        except KeyboardInterrupt:
            sentry.leave_word(Line("failed", f"interrupted, in {watch.doing()}"))
            raise
        except Exception as error:
            _outlast_the_launcher()
            if is_broken_exchange(error):
                line = Line("broke off", f"{plain_text(error)}; in {watch.doing()}")
                raise ExchangeError(sentry.explain(line, hang=is_timeout(error))) from error
            sentry.explain(Line("failed", f"{type(error).__name__}: {error}, in {watch.doing()}"))
            raise


def _end_alone(watch: Watch, stacks: Stacks, what: str) -> None:
    """A rank that has no others hangs."""
    stacks.dump(what)
    message = f"the watchdog ends the run; {what}; now in {watch.doing()}"
    last_words.leave(message, where=watch.doing(), code=EXIT_RANKS)
    print(f"moba-train: error: {message}", file=sys.stderr, flush=True)
    os._exit(EXIT_RANKS)


__all__ = [
    "Board",
    "Line",
    "Sentry",
    "answer_time_s",
    "collective_timeout_s",
    "device_timeout_s",
    "guarded",
    "story",
]
