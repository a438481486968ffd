"""What the program asks of a tokenizer, whatever kind of file holds its vocabulary."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class Tokenizer(ABC):
    """A loaded vocabulary.

    Attributes:
        path: its file.
        fingerprint: sha256 (hex) of the file; equal fingerprints mean equal ids.
        vocab_size: number of ids V.
        eod_id: end-of-document id.
        pad_id: padding id; the end-of-document id where there is no padding.
        begin_ids: ids in front of every document, such as Llama's <s>.
    """

    path: Path
    fingerprint: str
    vocab_size: int
    eod_id: int
    pad_id: int
    begin_ids: tuple[int, ...]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin_ids and end-of-document. No text becomes a control id, whatever it spells."""

    def encode_inside(self, text: str) -> list[int]:
        """Ids of a text that goes on after a newline: without the space that some models put before a text."""
        line_end, ids = self.encode("\n"), self.encode("\n" + text)
        return ids[len(line_end) :] if line_end and ids[: len(line_end)] == line_end else self.encode(text)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """The text of ids; control ids (end-of-document, padding) have none."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """File name -> bytes, to be put beside data: first the vocabulary as it is, then what else says all this."""

    @abstractmethod
    def piece(self, token: int) -> str:
        """What the vocabulary calls an id."""

    @abstractmethod
    def is_control(self, token: int) -> bool:
        """Is it an id without text, such as end-of-document?"""

    @cached_property
    def byte_lengths_V(self) -> NDArray[np.int64]:
        """int64 [V], UTF-8 bytes that each id decodes to (control ids: 0)."""
        return np.array([self._byte_length(i) for i in range(self.vocab_size)], dtype=np.int64)

    @abstractmethod
    def _byte_length(self, token: int) -> int:
        """UTF-8 bytes that an id decodes to."""
