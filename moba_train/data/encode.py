"""Texts to ids, in several processes if there are several, in the order of the texts."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from moba_train.data.tokenizer import Tokenizer, load_tokenizer

BATCH_KIB = 256
"""Text handed to a process at a time."""


@dataclass(frozen=True)
class Frame:
    """Ids before and after a text."""

    before: list[int]
    after: list[int]


@dataclass(frozen=True)
class Batch:
    """Documents on their way to a process and, encoded, back. int32 ids, one document after another."""

    held_out: tuple[bool, ...]
    ids: NDArray[np.int32]
    lengths: tuple[int, ...]


def document_hash(text: str) -> bytes:
    """sha256 of a document; its first 8 bytes decide whether it is held out, the next 8 whether it is sampled."""
    return hashlib.sha256(text.encode()).digest()


def in_batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_KIB * 1024:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encoded(
    batches: Iterable[list[str]], threshold: int, around: Frame, tokenizer: Tokenizer, workers: int
) -> Iterator[Batch]:
    """Encoded batches in the order of the texts, at most a few batches ahead of the reader.

    Args:
        threshold: a text is held out if the first 8 bytes of its hash are below.
        around: what each text is framed with.
    """
    if workers == 1:
        for batch in batches:
            yield _encode_batch(batch, threshold, around, tokenizer)
        return
    pending: deque[Future[Batch]] = deque()
    # spawn: a forked child would inherit the threads of whatever is loaded here.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for batch in batches:
            pending.append(pool.submit(_encode_batch_elsewhere, batch, threshold, around, str(tokenizer.path)))
            if len(pending) > 3 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _encode_batch(texts: list[str], threshold: int, around: Frame, tokenizer: Tokenizer) -> Batch:
    held_out = tuple(int.from_bytes(document_hash(text)[:8], "big") < threshold for text in texts)
    documents = [[*around.before, *ids, *around.after] for ids in tokenizer.encode_many(texts)]
    ids = np.fromiter((token for ids in documents for token in ids), dtype=np.int32)
    return Batch(held_out, ids, tuple(len(ids) for ids in documents))


def _encode_batch_elsewhere(texts: list[str], threshold: int, around: Frame, tokenizer_path: str) -> Batch:
    return _encode_batch(texts, threshold, around, _tokenizer_of_process(tokenizer_path))


@lru_cache(maxsize=1)
def _tokenizer_of_process(path: str) -> Tokenizer:
    """Each process loads the model once; it does not change while the pool lives."""
    return load_tokenizer(path)
