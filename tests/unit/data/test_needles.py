"""Needle documents and samples: exact lengths, places and answers, and nothing of the evaluation in training."""

import numpy as np
import pytest
import sentencepiece as spm

from moba_train.data.needles import (
    NeedleText,
    build_needle_document,
    build_niah_sample,
    load_words,
    questions_that_fit,
    split_of,
)
from moba_train.data.tokenizer import Tokenizer, load_tokenizer
from moba_train.errors import DataError
from tests.unit.data.conftest import corpus

DEPTHS = (0, 20, 40, 60, 80, 100)


@pytest.fixture(scope="module")
def text(tokenizer) -> NeedleText:
    return NeedleText(tokenizer, load_words())


@pytest.fixture(scope="module")
def haystack(tokenizer) -> np.ndarray:
    return np.array([token for ids in tokenizer.encode_many(corpus(80)) for token in ids], dtype=np.int64)


def sample(text, haystack, length=256, depth=40.0, index=0, **options):
    return build_niah_sample(text, haystack, length=length, depth_percent=depth, seed=3, index=index, **options)


def sentences(tokenizer, text, tokens) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """(key, value) of every needle and answered question, in order."""
    found = []
    for line in tokenizer.decode(tokens).split(text.form.prefix)[1:]:
        words = line.replace(text.form.middle + " ", " ", 1).split()
        end = text.form.key_words + text.form.value_words
        found.append((tuple(words[: text.form.key_words]), tuple(words[text.form.key_words : end])))
    return found


def test_words_are_many_distinct_and_plain():
    words = load_words()
    assert len(words) >= 100 and len(set(words)) == len(words)
    assert all(word.isascii() and word.isalpha() and word.islower() for word in words)


@pytest.mark.parametrize("length", [64, 100, 256, 1001])
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_sample_has_its_exact_length_and_says_where_everything_is(tokenizer, text, haystack, length, depth):
    made = sample(text, haystack, length, depth)
    assert made.tokens.shape == (length,) and made.tokens.dtype == np.int64
    assert tokenizer.decode(made.tokens[made.answer_start : made.answer_end]) == f" {made.value}"
    assert tokenizer.decode(made.tokens[made.value_start : made.value_end]) == f" {made.value}"
    needle = tokenizer.decode(made.tokens[made.needle_start : made.needle_end])
    assert needle == f"{made.question} {made.value}\n" and made.key in needle
    assert tokenizer.decode(made.tokens).endswith(f"{made.question} {made.value}")
    assert tokenizer.decode(made.tokens).count(made.key) == 2
    assert made.answer_end == length


@pytest.mark.parametrize("length", [256, 1024])
@pytest.mark.parametrize("depth", DEPTHS)
def test_the_needle_stands_where_the_depth_says(text, haystack, length, depth):
    made = sample(text, haystack, length, depth)
    needle_tokens = made.needle_end - made.needle_start
    # The question with its answer is the needle without the line end.
    room = length - needle_tokens - (needle_tokens - len(text.suffix_ids))
    reach = 0 if depth in (0, 100) else text.form.snap_tokens + 1
    assert abs(made.needle_start - depth / 100 * room) <= reach


def test_the_needle_begins_a_line_where_one_is_near(tokenizer, text, haystack):
    newline = tokenizer.encode("\n")[0]
    made = [sample(text, haystack, 512, 50.0, index=i) for i in range(20)]
    assert sum(int(m.tokens[m.needle_start - 1]) == newline for m in made) >= 18


def test_a_sample_is_a_pure_function_of_its_arguments(text, haystack):
    base = sample(text, haystack)
    assert np.array_equal(base.tokens, sample(text, haystack).tokens)
    for other in (sample(text, haystack, index=1), sample(text, haystack, depth=41.0)):
        assert other.key != base.key
    assert build_niah_sample(text, haystack, length=256, depth_percent=40.0, seed=4).key != base.key


def test_distractors_have_other_keys_and_values(tokenizer, text, haystack):
    made = sample(text, haystack, 512, distractors=5)
    decoded = tokenizer.decode(made.tokens)
    assert decoded.count(text.form.prefix) == 7
    assert decoded.count(made.key) == 2 and decoded.count(made.value) == 2


def test_the_row_of_a_sample_counts_the_answer_only(text, haystack):
    made = sample(text, haystack, 200)
    row = made.to_row()
    assert row.cu_seqlens == (0, 200) and row.tokens_S is made.tokens
    assert row.labels_S[row.loss_mask_S > 0].tolist() == made.tokens[made.answer_start :].tolist()
    assert np.array_equal(row.labels_S[:-1], row.tokens_S[1:])


