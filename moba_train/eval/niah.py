"""Needle in a haystack: does the model read one sentence out of a long context, at every depth, under every attention?

Samples are built at token level, so a context length is exact (`moba_train.data.needles`). The model is teacher-forced:
one forward pass gives the arg-max and the log-probability of every answer token, so that a small or half-trained model
shows a gradient where free generation would show zeros. Samples of one length are packed as documents of one row:
attention never crosses documents, so packing changes the speed and not the scores.

Under "moba" and "random" every sample also tells in which share of (MoBA layer, head) pairs the answer's queries picked
the needle's chunk (the one with the value), beside the share that uniformly random picks would reach.

Every rank calls these functions; rank 0 alone reads and writes files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moba_train.config.schema import StageConfig
from moba_train.data.needles import NeedleSample, NeedleText
from moba_train.eval.cells import (
    Cell,
    NiahRecord,
    depth_grid,
    expected_share,
    is_dense,
    mean_score,
    middle_depths,
    routed_share,
    summarise,
    token_chunks,
)
from moba_train.eval.jobs import Job, Samples, check_grid, pack_samples, share_rows
from moba_train.eval.records import RecordWriter, read_records
from moba_train.parallel.ranks import from_rank_0, map_over_ranks

if TYPE_CHECKING:
    from moba_train.data.tokenizer import Tokenizer
    from moba_train.engine.base import AttentionMode, Engine, RowScores

Progress = Callable[[int, int], None]
"""Called on rank 0 with (samples done, samples in all), resumed ones included."""


@dataclass(frozen=True)
class Origin:
    """What every record of a run of the grid has in common: the weights, what they compute, and the samples' seed."""

    step: int
    weights: str
    stage: StageConfig
    seed: int
    function: str = ""


@dataclass(frozen=True)
class NiahResult:
    """The whole grid, resumed samples included; the same on every rank.

    Attributes:
        records: one per sample and attention.
        cells: their summary per (attention, context length, depth).
        num_resumed: records that were read from an earlier, interrupted call.
        jsonl, png: the files that rank 0 wrote.
    """

    records: tuple[NiahRecord, ...]
    cells: tuple[Cell, ...]
    num_resumed: int
    jsonl: Path
    png: Path

    def mean(self, attention: str) -> float | None:
        """Mean score over the cells of one attention; None if it was not measured."""
        return mean_score(self.cells, attention)


def _routing_of_sample(
    scores: RowScores, sample: NeedleSample, queries: slice, *, first_chunk: int, stage: StageConfig
) -> tuple[float | None, float | None]:
    """(routed, expected at random), means over MoBA layers; (None, None) where no layer routes.

    `queries` is the sample's part of the row's query positions.
    """
    if not scores.picks:
        return None, None
    chunks = token_chunks(sample.value_start, sample.value_end, chunk_size=stage.chunk_size)
    layers = [routed_share(picks[queries], chunks, first_chunk=first_chunk) for picks in scores.picks.values()]
    asked = range(sample.answer_start - 1, sample.answer_end - 1)
    expected = expected_share(asked, chunks, chunk_size=stage.chunk_size, topk=stage.topk)
    return float(np.mean(layers)), expected


