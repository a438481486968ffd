"""Megatron index files: `PREFIX.bin` (token ids) and `PREFIX.idx` (where the documents are).

Layout of the .idx file (megatron.core.datasets.indexed_dataset): 9 bytes magic, uint64 version 1, uint8 dtype code,
uint64 sequences, uint64 document boundaries, then int32 length per sequence, int64 byte pointer per sequence, int64
index of the first sequence of each document (and the end). Megatron writes the pair; here it is checked before
anything maps it, because numpy and Megatron answer a damaged pair with an assertion or with garbage.

A third file may stand beside them: `PREFIX.spans.npy`, int64 [spans, 3], rows (document, start, end) sorted by
document: only tokens start..end-1 of these rows count in the loss (answers to needles, an assistant's words).

Legend: all lengths and offsets are in tokens unless a name says bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from moba_train.data.files import disk_errors, published
from moba_train.errors import DataError
from moba_train.quiet import quiet_imports

MAGIC = b"MMIDIDX\x00\x00"
HEADER_BYTES = len(MAGIC) + 8 + 1 + 8 + 8
DTYPES: tuple[tuple[int, str], ...] = ((1, "uint8"), (3, "int16"), (4, "int32"), (5, "int64"), (8, "uint16"))
"""Integer dtypes by Megatron's code; the float codes (6, 7) hold no tokens."""
CHECK_SEQUENCES = 1 << 20
"""Sequences checked at a time, so that checking needs bounded memory."""
MOST_BYTES = 1 << 62
"""No file is larger; sums of sequence lengths are stopped here, before int64 wraps."""
MISSING = "run `moba-train prep`, or mend the path in the section [data]"
REBUILD = "write the pair again (`moba-train prep`) or copy both files again"


def bin_path(prefix: str | Path) -> Path:
    """The token file of a pair."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The index file of a pair."""
    return Path(f"{prefix}.idx")


def spans_path(prefix: str | Path) -> Path:
    """The optional answer spans of a pair."""
    return Path(f"{prefix}.spans.npy")


