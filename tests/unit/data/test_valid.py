"""Held-out rows and bits per byte."""

import math

import numpy as np
import pytest

from moba_train.config.schema import SourceConfig
from moba_train.data.indexed import open_indexed, write_indexed
from moba_train.data.valid import ValidRows, bits_per_byte, count_bytes, unigram_bits_per_byte
from moba_train.errors import DataError
from tests.unit.data.conftest import corpus


@pytest.fixture
def held_out(tokenizer, tmp_path):
    texts = corpus(12)
    documents = [[*ids, tokenizer.eod_id] for ids in tokenizer.encode_many(texts)]
    write_indexed(tmp_path / "valid", documents, vocab_size=tokenizer.vocab_size)
    return SourceConfig(str(tmp_path / "valid")), documents, texts


def rows_of(tokenizer, source, seq_len) -> list:
    rows = ValidRows(source, seq_len=seq_len, eod_id=tokenizer.eod_id, pad_id=tokenizer.pad_id)
    return [rows.row(i) for i in range(len(rows))]


@pytest.mark.parametrize("seq_len", [7, 64, 1000])
def test_rows_hold_the_documents_in_the_order_of_the_file(tokenizer, held_out, seq_len):
    source, documents, _ = held_out
    stream = np.array([token for document in documents for token in document])
    rows = rows_of(tokenizer, source, seq_len)
    assert len(rows) == stream.size // seq_len
    assert np.array_equal(np.concatenate([row.tokens_S for row in rows]), stream[: len(rows) * seq_len])
    ends = np.concatenate([row.loss_mask_S for row in rows]) == 0
    assert np.array_equal(ends, stream[: ends.size] == tokenizer.eod_id)


def test_bytes_of_the_labels_are_those_of_the_text(tokenizer, held_out):
    source, documents, texts = held_out
    total = sum(map(len, documents))
    (row,) = rows_of(tokenizer, source, total)
    # The first token of each document is nobody's label.
    unseen = sum(int(tokenizer.byte_lengths_V[document[0]]) for document in documents)
    assert count_bytes(tokenizer, row) == sum(len(text.encode()) for text in texts) - unseen


def test_bits_per_byte_of_a_uniform_byte_model_are_eight():
    assert bits_per_byte(100 * math.log(256), 100) == pytest.approx(8.0)


def test_the_unigram_baseline_equals_a_count_by_hand(tokenizer, held_out):
    source, documents, _ = held_out
    (row,) = rows_of(tokenizer, source, sum(map(len, documents)))
    flat = [token for document in documents for token in document]
    counts = {token: flat.count(token) + 1 for token in set(flat)}
    total = len(flat) + tokenizer.vocab_size
    labels = [token for document in documents for token in document[1:]]
    bits = -sum(math.log2(counts[token] / total) for token in labels)
    got = unigram_bits_per_byte(tokenizer, open_indexed(source.path), [row])
    assert got == pytest.approx(bits / count_bytes(tokenizer, row))
    assert 0.5 < got < 8


def test_a_held_out_source_shorter_than_a_row_is_named(tokenizer, held_out):
    source, documents, _ = held_out
    with pytest.raises(DataError, match="less than one row") as caught:
        rows_of(tokenizer, source, sum(map(len, documents)) + 1)
    assert str(sum(map(len, documents))) in str(caught.value.got)
    with pytest.raises(DataError, match="not found"):
        rows_of(tokenizer, SourceConfig(source.path + "x"), 8)