@pytest.mark.parametrize("length", [64, 128, 300, 1024])
def test_a_training_document_has_its_exact_length_and_asks_for_every_needle(tokenizer, text, haystack, length):
    made = build_needle_document(text, haystack, length=length, seed=1, index=5)
    assert made.tokens_L.shape == (length,) and made.tokens_L[-1] == tokenizer.eod_id
    most = questions_that_fit(text, length)
    assert made.answers_Q2.shape[1:] == (2,)
    assert (most if length <= 128 else max(1, most // 4)) <= len(made.answers_Q2) <= most
    decoded = tokenizer.decode(made.tokens_L)
    assert decoded.count(text.form.prefix) == 2 * len(made.answers_Q2)
    for start, end in made.answers_Q2:
        before = tokenizer.decode(made.tokens_L[:start])
        question = before[before.rfind(text.form.prefix) :]
        # The question and its answer stand in the text before, as a needle.
        assert question + tokenizer.decode(made.tokens_L[start:end]) + text.form.suffix in before


def test_long_training_documents_hide_few_or_many_needles(text, haystack):
    documents = [build_needle_document(text, haystack, length=512, seed=1, index=i) for i in range(60)]
    counts = [len(made.answers_Q2) for made in documents]
    most = questions_that_fit(text, 512)
    assert min(counts) <= most // 3 and max(counts) >= most - 2


def test_training_and_evaluation_share_no_key_and_no_value(tokenizer, text, haystack):
    def phrases_in(tokens) -> set[tuple[str, ...]]:
        return {phrase for line in sentences(tokenizer, text, tokens) for phrase in line}

    trained = set()
    for index in range(150):
        trained |= phrases_in(build_needle_document(text, haystack, length=256, seed=1, index=index).tokens_L)
    evaluated = set()
    for index in range(150):
        made = sample(text, haystack, index=index)
        evaluated |= {tuple(made.key.split()), tuple(made.value.split())}
    assert len(trained) > 500 and len(evaluated) > 200
    assert not trained & evaluated
    assert {split_of(phrase) for phrase in trained} == {"train"}
    assert {split_of(phrase) for phrase in evaluated} == {"eval"}


@pytest.mark.parametrize("length", [128, 1024])
def test_no_word_stands_in_two_needles_of_a_document(tokenizer, text, haystack, length):
    made = build_needle_document(text, haystack, length=length, seed=1, index=0)
    needles = sentences(tokenizer, text, made.tokens_L)[: len(made.answers_Q2)]
    words = [word for needle in needles for phrase in needle for word in phrase]
    assert len(words) == len(set(words)) == 4 * len(needles)


def test_questions_come_in_another_order_than_needles(tokenizer, text, haystack):
    same_order = 0
    for index in range(20):
        made = build_needle_document(text, haystack, length=256, seed=1, index=index, num_needles=6)
        pairs = sentences(tokenizer, text, made.tokens_L)
        same_order += pairs[:6] == pairs[6:]
        assert sorted(pairs[:6]) == sorted(pairs[6:])
    assert same_order <= 2


def test_more_needles_than_words_are_refused(text, haystack):
    with pytest.raises(DataError, match="too many needles"):
        sample(text, haystack, 8192, distractors=len(text.words))


def test_a_short_haystack_is_repeated(text, haystack):
    assert sample(text, haystack[:50], length=500).tokens.shape == (500,)


def test_what_does_not_fit_is_refused(text, haystack):
    with pytest.raises(DataError, match="do not fit"):
        sample(text, haystack, length=12)
    with pytest.raises(DataError, match="do not fit"):
        build_needle_document(text, haystack, length=64, seed=0, index=0, num_needles=9)
    with pytest.raises(DataError, match="depth"):
        sample(text, haystack, depth=101)
    with pytest.raises(DataError, match="haystack is empty"):
        sample(text, haystack[:0])


def other_tokenizer(tmp_path, **options) -> Tokenizer:
    (tmp_path / "text.txt").write_text("\n".join(corpus(30)))
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "other"),
        model_type="bpe",
        minloglevel=2,
        **options,
    )
    return load_tokenizer(tmp_path / "other.model")


def test_a_tokenizer_that_changes_text_is_refused(tmp_path):
    with pytest.raises(DataError, match="survive") as caught:
        NeedleText(other_tokenizer(tmp_path, vocab_size=120), load_words())
    assert "other.model" in caught.value.where


def test_a_tokenizer_with_a_space_before_every_text_and_no_words_of_ours_serves_too(tmp_path, haystack):
    tokenizer = other_tokenizer(
        tmp_path,
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    assert tokenizer.decode(tokenizer.encode("a")) == "a" and tokenizer.piece(tokenizer.encode("(")[0]) != "("
    made = build_niah_sample(
        NeedleText(tokenizer, load_words()), haystack % 300 + 50, length=300, depth_percent=50, seed=1
    )
    assert tokenizer.decode(made.tokens[made.needle_start : made.needle_end]) == f"{made.question} {made.value}\n"
    assert made.tokens.shape == (300,)
