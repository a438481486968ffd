"""What exchanges cost: bytes that left this rank for other ranks, and bytes that came from them, by phase; and time.

Bytes are counted where a collective is called, from shapes alone. A rank's own part does not travel and does not count.
An all-gather delivers a rank's part to N - 1 others; a reduce-scatter takes N - 1 parts in; an all-reduce is the two
one after the other. Padding travels, so it counts.

Time is that in which computing stood still: on CPU that of the host inside `wait`, on CUDA that of the current stream,
between two events. A rank that is ahead of the others waits for them, too, and that is in it.

Phases read "forward/..." or "backward/..." and name what travels: "forward/kv", "backward/dkv", "forward/pooled_keys".
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Waits:
    """Time that one rank waited for exchanges.

    on_device: time CUDA, too, which takes two events a wait; without it, nothing is known there.
    """

    on_device: bool = False
    host_s: float = 0.0
    events: list[tuple[Any, Any]] = field(default_factory=list)

    @contextmanager
    def timed(self, is_cuda: bool) -> Iterator[None]:
        """A wait happens inside."""
        if not is_cuda:
            begun_s = time.perf_counter()
            yield
            self.host_s += time.perf_counter() - begun_s
        elif self.on_device:
            import torch  # counters of bytes need none

            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begun.record()
            yield
            ended.record()
            self.events.append((begun, ended))
        else:
            yield

    def seconds(self) -> float:
        """All waits so far. Waits for the device where it was timed."""
        if self.events:
            self.events[-1][1].synchronize()
        device_ms: float = sum(begun.elapsed_time(ended) for begun, ended in self.events)
        return self.host_s + device_ms / 1e3


@dataclass(frozen=True)
class Traffic:
    """Counters of one rank; a forward pass fills its phases at once, the backward pass when it runs."""

    sent: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)
    waits: Waits = field(default_factory=Waits)

    def add(self, phase: str, *, sent: int, received: int) -> None:
        """Count bytes of one exchange."""
        self.sent[phase] += sent
        self.received[phase] += received

    def total_sent(self, direction: str = "") -> int:
        """Bytes sent; direction "forward" or "backward" = of that pass alone."""
        return sum(size for phase, size in self.sent.items() if phase.startswith(direction))

    def total_received(self, direction: str = "") -> int:
        """Bytes received; direction as in `total_sent`."""
        return sum(size for phase, size in self.received.items() if phase.startswith(direction))


__all__ = ["Traffic", "Waits"]
