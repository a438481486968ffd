"""What this rank is at: what it does, and which exchange its host or its device is in. Read when ranks lose each other.

    with watch.during("step 12, forward and backward"):      # a collective that breaks off inside gets this name
        ...

On CPU the host waits inside an exchange, so one attribute says where it is. On CUDA it runs ahead: an event is recorded
behind every exchange and every part of a step, and what has not happened tells where the device is. Events hold no
tensor and are used again. Nothing of this synchronises anything.

A watch also says which limit of the watchdog holds now (watchdog.py), and since when: it changes with the words, in
`begin("step 12, reading rows", limit="step")`. What runs beside the main thread has a limit of its own (`background`).
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

from moba_train.errors import ExchangeError


class Event(Protocol):
    """What is asked of `torch.cuda.Event`."""

    def record(self) -> Any: ...

    def query(self) -> bool: ...


class DeviceEvent:
    """An event that any thread may ask about.

    A thread that has chosen no device is on the first one, where its question would make a context: half a GiB of GPU 0
    for every rank of the node.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event: Event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def record(self) -> None:
        """Behind what the current stream has been given."""
        self._event.record()

    def query(self) -> bool:
        """Has it happened?"""
        with torch.cuda.device(self._device):
            return self._event.query()


class Exchange(Protocol):
    """What is asked of a `Wire`: a name for one of its phases."""

    def place(self, phase: str) -> str: ...


Limit = Literal["start", "step", "save"]
"""A key of [watchdog], without its "_s"."""


@dataclass(frozen=True, eq=False)
class Stretch:
    """A piece of work under one limit; each is itself alone, so that two steps are two stretches.

    Attributes:
        limit: which limit holds.
        name: what began with it ("saving step 12").
    """

    limit: Limit
    name: str


@dataclass(frozen=True)
class _Part:
    """A part of a step, in the place of a Wire."""

    def place(self, phase: str) -> str:
        return phase


class Watch:
    """What one rank is at. Written by the main thread, read by the thread of a `Sentry`.

    Args:
        device: of this rank.
        new_event: makes an event; None = of `device` (tests pass their own).
        clock: seconds that only rise.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        new_event: Callable[[], Event] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.is_read = False
        """A sentry reads this watch; without one, nothing is followed."""
        self._runs_ahead = device.type == "cuda"
        self._new_event = new_event or partial(DeviceEvent, device)
        self._clock = clock
        self._doing = ("starting", clock())
        self._stretch = Stretch("start", "the start")
        self._background: list[tuple[Stretch, float]] = []
        self._waiting: tuple[Exchange, str, float] | None = None
        self._followed: deque[tuple[Event, Exchange, str, float]] = deque()
        self._free: deque[Event] = deque()

    def begin(self, doing: str, *, limit: Limit | None = None) -> None:
        """From now on this rank does `doing` ("step 12, optimizer"). With a limit, that limit counts from now."""
        self._doing = (doing, self._clock())
        if limit is not None:
            self._stretch = Stretch(limit, doing)

    @contextmanager
    def background(self, doing: str, *, limit: Limit) -> Iterator[None]:
        """Another thread does `doing` inside, beside the main thread and under a limit of its own."""
        entry = (Stretch(limit, doing), self._clock())
        self._background.append(entry)
        try:
            yield
        finally:
            self._background.remove(entry)

    @contextmanager
    def during(self, doing: str, *, limit: Limit | None = None) -> Iterator[None]:
        """`begin`, and a collective that breaks off inside raises ExchangeError that says what was going on."""
        self.begin(doing, limit=limit)
        try:
            yield
        except RuntimeError as error:
            if not is_broken_exchange(error) or isinstance(error, ExchangeError):
                raise
            raise ExchangeError(f"a collective broke off in {self._doing[0]}: {plain_text(error)}") from error
        if self._runs_ahead and self.is_read:
            self._follow(_Part(), doing)

    def wait_begins(self, exchange: Exchange, phase: str) -> None:
        """The host is about to wait for an exchange."""
        self._waiting = (exchange, phase, self._clock())

    def wait_is_over(self) -> None:
        """The host goes on; on CUDA the device may not have come so far."""
        waiting, self._waiting = self._waiting, None
        if self._runs_ahead and self.is_read and waiting is not None:
            self._follow(*waiting[:2])

    def late(self, limit_s: float) -> str:
        """What the device has been at for longer than `limit_s`; "" = nothing. Lets go of what is over."""
        while self._followed:
            event, exchange, phase, since_s = self._followed[0]
            if not _has_happened(event):
                return exchange.place(phase) if self._clock() - since_s > limit_s else ""
            self._free.append(self._followed.popleft()[0])
        return ""

    def in_exchange(self) -> str:
        """The exchange that the host, or else the device, is in; "" = none."""
        waiting = self._waiting
        if waiting is not None:
            return self._described(*waiting)
        for event, exchange, phase, since_s in list(self._followed):
            if not _has_happened(event):
                return self._described(exchange, phase, since_s)
        return ""

    def doing(self) -> str:
        """What the main thread and those beside it do, and for how long."""
        text, since_s = self._doing
        now_s = self._clock()
        beside = [f"; beside it: {stretch.name} (for {now_s - at_s:.0f} s)" for stretch, at_s in list(self._background)]
        return f"{text} (for {now_s - since_s:.0f} s)" + "".join(beside)

    def stretches(self) -> tuple[Stretch, ...]:
        """What is under a limit now: the main thread's work first, then what runs beside it."""
        return (self._stretch, *(stretch for stretch, _ in list(self._background)))

    def _described(self, exchange: Exchange, phase: str, since_s: float) -> str:
        return f"{exchange.place(phase)} (for {self._clock() - since_s:.0f} s)"

    def _follow(self, exchange: Exchange, phase: str) -> None:
        event = self._free.pop() if self._free else self._new_event()
        event.record()
        self._followed.append((event, exchange, phase, self._clock()))


def _has_happened(event: Event) -> bool:
    """An event of a device that has failed counts as happened: the main thread meets the error itself."""
    try:
        return event.query()
    except RuntimeError:
        return True


def is_broken_exchange(error: BaseException) -> bool:
    """Did a collective fail, and not the program? gloo has no exception of its own; its texts name its sources."""
    if isinstance(error, ExchangeError | dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "/gloo/" in str(error)


def is_timeout(error: BaseException) -> bool:
    """Did a collective wait too long, and its partners are still there? Told by gloo's and NCCL's words."""
    return bool(re.search(r"timed? ?out", str(error), re.IGNORECASE))


def plain_text(error: BaseException) -> str:
    """The first sentence of the library's message, without the place in its sources."""
    text = re.sub(r"^\[[^\]]*\.(cc|cpp|h):\d+\]\s*", "", str(error).strip())
    return re.split(r"\. This is typically|\nException raised from", text)[0].strip()


__all__ = [
    "DeviceEvent",
    "Event",
    "Exchange",
    "Limit",
    "Stretch",
    "Watch",
    "is_broken_exchange",
    "is_timeout",
    "plain_text",
]
