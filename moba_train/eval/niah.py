"""Needle in a haystack: does the model read one sentence out of a long context, at every depth, under every attention?

Samples are built at token level, so a context length is exact (`moba_train.data.needles`). The model is teacher-forced:
one forward pass gives the arg-max and the log-probability of every answer token, so that a small or half-trained model
shows a gradient where free generation would show zeros. Samples of one length are packed as documents of one row:
attention never crosses documents, so packing changes the speed and not the scores.

Under "moba" and "random" every sample also tells how many (MoBA layer, head) pairs had the needle's chunk among their
picks when they produced the answer, beside the share that uniformly random picks would reach.

Every rank calls these functions; rank 0 alone reads and writes files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moba_train.config.schema import StageConfig
from moba_train.data.needles import NeedleSample, build_niah_sample
from moba_train.data.row import Row
from moba_train.errors import ConfigError
from moba_train.eval.cells import (
    Cell,
    NiahRecord,
    depth_grid,
    expected_share,
    is_dense,
    mean_score,
    middle_depths,
    needle_chunks,
    routed_share,
    summarise,
)
from moba_train.eval.heatmap import draw_niah
from moba_train.eval.ranks import from_rank0, map_over_ranks
from moba_train.eval.records import RecordWriter, read_records

if TYPE_CHECKING:
    from moba_train.data.tokenizer import Tokenizer
    from moba_train.engine.base import AttentionMode, Engine, RowScores

Progress = Callable[[int, int], None]
"""Called on rank 0 with (samples done, samples in all), resumed ones included."""


@dataclass(frozen=True)
class Origin:
    """What every record of a run of the grid has in common: the weights and the samples' seed."""

    step: int
    stage: StageConfig
    seed: int


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


@dataclass(frozen=True)
class _Job:
    """One sample under one attention, named so that any rank can build it."""

    attention: AttentionMode
    length: int
    depth_percent: float
    sample: int
    sample_hash: str


class _Samples:
    """Builds samples by name: a pure function of (seed, length, depth, sample)."""

    def __init__(self, tokenizer: Tokenizer, haystack_ids: NDArray[np.integer], seed: int) -> None:
        self.tokenizer = tokenizer
        self._haystack_ids = haystack_ids
        self._seed = seed

    def build(self, length: int, depth_percent: float, sample: int) -> NeedleSample:
        return build_niah_sample(
            self.tokenizer,
            self._haystack_ids,
            length=length,
            depth_percent=depth_percent,
            seed=sample_seed(self._seed, length, depth_percent, sample),
        )

    def jobs(
        self, lengths: Sequence[int], depths: Sequence[float], samples: int, attentions: Sequence[AttentionMode]
    ) -> list[_Job]:
        """Every job of the grid; the samples of one length and attention follow one another, ready to be packed."""
        jobs: list[_Job] = []
        for length in lengths:
            names = [(depth, i) for depth in depths for i in range(samples)]
            hashes = [hashlib.sha256(self.build(length, *name).tokens.tobytes()).hexdigest()[:16] for name in names]
            for attention in attentions:
                jobs.extend(_Job(attention, length, *name, digest) for name, digest in zip(names, hashes, strict=True))
        return jobs


def sample_seed(seed: int, length: int, depth_percent: float, sample: int) -> int:
    """A 63-bit seed that differs for every sample of every cell (SHA-256 of its name)."""
    name = f"{seed}/{length}/{depth_percent:.2f}/{sample}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def _check_grid(lengths: Sequence[int], depths: Sequence[float], samples: int) -> None:
    wrong = [length for length in lengths if length < 1]
    outside = [depth for depth in depths if not 0 <= depth <= 100]
    if not lengths or not depths or samples < 1 or wrong or outside:
        raise ConfigError(
            "the needle grid is not usable",
            where="niah.lengths, niah.depths, niah.samples",
            got=f"lengths {list(lengths)}, depths {list(depths)}, {samples} samples",
            allowed="lengths >= 1, depths from 0 to 100 percent, at least one sample",
            fix="correct the grid in [niah] or on the command line",
        )


