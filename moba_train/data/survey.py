"""The first look of `prep` at its documents: what to hold out, and what to train a tokenizer on."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rich.progress import Progress

from moba_train.data.chat_gate import ChatGate
from moba_train.data.readers import SourceFile, read_documents
from moba_train.data.records import Conversation, document_hash, size_bytes
from moba_train.errors import DataError

TOKENIZER_SAMPLE_MIB = 8
"""Text that the tokenizer is trained on; more changes it little and takes longer."""
SURVEY_MIB = 1024
"""Text looked at before encoding, for the tokenizer's sample and the smallest held-out share."""
MIN_HELD_OUT_KIB = 64
"""Of a small corpus at least this much is held out (but at most a tenth of it)."""
_PACKED: Final = (".gz", ".zst", ".parquet")


@dataclass(frozen=True)
class Survey:
    """What the first pass found: the hash below which a document is held out, and text to train a tokenizer on."""

    threshold: int
    sample: tuple[str, ...]


def survey(
    files: Sequence[SourceFile],
    gate: ChatGate,
    progress: Progress,
    *,
    held_out: float,
    max_mib: float,
    skip_bad: bool,
) -> Survey:
    """Read the documents once; options as in `PrepOptions`.

    Raises:
        DataError: there is no text, or it is broken.
    """
    limit_mib = min(max_mib or SURVEY_MIB, SURVEY_MIB)
    expected = expected_bytes(files, limit_mib)
    sampled_below = int(min(1.0, TOKENIZER_SAMPLE_MIB * 2**20 / max(1, expected)) * 2**64)
    smallest: list[tuple[int, int]] = []  # heap of (-hash, bytes): the documents that would be held out first
    kept_bytes = total_bytes = sampled_bytes = 0
    sample: list[tuple[int, str]] = []
    task = progress.add_task("looking at the text", total=expected)
    for document in gate.passed(read_documents(files, skip_bad=skip_bad, max_mib=limit_mib)):
        digest, size = document_hash(document), size_bytes(document)
        order = int.from_bytes(digest[:8], "big")
        total_bytes += size
        progress.update(task, completed=total_bytes)
        heapq.heappush(smallest, (-order, size))
        kept_bytes += size
        while kept_bytes - smallest[0][1] >= MIN_HELD_OUT_KIB * 1024:
            kept_bytes -= heapq.heappop(smallest)[1]
        if isinstance(document, Conversation):
            continue  # it comes with its tokenizer
        if int.from_bytes(digest[8:16], "big") < sampled_below and sampled_bytes < 2 * TOKENIZER_SAMPLE_MIB * 2**20:
            sampled_bytes += size
            sample.append((order, document))
    progress.update(task, total=max(1, total_bytes), completed=max(1, total_bytes))
    if total_bytes == 0:
        where = ", ".join(file.name for file in files[:3]) + (", ..." if len(files) > 3 else "")
        raise DataError("the sources hold no text", where=where, got=f"{len(files)} files")
    threshold = int(held_out * 2**64)
    wanted = min(MIN_HELD_OUT_KIB * 1024, total_bytes // 10)
    covered = 0
    for negative, size in sorted(smallest, reverse=True):
        if covered >= wanted or (covered and covered + size > total_bytes // 5):
            break
        threshold = max(threshold, -negative + 1)
        covered += size
    return Survey(threshold, tuple(text for order, text in sample if order >= threshold))


def expected_bytes(files: Sequence[SourceFile], limit_mib: float) -> int:
    """Text in the files, about; of `limit_mib` MiB at most, unless that is 0."""
    # Text packs to about a quarter.
    sizes = sum(file.path.stat().st_size * (4 if file.path.suffix in _PACKED else 1) for file in files)
    return min(sizes, int(limit_mib * 2**20)) if limit_mib else sizes
