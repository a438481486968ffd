"""Context parallelism: process groups, shards of a row, and attention over a row that several ranks hold."""

from .context_attention import context_attend
from .halo import key_halo
from .pooled_keys import route_context

__all__ = ["context_attend", "key_halo", "route_context"]
