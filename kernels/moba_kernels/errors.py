"""Errors of the operator. Wrong arguments raise ValueError; a backend that cannot serve a call raises BackendError."""

from __future__ import annotations

from collections.abc import Sequence


class BackendError(RuntimeError):
    """A backend refuses a call. `backend` names it, `reasons` holds every reason (not only the first)."""

    def __init__(self, backend: str, reasons: Sequence[str], fix: str = "use backend='torch', which serves every call"):
        self.backend = backend
        self.reasons = tuple(reasons)
        self.fix = fix
        listed = "".join(f"\n  - {reason}" for reason in self.reasons)
        super().__init__(f"backend {backend!r} cannot serve this call:{listed}\n  fix: {fix}")

    def __reduce__(self) -> tuple[type[BackendError], tuple[str, tuple[str, ...], str]]:
        return type(self), (self.backend, self.reasons, self.fix)


def bad_argument(what: str, got: object, fix: str) -> ValueError:
    """A ValueError that says what is wrong, what was given and what to do."""
    return ValueError(f"{what}; got {got!s}; fix: {fix}")
