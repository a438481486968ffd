"""Context parallelism: process groups, shards of a row, and attention over a row that several ranks hold.

Names load when they are first asked for: the geometry (`cut`), the byte counts and the cost model need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .context_attention import context_attend
    from .halo import key_halo
    from .pooled_keys import route_context

_HOME = (("context_attend", "context_attention"), ("key_halo", "halo"), ("route_context", "pooled_keys"))


def __getattr__(name: str) -> object:
    for known, module in _HOME:
        if name == known:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["context_attend", "key_halo", "route_context"]
