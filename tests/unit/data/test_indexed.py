"""Megatron index files: what is written comes back, and damage is named before anything maps it."""

import json
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest

from moba_train.data.indexed import bin_path, idx_path, open_indexed, spans_path, write_indexed
from moba_train.errors import DataError

DOCUMENTS = [[5, 6, 7, 1], [1], [8, 9, 1], [300, 1]]


def pair(tmp_path: Path, **options) -> str:
    prefix = str(tmp_path / "pair")
    write_indexed(prefix, DOCUMENTS, vocab_size=options.pop("vocab_size", 1000), **options)
    return prefix


def test_documents_come_back_as_they_were_written(tmp_path):
    documents = open_indexed(pair(tmp_path))
    assert documents.num_documents == 4 and documents.num_tokens == 10
    assert [documents.get(i).tolist() for i in range(4)] == DOCUMENTS
    assert documents.get(0, 1, 2).tolist() == [6, 7]
    assert documents.sizes(np.arange(4)).tolist() == [4, 1, 3, 2]
    assert documents.dtype == np.uint16


def test_a_large_vocabulary_is_stored_in_int32(tmp_path):
    prefix = str(tmp_path / "wide")
    write_indexed(prefix, [[70000, 1]], vocab_size=128256)
    assert open_indexed(prefix).get(0).tolist() == [70000, 1]


def test_megatron_reads_the_pair_and_we_read_megatrons_pairs_of_several_sequences_per_document(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    ours = IndexedDataset(pair(tmp_path))
    assert [ours[i].tolist() for i in range(len(ours))] == DOCUMENTS
    assert ours.document_indices.tolist() == [0, 1, 2, 3, 4]

    theirs = str(tmp_path / "theirs")
    builder = IndexedDatasetBuilder(str(bin_path(theirs)), dtype=np.int32)
    builder.add_document(np.array([1, 2, 3, 4, 5]), [2, 3])
    builder.add_document(np.array([6, 7]), [2])
    builder.finalize(str(idx_path(theirs)))
    documents = open_indexed(theirs)
    assert [documents.get(i).tolist() for i in range(documents.num_documents)] == [[1, 2, 3, 4, 5], [6, 7]]


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 5), (5, 0), (3, 2)])
def test_reading_outside_a_document_is_an_error(tmp_path, offset, length):
    with pytest.raises(IndexError):
        open_indexed(pair(tmp_path)).get(0, offset, length)


def test_answer_spans_are_found_by_document(tmp_path):
    spans = np.array([[0, 1, 2], [0, 2, 3], [2, 0, 1]])
    documents = open_indexed(pair(tmp_path, spans=spans))
    assert documents.answer_spans(0).tolist() == [[1, 2], [2, 3]]
    assert documents.answer_spans(1).tolist() == []
    assert documents.answer_spans(2).tolist() == [[0, 1]]


def test_answer_spans_that_prep_wrote_may_not_go_missing(tmp_path):
    prefix = pair(tmp_path, spans=np.array([[0, 1, 2]]))
    (tmp_path / "prep.json").write_text(json.dumps({"files": {"pair.spans.npy": 1}}))
    assert open_indexed(prefix).spans is not None
    spans_path(prefix).unlink()
    with pytest.raises(DataError, match="answer spans of the source are missing"):
        open_indexed(prefix)


def test_a_new_pair_does_not_inherit_the_spans_of_an_old_one(tmp_path):
    prefix = pair(tmp_path, spans=np.array([[0, 1, 2]]))
    write_indexed(prefix, DOCUMENTS, vocab_size=1000)
    assert open_indexed(prefix).spans is None


def test_nothing_is_left_behind_when_writing_fails(tmp_path):
    with pytest.raises(DataError, match="without tokens"):
        write_indexed(tmp_path / "broken", [[1, 2], []], vocab_size=10)
    with pytest.raises(DataError, match="no document"):
        write_indexed(tmp_path / "none", [], vocab_size=10)
    assert list(tmp_path.iterdir()) == []


def remove_idx(prefix: str) -> None:
    idx_path(prefix).unlink()


def remove_bin(prefix: str) -> None:
    bin_path(prefix).unlink()


def empty_bin(prefix: str) -> None:
    bin_path(prefix).write_bytes(b"")


def empty_idx(prefix: str) -> None:
    idx_path(prefix).write_bytes(b"")


def cut_bin(prefix: str) -> None:
    bin_path(prefix).write_bytes(bin_path(prefix).read_bytes()[:-2])


def cut_idx(prefix: str) -> None:
    idx_path(prefix).write_bytes(idx_path(prefix).read_bytes()[:-8])


def cut_header(prefix: str) -> None:
    idx_path(prefix).write_bytes(idx_path(prefix).read_bytes()[:20])


def patch_idx(prefix: str, at: int, value: bytes) -> None:
    content = bytearray(idx_path(prefix).read_bytes())
    content[at : at + len(value)] = value
    idx_path(prefix).write_bytes(content)


def wrong_magic(prefix: str) -> None:
    patch_idx(prefix, 0, b"GARBAGE")


def wrong_version(prefix: str) -> None:
    patch_idx(prefix, 9, struct.pack("<Q", 7))


def float_dtype(prefix: str) -> None:
    patch_idx(prefix, 17, b"\x07")


def huge_count(prefix: str) -> None:
    patch_idx(prefix, 18, struct.pack("<Q", 1 << 60))


def wrong_length(prefix: str) -> None:
    patch_idx(prefix, 34, struct.pack("<i", 3))


def wrong_boundary(prefix: str) -> None:
    patch_idx(prefix, 34 + 4 * 12 + 8, struct.pack("<q", 9))


def other_bin(prefix: str) -> None:
    write_indexed(prefix + "2", [[1, 2, 3]], vocab_size=1000)
    bin_path(prefix).write_bytes(bin_path(prefix + "2").read_bytes())


def text_as_spans(prefix: str) -> None:
    spans_path(prefix).write_text("no array")


def spans_beyond(prefix: str) -> None:
    np.save(spans_path(prefix), np.array([[9, 0, 1]]))


def spans_of_two_columns(prefix: str) -> None:
    np.save(spans_path(prefix), np.array([[0, 1]]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_idx, "not found"),
        (remove_bin, "not found"),
        (empty_bin, "empty"),
        (empty_idx, "empty"),
        (cut_bin, "does not fit"),
        (cut_idx, "is cut"),
        (cut_header, "is cut"),
        (wrong_magic, "not a Megatron index"),
        (wrong_version, "unknown version"),
        (float_dtype, "integer dtype"),
        (huge_count, "is cut"),
        (wrong_length, "contradict"),
        (wrong_boundary, "boundaries"),
        (other_bin, "does not fit"),
        (text_as_spans, "answer spans"),
        (spans_beyond, "do not fit"),
        (spans_of_two_columns, "answer spans"),
    ],
)
def test_a_damaged_pair_is_refused_by_name(tmp_path, damage, message):
    prefix = pair(tmp_path)
    damage(prefix)
    with pytest.raises(DataError, match=message) as caught:
        open_indexed(prefix)
    assert "pair." in caught.value.where
    assert caught.value.fix
