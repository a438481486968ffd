"""Work in ranges, so that scratch stays bounded however long a row is."""

from __future__ import annotations

from collections.abc import Iterator


def ranges(total: int, size: int) -> Iterator[slice]:
    """0 .. total - 1 in slices of `size` (at least 1)."""
    size = max(1, size)
    for begin in range(0, total, size):
        yield slice(begin, min(total, begin + size))
