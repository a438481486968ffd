"""An engine that is a formula: it copies the answer in documents that a rule picks, and routes to known chunks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from moba_train.data.row import Row
from moba_train.engine.base import RowScores

COPIED, FAILED = -0.25, -3.0
"""Log-probability of every label of a document that is copied, and of one that is not."""


def one_rank() -> Any:
    return SimpleNamespace(rank=0, world_size=1, dp=1, dp_rank=0, device=None)


def copied_share(attention: str) -> float:
    """Share of documents whose answer the toy engine copies."""
    return {"moba": 0.5, "full": 1.0, "random": 0.0}[attention]


def is_copied(tokens: np.ndarray, attention: str) -> bool:
    """The rule: a hash of the document's tokens, so that packing and order cannot matter."""
    return hashlib.sha256(tokens.astype(np.int64).tobytes()).digest()[0] < 256 * copied_share(attention)


@dataclass
class ToyEngine:
    """Scores rows by `is_copied`; MoBA has two layers of two heads, and only head 0 of layer 0 looks for the needle."""

    chunk_size: int
    topology: Any = field(default_factory=one_rank)
    fail_after: int = 10**9
    rows: list[tuple[Row, str]] = field(default_factory=list)

    def score(self, row: Row, *, attention: str = "stage", query_positions: Sequence[int] = ()) -> RowScores:
        if len(self.rows) >= self.fail_after:
            raise KeyboardInterrupt
        self.rows.append((row, attention))
        log_prob = np.full(row.tokens_S.size, FAILED, dtype=np.float32)
        argmax = np.zeros(row.tokens_S.size, dtype=np.int64)
        for start, end in zip(row.cu_seqlens, row.cu_seqlens[1:], strict=False):
            if is_copied(row.tokens_S[start:end], attention):
                log_prob[start:end] = COPIED
                argmax[start:end] = row.labels_S[start:end]
        picks = {} if attention == "full" else {0: self._picks(row, query_positions, finds=True)}
        if picks:
            picks[1] = self._picks(row, query_positions, finds=False)
        return RowScores(log_prob, argmax, picks)

    def _picks(self, row: Row, query_positions: Sequence[int], *, finds: bool) -> np.ndarray:
        """int32 [Q, 2, 3]: the own chunk, and for head 0 the chunk of the first token equal to the asked-for one."""
        picks = np.full((len(query_positions), 2, 3), -1, dtype=np.int32)
        first_chunk = 0
        for start, end in zip(row.cu_seqlens, row.cu_seqlens[1:], strict=False):
            for i, position in enumerate(query_positions):
                if start <= position < end:
                    picks[i, :, 0] = first_chunk + (position - start) // self.chunk_size
                    document = row.tokens_S[start : position + 1].tolist()
                    if finds:
                        picks[i, 0, 1] = first_chunk + document.index(row.labels_S[position]) // self.chunk_size
            first_chunk += -(-(end - start) // self.chunk_size)
        return picks


@dataclass
class FormulaEngine:
    """Its loss is a function of the position inside the document, and of the attention."""

    loss: Callable[[np.ndarray, str], np.ndarray]
    topology: Any = field(default_factory=one_rank)

    def score(self, row: Row, *, attention: str = "stage", query_positions: Sequence[int] = ()) -> RowScores:
        parts = [np.arange(b - a) for a, b in zip(row.cu_seqlens, row.cu_seqlens[1:], strict=False)]
        log_prob = -self.loss(np.concatenate(parts), attention).astype(np.float32)
        return RowScores(log_prob, np.zeros(row.tokens_S.size, dtype=np.int64))
