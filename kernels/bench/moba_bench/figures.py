"""From seconds to figures. Pure: a record in, numbers out.

A record of kind "shape" holds: shape; seconds, by mode ("forward", "both") and contestant the time of every run;
memory in bytes; unable, the reasons of contestants that could not run.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Literal

from .contestants import OURS, PAPER
from .records import Record
from .shapes import Shape, attention_flops, causal_pairs, floor_flops, pair_ratio

Mode = Literal["forward", "both"]
MODES: dict[Mode, str] = {"forward": "forward", "both": "forward + backward"}
GIB = 1024**3


@dataclass(frozen=True)
class Figures:
    """One shape in one mode. None: not measured, or nothing to compare with."""

    shape: Shape
    ratio: float
    """Causal pairs over planned pairs."""
    ours_s: float
    tflops: float
    """Pairs and gate, over our time."""
    dense: str | None
    """The fastest dense kernel."""
    dense_s: float | None
    paper_s: float | None
    floor_s: float | None
    """Planned pairs and gate at the rate of the fastest dense kernel, as measured at this shape and mode."""

    @property
    def speedup(self) -> float | None:
        """Over the fastest dense kernel."""
        return self.dense_s / self.ours_s if self.dense_s is not None else None

    @property
    def share_of_ratio(self) -> float | None:
        return self.speedup / self.ratio if self.speedup is not None else None

    @property
    def over_paper(self) -> float | None:
        return self.paper_s / self.ours_s if self.paper_s is not None else None

    @property
    def share_of_floor(self) -> float | None:
        return self.floor_s / self.ours_s if self.floor_s is not None else None


def dense_runs(record: Record, mode: Mode) -> dict[str, list[float]]:
    """Seconds of the dense kernels that ran."""
    return {name: runs for name, runs in record["seconds"][mode].items() if name not in (OURS, PAPER)}


def figures_of(record: Record, mode: Mode) -> Figures:
    """Medians of the runs, and what follows from them."""
    shape = Shape.from_json(record["shape"])
    medians = {name: median(runs) for name, runs in record["seconds"][mode].items()}
    dense_times = {name: medians[name] for name in dense_runs(record, mode)}
    dense = min(dense_times, key=lambda name: dense_times[name]) if dense_times else None
    backward = mode == "both"
    floor = None
    if dense is not None:
        rate = attention_flops(shape, causal_pairs(shape), backward=backward) / dense_times[dense]
        floor = floor_flops(shape, backward=backward) / rate
    return Figures(
        shape=shape,
        ratio=pair_ratio(shape),
        ours_s=medians[OURS],
        tflops=floor_flops(shape, backward=backward) / medians[OURS] / 1e12,
        dense=dense,
        dense_s=dense_times[dense] if dense is not None else None,
        paper_s=medians.get(PAPER),
        floor_s=floor,
    )
