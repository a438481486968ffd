"""Needles in a haystack: lines "key value" hidden in real text, and the questions that ask for the value.

    ... text ... # magic amber river silver walnut ... text ... # magic amber river [silver walnut]
                 `------------ needle -----------'              `---- question ----' `-- answer --'

Key and value touch: with a word in between ("is"), a small model has to find the first word of the value in two hops
(from that word back to the key, then forth to the value) and stays at half of the answers for very long.

After github.com/gkamradt/LLMTest_NeedleInAHaystack and RULER (arXiv 2404.06654), built at token level so that every
sample has exactly the length asked for. Keys and values are phrases of a few words; a hash of the phrase decides
whether it serves training or evaluation, so that no key and no value of an evaluation was ever trained on.

A training document hides several needles and asks for all of them (its answers alone count in the loss); a sample of
the evaluation hides one (and `distractors` more) and asks for it.

Legend: L tokens of a sample, Q questions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moba_train.data.indexed import IndexedDocuments
from moba_train.data.row import Row
from moba_train.data.tokenizer import Tokenizer
from moba_train.errors import DataError

Split = Literal["train", "eval"]
Phrase = tuple[str, ...]
"""The words of a key or of a value."""


@dataclass(frozen=True)
class NeedleFormat:
    """Every choice of wording, in one place: prefix key middle value suffix. The question is that up to the value."""

    prefix: str = "# magic"
    middle: str = ""
    suffix: str = "\n"
    key_words: int = 2
    value_words: int = 2
    num_words: int = 256
    """Words in use: the first num_words of the asset."""
    pieces: tuple[str, ...] = ("magic",)
    """Further words that a trained tokenizer gets as one token each."""
    eval_share: int = 5
    """One phrase in eval_share is kept for evaluation."""
    questions_at_128: int = 7
    """Needles, and questions, of a training document of 128 tokens; they grow with length ** 0.75."""
    snap_tokens: int = 24
    """A needle moves to the nearest line start if one is at most this far, so that it does not split a line."""


FORMAT = NeedleFormat()
DRAWS_PER_PHRASE = 1000
"""So many draws find a fresh phrase even when half of the words are taken; more needles than that are refused."""


def load_words(form: NeedleFormat = FORMAT) -> tuple[str, ...]:
    """The words that keys and values are made of (an asset of this package)."""
    text = files("moba_train.data").joinpath("assets/words.txt").read_text("utf-8")
    return tuple(text.split()[: form.num_words])


def special_words(form: NeedleFormat = FORMAT) -> tuple[str, ...]:
    """Words that a trained tokenizer gets as one token each, with their leading space."""
    return (*load_words(form), *form.pieces)


def split_of(phrase: Phrase, form: NeedleFormat = FORMAT) -> Split:
    """Whether a key or a value serves training or evaluation: a hash decides."""
    digest = hashlib.sha256(" ".join(phrase).encode()).digest()
    return "eval" if digest[0] % form.eval_share == 0 else "train"


class NeedleText:
    """Token ids of the words and of the sentence around them, checked against the tokenizer.

    Raises:
        DataError: a word or the sentence does not survive encode -> decode.
    """

    def __init__(self, tokenizer: Tokenizer, words: tuple[str, ...], form: NeedleFormat = FORMAT) -> None:
        self.tokenizer, self.words, self.form = tokenizer, words, form
        self.prefix_ids = tokenizer.encode_inside(form.prefix)
        self.middle_ids = tokenizer.encode_inside(form.middle)
        self.suffix_ids = tokenizer.encode_inside(form.suffix)
        self._word_ids = {word: tokenizer.encode_inside(f" {word}") for word in words}
        for word in words:
            key, value = (word,) * form.key_words, (word,) * form.value_words
            text = self.question(key) + self.phrase_text(value) + form.suffix
            decoded = tokenizer.decode(self.needle_ids(key, value))
            if decoded != text:
                raise DataError(
                    "a needle does not survive encode -> decode",
                    where=f"tokenizer {tokenizer.path}, word {word!r}",
                    got=repr(decoded),
                    allowed=repr(text),
                    fix="take a tokenizer that neither normalises nor adds a prefix; `moba-train prep` trains one",
                )
        self.newline_id = tokenizer.encode_inside("\n")[-1]

    def phrase_text(self, phrase: Phrase) -> str:
        """A key or a value as it stands in the text, with its leading space."""
        return "".join(f" {word}" for word in phrase)

    def question(self, key: Phrase) -> str:
        """The text that ends where the value begins."""
        return self.form.prefix + self.phrase_text(key) + self.form.middle

    def phrase_ids(self, phrase: Phrase) -> list[int]:
        """Ids of a key or a value."""
        return [token for word in phrase for token in self._word_ids[word]]

    def question_ids(self, key: Phrase) -> list[int]:
        """Ids of the question."""
        return [*self.prefix_ids, *self.phrase_ids(key), *self.middle_ids]

    def needle_ids(self, key: Phrase, value: Phrase) -> list[int]:
        """Ids of the whole sentence."""
        return [*self.question_ids(key), *self.phrase_ids(value), *self.suffix_ids]

    def draw(self, rng: np.random.Generator, n: int, split: Split) -> list[tuple[Phrase, Phrase]]:
        """n random (key, value) of one split; no word stands twice in them, so that every question has one answer."""
        used: set[str] = set()
        keys = self._draw_phrases(rng, n, self.form.key_words, split, used)
        return list(zip(keys, self._draw_phrases(rng, n, self.form.value_words, split, used), strict=True))

    def _draw_phrases(
        self, rng: np.random.Generator, n: int, num_words: int, split: Split, used: set[str]
    ) -> list[Phrase]:
        phrases: list[Phrase] = []
        for _ in range(DRAWS_PER_PHRASE * n):
            if len(phrases) == n:
                break
            phrase = tuple(self.words[int(i)] for i in rng.integers(len(self.words), size=num_words))
            fresh = len(set(phrase)) == num_words and not used.intersection(phrase)
            if fresh and split_of(phrase, self.form) == split:
                phrases.append(phrase)
                used.update(phrase)
        if len(phrases) < n:
            raise DataError(
                "too many needles for the number of words",
                where="needles of one sample",
                got=f"{n} needles of {num_words} words, from {len(self.words)} words",
                fix="ask for fewer needles or distractors",
            )
        return phrases


@dataclass(frozen=True)
class NeedleDocument:
    """A training document: tokens int64 [L] that end in end-of-document, answer spans int64 [Q, 2] (start, end)."""

    tokens_L: NDArray[np.int64]
    answers_Q2: NDArray[np.int64]


@dataclass(frozen=True)
class NeedleSample:
    """One evaluation sample; its last tokens are the answer, so that the score is teacher-forced.

    Attributes:
        tokens: int64 [L].
        answer_start, answer_end: tokens of the answer (answer_end = L).
        needle_start, needle_end: tokens of the needle's sentence.
        value_start, value_end: tokens of the value inside the needle.
        key, value: as text, without the leading space.
        question: the text in front of the answer.
        depth_percent: as asked for; the needle stands at the line start next to it.
        eod_id: label of the last token.
    """

    tokens: NDArray[np.int64]
    answer_start: int
    answer_end: int
    needle_start: int
    needle_end: int
    value_start: int
    value_end: int
    key: str
    value: str
    question: str
    depth_percent: float
    eod_id: int

    def to_row(self, *, sample_id: int = 0) -> Row:
        """The sample as a row of one document whose answer alone counts."""
        mask = np.zeros(self.tokens.size, dtype=np.float32)
        mask[self.answer_start - 1 : self.answer_end - 1] = 1
        labels = np.append(self.tokens[1:], self.eod_id)
        return Row(self.tokens, labels, mask, (0, self.tokens.size), "niah", sample_id, (sample_id,))


def questions_that_fit(text: NeedleText, length: int) -> int:
    """Needles, and questions, of a training document: they fill at most 4/5 of it and use at most half of the words."""
    form = text.form
    cost = 2 * len(text.needle_ids(text.words[: form.key_words], text.words[: form.value_words]))
    wanted = round(form.questions_at_128 * math.pow(length / 128, 0.75))
    most = len(text.words) // (2 * (form.key_words + form.value_words))
    return max(1, min(wanted, int(0.8 * length) // cost, most))


def draw_num_needles(text: NeedleText, length: int, rng: np.random.Generator) -> int:
    """As many as fit into short documents, which have to teach retrieval in few steps; in longer ones a quarter of that
    or more, at random, because a sample of the evaluation has a single needle."""
    most = questions_that_fit(text, length)
    return most if length <= 128 else int(rng.integers(max(1, most // 4), most + 1))


def build_needle_document(
    text: NeedleText,
    haystack: NDArray[np.int64],
    *,
    length: int,
    seed: int,
    index: int,
    num_needles: int | Literal["auto"] = "auto",
) -> NeedleDocument:
    """Training document `index`: several needles at random places, then a question for each, in another order.

    Args:
        haystack: int64 [n], training text without end-of-document ids; repeated where it is too short.
        length: tokens of the document, its end-of-document included.
        num_needles: "auto" = what `draw_num_needles` draws.

    Raises:
        DataError: needles and questions do not fit into length.
    """
    rng = np.random.default_rng([seed, length, index])
    n = draw_num_needles(text, length, rng) if num_needles == "auto" else num_needles
    pairs = text.draw(rng, n, "train")
    order = [pairs[int(i)] for i in rng.permutation(n)]
    asked: list[int] = []
    spans: list[tuple[int, int]] = []
    for key, value in order:
        asked += text.suffix_ids if asked else []
        asked += text.question_ids(key)
        spans.append((len(asked), len(asked) + len(text.phrase_ids(value))))
        asked += text.phrase_ids(value)
    needles = [text.needle_ids(key, value) for key, value in pairs]
    room = _room(length - 1 - len(text.tokenizer.begin_ids), needles, len(asked), length)
    places = [float(x) for x in rng.random(n)]
    hidden, _ = _hide(text, rng, haystack, room, needles, places)
    tokens = np.array([*hidden, *asked, text.tokenizer.eod_id], dtype=np.int64)
    return NeedleDocument(tokens, np.array(spans, dtype=np.int64) + len(hidden))


def build_niah_sample(
    text: NeedleText,
    haystack: NDArray[np.int64],
    *,
    length: int,
    depth_percent: float,
    seed: int,
    index: int = 0,
    distractors: int = 0,
) -> NeedleSample:
    """Evaluation sample `index` of a cell (length, depth): a pure function of its arguments.

    Args:
        haystack: int64 [n], held-out text without end-of-document ids (`haystack_of`).
        length: tokens of the sample, question and answer included.
        depth_percent: 0 = at the beginning of the text, 100 = just before the question.
        distractors: further needles with other keys, at random places.

    Raises:
        DataError: depth outside 0..100, or needle and question do not fit into length.
    """
    if not 0 <= depth_percent <= 100:
        raise DataError("needle depth out of range", where="niah", got=depth_percent, allowed="0 .. 100 (percent)")
    rng = np.random.default_rng([seed, length, round(depth_percent * 1000), index])
    n = 1 + distractors
    pairs = text.draw(rng, n, "eval")
    key, value = pairs[0]
    asked = [*text.question_ids(key), *text.phrase_ids(value)]
    needles = [text.needle_ids(*pair) for pair in pairs]
    room = _room(length - len(text.tokenizer.begin_ids), needles, len(asked), length)
    places = [depth_percent / 100, *(float(x) for x in rng.random(distractors))]
    hidden, starts = _hide(text, rng, haystack, room, needles, places)
    value_start = starts[0] + len(text.question_ids(key))
    return NeedleSample(
        tokens=np.array([*hidden, *asked], dtype=np.int64),
        answer_start=length - len(text.phrase_ids(value)),
        answer_end=length,
        needle_start=starts[0],
        needle_end=starts[0] + len(needles[0]),
        value_start=value_start,
        value_end=value_start + len(text.phrase_ids(value)),
        key=" ".join(key),
        value=" ".join(value),
        question=text.question(key),
        depth_percent=depth_percent,
        eod_id=text.tokenizer.eod_id,
    )


def haystack_of(
    documents: IndexedDocuments, *, eod_id: int, begin_ids: Sequence[int] = (), max_tokens: int = 1 << 24
) -> NDArray[np.int64]:
    """int64 [n]: the first max_tokens tokens of a source in file order, without what begins and ends documents."""
    tokens = documents.tokens(0, min(max_tokens, documents.num_tokens)).astype(np.int64)
    return np.asarray(tokens[~np.isin(tokens, [eod_id, *begin_ids])])


def _room(available: int, needles: list[list[int]], num_asked: int, length: int) -> int:
    """Tokens left for the haystack."""
    needed = sum(map(len, needles)) + num_asked
    if needed >= available:
        raise DataError(
            "needles and questions do not fit into the sample",
            where="needle length",
            got=f"{length} tokens",
            allowed=f"> {needed} for {len(needles)} needle(s)",
            fix="raise the length or ask for fewer needles",
        )
    return available - needed


def _hide(
    text: NeedleText,
    rng: np.random.Generator,
    haystack: NDArray[np.int64],
    room: int,
    needles: list[list[int]],
    places: list[float],
) -> tuple[list[int], list[int]]:
    """Put each needle at its place (share of the haystack, 0..1); returns the tokens, which begin as a document does,
    and where each needle begins."""
    if haystack.size == 0:
        raise DataError("the haystack is empty", where="needle samples", fix="prepare more text")
    first = int(rng.integers(haystack.size))
    hay = haystack[(first + np.arange(room)) % haystack.size]
    line_starts = np.flatnonzero(hay == text.newline_id) + 1
    spots = [_snap(round(place * room), line_starts, room, text.form.snap_tokens) for place in places]
    tokens = list(text.tokenizer.begin_ids)
    starts = [0] * len(needles)
    last = 0
    for i in sorted(range(len(needles)), key=lambda i: spots[i]):
        tokens += hay[last : spots[i]].tolist()
        last = spots[i]
        starts[i] = len(tokens)
        tokens += needles[i]
    return tokens + hay[last:].tolist(), starts


def _snap(spot: int, line_starts: NDArray[np.int64], room: int, reach: int) -> int:
    """The line start nearest to `spot`, if one is near; the two ends of the haystack stay where they are."""
    if spot in (0, room) or line_starts.size == 0:
        return spot
    nearest = int(line_starts[np.abs(line_starts - spot).argmin()])
    return nearest if abs(nearest - spot) <= reach else spot
