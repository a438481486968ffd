"""Sentencepiece tokenizer: train one, or take one.

A trained model is BPE with byte fallback and no normalisation: every text survives encode -> decode byte for byte
(except U+2581, sentencepiece's own mark for a space). Newline is a piece of its own, digits are split, and so are the
needle words with their leading space, so that each is one token.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece as spm
from numpy.typing import NDArray

from moba_train.data.files import published
from moba_train.data.tokenizer_base import Tokenizer
from moba_train.errors import DataError

SPACE = "▁"
"""Sentencepiece's mark for a space."""
MAX_LINE_BYTES = 4096
"""Longer lines are left out of training (not of encoding)."""
NUM_RESERVED = 3 + 256
"""Ids that a trained model spends on unk, end-of-document, padding and the 256 bytes."""


class SentencepieceTokenizer(Tokenizer):
    """A loaded sentencepiece model. Its control pieces never come out of text; it puts nothing before a document.

    Raises:
        DataError: not a sentencepiece model with an end-of-document piece.
    """

    def __init__(self, path: Path, model: bytes) -> None:
        self.path = path
        self.fingerprint = hashlib.sha256(model).hexdigest()
        try:
            self._model = spm.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError(
                "not a sentencepiece model", where=str(path), got=str(error), fix="give a .model file"
            ) from error
        self.vocab_size = int(self._model.vocab_size())
        self.eod_id = int(self._model.eos_id())
        if self.eod_id < 0:
            raise DataError(
                "the tokenizer has no end-of-document id",
                where=str(path),
                allowed="a sentencepiece model with an eos piece",
                fix="train it with eos_id >= 0",
            )
        pad_id = int(self._model.pad_id())
        self.pad_id = pad_id if pad_id >= 0 else self.eod_id
        self.begin_ids = ()

    def encode(self, text: str) -> list[int]:
        return list(self._model.encode(text))

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(ids) for ids in self._model.encode(list(texts), num_threads=1)]

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        return str(self._model.decode([int(i) for i in ids]))

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self.path.read_bytes()}

    def piece(self, token: int) -> str:
        return str(self._model.id_to_piece(int(token)))

    def is_control(self, token: int) -> bool:
        return bool(self._model.is_control(int(token)))

    def _byte_length(self, token: int) -> int:
        if self._model.is_control(token):
            return 0
        if self._model.is_byte(token):
            return 1
        return len(self.piece(token).replace(SPACE, " ").encode())


def train_tokenizer(
    texts: Iterable[str], path: Path, *, vocab_size: int, words: Sequence[str] = ()
) -> SentencepieceTokenizer:
    """Train a BPE model on `texts` and write it to `path`. The same texts give the same bytes.

    Args:
        vocab_size: ids of the model, exactly.
        words: each becomes a piece of its own, with a leading space.

    Raises:
        DataError: the texts cannot fill vocab_size, or it is too small for bytes and words.
    """
    smallest = NUM_RESERVED + 1 + len(words) + 64
    if vocab_size < smallest:
        raise DataError(
            "the vocabulary is too small",
            where="--vocab-size",
            got=vocab_size,
            allowed=f">= {smallest} (bytes, {len(words)} needle words and some letters)",
        )
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            user_defined_symbols=["\n", *(SPACE + word for word in words)],
            unk_id=0,
            bos_id=-1,
            eos_id=1,
            pad_id=2,
            eos_piece="<eod>",
            max_sentence_length=MAX_LINE_BYTES,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:  # ValueError: a vocabulary beyond its integers
        raise DataError(
            "the tokenizer could not be trained",
            where=str(path),
            got=str(error).strip().splitlines()[-1],
            fix="give more text or a smaller --vocab-size",
        ) from error
    with published(path) as aside:
        aside.write_bytes(model.getvalue())
    return SentencepieceTokenizer(path, model.getvalue())


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (line for line in text.split("\n") if line)
