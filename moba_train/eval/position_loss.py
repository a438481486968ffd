"""Held-out loss by position, on the trailing sixteenth, and in bits per byte, under MoBA and under full attention.

A token's *position* is counted inside its document, because that is the context it can attend to: token 5 of the third
document of a row has position 5, like RoPE and the attention see it. Buckets divide [0, seq_len) evenly. The trailing
sixteenth holds positions from seq_len * 15/16 on (the trailing loss of arXiv 2502.13189, section 3.1): it exists only
where held-out documents are about as long as the row.

Legend: S tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from moba_train.data.row import Row
from moba_train.errors import ConfigError
from moba_train.parallel.ranks import map_over_ranks

if TYPE_CHECKING:
    from moba_train.engine.base import AttentionMode, Engine


class Rows(Protocol):
    """Held-out rows; `moba_train.data.valid.ValidRows` is one."""

    def __len__(self) -> int: ...

    def row(self, i: int) -> Row: ...


@dataclass(frozen=True)
class PositionLoss:
    """Held-out loss under one attention.

    Attributes:
        loss: mean negative log-likelihood per counted token, in nats; NaN if no token counts.
        trailing_loss: the same over the trailing sixteenth; None if no token lies there.
        bits_per_byte: total negative log-likelihood in bits divided by the bytes of the counted tokens' text; None if
            bytes were not asked for.
        edges: bucket b covers positions edges[b] <= position < edges[b + 1].
        bucket_loss: mean per bucket, None for an empty one.
        bucket_tokens: counted tokens per bucket.
    """

    loss: float
    trailing_loss: float | None
    bits_per_byte: float | None
    edges: tuple[int, ...]
    bucket_loss: tuple[float | None, ...]
    bucket_tokens: tuple[int, ...]


def document_positions(cu_seqlens: Sequence[int]) -> NDArray[np.int64]:
    """int64 [S]: the position of every token of a row inside its document."""
    bounds = np.asarray(cu_seqlens, dtype=np.int64)
    lengths = np.diff(bounds)
    return np.arange(bounds[-1], dtype=np.int64) - np.repeat(bounds[:-1], lengths)


def bucket_edges(seq_len: int, buckets: int) -> tuple[int, ...]:
    """`buckets` + 1 rising edges from 0 to seq_len; fewer buckets if the row has fewer tokens."""
    count = min(buckets, seq_len)
    return tuple(seq_len * i // count for i in range(count + 1))


def trailing_start(seq_len: int) -> int:
    """First position of the trailing sixteenth."""
    return seq_len - max(1, seq_len // 16)


def has_trailing_tokens(row: Row) -> bool:
    """Some token of the row counts in the trailing sixteenth."""
    counted_S = row.loss_mask_S > 0
    return bool((document_positions(row.cu_seqlens)[counted_S] >= trailing_start(row.loss_mask_S.size)).any())


def _row_sums(row: Row, log_prob_S: NDArray[np.float32], edges: tuple[int, ...]) -> NDArray[np.float64]:
    """float64 [buckets + 1, 2]: summed loss and counted tokens per bucket; the last line is the trailing part."""
    position_S = document_positions(row.cu_seqlens)
    counted_S = row.loss_mask_S > 0
    position, loss = position_S[counted_S], -log_prob_S.astype(np.float64)[counted_S]
    num_buckets = len(edges) - 1
    bucket = np.clip(np.searchsorted(edges, position, side="right") - 1, 0, num_buckets - 1)
    tail = position >= trailing_start(edges[-1])
    sums = np.zeros((num_buckets + 1, 2), dtype=np.float64)
    sums[:-1, 0] = np.bincount(bucket, weights=loss, minlength=num_buckets)
    sums[:-1, 1] = np.bincount(bucket, minlength=num_buckets)
    sums[-1] = loss[tail].sum(), tail.sum()
    return sums


def evaluate_position_loss(
    engine: Engine,
    rows: Rows,
    *,
    num_rows: int,
    seq_len: int,
    buckets: int,
    attention: AttentionMode,
    count_bytes: Callable[[Row], int] | None = None,
) -> PositionLoss:
    """Score the first `num_rows` rows (all, if there are fewer) under `attention`. Collective over all ranks.

    Sums run in row order in fp64, so the result does not depend on the number of data-parallel ranks.

    Args:
        count_bytes: bytes of UTF-8 text that the counted labels of a row stand for; None leaves bits per byte out.

    Raises:
        ConfigError: no rows or no buckets were asked for, or there are none.
    """
    count = min(num_rows, len(rows))
    if count < 1 or buckets < 1:
        raise ConfigError(
            "held-out evaluation needs at least one row and one bucket",
            where="eval.rows, eval.buckets",
            got=f"{num_rows} rows of {len(rows)}, {buckets} buckets",
            allowed=">= 1",
            fix="raise eval.rows and eval.buckets, or give data.valid more text",
        )
    edges = bucket_edges(seq_len, buckets)

    def measure(i: int) -> tuple[NDArray[np.float64], int]:
        row = rows.row(i)
        scores = engine.score(row, attention=attention)
        return _row_sums(row, scores.log_prob_S, edges), count_bytes(row) if count_bytes is not None else 0

    measured = map_over_ranks(measure, range(count), engine.topology)
    sums = np.sum([row_sums for row_sums, _ in measured], axis=0)
    num_bytes = sum(row_bytes for _, row_bytes in measured)
    total, tokens = sums[:-1].sum(axis=0)
    return PositionLoss(
        loss=float(total / tokens) if tokens else math.nan,
        trailing_loss=float(sums[-1, 0] / sums[-1, 1]) if sums[-1, 1] else None,
        bits_per_byte=float(total / math.log(2) / num_bytes) if num_bytes else None,
        edges=edges,
        bucket_loss=tuple(float(s / n) if n else None for s, n in sums[:-1]),
        bucket_tokens=tuple(int(n) for _, n in sums[:-1]),
    )


def position_metrics(
    engine: Engine,
    rows: Rows,
    *,
    num_rows: int,
    seq_len: int,
    buckets: int,
    attentions: Sequence[AttentionMode] = ("moba", "full"),
    count_bytes: Callable[[Row], int] | None = None,
    unigram_bits_per_byte: float | None = None,
) -> dict[str, float | list[float | None]]:
    """The `eval/*` entries of metrics.jsonl from `evaluate_position_loss` under each of `attentions`.

    Keys whose number is not known (no token in the trailing sixteenth, no bytes) are absent; an empty bucket is None.
    """
    metrics: dict[str, float | list[float | None]] = {}
    for attention in attentions:
        result = evaluate_position_loss(
            engine,
            rows,
            num_rows=num_rows,
            seq_len=seq_len,
            buckets=buckets,
            attention=attention,
            count_bytes=count_bytes,
        )
        metrics[f"eval/loss_{attention}"] = result.loss
        if result.trailing_loss is not None:
            metrics[f"eval/trailing_loss_{attention}"] = result.trailing_loss
        if result.bits_per_byte is not None:
            metrics[f"eval/bits_per_byte_{attention}"] = result.bits_per_byte
        metrics[f"eval/position_loss_{attention}"] = list(result.bucket_loss)
        metrics["eval/position_edges"] = [float(edge) for edge in result.edges]
    if unigram_bits_per_byte is not None:
        metrics["eval/bits_per_byte_unigram"] = unigram_bits_per_byte
    return metrics