class IndexedDocuments:
    """Memory-mapped documents of a checked `.bin/.idx` pair. Made by `open_indexed`.

    Attributes:
        prefix: path without .bin / .idx.
        num_documents: documents in the pair.
        num_tokens: tokens in the pair.
        dtype: numpy dtype of the stored ids.
        spans: int64 [spans, 3] (document, start, end), or None where the pair has no answer spans.
    """

    def __init__(
        self,
        prefix: str,
        tokens: NDArray[np.integer],
        pointers_bytes: NDArray[np.int64],
        boundaries: NDArray[np.int64],
        spans: NDArray[np.int64] | None,
    ) -> None:
        self.prefix = prefix
        self.dtype = tokens.dtype
        self.num_tokens = int(tokens.size)
        self.num_documents = int(boundaries.size - 1)
        self.spans = spans
        self._tokens = tokens
        self._pointers_bytes = pointers_bytes
        self._boundaries = boundaries

    def starts(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """First token of each document, int64 of the same shape; index num_documents gives the end of the last one."""
        sequences = self._boundaries[documents]
        starts = np.full(sequences.shape, self.num_tokens, dtype=np.int64)
        inside = sequences < self._pointers_bytes.size
        starts[inside] = self._pointers_bytes[sequences[inside]] // self.dtype.itemsize
        return starts

    def sizes(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each document, int64 of the same shape."""
        return self.starts(documents + 1) - self.starts(documents)

    def size(self, document: int) -> int:
        """Tokens of one document."""
        return int(self.sizes(np.array([document], dtype=np.int64))[0])

    def get(self, document: int, offset: int = 0, length: int | None = None) -> NDArray[np.int64]:
        """Token ids of one document from `offset`, int64 [length]; length None = up to its end.

        Raises:
            IndexError: outside the document.
        """
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents}")
        start, end = (int(x) for x in self.starts(np.array([document, document + 1], dtype=np.int64)))
        stop = end if length is None else start + offset + length
        if offset < 0 or stop > end or start + offset > stop:
            raise IndexError(f"tokens {offset}..{stop - start} of document {document}, which has {end - start}")
        return self._tokens[start + offset : stop].astype(np.int64)

    def tokens(self, start: int, stop: int) -> NDArray[np.integer]:
        """Stored ids start..stop-1 over all documents, as a view of the file."""
        return self._tokens[start:stop]

    def answer_spans(self, document: int) -> NDArray[np.int64]:
        """int64 [spans, 2] answer spans (start, end) of one document; empty where it has none."""
        if self.spans is None:
            return np.zeros((0, 2), dtype=np.int64)
        low, high = np.searchsorted(self.spans[:, 0], [document, document + 1])
        return np.asarray(self.spans[low:high, 1:], dtype=np.int64)


def open_indexed(prefix: str | Path) -> IndexedDocuments:
    """Check a `.bin/.idx` pair and map it read-only.

    Raises:
        DataError: a file is missing or empty, the index is not an index or is cut, or the two do not fit.
    """
    prefix = str(prefix)
    for path in (idx_path(prefix), bin_path(prefix)):
        require_file(path)
    idx, sizes = idx_path(prefix), idx_path(prefix).stat().st_size
    dtype, num_sequences, num_boundaries = _read_header(idx)
    expected = HEADER_BYTES + num_sequences * 12 + num_boundaries * 8
    # A multimodal pair has one more byte per sequence.
    if sizes not in (expected, expected + num_sequences):
        raise DataError(
            "the index file is cut or has trailing bytes",
            where=str(idx),
            got=f"{sizes} bytes",
            allowed=f"{expected} bytes for {num_sequences} sequences in {num_boundaries - 1} documents",
            fix=REBUILD,
        )
    lengths = np.memmap(idx, dtype="<i4", mode="r", offset=HEADER_BYTES, shape=(num_sequences,))
    pointers = np.memmap(idx, dtype="<i8", mode="r", offset=HEADER_BYTES + 4 * num_sequences, shape=(num_sequences,))
    boundaries = np.memmap(
        idx, dtype="<i8", mode="r", offset=HEADER_BYTES + 12 * num_sequences, shape=(num_boundaries,)
    )
    bytes_indexed = _check_sequences(idx, lengths, pointers, dtype.itemsize)
    _check_boundaries(idx, boundaries, num_sequences)
    bytes_found = bin_path(prefix).stat().st_size
    if bytes_indexed != bytes_found:
        raise DataError(
            "the index does not fit the token file",
            where=str(bin_path(prefix)),
            got=f"{bytes_found} bytes",
            allowed=f"{bytes_indexed} bytes ({bytes_indexed // dtype.itemsize} tokens of {dtype}, says {idx.name})",
            fix=REBUILD,
        )
    tokens = np.memmap(bin_path(prefix), dtype=dtype, mode="r")
    documents = IndexedDocuments(prefix, tokens, pointers, boundaries, None)
    documents.spans = _open_spans(prefix, documents)
    return documents


def require_file(path: Path) -> None:
    """Refuse a file of a pair that is missing or empty. Raises DataError."""
    if not path.is_file():
        pair = "a source is a pair PREFIX.bin and PREFIX.idx; give the path without the ending"
        raise DataError(
            "data file not found", where=str(path), allowed=pair, fix="run `moba-train prep` or mend data.*.path"
        )
    if path.stat().st_size == 0:
        raise DataError("data file is empty", where=str(path), got="0 bytes", fix=REBUILD)


def _read_header(idx: Path) -> tuple[np.dtype[np.integer], int, int]:
    """dtype, number of sequences, number of document boundaries."""
    with open(idx, "rb") as stream:
        header = stream.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        raise DataError(
            "the index file is cut",
            where=str(idx),
            got=f"{len(header)} bytes",
            allowed=f">= {HEADER_BYTES}",
            fix=REBUILD,
        )
    if header[: len(MAGIC)] != MAGIC:
        raise DataError(
            "not a Megatron index file",
            where=str(idx),
            got=repr(header[: len(MAGIC)]),
            allowed=repr(MAGIC),
            fix=REBUILD,
        )
    version, code, num_sequences, num_boundaries = struct.unpack("<QBQQ", header[len(MAGIC) :])
    if version != 1:
        raise DataError("unknown version of the index file", where=str(idx), got=version, allowed="1", fix=REBUILD)
    names = dict(DTYPES)
    if code not in names:
        allowed = ", ".join(f"{c} ({name})" for c, name in DTYPES)
        raise DataError("the index names no integer dtype", where=str(idx), got=code, allowed=allowed, fix=REBUILD)
    if num_sequences == 0 or num_boundaries < 2:
        raise DataError("the index holds no document", where=str(idx), got=f"{num_sequences} sequences", fix=REBUILD)
    return np.dtype(names[code]), num_sequences, num_boundaries


def _check_sequences(idx: Path, lengths: NDArray[np.int32], pointers: NDArray[np.int64], itemsize: int) -> int:
    """Sequences must follow one another without gaps; returns the bytes that they cover."""
    end_bytes = 0
    for first in range(0, lengths.size, CHECK_SEQUENCES):
        size_bytes = lengths[first : first + CHECK_SEQUENCES].astype(np.int64) * itemsize
        ends = end_bytes + np.cumsum(size_bytes)
        told = pointers[first : first + CHECK_SEQUENCES]
        if size_bytes.min() < 0 or ends[-1] > MOST_BYTES or not np.array_equal(told, ends - size_bytes):
            raise DataError(
                "lengths and pointers of the index contradict one another",
                where=f"{idx}, sequences {first}..{first + size_bytes.size - 1}",
                fix=REBUILD,
            )
        end_bytes = int(ends[-1])
    return end_bytes


def _check_boundaries(idx: Path, boundaries: NDArray[np.int64], num_sequences: int) -> None:
    """Document boundaries must rise from 0 to the number of sequences."""
    ok = boundaries[0] == 0 and boundaries[-1] == num_sequences
    for first in range(0, boundaries.size - 1, CHECK_SEQUENCES):
        ok = ok and _is_rising(boundaries[first : first + CHECK_SEQUENCES + 1])
    if not ok:
        raise DataError(
            "document boundaries of the index do not rise from 0 to the number of sequences",
            where=str(idx),
            got=f"{boundaries[0]} .. {boundaries[-1]}",
            allowed=f"0 .. {num_sequences}",
            fix=REBUILD,
        )


def _is_rising(values: NDArray[np.int64]) -> bool:
    """Compared, not subtracted: a difference of int64 extremes wraps."""
    return bool((values[1:] >= values[:-1]).all())


def _require_no_spans(path: Path) -> None:
    """Spans are optional, but where `prep` wrote some, a loss on every token would be another training.

    Raises:
        DataError: the folder's prep.json lists the file that is not there.
    """
    listing = path.parent / "prep.json"
    try:
        is_listed = path.name in json.loads(listing.read_text("utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # not a folder of `prep`
    if is_listed:
        raise DataError("the answer spans of the source are missing", where=str(path), got="no such file", fix=REBUILD)


def _open_spans(prefix: str, documents: IndexedDocuments) -> NDArray[np.int64] | None:
    path = spans_path(prefix)
    if not path.exists():
        _require_no_spans(path)
        return None
    rows = "int64 [spans, 3]: rows (document, start, end), sorted by document"
    try:
        spans: NDArray[np.int64] = np.lib.format.open_memmap(path, mode="r")  # type: ignore[no-untyped-call]
    except Exception as error:  # numpy's parser fails in a dozen ways on a header that it did not write
        got = f"{type(error).__name__}: {error}"[:200]
        raise DataError("cannot read the answer spans", where=str(path), got=got, allowed=rows, fix=REBUILD) from error
    if spans.dtype != np.int64 or spans.ndim != 2 or spans.shape[1] != 3:
        got = f"{spans.dtype} {spans.shape}"
        raise DataError("not an array of answer spans", where=str(path), got=got, allowed=rows, fix=REBUILD)
    of, starts, ends = spans.T
    ok = _is_rising(of) and not (spans.size and (of[0] < 0 or of[-1] >= documents.num_documents))
    if not (ok and ((starts >= 0) & (starts <= ends) & (ends <= documents.sizes(of))).all()):
        raise DataError(
            "the answer spans do not fit the index",
            where=str(path),
            got=f"documents {of[0]} .. {of[-1]}, tokens {starts.min()} .. {ends.max()}",
            allowed=f"{rows}, within {documents.num_documents} documents",
            fix=REBUILD,
        )
    return spans


class IndexedWriter:
    """Writes a pair document by document; a context manager. Both files appear on leaving it, whole or not at all.

    Args:
        join: everything that is added becomes one document (of several Megatron sequences).

    Attributes:
        num_documents: documents added so far.
        num_tokens: their tokens.
    """

    def __init__(self, prefix: str | Path, *, vocab_size: int, join: bool = False) -> None:
        with quiet_imports():
            from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
        self.prefix = str(prefix)
        self.num_documents = self.num_tokens = 0
        self._join = join
        self._dtype = DType.optimal_dtype(vocab_size)
        self._make_builder = IndexedDatasetBuilder
        self._files = ExitStack()

    def __enter__(self) -> IndexedWriter:
        self._files.__enter__()
        bin_aside = self._files.enter_context(published(bin_path(self.prefix)))
        self._idx_aside = self._files.enter_context(published(idx_path(self.prefix)))
        self._builder = self._make_builder(str(bin_aside), dtype=self._dtype)
        return self

    def add(self, tokens: NDArray[np.integer] | Sequence[int]) -> None:
        """Add one document, or a part of the one that all parts are joined into.

        Raises:
            DataError: it has no token, or the disk refuses.
        """
        if len(tokens) == 0:
            where = f"{self.prefix}, document {self.num_documents}"
            raise DataError("a document without tokens cannot be written", where=where)
        with disk_errors(bin_path(self.prefix)):
            self._builder.add_document(np.asarray(tokens), [len(tokens)])
        if self._join and self.num_documents:
            del self._builder.document_indices[-2]  # the end of what came before
        else:
            self.num_documents += 1
        self.num_tokens += len(tokens)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            with suppress(OSError):  # a full disk refuses what is still in the buffer, too
                self._builder.data_file.close()
            self._files.__exit__(kind, error, trace)
            return
        try:
            if self.num_documents == 0:
                raise DataError("nothing to write: there is no document", where=self.prefix, fix="give more text")
            self._builder.finalize(str(self._idx_aside))
        except BaseException as caught:
            self._files.__exit__(type(caught), caught, caught.__traceback__)
            raise
        # Spans of an older pair of this name would be applied to the new one.
        spans_path(self.prefix).unlink(missing_ok=True)
        self._files.__exit__(None, None, None)


def write_indexed(
    prefix: str | Path,
    documents: Iterable[NDArray[np.integer] | Sequence[int]],
    *,
    vocab_size: int,
    spans: NDArray[np.int64] | None = None,
) -> tuple[int, int]:
    """Write documents as a pair, and `spans` (int64 [spans, 3]: document, start, end) beside it.

    Returns:
        (documents, tokens) written.

    Raises:
        DataError: no document, or an empty one.
    """
    with IndexedWriter(prefix, vocab_size=vocab_size) as writer:
        for document in documents:
            writer.add(document)
    if spans is not None:
        write_spans(prefix, spans)
    return writer.num_documents, writer.num_tokens


def write_spans(prefix: str | Path, spans: NDArray[np.int64]) -> None:
    """Write the answer spans of a pair, int64 [spans, 3]: (document, start, end) sorted by document."""
    with published(spans_path(prefix)) as aside, open(aside, "wb") as stream:
        np.save(stream, np.asarray(spans, dtype=np.int64))
