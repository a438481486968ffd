"""Rules about one number, shared by the rules that span fields."""

from __future__ import annotations

from collections.abc import Iterator

from moba_train.errors import ConfigError


def at_least(value: float, low: float, where: str, fix: str = "") -> Iterator[ConfigError]:
    """An error unless `value` >= `low`; `where` is the key."""
    if value < low:
        parent, _, name = where.rpartition(".")
        if name.isdecimal():
            name = f"every number in {parent.rpartition('.')[-1]}"
        what = f"{name} must be at least {low}"
        yield ConfigError(what, where=where, got=value, allowed=f">= {low}", fix=fix or f"raise {where}")


def positive(value: float, where: str, fix: str = "write a number above zero") -> Iterator[ConfigError]:
    """An error unless `value` > 0."""
    if not value > 0:
        name = where.rpartition(".")[-1]
        yield ConfigError(f"{name} must be positive", where=where, got=value, allowed="> 0", fix=fix)


def divides(value: int, divisor: int, where: str, by: str, fix: str) -> Iterator[ConfigError]:
    """An error unless `divisor`, which the message calls `by`, divides `value`."""
    if value >= 1 and divisor >= 1 and value % divisor:
        name = where.rsplit(".", 1)[-1]
        yield ConfigError(
            f"{name} must be a multiple of {by}",
            where=where,
            got=value,
            allowed=f"multiples of {divisor} ({by})",
            fix=fix,
        )


__all__ = ["at_least", "divides", "positive"]
