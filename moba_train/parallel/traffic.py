"""What an exchange cost: bytes that left this rank for other ranks, and bytes that came from them, by phase.

Counted where a collective is called, from shapes alone. A rank's own part does not travel and does not count. An
all-gather delivers a rank's part to N - 1 others; a reduce-scatter takes N - 1 parts in; an all-reduce is the two one
after the other. Padding travels, so it counts.

Phases read "forward/..." or "backward/..." and name what travels: "forward/kv", "backward/dkv", "forward/pooled_keys".
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Traffic:
    """Counters of one rank; a forward pass fills its phases at once, the backward pass when it runs."""

    sent: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)

    def add(self, phase: str, *, sent: int, received: int) -> None:
        """Count bytes of one exchange."""
        self.sent[phase] += sent
        self.received[phase] += received

    def add_all(self, other: Traffic) -> None:
        """Count everything that `other` counted."""
        self.sent.update(other.sent)
        self.received.update(other.received)

    def total_sent(self, direction: str = "") -> int:
        """Bytes sent; direction "forward" or "backward" = of that pass alone."""
        return sum(size for phase, size in self.sent.items() if phase.startswith(direction))

    def total_received(self, direction: str = "") -> int:
        """Bytes received; direction as in `total_sent`."""
        return sum(size for phase, size in self.received.items() if phase.startswith(direction))


__all__ = ["Traffic"]
