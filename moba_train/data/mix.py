"""Which source each row of a stage comes from.

Source s gets an exact number of the R rows (largest remainders of weight * R), spread evenly: its j-th row is due at
time (j + 1/2) / count, and rows are taken in the order of their times. So every step sees the mix of the whole stage,
and no row of a source is lost or repeated.

Legend: R rows of the stage.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROWS_AT_ONCE = 1 << 20
"""Rows ordered at a time, so that ordering needs bounded memory."""


def rows_per_source(weights: dict[str, float], num_rows: int) -> dict[str, int]:
    """Exact row counts that sum to num_rows; ties of the remainders go to the source named first."""
    total = sum(weights.values())
    ideal = {name: weight / total * num_rows for name, weight in weights.items()}
    counts = {name: int(x) for name, x in ideal.items()}
    by_remainder = sorted(weights, key=lambda name: counts[name] - ideal[name])
    for name in by_remainder[: num_rows - sum(counts.values())]:
        counts[name] += 1
    return counts


def mix_rows(counts: list[int], out: NDArray[np.int64]) -> None:
    """Fill `out`, int64 [R, 2], with (source, row within that source) for each row of the stage.

    Args:
        counts: rows of each source; sum R.
    """
    num_rows = sum(counts)
    windows = max(1, -(-num_rows // ROWS_AT_ONCE))
    row = 0
    for window in range(windows):
        # Rows of source s that are due in this window of time; integer arithmetic, so that no row falls between two.
        spans = [(_due_before(n, window, windows), _due_before(n, window + 1, windows)) for n in counts]
        sources = np.concatenate([np.full(b - a, s, dtype=np.int64) for s, (a, b) in enumerate(spans)])
        indices = np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in spans])
        times = (indices + 0.5) / np.asarray(counts, dtype=np.float64)[sources] if indices.size else indices
        order = np.lexsort((sources, times))
        out[row : row + order.size, 0] = sources[order]
        out[row : row + order.size, 1] = indices[order]
        row += order.size


def _due_before(count: int, window: int, windows: int) -> int:
    """How many j have (j + 1/2) / count < window / windows."""
    return min(count, max(0, (2 * count * window + windows - 1) // (2 * windows)))
