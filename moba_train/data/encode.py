"""Documents to ids, in several processes if there are several, in the order of the documents."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from moba_train.data.chat import ChatEncoder, ChatTemplate
from moba_train.data.records import Document, document_hash, size_letters
from moba_train.data.tokenizer import Tokenizer, load_tokenizer
from moba_train.data.tokenizer_hf import HfTokenizer
from moba_train.errors import BackendError

BATCH_KIB = 256
"""Text handed to a process at a time."""


@dataclass(frozen=True)
class Frame:
    """Ids before and after a text."""

    before: list[int]
    after: list[int]


@dataclass(frozen=True)
class Coding:
    """How documents become ids.

    Attributes:
        threshold: a document is held out if the first 8 bytes of its hash are below.
        around: what each text is framed with.
        template: renders conversations; None = there is none among the documents.
    """

    threshold: int
    around: Frame
    template: ChatTemplate | None = None


@dataclass(frozen=True)
class Batch:
    """Documents, encoded. int32 ids, one document after another.

    Attributes:
        held_out: of each document.
        ids: of all.
        lengths: tokens of each; 0 = nothing is left of it.
        spans: of each conversation, by its place in the batch: int64 [n, 2], tokens (start, end) that are the
            assistant's.
        broken: of each conversation that cannot be used: where it is and why.
        endless: conversations in which nothing that the assistant says ends in a special token.
    """

    held_out: tuple[bool, ...]
    ids: NDArray[np.int32]
    lengths: tuple[int, ...]
    spans: dict[int, NDArray[np.int64]]
    broken: tuple[tuple[str, str], ...]
    endless: int


def in_batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += size_letters(document)
        if size >= BATCH_KIB * 1024:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encoded(batches: Iterable[list[Document]], coding: Coding, tokenizer: Tokenizer, workers: int) -> Iterator[Batch]:
    """Encoded batches in the order of the documents, at most a few batches ahead of the reader.

    Raises:
        BackendError: something outside killed one of the processes.
    """
    if workers == 1:
        for batch in batches:
            yield _encode_batch(batch, coding, tokenizer)
        return
    pending: deque[Future[Batch]] = deque()
    # spawn: a forked child would inherit the threads of whatever is loaded here.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            for batch in batches:
                pending.append(pool.submit(_encode_batch_elsewhere, batch, coding, str(tokenizer.path)))
                if len(pending) > 3 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise BackendError(
                "a process that encodes was killed",
                where=f"--workers {workers}",
                fix="If the kernel did it for want of memory (dmesg says so), take fewer --workers.",
            ) from error


def _encode_batch(documents: list[Document], coding: Coding, tokenizer: Tokenizer) -> Batch:
    held_out = tuple(int.from_bytes(document_hash(document)[:8], "big") < coding.threshold for document in documents)
    texts = iter(tokenizer.encode_many([document for document in documents if isinstance(document, str)]))
    framed: list[list[int]] = []
    spans: dict[int, NDArray[np.int64]] = {}
    broken: list[tuple[str, str]] = []
    endless = 0
    for place, document in enumerate(documents):
        if isinstance(document, str):
            framed.append([*coding.around.before, *next(texts), *coding.around.after])
            continue
        assert coding.template is not None and isinstance(tokenizer, HfTokenizer)  # prep has seen to it
        try:
            chat = _encoder(coding.template, tokenizer).encode(document)
        except ValueError as error:
            broken.append((document.where, str(error)))
            framed.append([])
            continue
        spans[place] = chat.spans_N2
        framed.append(chat.ids if len(chat.spans_N2) else [])
        endless += len(chat.spans_N2) > 0 and not chat.stops
    ids = np.fromiter((token for ids in framed for token in ids), dtype=np.int32)
    return Batch(held_out, ids, tuple(len(ids) for ids in framed), spans, tuple(broken), endless)


def _encode_batch_elsewhere(documents: list[Document], coding: Coding, tokenizer_path: str) -> Batch:
    return _encode_batch(documents, coding, _tokenizer_of_process(tokenizer_path))


@lru_cache(maxsize=1)
def _tokenizer_of_process(path: str) -> Tokenizer:
    """Each process loads the model once; it does not change while the pool lives."""
    return load_tokenizer(path)


@lru_cache(maxsize=1)
def _encoder(template: ChatTemplate, tokenizer: HfTokenizer) -> ChatEncoder:
    """Compiled once."""
    return ChatEncoder(template, tokenizer)


__all__ = ["Batch", "Coding", "Frame", "document_hash", "encoded", "in_batches"]
