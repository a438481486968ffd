"""Held-out rows for evaluation: documents in the order of the file, cut into rows of seq_len tokens; never shuffled.

Also what turns a loss into bits per byte, a measure that does not depend on the tokenizer: the bytes that the counted
labels stand for, and a unigram model of the training tokens as the baseline to beat.

Legend: S tokens of a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from moba_train.config.schema import SourceConfig
from moba_train.data.assemble import row_of_stream
from moba_train.data.indexed import IndexedDocuments, open_indexed
from moba_train.data.row import Row
from moba_train.data.row_index import DocumentStream, build_row_starts
from moba_train.data.tokenizer import Tokenizer
from moba_train.errors import DataError


class ValidRows:
    """Rows of the held-out source; the tokens behind the last whole row are left out.

    Raises:
        DataError: the source is missing or damaged, or has less than one row.
    """

    def __init__(self, valid: SourceConfig, *, seq_len: int, eod_id: int, pad_id: int) -> None:
        self.documents = open_indexed(valid.path)
        self.seq_len = seq_len
        self._eod_id, self._pad_id = eod_id, pad_id
        self._stream = DocumentStream(
            "valid", self.documents.num_documents, self.documents.sizes, valid.min_doc_tokens, ""
        )
        sizes = self._stream.sizes(np.arange(self.documents.num_documents, dtype=np.int64))
        self._num_rows = int(sizes.sum()) // seq_len
        if self._num_rows == 0:
            raise DataError(
                "the held-out source has less than one row",
                where=f"data.valid = {valid.path}",
                got=f"{int(sizes.sum())} tokens in documents of at least {valid.min_doc_tokens}",
                allowed=f">= seq_len = {seq_len}",
                fix="prepare more held-out text (`moba-train prep --held-out`), or lower data.valid.min_doc_tokens",
            )
        self._starts = build_row_starts(self._stream, packing="split", seq_len=seq_len, num_rows=self._num_rows).starts

    def __len__(self) -> int:
        """Whole rows of the held-out source."""
        return self._num_rows

    def row(self, i: int) -> Row:
        """Row i, 0 <= i < len; source "valid".

        Raises:
            IndexError: outside.
        """
        if not 0 <= i < self._num_rows:
            raise IndexError(f"row {i} of {self._num_rows}")
        (first, offset), (last, end) = self._starts[i].tolist(), self._starts[i + 1].tolist()
        return row_of_stream(
            self.documents,
            self._stream,
            (first, offset),
            (last, end),
            seq_len=self.seq_len,
            eod_id=self._eod_id,
            pad_id=self._pad_id,
            source="valid",
            sample_id=i,
        )


def count_bytes(tokenizer: Tokenizer, row: Row) -> int:
    """UTF-8 bytes that the counted labels of a row decode to (end-of-document: none)."""
    return int(tokenizer.byte_lengths_V[row.labels_S[row.loss_mask_S > 0]].sum())


def bits_per_byte(total_nll: float, num_bytes: int) -> float:
    """From the summed negative log-likelihood (natural log) of labels that stand for `num_bytes` bytes."""
    return total_nll / math.log(2) / max(1, num_bytes)


def unigram_bits_per_byte(
    tokenizer: Tokenizer, train: IndexedDocuments, rows: Iterable[Row], *, max_tokens: int = 1 << 25
) -> float:
    """Bits per byte of `rows` under the token frequencies of the first `max_tokens` training tokens (add-one)."""
    counts_V = np.ones(tokenizer.vocab_size, dtype=np.int64)
    for start in range(0, min(max_tokens, train.num_tokens), 1 << 20):
        piece = train.tokens(start, min(start + (1 << 20), max_tokens))
        counts_V += np.bincount(piece.astype(np.int64), minlength=tokenizer.vocab_size)
    nll_V: NDArray[np.float64] = -np.log(counts_V / counts_V.sum())
    total, num_bytes = 0.0, 0
    for row in rows:
        total += float(nll_V[row.labels_S[row.loss_mask_S > 0]].sum())
        num_bytes += count_bytes(tokenizer, row)
    return bits_per_byte(total, num_bytes)
