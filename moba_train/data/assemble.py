"""One packed row from pieces of documents: tokens, labels, loss mask, boundaries.

Legend: S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moba_train.data.indexed import IndexedDocuments
from moba_train.data.row import Row
from moba_train.data.row_index import DocumentStream


@dataclass(frozen=True)
class Piece:
    """Tokens first..stop-1 of one document.

    Attributes:
        document: its index in the source.
        size: tokens of the whole document.
    """

    document: int
    first: int
    stop: int
    size: int


def pieces_of_stream(stream: DocumentStream, begin: tuple[int, int], end: tuple[int, int]) -> Iterator[Piece]:
    """What lies between two points of the stream (each: position, offset in that document), in order."""
    positions = range(begin[0], end[0] + (end[1] > 0))
    documents = stream.documents(positions.start, positions.stop)
    for position, document, size in zip(positions, documents, stream.sizes(documents), strict=True):
        first = begin[1] if position == begin[0] else 0
        stop = end[1] if position == end[0] else int(size)
        if first < stop:
            yield Piece(int(document), first, stop, int(size))


def row_of_stream(
    documents: IndexedDocuments,
    stream: DocumentStream,
    begin: tuple[int, int],
    end: tuple[int, int],
    *,
    seq_len: int,
    eod_id: int,
    pad_id: int,
    source: str,
    sample_id: int,
) -> Row:
    """The row from stream point `begin` to `end` (each: position, offset in that document), filled up with padding.

    A document that goes on in the next row predicts its real next token at the cut. Padding is a document of its own,
    masked out.
    """
    tokens_S = np.full(seq_len, pad_id, dtype=np.int64)
    labels_S = np.full(seq_len, pad_id, dtype=np.int64)
    mask_S = np.zeros(seq_len, dtype=np.float32)
    boundaries, ids, at = [0], [], 0
    for piece in pieces_of_stream(stream, begin, end):
        length = piece.stop - piece.first
        # One token more than the piece, where there is one: the label of the piece's last token.
        tokens = documents.get(piece.document, piece.first, min(piece.stop + 1, piece.size) - piece.first)
        here = slice(at, at + length)
        tokens_S[here] = tokens[:length]
        labels_S[here] = np.append(tokens, eod_id)[1 : length + 1]
        mask_S[here] = _loss_mask(documents, piece) * (tokens_S[here] != eod_id)
        at = here.stop
        boundaries.append(at)
        ids.append(piece.document)
    if at < seq_len:
        boundaries.append(seq_len)
        ids.append(-1)
    return Row(tokens_S, labels_S, mask_S, tuple(boundaries), source, sample_id, tuple(ids))


def _loss_mask(documents: IndexedDocuments, piece: Piece) -> np.ndarray:
    """float32 [tokens of the piece]: 1 where the label counts; with answer spans, where the label lies in an answer."""
    length = piece.stop - piece.first
    if documents.spans is None:
        return np.ones(length, dtype=np.float32)
    mask = np.zeros(length, dtype=np.float32)
    for start, stop in documents.answer_spans(piece.document):
        # The label of position p is token p + 1.
        mask[max(0, int(start) - 1 - piece.first) : max(0, int(stop) - 1 - piece.first)] = 1
    return mask
