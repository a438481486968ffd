"""`moba-train prep`: text in, everything that training and evaluation read out.

    tokenizer.model                      sentencepiece, trained on a sample of the training text, or taken as it is
    tokenizer.json, tokenizer_config.json  instead of it, where a tokenizer.json is taken
    train.bin/.idx, valid.bin/.idx       documents, each ending in end-of-document
    needle_<length>.bin/.idx/.spans.npy  training documents with needles (on request), hidden in training text
    prep.json                            options, counts, file sizes; written last: where it stands, prep has finished

A hash of a document's text decides whether it is held out. The number of processes changes no byte.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from moba_train.data.encode import Frame, document_hash, encoded, in_batches
from moba_train.data.files import published
from moba_train.data.indexed import IndexedWriter, bin_path, idx_path, open_indexed, spans_path, write_spans
from moba_train.data.needles import FORMAT, NeedleText, build_needle_document, haystack_of, load_words, special_words
from moba_train.data.readers import ReadStats, SourceFile, list_files, read_documents, signature
from moba_train.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from moba_train.errors import ConfigError, DataError

PREP_VERSION = 1
"""Raised when the same options begin to give other bytes."""
TRAIN = "train"
"""Value of `PrepOptions.tokenizer` that trains one."""
TOKENIZER_SAMPLE_MIB = 8
"""Text that the tokenizer is trained on; more changes it little and takes longer."""
SURVEY_MIB = 1024
"""Text looked at before encoding, for the tokenizer's sample and the smallest held-out share."""
MIN_HELD_OUT_KIB = 64
"""Of a small corpus at least this much is held out (but at most a tenth of it)."""


@dataclass(frozen=True)
class PrepOptions:
    """What to prepare.

    Attributes:
        out: folder to write.
        sources: files, folders, or "stdlib".
        tokenizer: "train", or the path of a sentencepiece model or of a tokenizer.json.
        eod: of a tokenizer.json, the token that ends a document; "" = its eos_token.
        vocab_size: ids of a trained tokenizer.
        held_out: share of the documents that is held out for evaluation.
        max_mib: read at most this much text; 0 = everything.
        skip_bad: leave out and count broken records.
        join: put all training text into one document, and all held-out text into another.
        workers: processes that encode; changes no byte.
        needles: training documents with needles, length in tokens -> how many.
        seed: of the needle documents.
    """

    out: Path
    sources: tuple[str, ...] = ("stdlib",)
    tokenizer: str = TRAIN
    eod: str = ""
    vocab_size: int = 4096
    held_out: float = 0.02
    max_mib: float = 0.0
    skip_bad: bool = False
    join: bool = False
    workers: int = 1
    needles: dict[int, int] = field(default_factory=dict)
    seed: int = 1234


@dataclass(frozen=True)
class PrepReport:
    """What was prepared (also in prep.json).

    Attributes:
        up_to_date: nothing was done: the folder already held this.
        read: files, documents, num_bytes, bad, first_bad.
        tokenizer: name of its file.
        vocab_size: of the tokenizer.
        fingerprint: of the tokenizer.
        documents: documents by pair ("train", "valid", "needle_128", ...).
        tokens: tokens by pair.
    """

    up_to_date: bool
    read: ReadStats
    tokenizer: str
    vocab_size: int
    fingerprint: str
    documents: dict[str, int]
    tokens: dict[str, int]


def prepare(options: PrepOptions) -> PrepReport:
    """Do what the options say, unless the folder already holds the result.

    Raises:
        ConfigError: options out of range.
        DataError: sources missing, empty or broken; no text for a tokenizer.
    """
    _check_options(options)
    files = list_files(options.sources)
    request = _request(options, files)
    finished = _finished(options.out, request)
    if finished is not None:
        return finished
    (options.out / "prep.json").unlink(missing_ok=True)
    with _progress() as progress:
        survey = _survey(options, files, progress)
        tokenizer = _make_tokenizer(options, survey)
        stats, documents, tokens = _encode(options, files, survey, tokenizer, progress)
        for length, count in sorted(options.needles.items()):
            name = f"needle_{length}"
            documents[name], tokens[name] = _write_needles(options, tokenizer, length, count, progress)
    name = tokenizer.path.name
    report = PrepReport(False, stats, name, tokenizer.vocab_size, tokenizer.fingerprint, documents, tokens)
    _write_record(options.out, request, report, tokenizer)
    return report


# ---------------------------------------------------------------------------------------------- options and prep.json