def _groups(jobs: Sequence[_Job], row_tokens: int) -> list[list[_Job]]:
    """Jobs that share a row: one attention, one length, at most max(1, row_tokens // length) samples."""
    groups: list[list[_Job]] = []
    for job in jobs:
        last = groups[-1] if groups else []
        same = bool(last) and (last[0].attention, last[0].length) == (job.attention, job.length)
        if same and len(last) < max(1, row_tokens // job.length):
            last.append(job)
        else:
            groups.append([job])
    return groups


def pack_samples(samples: Sequence[NeedleSample], *, sample_id: int = 0) -> Row:
    """One row whose documents are the samples, in order, without padding."""
    rows = [sample.to_row() for sample in samples]
    bounds = np.cumsum([0, *(len(row.tokens_S) for row in rows)])
    return Row(
        tokens_S=np.concatenate([row.tokens_S for row in rows]),
        labels_S=np.concatenate([row.labels_S for row in rows]),
        loss_mask_S=np.concatenate([row.loss_mask_S for row in rows]),
        cu_seqlens=tuple(int(bound) for bound in bounds),
        source="niah",
        sample_id=sample_id,
    )


def _routing_of_sample(
    scores: RowScores, sample: NeedleSample, queries: slice, *, first_chunk: int, stage: StageConfig
) -> tuple[float | None, float | None]:
    """(routed, expected at random), means over MoBA layers; (None, None) where no layer routes.

    `queries` is the sample's part of the row's query positions.
    """
    if not scores.picks:
        return None, None
    chunks = needle_chunks(sample.needle_start, sample.needle_end, chunk_size=stage.chunk_size)
    layers = [routed_share(picks[queries], chunks, first_chunk=first_chunk) for picks in scores.picks.values()]
    asked = range(sample.answer_start - 1, sample.answer_end - 1)
    expected = expected_share(asked, chunks, chunk_size=stage.chunk_size, topk=stage.topk)
    return float(np.mean(layers)), expected


def _score_group(engine: Engine, group: Sequence[_Job], samples: _Samples, origin: Origin) -> list[NiahRecord]:
    """Score one row of samples; collective over the context-parallel group."""
    built = [samples.build(job.length, job.depth_percent, job.sample) for job in group]
    row = pack_samples(built, sample_id=group[0].sample)
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
    job: _Job,
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
        model_response=tokenizer.decode([int(token) for token in response]),
        expected=sample.value,
        key=sample.key,
        needle_chunk=sample.needle_start // stage.chunk_size,
        needle_offset=sample.needle_start % stage.chunk_size,
        needle_tokens=sample.needle_end - sample.needle_start,
        chunk_size=stage.chunk_size,
        topk=stage.topk,
        select=stage.select,
        step=origin.step,
        stage=stage.name,
        seed=origin.seed,
        sample_hash=job.sample_hash,
    )


def _identity(job: _Job, origin: Origin) -> tuple[object, ...]:
    """`NiahRecord.identity` of the record that `job` will give."""
    stage = origin.stage
    name = (job.attention, job.length, job.depth_percent, job.sample, job.sample_hash)
    return (*name, stage.chunk_size, stage.topk, stage.select, origin.step, stage.name, origin.seed)


def _score_jobs(
    engine: Engine, jobs: Sequence[_Job], samples: _Samples, origin: Origin, row_tokens: int
) -> Iterator[list[NiahRecord]]:
    """Records in job order, one row per data-parallel rank at a time; the same on every rank."""
    groups = _groups(jobs, row_tokens)
    dp = engine.topology.dp
    for first in range(0, len(groups), dp):
        parts = map_over_ranks(
            lambda group: _score_group(engine, group, samples, origin), groups[first : first + dp], engine.topology
        )
        yield [record for part in parts for record in part]


def run_niah(
    engine: Engine,
    tokenizer: Tokenizer,
    haystack_ids: NDArray[np.integer],
    *,
    stage: StageConfig,
    step: int,
    lengths: Sequence[int],
    depths: int,
    samples: int,
    out_dir: Path,
    seed: int,
    attentions: Sequence[AttentionMode] = ("moba", "full", "random"),
    row_tokens: int = 0,
    progress: Progress | None = None,
) -> NiahResult:
    """Measure the grid lengths x depths and write niah.jsonl and niah.png into `out_dir`. Collective over all ranks.

    Samples that niah.jsonl already holds for the same weights (`step`), stage, seed and tokens are not scored again.

    Args:
        haystack_ids: int [N], token ids of held-out documents.
        stage: the stage that the engine is in; its chunk_size and topk are what "moba" and "random" run with.
        depths: number of depths, evenly spaced from 0 to 100 percent.
        samples: per cell.
        row_tokens: samples of one length share rows of at most this many tokens; 0 = stage.seq_len.

    Raises:
        ConfigError: the grid is empty or out of range.
        DataError: a sample cannot be built at that length, or niah.jsonl is damaged before its last line.
    """
    grid = depth_grid(depths) if depths >= 1 else ()
    _check_grid(lengths, grid, samples)
    origin = Origin(step=step, stage=stage, seed=seed)
    source = _Samples(tokenizer, haystack_ids, seed)
    jsonl, png = out_dir / "niah.jsonl", out_dir / "niah.png"

    def plan() -> tuple[list[_Job], list[NiahRecord]]:
        jobs = source.jobs(lengths, grid, samples, attentions)
        wanted = {_identity(job, origin) for job in jobs}
        done = [record for record in read_records(jsonl) if record.identity in wanted]
        finished = {record.identity for record in done}
        return [job for job in jobs if _identity(job, origin) not in finished], done

    is_writer = engine.topology.rank == 0
    jobs, records = from_rank0(plan, engine.topology)
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
    order = {attention: i for i, attention in enumerate(attentions)}
    records.sort(key=lambda r: (order[r.attention], r.context_length, r.depth_percent, r.sample))  # type: ignore[index]
    cells = summarise(records)
    if is_writer:
        draw_niah(cells, png, title=heatmap_title(origin))
    return NiahResult(records=tuple(records), cells=cells, num_resumed=num_resumed, jsonl=jsonl, png=png)


def heatmap_title(origin: Origin) -> str:
    """What was measured, in one line."""
    stage = origin.stage
    return f"stage {stage.name}, step {origin.step}: chunk_size {stage.chunk_size}, topk {stage.topk}"


def niah_summary(
    engine: Engine,
    tokenizer: Tokenizer,
    haystack_ids: NDArray[np.integer],
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
    grid = middle_depths(depths) if depths >= 1 else ()
    _check_grid(lengths, grid, samples)
    origin = Origin(step=0, stage=stage, seed=seed)
    source = _Samples(tokenizer, haystack_ids, seed)
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
