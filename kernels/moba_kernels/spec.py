"""What a query may attend to: `Full()` or `MoBA(chunk_size, topk, select)`. Frozen, typed, hashable; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import bad_argument

LARGEST = 2**31 - 1  # token and chunk indices are kept in 32 bits


@dataclass(frozen=True, slots=True)
class Full:
    """Causal attention over the whole document."""


@dataclass(frozen=True, slots=True)
class MoBA:
    """Mixture of Block Attention (arXiv 2502.13189): a query attends to its own chunk and up to topk - 1 earlier ones.

    Raises ValueError when chunk_size or topk is not an integer from 1 to 2**31 - 1, or select is unknown.
    """

    chunk_size: int
    """Tokens in a chunk, the unit of routing. A document's last chunk may be shorter."""
    topk: int
    """Chunks a query attends to, its own included: 1 means the own chunk only."""
    select: Literal["head", "group"] = "head"
    """"head": every query head picks for itself; "group": the query heads of one KV head pick together."""

    def __post_init__(self) -> None:
        for name in ("chunk_size", "topk"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
                fix = f"pass {name} >= 1 (as long as the row: no limit)"
                raise bad_argument(f"MoBA.{name} must be an integer >= 1, at most 2**31 - 1", repr(value), fix)
        if self.select not in ("head", "group"):
            raise bad_argument("MoBA.select must be 'head' or 'group'", repr(self.select), "pass select='head'")

    @property
    def num_picks(self) -> int:
        """Chunks picked besides the own one."""
        return self.topk - 1

    def routed_heads(self, num_heads: int, num_kv_heads: int) -> int:
        """How many heads route on their own: H for select="head", K for select="group"."""
        return num_heads if self.select == "head" else num_kv_heads


AttentionSpec = Full | MoBA
