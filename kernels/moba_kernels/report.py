"""What a call gives back besides numbers: the partial result, the full result and the account of what was computed.

Shape letters: T query tokens, H query heads, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .routing import Routing


class Partial(NamedTuple):
    """Attention over the keys at hand: out [T,H,Dv] and lse [T,H] (natural log), fp32 (fp64 for fp64 inputs).

    A query with no key at hand has out 0 and lse -inf, so merging it changes nothing.
    """

    out: Tensor
    lse: Tensor


class PairTally:
    """Counts pairs while a backend works: device tensors are added unread, so counting never waits for a device."""

    def __init__(self) -> None:
        self._attended: list[Tensor | int] = []
        self._scored: list[Tensor | int] = []

    def add(self, attended: Tensor | int, scored: Tensor | int) -> None:
        """attended: pairs that entered a softmax; scored: elements of score tiles, padding included.

        What the host does not know comes as a tensor, whose elements are summed up when it is read.
        """
        self._attended.append(attended)
        self._scored.append(scored)

    @property
    def attended(self) -> int:
        """Reads the device."""
        return _total(self._attended)

    @property
    def scored(self) -> int:
        """Reads the device."""
        return _total(self._scored)


def _total(counts: Sequence[Tensor | int]) -> int:
    """Their sum; device tensors are added up where they lie and read once."""
    unread = [x.sum(dtype=torch.int64) for x in counts if isinstance(x, Tensor)]
    known = sum(x for x in counts if not isinstance(x, Tensor))
    return known + (int(torch.stack(unread).sum()) if unread else 0)


@dataclass(frozen=True)
class ExecutionReport:
    """What was planned and what was done, over all query heads."""

    backend: str
    """The backend that ran."""
    planned_pairs: int
    """Closed form from the pack and the spec, times the number of query heads."""
    tally: PairTally = field(repr=False)
    covered_documents: int = 0
    """Documents that ran as plain causal attention: all under Full, under MoBA those that topk chunks cover."""

    @property
    def computed_pairs(self) -> int:
        """Pairs that entered a softmax, as counted by the backend. Reads the device: for log steps."""
        return self.tally.attended

    @property
    def scored_pairs(self) -> int:
        """Elements of the score tiles that were multiplied out, masked ones and padding included."""
        return self.tally.scored

    def raise_if_different(self) -> None:
        """Strict mode: RuntimeError unless exactly the planned pairs were attended."""
        if self.computed_pairs != self.planned_pairs:
            raise RuntimeError(
                f"backend {self.backend!r} attended {self.computed_pairs} pairs where {self.planned_pairs} were "
                "planned; a routing that was handed in may hold fewer picks, otherwise this is a bug in the backend"
            )

    def check(self, *, tile_padding: float) -> None:
        """Strict mode with a limit on waste: also RuntimeError when scored_pairs > planned_pairs * tile_padding."""
        self.raise_if_different()
        if self.scored_pairs > self.planned_pairs * tile_padding:
            raise RuntimeError(
                f"backend {self.backend!r} multiplied out {self.scored_pairs} score elements for {self.planned_pairs} "
                f"planned pairs, more than {tile_padding} times as many"
            )


@dataclass(frozen=True)
class AttendResult:
    """out [T,H,Dv] in q's dtype; lse [T,H] natural log, not differentiable; routing on request (None under Full)."""

    out: Tensor
    lse: Tensor
    routing: Routing | None
    report: ExecutionReport
