"""One packed row from pieces of documents: tokens, labels, loss mask, boundaries.

Legend: S tokens of a row.
"""

from __future__ import annotations

import numpy as np

from moba_train.data.indexed import IndexedDocuments
from moba_train.data.row import Row
from moba_train.data.row_index import DocumentStream


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
    positions = range(begin[0], end[0] + (end[1] > 0))
    candidates = stream.documents(positions.start, positions.stop)
    for position, document, size in zip(positions, candidates, stream.sizes(candidates), strict=True):
        first = begin[1] if position == begin[0] else 0
        last = end[1] if position == end[0] else int(size)
        if last <= first:
            continue
        # One token more than the piece, where there is one: the label of the piece's last token.
        piece = documents.get(int(document), first, min(last + 1, int(size)) - first)
        here = slice(at, at + last - first)
        tokens_S[here] = piece[: last - first]
        labels_S[here] = np.append(piece, eod_id)[1 : last - first + 1]
        mask_S[here] = _loss_mask(documents, int(document), first, last) * (tokens_S[here] != eod_id)
        at = here.stop
        boundaries.append(at)
        ids.append(int(document))
    if at < seq_len:
        boundaries.append(seq_len)
        ids.append(-1)
    return Row(tokens_S, labels_S, mask_S, tuple(boundaries), source, sample_id, tuple(ids))


def _loss_mask(documents: IndexedDocuments, document: int, first: int, last: int) -> np.ndarray:
    """float32 [last - first]: 1 where the label counts; with answer spans, where the label lies in an answer."""
    if documents.spans is None:
        return np.ones(last - first, dtype=np.float32)
    mask = np.zeros(last - first, dtype=np.float32)
    for start, stop in documents.answer_spans(document):
        # The label of position p is token p + 1.
        mask[max(0, int(start) - 1 - first) : max(0, int(stop) - 1 - first)] = 1
    return mask