def _score_group(engine: Engine, group: Sequence[Job], samples: Samples, origin: Origin) -> list[NiahRecord]:
    """Score one row of samples; collective over the context-parallel group."""
    built = [samples.build(job.length, job.depth_percent, job.sample) for job in group]
    row = pack_samples(built, sample_id=int(group[0].sample_hash[:8], 16))  # random routing differs from row to row
    asked = [
        range(start + sample.answer_start - 1, start + sample.answer_end - 1)
        for start, sample in zip(row.cu_seqlens, built, strict=False)
    ]
    scores = engine.score(row, attention=group[0].attention, query_positions=[p for part in asked for p in part])
    records, first_query, first_chunk = [], 0, 0
    for job, sample, part in zip(group, built, asked, strict=True):
        queries = slice(first_query, first_query + len(part))
        routed, expected = _routing_of_sample(scores, sample, queries, first_chunk=first_chunk, stage=origin.stage)
        records.append(_record(job, sample, scores, np.asarray(part), routed, expected, samples.tokenizer, origin))
        first_query = queries.stop
        first_chunk += -(-job.length // origin.stage.chunk_size)
    return records


def _record(
    job: Job,
    sample: NeedleSample,
    scores: RowScores,
    positions: NDArray[np.int64],
    routed: float | None,
    routed_expected: float | None,
    tokenizer: Tokenizer,
    origin: Origin,
) -> NiahRecord:
    stage = origin.stage
    answer = sample.tokens[sample.answer_start : sample.answer_end]
    response = scores.argmax_S[positions]
    return NiahRecord(
        context_length=job.length,
        depth_percent=job.depth_percent,
        sample=job.sample,
        attention=job.attention,
        score=float(np.array_equal(response, answer)),
        log_prob=float(scores.log_prob_S[positions].astype(np.float64).mean()),
        routed=routed,
        routed_expected=routed_expected,
        dense=job.attention != "full" and is_dense(job.length, chunk_size=stage.chunk_size, topk=stage.topk),
        model_response=tokenizer.decode([int(token) for token in response]).strip(),
        expected=sample.value,
        key=sample.key,
        needle_chunk=sample.value_start // stage.chunk_size,
        needle_offset=sample.needle_start % stage.chunk_size,
        needle_tokens=sample.needle_end - sample.needle_start,
        chunk_size=stage.chunk_size,
        topk=stage.topk,
        select=stage.select,
        step=origin.step,
        weights=origin.weights,
        stage=stage.name,
        seed=origin.seed,
        sample_hash=job.sample_hash,
        function=origin.function,
    )


def _identity(job: Job, origin: Origin) -> tuple[object, ...]:
    """`NiahRecord.identity` of the record that `job` will give."""
    stage = origin.stage
    name = (job.attention, job.length, job.depth_percent, job.sample, job.sample_hash)
    settings = (stage.chunk_size, stage.topk, stage.select, origin.function, origin.weights, stage.name, origin.seed)
    return (*name, *settings)


def _remaining(jobs: Sequence[Job], jsonl: Path, origin: Origin) -> tuple[list[Job], list[NiahRecord]]:
    """(jobs that are left to do, records of the others) after an earlier call that was interrupted."""
    wanted = {_identity(job, origin) for job in jobs}
    done = [record for record in read_records(jsonl) if record.identity in wanted]
    finished = {record.identity for record in done}
    return [job for job in jobs if _identity(job, origin) not in finished], done


def _score_jobs(
    engine: Engine, jobs: Sequence[Job], samples: Samples, origin: Origin, row_tokens: int
) -> Iterator[list[NiahRecord]]:
    """Records in job order, one row per data-parallel rank at a time; the same on every rank."""
    groups = share_rows(jobs, row_tokens)
    dp = engine.topology.dp
    for first in range(0, len(groups), dp):
        parts = map_over_ranks(
            lambda group: _score_group(engine, group, samples, origin), groups[first : first + dp], engine.topology
        )
        yield [record for part in parts for record in part]


def run_niah(
    engine: Engine,
    text: NeedleText,
    haystack: NDArray[np.int64],
    *,
    stage: StageConfig,
    step: int,
    weights: str,
    lengths: Sequence[int],
    depths: int,
    samples: int,
    out_dir: Path,
    seed: int,
    attentions: Sequence[AttentionMode] = ("moba", "full", "random"),
    row_tokens: int = 0,
    function: str = "",
    progress: Progress | None = None,
) -> NiahResult:
    """Measure the grid lengths x depths and write niah.jsonl and niah.png into `out_dir`. Collective over all ranks.

    Samples that niah.jsonl already holds for the same weights, stage, function, seed and tokens are not scored again.

    Args:
        text: the needle's wording in the tokenizer's ids.
        haystack: int64 [n], held-out text (`moba_train.data.needles.haystack_of`).
        stage: the stage that the engine is in; its chunk_size and topk are what "moba" and "random" run with.
        step, weights: what is evaluated: the step of the checkpoint, and a fingerprint of its content.
        depths: number of depths, evenly spaced from 0 to 100 percent.
        samples: per cell.
        row_tokens: samples of one length share rows of at most this many tokens; 0 = stage.seq_len.
        function: names what else the engine computes with (`NiahRecord.function`).

    Raises:
        ConfigError: the grid is empty or out of range.
        DataError: a sample cannot be built at that length, or niah.jsonl is damaged before its last line.
    """
    grid = depth_grid(depths)
    check_grid(lengths, grid, samples)
    origin, source = Origin(step, weights, stage, seed, function), Samples(text, haystack, seed)
    jsonl, png = out_dir / "niah.jsonl", out_dir / "niah.png"
    jobs, records = from_rank_0(lambda: _remaining(source.jobs(lengths, grid, samples, attentions), jsonl, origin))
    is_writer = engine.topology.rank == 0
    num_resumed, total = len(records), len(jobs) + len(records)
    writer = RecordWriter(jsonl) if is_writer else None
    try:
        for part in _score_jobs(engine, jobs, source, origin, row_tokens or stage.seq_len):
            records.extend(part)
            if writer is not None:
                writer.write(part)
                if progress is not None:
                    progress(len(records), total)
    finally:
        if writer is not None:
            writer.close()
    order = [str(attention) for attention in attentions]
    records.sort(key=lambda r: (order.index(r.attention), r.context_length, r.depth_percent, r.sample))
    cells = summarise(records)
    if is_writer:
        from moba_train.eval.heatmap import draw_niah  # matplotlib is slow to import, and training never draws

        draw_niah(cells, png, title=heatmap_title(origin))
    return NiahResult(tuple(records), cells, num_resumed, jsonl, png)


def heatmap_title(origin: Origin) -> str:
    """What was measured, in one line."""
    stage = origin.stage
    return f"stage {stage.name}, step {origin.step}: chunk_size {stage.chunk_size}, topk {stage.topk}"


def niah_summary(
    engine: Engine,
    text: NeedleText,
    haystack: NDArray[np.int64],
    *,
    stage: StageConfig,
    lengths: Sequence[int],
    depths: int,
    samples: int,
    seed: int,
    attentions: Sequence[AttentionMode] = ("moba", "full"),
) -> dict[str, float]:
    """The small form for the training loop: the middle depths of the grid, no files. Collective over all ranks.

    Returns:
        "eval/niah_<attention>" (mean score over cells), "eval/niah_log_prob_<attention>" and, where layers route,
        "eval/niah_routed_<attention>" and "eval/niah_routed_expected_<attention>".
    """
    grid = middle_depths(depths)
    check_grid(lengths, grid, samples)
    origin = Origin(step=0, weights="in training", stage=stage, seed=seed)
    source = Samples(text, haystack, seed)
    jobs = source.jobs(lengths, grid, samples, attentions)
    records = [r for part in _score_jobs(engine, jobs, source, origin, stage.seq_len) for r in part]
    metrics: dict[str, float] = {}
    for attention in attentions:
        cells = [cell for cell in summarise(records) if cell.attention == attention]
        metrics[f"eval/niah_{attention}"] = float(np.mean([cell.score for cell in cells]))
        metrics[f"eval/niah_log_prob_{attention}"] = float(np.mean([cell.log_prob for cell in cells]))
        routed = [
            (c.routed, c.routed_expected) for c in cells if c.routed is not None and c.routed_expected is not None
        ]
        if routed:
            metrics[f"eval/niah_routed_{attention}"] = float(np.mean([share for share, _ in routed]))
            metrics[f"eval/niah_routed_expected_{attention}"] = float(np.mean([share for _, share in routed]))
    return metrics
