"""The tokenizer keeps every text, and refuses what is no tokenizer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moba_train.data.needles import special_words
from moba_train.data.tokenizer import SPACE, load_tokenizer, train_tokenizer
from moba_train.errors import DataError
from tests.unit.data.conftest import corpus

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0" + SPACE), max_size=60)


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_every_text_survives_encode_and_decode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_byte_lengths_add_up_to_the_bytes_of_the_text(tokenizer, text):
    assert tokenizer.byte_lengths_V[tokenizer.encode(text)].sum() == len(text.encode())


@pytest.mark.parametrize("text", ["  two  ", "\t\ttabs", "\n\n\n", " ", "\r\n", "a\u00a0b\u2009c", "\u0301e\u0301"])
def test_whitespace_and_unnormalised_text_are_kept(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_ids_are_never_made_from_text(tokenizer):
    ids = tokenizer.encode("<eod><pad><unk></s>")
    assert tokenizer.eod_id not in ids and tokenizer.pad_id not in ids
    assert tokenizer.decode([tokenizer.eod_id, tokenizer.pad_id]) == ""
    assert tokenizer.byte_lengths_V[[tokenizer.eod_id, tokenizer.pad_id]].tolist() == [0, 0]
    assert len({tokenizer.eod_id, tokenizer.pad_id}) == 2


def test_each_needle_word_is_one_token(tokenizer):
    assert all(len(tokenizer.encode(f" {word}")) == 1 for word in special_words())


def test_newline_is_a_token_of_its_own(tokenizer):
    assert tokenizer.encode("x\n\ny").count(tokenizer.encode("\n")[0]) == 2


def test_training_twice_gives_the_same_bytes(tokenizer, tmp_path):
    words = special_words()
    again = train_tokenizer(corpus(60), tmp_path / "again.model", vocab_size=700, words=words)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.vocab_size == 700
    assert load_tokenizer(again.path).fingerprint == again.fingerprint


def test_too_small_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(DataError, match="too small"):
        train_tokenizer(corpus(5), tmp_path / "t.model", vocab_size=300)


@pytest.mark.parametrize("vocab_size", [4000, 10**10])
def test_too_little_text_is_refused(tmp_path, vocab_size):
    with pytest.raises(DataError, match="could not be trained"):
        train_tokenizer(["abc"], tmp_path / "t.model", vocab_size=vocab_size)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(DataError, match="tokenizer not found"):
        load_tokenizer(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path / "bad.model")
