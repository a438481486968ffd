"""One of the pairs that `prep` encodes into, with the spans that the loss is restricted to."""

from __future__ import annotations

from array import array
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from moba_train.data.indexed import IndexedWriter, write_spans


class PairWriter:
    """Writes documents, and a `.spans.npy` if there are conversations among them; a context manager.

    Spans are kept in memory until the end: 24 bytes each, so a gigabyte holds 40 million turns. A text among
    conversations has one span, all of it.

    Args:
        join: one document of all texts; then there are no conversations.

    Attributes:
        conversations, chat_tokens, loss_tokens: how many, their tokens, and the assistant's among these.
    """

    def __init__(self, prefix: Path, *, vocab_size: int, join: bool) -> None:
        self.writer = IndexedWriter(prefix, vocab_size=vocab_size, join=join)
        self.conversations = self.chat_tokens = self.loss_tokens = 0
        self._join = join
        self._rows = array("q")
        self._texts_before = array("q")  # tokens of each document, until the first conversation

    def __enter__(self) -> PairWriter:
        self.writer.__enter__()
        return self

    def add_text(self, tokens: NDArray[np.integer] | list[int]) -> None:
        """Add one text, or with `join` a part of the one that there is."""
        if self.conversations:
            self._rows.extend((self.writer.num_documents, 0, len(tokens)))
        elif not self._join:
            self._texts_before.append(len(tokens))
        self.writer.add(tokens)

    def add_chat(self, tokens: NDArray[np.integer], spans_N2: NDArray[np.int64]) -> None:
        """Add one conversation, whose spans_N2 (int64 [N, 2]: start, end) are the assistant's."""
        if not self.conversations:
            for document, size in enumerate(self._texts_before):
                self._rows.extend((document, 0, size))
            self._texts_before = array("q")
        for start, end in spans_N2.tolist():
            self._rows.extend((self.writer.num_documents, start, end))
        self.conversations += 1
        self.chat_tokens += len(tokens)
        self.loss_tokens += int((spans_N2[:, 1] - spans_N2[:, 0]).sum())
        self.writer.add(tokens)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.writer.__exit__(kind, error, trace)
        if kind is None and self.conversations:
            write_spans(self.writer.prefix, np.frombuffer(self._rows, dtype=np.int64).reshape(-1, 3))
