"""Where each row of a source begins, computed once in bounded memory.

Documents form an endless stream: epoch after epoch, each in its own order. A stream position p counts documents
(epoch p // n, place p % n in that epoch's order). Row r runs from starts[r] = (position, offset in that document) to
starts[r + 1]:

    split   every row holds exactly seq_len tokens; a document goes on in the next row
    whole   a row holds whole documents; one that does not fit any more begins the next row

Legend: R rows; lengths in tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moba_train.data.permutation import permute
from moba_train.errors import DataError

DOCUMENTS_AT_ONCE = 1 << 20
"""Documents handled at a time: 8 MiB per temporary array."""


@dataclass(frozen=True)
class DocumentStream:
    """Documents in endless order.

    Attributes:
        name: of the source, for messages.
        num_documents: documents n of the stream: all of the source, or as many as `ids` lists.
        sizes_of: int64 document ids -> int64 sizes of the same shape.
        min_doc_tokens: shorter documents are left out (size 0 in `sizes`).
        order_key: names the pseudo-random order; "" keeps the order of the file.
        ids: int64 [n], the documents of the stream where it does not take all. Where few are wanted, listing them is
            what keeps a row from walking over all the others.
    """

    name: str
    num_documents: int
    sizes_of: Callable[[NDArray[np.int64]], NDArray[np.int64]]
    min_doc_tokens: int
    order_key: str
    ids: NDArray[np.int64] | None = None

    def documents(self, first: int, stop: int) -> NDArray[np.int64]:
        """Document ids at stream positions first..stop-1."""
        positions = np.arange(first, stop, dtype=np.int64)
        if not self.order_key:
            return self._ids(positions % self.num_documents)
        places = np.empty_like(positions)
        for epoch in range(first // self.num_documents, (stop - 1) // self.num_documents + 1):
            here = (positions // self.num_documents) == epoch
            key = f"{self.order_key}/epoch {epoch}"
            places[here] = permute(positions[here] % self.num_documents, n=self.num_documents, key=key)
        return self._ids(places)

    def tokens_of_epoch(self) -> int:
        """Tokens that all documents together give to the stream."""
        return sum(int(sizes.sum()) for sizes in self._sizes_of_epoch())

    def num_longer(self, num_tokens: int) -> int:
        """Documents that have more tokens than this."""
        return sum(int(np.count_nonzero(sizes > num_tokens)) for sizes in self._sizes_of_epoch())

    def _sizes_of_epoch(self) -> Iterator[NDArray[np.int64]]:
        for first in range(0, self.num_documents, DOCUMENTS_AT_ONCE):
            stop = min(first + DOCUMENTS_AT_ONCE, self.num_documents)
            yield self.sizes(self._ids(np.arange(first, stop, dtype=np.int64)))

    def sizes(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens that each document gives to the stream: its size, or 0 where it is left out."""
        sizes = self.sizes_of(documents)
        return np.where(sizes >= self.min_doc_tokens, sizes, 0)

    def _ids(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Document ids at places 0..n-1 of the file's order."""
        return places if self.ids is None else np.asarray(self.ids[places])


@dataclass(frozen=True)
class LengthCounts:
    """Documents of a source on both sides of a length.

    Attributes:
        num_long: documents of at least this length, and long_tokens their tokens.
        num_short: the shorter ones, down to the floor, and short_tokens their tokens.
        longest: tokens of the longest document of the source.
    """

    num_long: int = 0
    long_tokens: int = 0
    num_short: int = 0
    short_tokens: int = 0
    longest: int = 0


def split_by_length(
    num_documents: int,
    sizes_of: Callable[[NDArray[np.int64]], NDArray[np.int64]],
    *,
    floor: int,
    long_doc_tokens: int,
    out: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
) -> LengthCounts:
    """Count the documents of a source on both sides of a length, in one pass over all sizes.

    Args:
        num_documents: documents of the source.
        sizes_of: int64 document ids -> int64 sizes.
        floor: shorter documents belong to neither side; nor do those without a token.
        long_doc_tokens: the length; at or below the floor, no document is short.
        out: int64 [num_long] and [num_short] to fill with the ids of the documents, rising; None = count alone.
    """
    num, tokens, longest = [0, 0], [0, 0], 0
    for first in range(0, num_documents, DOCUMENTS_AT_ONCE):
        ids = np.arange(first, min(first + DOCUMENTS_AT_ONCE, num_documents), dtype=np.int64)
        sizes = sizes_of(ids)
        longest = max(longest, int(sizes.max()))
        is_drawn, is_long = sizes >= max(1, floor), sizes >= long_doc_tokens
        for side, wanted in enumerate((is_drawn & is_long, is_drawn & ~is_long)):
            count = int(np.count_nonzero(wanted))
            if out is not None:
                out[side][num[side] : num[side] + count] = ids[wanted]
            num[side] += count
            tokens[side] += int(sizes[wanted].sum())
    return LengthCounts(num[0], tokens[0], num[1], tokens[1], longest)


@dataclass(frozen=True)
class RowStarts:
    """Result of `build_row_starts`.

    Attributes:
        starts: int64 [R + 1, 2], (stream position, offset in that document).
        num_documents: documents that begin in these rows (over all epochs).
        num_cut: those of them that a row boundary cuts.
    """

    starts: NDArray[np.int64]
    num_documents: int
    num_cut: int


def build_row_starts(
    stream: DocumentStream,
    *,
    packing: Literal["split", "whole"],
    seq_len: int,
    num_rows: int,
    out: NDArray[np.int64] | None = None,
) -> RowStarts:
    """Walk the stream until `num_rows` rows are known.

    Args:
        out: int64 [num_rows + 1, 2] to fill (a memory map, where rows are many); None = a new array.

    Raises:
        DataError: the source gives no token, or (whole) holds a document longer than a row.
    """
    starts = np.empty((num_rows + 1, 2), dtype=np.int64) if out is None else out
    starts[0] = 0
    row = position = num_documents = num_cut = 0
    row_begin = 0  # token of the stream at which the row under construction began
    stream_end = 0  # tokens of the stream before this batch
    epoch_begin = 0  # tokens of the stream before this epoch
    while row < num_rows:
        epoch_end = (position // stream.num_documents + 1) * stream.num_documents
        stop = min(position + DOCUMENTS_AT_ONCE, epoch_end)
        sizes = stream.sizes(stream.documents(position, stop))
        ends = stream_end + np.cumsum(sizes)
        if packing == "whole":
            _require_whole(stream, sizes, position, stop, seq_len)
            where, begins = _whole_rows(ends, sizes, row_begin, seq_len, num_rows - row)
        else:
            where, begins = _split_rows(ends, row_begin, seq_len, num_rows - row)
        offsets = begins - (ends[where] - sizes[where])
        starts[row + 1 : row + 1 + where.size, 0] = position + where
        starts[row + 1 : row + 1 + where.size, 1] = offsets
        row += where.size
        begun = sizes.size if row < num_rows else int(where[-1] + (offsets[-1] > 0))
        num_documents += int(np.count_nonzero(sizes[:begun]))
        num_cut += np.unique(where[offsets > 0]).size
        row_begin = int(begins[-1]) if begins.size else row_begin
        stream_end = int(ends[-1])
        position = stop
        if position == epoch_end:
            _require_tokens(stream, stream_end - epoch_begin)
            epoch_begin = stream_end
    return RowStarts(starts, num_documents, num_cut)


def _split_rows(
    ends: NDArray[np.int64], row_begin: int, seq_len: int, limit: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row boundaries inside this batch: (index of the document that holds it, token of the stream)."""
    count = min(limit, max(0, (int(ends[-1]) - 1 - row_begin) // seq_len))
    begins = row_begin + seq_len * np.arange(1, count + 1, dtype=np.int64)
    return np.searchsorted(ends, begins, side="right").astype(np.int64), begins


def _whole_rows(
    ends: NDArray[np.int64], sizes: NDArray[np.int64], row_begin: int, seq_len: int, limit: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Greedy: the first document that ends beyond the row begins the next one."""
    where: list[int] = []
    begins: list[int] = []
    while len(where) < limit:
        index = int(np.searchsorted(ends, row_begin + seq_len, side="right"))
        if index == ends.size:
            break
        row_begin = int(ends[index] - sizes[index])
        where.append(index)
        begins.append(row_begin)
    return np.array(where, dtype=np.int64), np.array(begins, dtype=np.int64)


def _require_tokens(stream: DocumentStream, tokens_of_epoch: int) -> None:
    if tokens_of_epoch == 0:
        raise DataError(
            "the source gives no token",
            where=f"data source {stream.name!r}",
            got=f"{stream.num_documents} documents, none of at least {max(1, stream.min_doc_tokens)} tokens",
            fix="lower min_doc_tokens or prepare more text",
        )


def _require_whole(stream: DocumentStream, sizes: NDArray[np.int64], position: int, stop: int, seq_len: int) -> None:
    if sizes.size and int(sizes.max()) > seq_len:
        longest = int(sizes.argmax())
        document = int(stream.documents(position, stop)[longest])
        too_long = f"{stream.num_longer(seq_len):,} of {stream.num_documents:,} documents"
        raise DataError(
            "a document is longer than a row, and this source packs whole documents",
            where=f"data source {stream.name!r}, document {document}",
            got=f"{int(sizes[longest]):,} tokens; {too_long} do not fit",
            allowed=f"<= seq_len = {seq_len}",
            fix='raise the stage\'s seq_len, or set packing = "split"',
        )