def _check_options(options: PrepOptions) -> None:
    if not 0 < options.held_out < 1:
        raise ConfigError("held-out share out of range", where="--held-out", got=options.held_out, allowed="0 < x < 1")
    if options.eod and options.tokenizer == TRAIN:
        fix = "name it with --tokenizer"
        raise ConfigError(
            "the end of documents is chosen for a tokenizer.json", where="--eod", got=options.eod, fix=fix
        )
    if options.workers < 1:
        raise ConfigError("at least one process must encode", where="--workers", got=options.workers, allowed=">= 1")
    for length, count in options.needles.items():
        if length < 1 or count < 1:
            got = f"{length}:{count}"
            raise ConfigError("length and number of needle documents must be positive", where="--needles", got=got)


def _request(options: PrepOptions, files: list[SourceFile]) -> dict[str, Any]:
    """Everything that decides the bytes."""
    kept = {key: value for key, value in asdict(options).items() if key not in ("out", "workers", "eod")}
    if options.tokenizer != TRAIN:
        taken = load_tokenizer(options.tokenizer, eod=options.eod)
        kept["tokenizer"] = taken.fingerprint
        others = list(taken.files().items())[1:]
        kept |= {name: hashlib.sha256(content).hexdigest() for name, content in others}
        del kept["vocab_size"]
    if not options.join:
        del kept["join"]  # folders from before there was this option are as they should be
    form = hashlib.sha256(repr((FORMAT, load_words())).encode()).hexdigest()
    request = {"version": PREP_VERSION, "options": kept, "needle_format": form, "sources": signature(files)}
    return dict(json.loads(json.dumps(request)))


def _finished(out: Path, request: dict[str, Any]) -> PrepReport | None:
    """The report of an earlier run with the same request whose files are all there, or None."""
    path = out / "prep.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text("utf-8"))
    except ValueError:
        return None
    if not isinstance(record, dict) or record.get("request") != request:
        return None
    if any(not (out / name).is_file() or (out / name).stat().st_size != n for name, n in record["files"].items()):
        return None
    tokenizer = record["tokenizer"]
    return PrepReport(
        True,
        ReadStats(**record["read"]),
        tokenizer.get("file", "tokenizer.model"),  # folders from before there was another
        tokenizer["vocab_size"],
        tokenizer["fingerprint"],
        record["documents"],
        record["tokens"],
    )


def _write_record(out: Path, request: dict[str, Any], report: PrepReport, tokenizer: Tokenizer) -> None:
    names = list(tokenizer.files())
    for pair in report.documents:
        found = (bin_path(out / pair), idx_path(out / pair), spans_path(out / pair))
        names.extend(path.name for path in found if path.exists())
    record = {
        "request": request,
        "read": asdict(report.read),
        "tokenizer": {
            "file": report.tokenizer,
            "fingerprint": report.fingerprint,
            "vocab_size": report.vocab_size,
            "eod_id": tokenizer.eod_id,
        },
        "documents": report.documents,
        "tokens": report.tokens,
        "files": {name: (out / name).stat().st_size for name in names},
    }
    with published(out / "prep.json") as aside:
        aside.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


# ------------------------------------------------------------------------------------------------ survey and tokenizer


@dataclass(frozen=True)
class _Survey:
    """What the first pass found: the hash below which a document is held out, and text to train a tokenizer on."""

    threshold: int
    sample: tuple[str, ...]


