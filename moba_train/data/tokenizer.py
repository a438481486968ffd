"""A vocabulary from its file: a sentencepiece `.model`, or a Hugging Face `tokenizer.json`."""

from __future__ import annotations

from pathlib import Path

from moba_train.data.tokenizer_base import Tokenizer
from moba_train.data.tokenizer_hf import HfTokenizer
from moba_train.data.tokenizer_sentencepiece import SPACE, SentencepieceTokenizer, train_tokenizer
from moba_train.errors import ConfigError, DataError


def load_tokenizer(path: str | Path, *, eod: str = "") -> Tokenizer:
    """Read a tokenizer file; a name that ends in .json is a tokenizer.json, any other a sentencepiece model.

    Args:
        eod: of a tokenizer.json, the token that ends a document; "" = the eos_token that the files beside it name.

    Raises:
        DataError: no such file, not what its name says, or what ends a document is not known.
        ConfigError: eod is given for a sentencepiece model.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            "tokenizer not found",
            where=str(path),
            got="a folder" if path.is_dir() else None,
            allowed="a sentencepiece .model file, or a tokenizer.json",
            fix="run `moba-train prep`, or mend data.tokenizer",
        )
    content = path.read_bytes()
    if not content:
        raise DataError("the tokenizer is empty", where=str(path), got="0 bytes", fix="run `moba-train prep` again")
    if path.suffix == ".json":
        return HfTokenizer(path, content, eod=eod)
    if eod:
        raise ConfigError(
            "a sentencepiece model says itself what ends a document",
            where="--eod",
            got=eod,
            fix="leave --eod out, or name a tokenizer.json",
        )
    return SentencepieceTokenizer(path, content)


__all__ = ["SPACE", "Tokenizer", "load_tokenizer", "train_tokenizer"]
