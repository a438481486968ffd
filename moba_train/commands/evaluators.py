"""The evaluations that run inside the training loop: held-out loss by position, and a small needle grid.

Each evaluator is called after every step with (finished steps, stage name, end of a stage?) and answers with `eval/*`
numbers, or with nothing when it is not due. Every rank calls it. The held-out loss comes first: `until` may end a stage
by it, and the other one then takes place as at the end of any stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from moba_train.config.schema import EvalConfig, NiahConfig, RunConfig, StageConfig
from moba_train.data.indexed import IndexedDocuments, open_indexed
from moba_train.data.needles import NeedleText, build_niah_sample, haystack_of, load_words
from moba_train.data.tokenizer import Tokenizer
from moba_train.data.valid import ValidRows, count_bytes, unigram_bits_per_byte
from moba_train.engine.base import Engine
from moba_train.errors import DataError
from moba_train.eval.niah import niah_summary
from moba_train.eval.position_loss import has_trailing_tokens, position_metrics
from moba_train.train.step import Evaluator
from moba_train.train.until import no_trailing_loss


def build_evaluators(config: RunConfig, engine: Engine, tokenizer: Tokenizer) -> tuple[Evaluator, ...]:
    """The evaluators that the configuration asks for; rank 0 prints where there are fewer held-out rows than that.

    Everything that could fail for lack of held-out text fails here, and not after hours of training.

    Raises:
        DataError: the held-out source is too short for a row, or for a needle sample of some length; no token of the
            rows that are scored counts, or none in trailing positions where a stage watches them.
    """
    evaluators: list[Evaluator] = []
    if config.eval.rows > 0:
        position = PositionEvaluator(config, engine, tokenizer)
        evaluators.append(position)
        for line in position.missing_rows if engine.topology.is_first_rank else ():
            print(line, flush=True)
    if config.niah.loop_samples > 0:
        evaluators.append(NiahEvaluator(config, engine, tokenizer))
    return tuple(evaluators)


class PositionEvaluator:
    """Held-out loss by position, on the trailing sixteenth, and in bits per byte, under MoBA and full attention."""

    def __init__(self, config: RunConfig, engine: Engine, tokenizer: Tokenizer) -> None:
        self._eval: EvalConfig = config.eval
        self._engine = engine
        self._tokenizer = tokenizer
        self._seq_len_of_stage = {stage.name: stage.seq_len for stage in config.stages}
        self._rows = {
            seq_len: ValidRows(config.data.valid, seq_len=seq_len, eod_id=tokenizer.eod_id, pad_id=tokenizer.pad_id)
            for seq_len in set(self._seq_len_of_stage.values())
        }
        self._training_text = open_indexed(text_source(config))
        self._unigram: dict[int, float] = {}
        self._check_rows(config)

    @property
    def missing_rows(self) -> tuple[str, ...]:
        """A line for each length of rows of which there are fewer than are asked for."""
        return tuple(
            f"held-out: {len(rows):,} row(s) of {seq_len:,} tokens are all there are (eval.rows {self._eval.rows:,})"
            for seq_len, rows in sorted(self._rows.items())
            if len(rows) < self._eval.rows
        )

    def is_due(self, step: int, is_stage_end: bool) -> bool:
        """See `Evaluator`."""
        return is_due(step, self._eval.every_steps, is_stage_end)

    def __call__(self, step: int, stage_name: str, is_stage_end: bool) -> dict[str, Any]:
        if not self.is_due(step, is_stage_end):
            return {}
        seq_len = self._seq_len_of_stage[stage_name]
        return position_metrics(
            self._engine,
            self._rows[seq_len],
            num_rows=self._eval.rows,
            seq_len=seq_len,
            buckets=self._eval.buckets,
            count_bytes=partial(count_bytes, self._tokenizer),
            unigram_bits_per_byte=self._baseline(seq_len),
        )

    def _check_rows(self, config: RunConfig) -> None:
        """DataError where held-out rows have no token that counts, or none where a stage watches the loss."""
        for stage in config.stages:
            rows = self._rows[stage.seq_len]
            scored = range(min(self._eval.rows, len(rows)))
            if not any(rows.row(i).loss_mask_S.any() for i in scored):
                raise _nothing_counts(config, stage, len(scored))
            if stage.until.trailing_gap > 0 and not any(has_trailing_tokens(rows.row(i)) for i in scored):
                raise no_trailing_loss(stage, f"the first {len(scored)} held-out rows of {config.data.valid.path}")

    def _baseline(self, seq_len: int) -> float:
        """Bits per byte of a unigram model of the training text, on the rows that are evaluated."""
        if seq_len not in self._unigram:
            rows = self._rows[seq_len]
            scored = (rows.row(i) for i in range(min(self._eval.rows, len(rows))))
            self._unigram[seq_len] = unigram_bits_per_byte(self._tokenizer, self._training_text, scored)
        return self._unigram[seq_len]


def _nothing_counts(config: RunConfig, stage: StageConfig, num_rows: int) -> DataError:
    return DataError(
        f"no held-out token of stage '{stage.name}' counts: there is no loss to tell",
        where=f"data.valid = {config.data.valid.path}",
        got=f"loss masks of nothing but zeros in its first {num_rows} row(s) of {stage.seq_len:,} tokens",
        fix="raise eval.rows, hold out other documents, or set eval.rows = 0",
    )


class NiahEvaluator:
    """Needle in a haystack at the middle depths, a few samples per cell, under MoBA and under full attention."""

    def __init__(self, config: RunConfig, engine: Engine, tokenizer: Tokenizer) -> None:
        self._niah: NiahConfig = config.niah
        self._engine = engine
        self._text = NeedleText(tokenizer, load_words())
        self._seed = config.run.seed
        self._stages = {stage.name: stage for stage in config.stages}
        documents: IndexedDocuments = open_indexed(config.data.valid.path)
        self._haystack_ids = haystack_of(documents, eod_id=tokenizer.eod_id, begin_ids=tokenizer.begin_ids)
        for length in self._niah.lengths:
            build_niah_sample(self._text, self._haystack_ids, length=length, depth_percent=50.0, seed=self._seed)

    def is_due(self, step: int, is_stage_end: bool) -> bool:
        """See `Evaluator`."""
        return is_due(step, self._niah.every_steps, is_stage_end)

    def __call__(self, step: int, stage_name: str, is_stage_end: bool) -> dict[str, Any]:
        if not self.is_due(step, is_stage_end):
            return {}
        return dict(
            niah_summary(
                self._engine,
                self._text,
                self._haystack_ids,
                stage=self._stages[stage_name],
                lengths=self._niah.lengths,
                depths=self._niah.depths,
                samples=self._niah.loop_samples,
                seed=self._seed,
            )
        )


def is_due(step: int, every_steps: int, stage_end: bool) -> bool:
    """At the end of every stage, and every `every_steps` finished steps (0 = never in between)."""
    return stage_end or (every_steps > 0 and step % every_steps == 0)


def text_source(config: RunConfig) -> str:
    """Path prefix of the training source that the unigram baseline is counted on: the first that is plain text.

    Needle documents come whole ("packing" = "whole") and are no plain text; a run of nothing else is measured on them.
    """
    sources: Sequence[Any] = tuple(config.data.sources.values())
    plain = [source for source in sources if source.packing == "split"]
    return str((plain or sources)[0].path)