def _survey(options: PrepOptions, files: list[SourceFile], progress: Progress) -> _Survey:
    limit_mib = min(options.max_mib or SURVEY_MIB, SURVEY_MIB)
    expected = _expected_bytes(files, limit_mib)
    sampled_below = int(min(1.0, TOKENIZER_SAMPLE_MIB * 2**20 / max(1, expected)) * 2**64)
    smallest: list[tuple[int, int]] = []  # heap of (-hash, bytes): the documents that would be held out first
    kept_bytes = total_bytes = sampled_bytes = 0
    sample: list[tuple[int, str]] = []
    task = progress.add_task("looking at the text", total=expected)
    for text in read_documents(files, skip_bad=options.skip_bad, max_mib=limit_mib):
        digest, size = document_hash(text), len(text.encode())
        order = int.from_bytes(digest[:8], "big")
        total_bytes += size
        progress.update(task, completed=total_bytes)
        heapq.heappush(smallest, (-order, size))
        kept_bytes += size
        while kept_bytes - smallest[0][1] >= MIN_HELD_OUT_KIB * 1024:
            kept_bytes -= heapq.heappop(smallest)[1]
        if int.from_bytes(digest[8:16], "big") < sampled_below and sampled_bytes < 2 * TOKENIZER_SAMPLE_MIB * 2**20:
            sampled_bytes += size
            sample.append((order, text))
    progress.update(task, total=max(1, total_bytes), completed=max(1, total_bytes))
    if total_bytes == 0:
        raise DataError("the sources hold no text", where=" ".join(options.sources), got=f"{len(files)} files")
    threshold = int(options.held_out * 2**64)
    wanted = min(MIN_HELD_OUT_KIB * 1024, total_bytes // 10)
    covered = 0
    for negative, size in sorted(smallest, reverse=True):
        if covered >= wanted or (covered and covered + size > total_bytes // 5):
            break
        threshold = max(threshold, -negative + 1)
        covered += size
    return _Survey(threshold, tuple(text for order, text in sample if order >= threshold))


def _expected_bytes(files: list[SourceFile], limit_mib: float) -> int:
    # Text packs to about a quarter.
    sizes = sum(file.path.stat().st_size * (4 if file.path.suffix == ".gz" else 1) for file in files)
    return min(sizes, int(limit_mib * 2**20)) if limit_mib else sizes


def _make_tokenizer(options: PrepOptions, survey: _Survey) -> Tokenizer:
    if options.tokenizer != TRAIN:
        files = load_tokenizer(options.tokenizer, eod=options.eod).files()
        for name, content in files.items():
            with published(options.out / name) as aside:
                aside.write_bytes(content)
        return load_tokenizer(options.out / next(iter(files)))
    return train_tokenizer(
        survey.sample, options.out / "tokenizer.model", vocab_size=options.vocab_size, words=special_words()
    )


# ------------------------------------------------------------------------------------------------------------ encoding


def _encode(
    options: PrepOptions, files: list[SourceFile], survey: _Survey, tokenizer: Tokenizer, progress: Progress
) -> tuple[ReadStats, dict[str, int], dict[str, int]]:
    """Second pass: write train and valid; returns what was read, documents and tokens by pair."""
    stats = ReadStats()
    task = progress.add_task("encoding", total=_expected_bytes(files, options.max_mib))
    texts = read_documents(files, skip_bad=options.skip_bad, max_mib=options.max_mib, stats=stats)
    with ExitStack() as stack:
        train, valid = (
            stack.enter_context(IndexedWriter(options.out / name, vocab_size=tokenizer.vocab_size, join=options.join))
            for name in ("train", "valid")
        )
        frame = Frame(list(tokenizer.begin_ids), [tokenizer.eod_id])
        if options.join and frame.before:
            for writer in (train, valid):
                writer.add(frame.before)
        around = Frame([], []) if options.join else frame
        for batch in encoded(in_batches(texts), survey.threshold, around, tokenizer, options.workers):
            ends = np.cumsum(batch.lengths)
            for held_out, end, length in zip(batch.held_out, ends, batch.lengths, strict=True):
                if length:  # a tokenizer may leave nothing of a text
                    (valid if held_out else train).add(batch.ids[end - length : end])
            progress.update(task, completed=stats.num_bytes)
        if options.join:
            for writer in (train, valid):
                writer.add(frame.after)
    progress.update(task, total=max(1, stats.num_bytes), completed=max(1, stats.num_bytes))
    writers = {"train": train, "valid": valid}
    documents = {name: writer.num_documents for name, writer in writers.items()}
    return stats, documents, {name: writer.num_tokens for name, writer in writers.items()}


# ------------------------------------------------------------------------------------------------------------- needles


def _write_needles(
    options: PrepOptions, tokenizer: Tokenizer, length: int, count: int, progress: Progress
) -> tuple[int, int]:
    """Write one needle source; returns its documents and tokens."""
    text = NeedleText(tokenizer, load_words())
    haystack = haystack_of(open_indexed(options.out / "train"), eod_id=tokenizer.eod_id, begin_ids=tokenizer.begin_ids)
    prefix = options.out / f"needle_{length}"
    spans: list[tuple[int, int, int]] = []
    task = progress.add_task(f"needles of {length} tokens", total=count)
    with IndexedWriter(prefix, vocab_size=tokenizer.vocab_size) as writer:
        for index in range(count):
            document = build_needle_document(text, haystack, length=length, seed=options.seed, index=index)
            writer.add(document.tokens_L)
            spans.extend((index, int(start), int(end)) for start, end in document.answers_Q2)
            progress.update(task, completed=index + 1)
    write_spans(prefix, np.array(spans, dtype=np.int64))
    return writer.num_documents, writer.num_tokens


def _progress() -> Progress:
    """A bar for each part, on a terminal only."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
    return Progress(*columns, console=console, disable=not console.is_terminal)
