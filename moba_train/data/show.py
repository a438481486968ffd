"""A row as a person reads it: which documents it holds, from where to where, and how their text begins and ends.

Legend: S tokens of a row.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from moba_train.data.assemble import Piece
from moba_train.data.row import Row
from moba_train.data.tokenizer import Tokenizer


def row_lines(row: Row, pieces: Sequence[Piece], tokenizer: Tokenizer, *, num_shown: int) -> list[str]:
    """One line about the row, then two for each piece of a document, and one for padding.

    Args:
        pieces: what the row holds, as `StageData.pieces` tells it.
        num_shown: tokens of each piece whose text is shown, at its beginning and at its end.
    """
    lines = [
        f"row {row.sample_id}: source {row.source!r}, {row.tokens_S.size:,} tokens, {len(pieces)} document(s), loss on "
        f"{np.count_nonzero(row.loss_mask_S):,} tokens, checksum {row_checksum(row)}"
    ]
    at = 0
    for piece in pieces:
        length = piece.stop - piece.first
        lines += [
            f"  document {piece.document}: tokens {piece.first:,}..{piece.stop - 1:,} of {piece.size:,}, at "
            f"{at:,}..{at + length - 1:,} of the row",
            f"    {_ends(row.tokens_S[at : at + length], tokenizer, num_shown)}",
        ]
        at += length
    if at < row.tokens_S.size:
        lines.append(f"  padding: at {at:,}..{row.tokens_S.size - 1:,} of the row")
    return lines


def row_checksum(row: Row) -> str:
    """Of the row's tokens: 8 hexadecimal digits, those that a message about ranks that disagree shows."""
    return f"{zlib.crc32(np.ascontiguousarray(row.tokens_S).tobytes()):08x}"


def visible_text(tokens: Iterable[int], tokenizer: Tokenizer) -> str:
    """The text of tokens on one line: line ends, tabs and whatever has no shape are escaped as Python does it; control
    pieces stand as they are called (<eod>); ids that the tokenizer does not have as <id 5000>."""
    parts = []
    for name, run in groupby((int(token) for token in tokens), key=lambda token: _name_of_control(token, tokenizer)):
        ids = list(run)
        parts.append(name * len(ids) if name else "".join(map(_visible, tokenizer.decode(ids))))
    return "".join(parts)


def _ends(tokens: NDArray[np.int64], tokenizer: Tokenizer, num_shown: int) -> str:
    """Beginning and end of a piece, in quotes; all of it where they meet."""
    if tokens.size <= 2 * num_shown:
        return f'"{visible_text(tokens, tokenizer)}"'
    head, tail = (visible_text(part, tokenizer) for part in (tokens[:num_shown], tokens[-num_shown:]))
    return f'"{head}" ... "{tail}"'


def _name_of_control(token: int, tokenizer: Tokenizer) -> str:
    """ "" for a token that has a text."""
    if not 0 <= token < tokenizer.vocab_size:
        return f"<id {token}>"
    return tokenizer.piece(token) if tokenizer.is_control(token) else ""


def _visible(character: str) -> str:
    if character in '\\"':
        return "\\" + character
    return character if character.isprintable() else character.encode("unicode_escape").decode()
