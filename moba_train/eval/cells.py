"""The needle grid as pure functions: its cells, what counts as routed, and how sure a score is.

A *cell* is one (attention, context length, depth) of the grid. Nothing here imports torch or touches a file.

Legend: Q answer queries of one sample, P rows of picks per query (query heads, or key/value heads for group selection),
topk slots of a pick (slot 0 the own chunk, -1 = none).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ATTENTION_TITLES = {"moba": "MoBA", "full": "Full attention", "random": "Random routing", "stage": "Stage's attention"}
"""How an attention mode is called in tables and pictures."""

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True)
class NiahRecord:
    """One scored sample: one line of niah.jsonl.

    Attributes:
        context_length: tokens of the sample, question and answer included; exact.
        depth_percent: where the needle stands: 0 = start of the haystack, 100 = its end.
        sample: index of the sample in its cell.
        attention: "moba", "full" or "random".
        score: 1.0 if the arg-max at every answer position (teacher-forced) is the answer's token, else 0.0.
        log_prob: mean natural log-probability of the answer's tokens (teacher-forced).
        routed: share of (MoBA layer, head, answer query) triples that picked a chunk holding a part of the needle's
            value; None where no layer routes.
        routed_expected: the same share if picks were uniformly random; None where `routed` is None.
        dense: the pattern is dense by construction: context_length <= topk * chunk_size.
        model_response: the arg-max tokens at the answer positions, decoded.
        expected: the answer.
        key: what the question asks for.
        needle_chunk: chunk of the document in which the needle's value begins.
        needle_offset: position of the needle's first token inside its own chunk.
        needle_tokens: length of the needle.
        chunk_size, topk, select: the stage's MoBA settings.
        step, weights: the checkpoint: finished steps, and a fingerprint of its content.
        stage, seed: which settings and which samples.
        sample_hash: of the sample's tokens; a resumed evaluation skips a sample only if this is the same.
        function: digest of what else shapes the scores: which layers stay full, RoPE, precision, backend. Empty in a
            file from before there was one: such samples are scored anew.
    """

    context_length: int
    depth_percent: float
    sample: int
    attention: str
    score: float
    log_prob: float
    routed: float | None
    routed_expected: float | None
    dense: bool
    model_response: str
    expected: str
    key: str
    needle_chunk: int
    needle_offset: int
    needle_tokens: int
    chunk_size: int
    topk: int
    select: str
    step: int
    weights: str
    stage: str
    seed: int
    sample_hash: str
    function: str = ""

    @property
    def settings(self) -> tuple[object, ...]:
        """What all records of one grid have in common."""
        return (self.chunk_size, self.topk, self.select, self.function, self.weights, self.stage, self.seed)

    @property
    def identity(self) -> tuple[object, ...]:
        """What makes two records the same measurement."""
        cell = (self.attention, self.context_length, self.depth_percent)
        return (*cell, self.sample, self.sample_hash, *self.settings)


@dataclass(frozen=True)
class Cell:
    """All samples of one (attention, context length, depth).

    Attributes:
        score: mean exact match; `low` and `high` bound it with 95 % confidence (Wilson).
        log_prob: mean over samples of the mean log-probability per answer token.
        routed, routed_expected: means over samples, None where no layer routes.
        dense: see `NiahRecord.dense`.
    """

    attention: str
    context_length: int
    depth_percent: float
    num_samples: int
    score: float
    low: float
    high: float
    log_prob: float
    routed: float | None
    routed_expected: float | None
    dense: bool


def depth_grid(depths: int) -> tuple[float, ...]:
    """`depths` percentages evenly spaced from 0 to 100, rounded to 0.01; one means the middle, none is empty."""
    if depths == 1:
        return (50.0,)
    return tuple(round(100.0 * i / (depths - 1), 2) for i in range(depths))


def middle_depths(depths: int) -> tuple[float, ...]:
    """The grid of `depths` without its two ends (the whole grid where it has no more than two)."""
    grid = depth_grid(depths)
    return grid[1:-1] if len(grid) > 2 else grid


def is_dense(length: int, *, chunk_size: int, topk: int) -> bool:
    """Whether MoBA attends to every causal pair of a document of `length` tokens."""
    return length <= topk * chunk_size


def wilson_interval(successes: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval of a share (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927); (0, 1) for n = 0.

    Unlike the normal approximation it stays inside 0..1 and has width at a share of 0 or 1, where needle scores live.
    """
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    denominator = 1.0 + z * z / n
    centre = (share + z * z / (2 * n)) / denominator
    half = z / denominator * math.sqrt(share * (1.0 - share) / n + z * z / (4.0 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def token_chunks(start: int, end: int, *, chunk_size: int) -> range:
    """Chunks (of the document, from 0) that hold a token of [start, end)."""
    return range(start // chunk_size, (end - 1) // chunk_size + 1)


def routed_share(picks_QPk: NDArray[np.int32], chunks: range, *, first_chunk: int) -> float:
    """Share of (query, head) pairs that picked at least one of `chunks`.

    Args:
        picks_QPk: int32 [Q, P, topk], chunk ids counted over the row.
        chunks: the chunks of the needle's value, counted over its document.
        first_chunk: row-wide id of the document's first chunk.
    """
    wanted = np.arange(chunks.start, chunks.stop, dtype=np.int64) + first_chunk
    return float(np.isin(picks_QPk, wanted).any(axis=-1).mean())


def expected_share(query_positions: Sequence[int], chunks: range, *, chunk_size: int, topk: int) -> float:
    """`routed_share` of uniformly random picks: the own chunk, and topk - 1 of the chunks before it.

    A query at position t of its document has n = t // chunk_size candidates and picks p = min(topk - 1, n) of them.
    With m of the needle's chunks among the candidates it misses all with probability C(n - m, p) / C(n, p).
    """
    shares = []
    for position in query_positions:
        candidates = position // chunk_size
        if candidates in chunks:
            shares.append(1.0)
            continue
        picks = min(topk - 1, candidates)
        among = sum(1 for chunk in chunks if chunk < candidates)
        shares.append(1.0 - math.comb(candidates - among, picks) / math.comb(candidates, picks))
    return float(np.mean(shares))


def _mean_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _cell(members: Sequence[NiahRecord], *, attention: str, context_length: int, depth_percent: float) -> Cell:
    total = sum(record.score for record in members)
    low, high = wilson_interval(total, len(members))
    return Cell(
        attention=attention,
        context_length=context_length,
        depth_percent=depth_percent,
        num_samples=len(members),
        score=total / len(members),
        low=low,
        high=high,
        log_prob=float(np.mean([record.log_prob for record in members])),
        routed=_mean_known(record.routed for record in members),
        routed_expected=_mean_known(record.routed_expected for record in members),
        dense=all(record.dense for record in members),
    )


def summarise(records: Iterable[NiahRecord]) -> tuple[Cell, ...]:
    """Cells of the grid, ordered by attention (as first seen), context length and depth."""
    groups: dict[tuple[str, int, float], list[NiahRecord]] = {}
    attentions: list[str] = []
    for record in records:
        groups.setdefault((record.attention, record.context_length, record.depth_percent), []).append(record)
        if record.attention not in attentions:
            attentions.append(record.attention)
    return tuple(
        _cell(groups[key], attention=key[0], context_length=key[1], depth_percent=key[2])
        for key in sorted(groups, key=lambda key: (attentions.index(key[0]), key[1], key[2]))
    )


def mean_score(cells: Iterable[Cell], attention: str) -> float | None:
    """Mean of the cell scores under `attention`, every cell weighing the same; None without cells."""
    return _mean_known(cell.score for cell in cells if cell.attention == attention)


def mean_by_length(records: Iterable[NiahRecord]) -> dict[tuple[str, int], tuple[float, float, float, int]]:
    """(attention, length) -> (mean score, Wilson low, Wilson high, samples) over all depths."""
    groups: dict[tuple[str, int], list[float]] = {}
    for record in records:
        groups.setdefault((record.attention, record.context_length), []).append(record.score)
    return {
        key: (sum(scores) / len(scores), *wilson_interval(sum(scores), len(scores)), len(scores))
        for key, scores in groups.items()
    }


def by_chunk_offset(records: Iterable[NiahRecord], attention: str, *, parts: int = 4) -> tuple[Cell, ...]:
    """Score by where in its chunk the needle begins: `parts` equal ranges of the offset, then needles that straddle.

    Dense cells are left out: there routing has nothing to lose. `depth_percent` of the returned cells is the start of
    the range as a share of the chunk in percent, 100 for straddling needles; `context_length` is 0.
    """
    groups: dict[int, list[NiahRecord]] = {}
    for record in records:
        if record.attention != attention or record.dense:
            continue
        straddles = record.needle_offset + record.needle_tokens > record.chunk_size
        part = parts if straddles else record.needle_offset * parts // record.chunk_size
        groups.setdefault(part, []).append(record)
    return tuple(
        _cell(groups[part], attention=attention, context_length=0, depth_percent=100.0 * part / parts)
        for part in sorted(groups)
    )
