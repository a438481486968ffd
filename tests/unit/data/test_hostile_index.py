"""Whatever stands in the files of a pair: it is read as they say, or refused by name; nothing outside them is read."""

from __future__ import annotations

import struct
import tracemalloc
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings

from moba_train.data.indexed import HEADER_BYTES, bin_path, idx_path, open_indexed, spans_path, write_indexed
from moba_train.errors import DataError
from tests.mutations import Mutation, mutated, mutations

DOCUMENTS = [[5, 6, 7, 1], [1], [8, 9, 1], [300, 1]]
SPANS = np.array([[0, 1, 2], [0, 2, 4], [2, 0, 3]])
FORMATS = {1: "B", 3: "h", 4: "i", 5: "q", 8: "H"}
FUZZ = settings(max_examples=300, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Pair:
    """A whole pair and its spans, and a prefix to write changed copies to."""

    idx: bytes
    bin: bytes
    spans: bytes
    prefix: str

    def write(self, **changed: bytes) -> str:
        for name, path in (("idx", idx_path), ("bin", bin_path), ("spans", spans_path)):
            path(self.prefix).write_bytes(changed.get(name, getattr(self, name)))
        return self.prefix


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("hostile")
    prefix = str(folder / "pair")
    write_indexed(prefix, DOCUMENTS, vocab_size=1000, spans=SPANS)
    content = [path(prefix).read_bytes() for path in (idx_path, bin_path, spans_path)]
    return Pair(*content, prefix)


def decoded(idx: bytes, tokens: bytes) -> list[list[int]]:
    """The documents as the format has them, read the slow way; an error where a byte is missing."""
    version, code, sequences, boundaries = struct.unpack_from("<QBQQ", idx, 9)
    item, at = struct.calcsize(FORMATS[code]), HEADER_BYTES
    lengths = struct.unpack_from(f"<{sequences}i", idx, at)
    pointers = struct.unpack_from(f"<{sequences}q", idx, at + 4 * sequences)
    edges = struct.unpack_from(f"<{boundaries}q", idx, at + 12 * sequences)
    assert version == 1 and min(pointers) >= 0
    read = [struct.unpack_from(f"<{n}{FORMATS[code]}", tokens, p) for n, p in zip(lengths, pointers, strict=True)]
    assert sum(lengths) * item == len(tokens)
    return [[t for part in read[low:high] for t in part] for low, high in pairwise(edges)]


def opened(prefix: str) -> list[list[int]] | None:
    """All documents, or None if the pair was refused in good order."""
    try:
        documents = open_indexed(prefix)
    except DataError as error:
        assert "pair." in error.where and error.fix
        return None
    return [documents.get(i).tolist() for i in range(documents.num_documents)]


@FUZZ
@given(changes=mutations())
@example(changes=[])
def test_a_changed_index_is_read_as_it_says_or_refused(pair: Pair, changes: list[Mutation]) -> None:
    idx = mutated(pair.idx, changes)
    found = opened(pair.write(idx=idx))
    assert found is None or found == decoded(idx, pair.bin)
    assert found is not None or idx != pair.idx


@FUZZ
@given(changes=mutations())
def test_a_changed_token_file_is_read_as_it_says_or_refused(pair: Pair, changes: list[Mutation]) -> None:
    tokens = mutated(pair.bin, changes)
    found = opened(pair.write(bin=tokens))
    assert (found is None) == (len(tokens) != len(pair.bin))
    assert found is None or found == decoded(pair.idx, tokens)


@FUZZ
@given(changes=mutations())
@example(changes=[])
def test_changed_answer_spans_lie_within_their_documents_or_are_refused(pair: Pair, changes: list[Mutation]) -> None:
    prefix = pair.write(spans=mutated(pair.spans, changes))
    if opened(prefix) is None:
        return
    documents = open_indexed(prefix)
    assert documents.spans is not None
    rows = documents.spans.tolist()
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert all(0 <= start <= end <= len(DOCUMENTS[document]) for document, start, end in rows)


BIG, LOW = (1 << 63) - 1, -(1 << 63)
SEQUENCES = len(DOCUMENTS)
LENGTHS_AT, POINTERS_AT, EDGES_AT = HEADER_BYTES, HEADER_BYTES + 4 * SEQUENCES, HEADER_BYTES + 12 * SEQUENCES

LIES = {
    "magic": (0, b"PK\x03\x04", "not a Megatron index"),
    "version": (9, struct.pack("<Q", 2), "unknown version"),
    "dtype that holds no tokens": (17, b"\x06", "integer dtype"),
    "unknown dtype": (17, b"\xff", "integer dtype"),
    "no sequence": (18, struct.pack("<Q", 0), "no document"),
    "no document": (26, struct.pack("<Q", 1), "no document"),
    "2^64 - 1 sequences": (18, b"\xff" * 8, "is cut"),
    "2^64 - 1 documents": (26, b"\xff" * 8, "is cut"),
    "counts whose bytes wrap": (18, struct.pack("<QQ", 1 << 62, 1 << 61), "is cut"),
    "negative length": (LENGTHS_AT, struct.pack("<i", -4), "contradict"),
    "negative length whose pointers agree": (LENGTHS_AT, struct.pack("<4i4q", 4, -1, 5, 2, 0, 8, 6, 16), "contradict"),
    "longest length": (LENGTHS_AT, struct.pack("<i", (1 << 31) - 1), "contradict"),
    "negative pointer": (POINTERS_AT, struct.pack("<q", -8), "contradict"),
    "pointer past the end": (POINTERS_AT + 8, struct.pack("<q", 1 << 40), "contradict"),
    "pointer between two tokens": (POINTERS_AT + 8, struct.pack("<q", 9), "contradict"),
    "documents that fall": (EDGES_AT, struct.pack("<5q", 0, 3, 2, 3, 4), "do not rise"),
    "documents that do not begin at 0": (EDGES_AT, struct.pack("<q", 1), "do not rise"),
    "documents beyond the sequences": (EDGES_AT, struct.pack("<5q", 0, 1, 2, 9, 4), "do not rise"),
    "documents whose differences wrap": (EDGES_AT, struct.pack("<5q", 0, BIG, LOW, -1, 4), "do not rise"),
}


@pytest.mark.parametrize(("at", "value", "message"), LIES.values(), ids=LIES.keys())
def test_a_lie_in_the_index_is_refused_by_name(pair: Pair, at: int, value: bytes, message: str) -> None:
    prefix = pair.write(idx=pair.idx[:at] + value + pair.idx[at + len(value) :])
    with pytest.raises(DataError, match=message) as caught:
        open_indexed(prefix)
    assert caught.value.where.startswith(f"{prefix}.idx")


@pytest.mark.parametrize("size", [0, 1, 19])
def test_a_token_file_shorter_than_told_is_refused(pair: Pair, size: int) -> None:
    prefix = pair.write(bin=pair.bin[:size])
    with pytest.raises(DataError, match=r"does not fit|is empty") as caught:
        open_indexed(prefix)
    assert caught.value.where == f"{prefix}.bin"


def test_a_lie_about_counts_costs_no_memory(pair: Pair) -> None:
    prefix = pair.write(idx=pair.idx[:18] + struct.pack("<QQ", 1 << 40, 1 << 40) + pair.idx[34:])
    tracemalloc.start()
    with pytest.raises(DataError):
        open_indexed(prefix)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


class Malice:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("import pathlib; pathlib.Path('pwned').touch()",)


def header_only(shape: str) -> bytes:
    text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


HOSTILE_SPANS = {
    "an archive": lambda path: np.savez(path.open("wb"), SPANS),
    "pickled objects": lambda path: np.save(path, np.array([[Malice()]]), allow_pickle=True),
    "a huge shape": lambda path: path.write_bytes(header_only(f"({1 << 40}, 3)")),
    "a shape that wraps": lambda path: path.write_bytes(header_only(f"({((1 << 64) + 2) // 3}, 3)")),
    "a negative shape": lambda path: path.write_bytes(header_only("(-1, 3)")),
    "code as a header": lambda path: path.write_bytes(header_only("(__import__('os').getpid(), 3)")),
    "nested brackets": lambda path: path.write_bytes(header_only("(" * 90)),
    "an end before the start": lambda path: np.save(path, np.array([[0, 3, 1]])),
    "an end beyond the document": lambda path: np.save(path, np.array([[1, 0, 2]])),
    "a negative start": lambda path: np.save(path, np.array([[0, -1, 2]])),
    "documents whose differences wrap": lambda path: np.save(path, np.array([[0, 0, 1], [BIG, 0, 1], [LOW, 0, 1]])),
}


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("write", HOSTILE_SPANS.values(), ids=HOSTILE_SPANS.keys())
def test_hostile_answer_spans_are_refused(pair: Pair, write: object, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = pair.write()
    monkeypatch.chdir(Path(prefix).parent)
    assert callable(write)
    write(spans_path(prefix))
    with pytest.raises(DataError, match="answer spans") as caught:
        open_indexed(prefix)
    assert caught.value.where == f"{prefix}.spans.npy"
    assert not Path("pwned").exists()


@pytest.mark.parametrize("content", ["5", "[]", '{"files": 5}', '{"files": null}', "[" * 100_000, "\x00"])
def test_a_listing_of_prep_that_makes_no_sense_lists_nothing(pair: Pair, content: str) -> None:
    prefix = pair.write()
    spans_path(prefix).unlink()
    listing = Path(prefix).with_name("prep.json")
    listing.write_text(content)
    assert open_indexed(prefix).spans is None
    listing.unlink()


def test_no_answer_at_all_is_a_whole_file(pair: Pair) -> None:
    prefix = pair.write()
    np.save(spans_path(prefix), np.zeros((0, 3), dtype=np.int64))
    spans = open_indexed(prefix).spans
    assert spans is not None and spans.shape == (0, 3)
