"""Do tokenizer, data and model agree on what an id means?"""

from __future__ import annotations

import json
from pathlib import Path

from moba_train.data.indexed import IndexedDocuments
from moba_train.data.tokenizer import Tokenizer
from moba_train.errors import ConfigError, DataError

CHECKED_TOKENS = 1 << 20
"""Tokens looked at, at the beginning and at the end of the source; all would take hours at 10^12."""


def check_vocabulary(tokenizer: Tokenizer, documents: IndexedDocuments, *, vocab_size: int, padding: int = 0) -> None:
    """Refuse a source or a model that does not fit the tokenizer.

    Args:
        vocab_size: rows of the model's embedding.
        padding: those of them that stand for no token.

    Raises:
        ConfigError: the model has fewer rows than the tokenizer has ids.
        DataError: the source was written with another tokenizer, or holds ids that the tokenizer does not have.
    """
    if vocab_size - padding < tokenizer.vocab_size:
        spare = vocab_size - tokenizer.vocab_size
        lower = f"lower model.vocab_padding to {spare}, or " if padding and spare >= 0 else ""
        raise ConfigError(
            "the model's vocabulary is smaller than the tokenizer's",
            where="model.vocab_size",
            got=f"{vocab_size}, less {padding} of model.vocab_padding" if padding else vocab_size,
            allowed=f">= {tokenizer.vocab_size}{' and the padding' if padding else ''} ({tokenizer.path})",
            fix=f"{lower}set model.vocab_size to at least {tokenizer.vocab_size + padding}",
        )
    written_with, ending_with = prepared_with(documents.prefix)
    if written_with and written_with != tokenizer.fingerprint:
        raise DataError(
            "the data was written with another tokenizer",
            where=documents.prefix,
            got=f"sha256 {written_with[:12]}... (prep.json)",
            allowed=f"sha256 {tokenizer.fingerprint[:12]}... ({tokenizer.path})",
            fix="point data.tokenizer to the file that the data was prepared with, or prepare again",
        )
    if ending_with not in (None, tokenizer.eod_id):
        raise DataError(
            "the documents of the data end in another token",
            where=documents.prefix,
            got=f"{tokenizer.piece(ending_with)!r} (prep.json)",
            allowed=f"{tokenizer.piece(tokenizer.eod_id)!r} ({tokenizer.path})",
            fix="point data.tokenizer to the tokenizer.json that prep wrote beside the data, or prepare again",
        )
    n = documents.num_tokens
    for part in (documents.tokens(0, min(n, CHECKED_TOKENS)), documents.tokens(max(0, n - CHECKED_TOKENS), n)):
        lowest, highest = int(part.min()), int(part.max())
        if lowest < 0 or highest >= tokenizer.vocab_size:
            raise DataError(
                "the data holds ids that the tokenizer does not have",
                where=documents.prefix,
                got=f"ids {lowest} .. {highest}",
                allowed=f"0 .. {tokenizer.vocab_size - 1} ({tokenizer.path})",
                fix="point data.tokenizer to the file that the data was prepared with, or prepare again",
            )


def prepared_with(prefix: str) -> tuple[str, int | None]:
    """(fingerprint, end-of-document id) of the tokenizer that a pair was prepared with, from the prep.json beside it;
    "" and None where that does not say."""
    path = Path(prefix).parent / "prep.json"
    if not path.is_file():
        return "", None
    try:
        record = json.loads(path.read_text("utf-8"))
        eod_id = record["tokenizer"].get("eod_id")
        return str(record["tokenizer"]["fingerprint"]), None if eod_id is None else int(eod_id)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError("cannot read what prep wrote", where=str(path), got=repr(error), fix="prepare again") from error
