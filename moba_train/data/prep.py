"""`moba-train prep`: text in, everything that training and evaluation read out.

    tokenizer.model                      sentencepiece, trained on a sample of the training text, or taken as it is
    tokenizer.json, tokenizer_config.json  instead of it, where a tokenizer.json is taken
    chat_template.jinja                  what rendered the conversations, if there are any
    train.bin/.idx, valid.bin/.idx       documents, each ending in end-of-document
    train.spans.npy, valid.spans.npy     what the loss is on, where there are conversations
    needle_<length>.bin/.idx/.spans.npy  training documents with needles (on request), hidden in training text
    prep.json                            options, counts, file sizes; written last: where it stands, prep has finished

A hash of a document's text decides whether it is held out. The number of processes changes no byte.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from moba_train.data.chat import TEMPLATE_NAME, ChatEncoder, ChatTemplate, find_template
from moba_train.data.chat_gate import ChatGate
from moba_train.data.encode import Batch, Coding, Frame, encoded, in_batches
from moba_train.data.files import disk_errors, published
from moba_train.data.indexed import IndexedWriter, bin_path, idx_path, open_indexed, spans_path, write_spans
from moba_train.data.needles import FORMAT, NeedleText, build_needle_document, haystack_of, load_words, special_words
from moba_train.data.pair_writer import PairWriter
from moba_train.data.prep_options import TRAIN, PrepOptions, check_options
from moba_train.data.readers import ReadStats, SourceFile, broken, list_files, read_documents, signature
from moba_train.data.survey import Survey, expected_bytes, survey
from moba_train.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from moba_train.data.tokenizer_hf import SETTINGS, HfTokenizer

PREP_VERSION = 2
"""Raised when the same options begin to give other bytes. 2: files without their byte order mark."""
_OURS = frozenset({"prep.json", "tokenizer.json", SETTINGS})
"""What `prep` writes that reads like text."""


@dataclass(frozen=True)
class ChatCounts:
    """Conversations among the documents.

    Attributes:
        documents: how many were written.
        tokens: theirs.
        loss_tokens: those of them that are the assistant's.
        silent: conversations that were left out because the assistant says nothing in them.
        endless: those of the documents in which nothing that the assistant says ends in a special token.
    """

    documents: int
    tokens: int
    loss_tokens: int
    silent: int
    endless: int = 0  # as in folders from before it was counted


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
        chat: of the conversations; None if there are none.
    """

    up_to_date: bool
    read: ReadStats
    tokenizer: str
    vocab_size: int
    fingerprint: str
    documents: dict[str, int]
    tokens: dict[str, int]
    chat: ChatCounts | None = None


def prepare(options: PrepOptions) -> PrepReport:
    """Do what the options say, unless the folder already holds the result.

    Raises:
        ConfigError: options out of range.
        DataError: sources missing, empty or broken; no text for a tokenizer; a folder that cannot be written.
    """
    check_options(options)
    files = [file for file in list_files(options.sources) if not _is_ours(file.path, options.out)]
    taken = None if options.tokenizer == TRAIN else load_tokenizer(options.tokenizer, eod=options.eod)
    template = _template(options, taken)
    request = _request(options, files, taken)
    finished = _finished(options.out, request, template)
    if finished is not None:
        return finished
    with disk_errors(options.out, what="the folder cannot be written"):  # asked before hours of reading
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "prep.json").unlink(missing_ok=True)
        TemporaryFile(dir=options.out).close()
    gate = ChatGate(template, taken, options.tokenizer, join=options.join)
    with _progress() as progress:
        found = survey(
            files,
            gate,
            progress,
            held_out=options.held_out,
            max_mib=options.max_mib,
            skip_bad=options.skip_bad,
        )
        tokenizer = _make_tokenizer(options, found, taken)
        stats, pairs, chat = _encode(options, files, found, tokenizer, gate, progress)
        documents = {name: pair.writer.num_documents for name, pair in pairs.items()}
        tokens = {name: pair.writer.num_tokens for name, pair in pairs.items()}
        for length, count in sorted(options.needles.items()):
            name = f"needle_{length}"
            documents[name], tokens[name] = _write_needles(options, tokenizer, length, count, progress)
    name = tokenizer.path.name
    report = PrepReport(False, stats, name, tokenizer.vocab_size, tokenizer.fingerprint, documents, tokens, chat)
    if chat is not None and template is not None:
        _write_template(options.out, template)
        request |= {"chat_template": template.fingerprint}
    _write_record(options.out, request, report, tokenizer)
    return report


# ---------------------------------------------------------------------------------------------------------- prep.json


def _is_ours(path: Path, out: Path) -> bool:
    """It is no text, but what an earlier `prep` has left: `out` may lie in the folder that is read."""
    return path.name in _OURS and path.parent.resolve() == out.resolve()


def _request(options: PrepOptions, files: list[SourceFile], taken: Tokenizer | None) -> dict[str, Any]:
    """Everything that decides the bytes, but for the chat template, which counts if there are conversations."""
    others = ("out", "workers", "eod", "chat_template")
    kept = {key: value for key, value in asdict(options).items() if key not in others}
    if taken is not None:
        kept["tokenizer"] = taken.fingerprint
        settings = list(taken.files().items())[1:]
        kept |= {name: hashlib.sha256(content).hexdigest() for name, content in settings}
        del kept["vocab_size"]
    if not options.join:
        del kept["join"]  # folders from before there was this option are as they should be
    form = hashlib.sha256(repr((FORMAT, load_words())).encode()).hexdigest()
    request = {"version": PREP_VERSION, "options": kept, "needle_format": form, "sources": signature(files)}
    return dict(json.loads(json.dumps(request)))


def _finished(out: Path, request: dict[str, Any], template: ChatTemplate | None) -> PrepReport | None:
    """The report of an earlier run with the same request whose files are all there, or None."""
    path = out / "prep.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text("utf-8"))
    except ValueError:
        return None
    chat = record.get("chat") if isinstance(record, dict) else None
    if chat is not None:
        request = request | {"chat_template": template.fingerprint if template is not None else ""}
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
        None if chat is None else ChatCounts(**chat),
    )


def _write_record(out: Path, request: dict[str, Any], report: PrepReport, tokenizer: Tokenizer) -> None:
    names = [*tokenizer.files(), *([TEMPLATE_NAME] if report.chat is not None else [])]
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
        **({} if report.chat is None else {"chat": asdict(report.chat)}),
        "files": {name: (out / name).stat().st_size for name in names},
    }
    with published(out / "prep.json") as aside:
        aside.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


# --------------------------------------------------------------------------------------------- tokenizer and template


def _make_tokenizer(options: PrepOptions, found: Survey, taken: Tokenizer | None) -> Tokenizer:
    if taken is not None:
        files = taken.files()
        for name, content in files.items():
            with published(options.out / name) as aside:
                aside.write_bytes(content)
        return load_tokenizer(options.out / next(iter(files)))
    return train_tokenizer(
        found.sample, options.out / "tokenizer.model", vocab_size=options.vocab_size, words=special_words()
    )


def _template(options: PrepOptions, taken: Tokenizer | None) -> ChatTemplate | None:
    """The template for conversations, if there should be any. One that was named is compiled at once."""
    if not isinstance(taken, HfTokenizer):
        return None
    named = options.chat_template
    template = find_template(taken, Path(named) if named else None, eod=options.eod)
    if named and template is not None:
        ChatEncoder(template, taken)
    return template


def _write_template(out: Path, template: ChatTemplate) -> None:
    """Put the template beside the tokenizer, and take out of the settings whatever they called by that name."""
    with published(out / TEMPLATE_NAME) as aside:
        aside.write_text(template.source, "utf-8")
    settings = json.loads((out / SETTINGS).read_text("utf-8"))
    if settings.pop("chat_template", None) is not None:
        with published(out / SETTINGS) as aside:
            aside.write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", "utf-8")


# ------------------------------------------------------------------------------------------------------------ encoding


def _encode(
    options: PrepOptions,
    files: list[SourceFile],
    found: Survey,
    tokenizer: Tokenizer,
    gate: ChatGate,
    progress: Progress,
) -> tuple[ReadStats, dict[str, PairWriter], ChatCounts | None]:
    """Second pass: write train and valid; returns what was read, the pairs, and what there is of conversations."""
    stats, silent, endless, refused, first_refused = ReadStats(), 0, 0, 0, ""
    task = progress.add_task("encoding", total=expected_bytes(files, options.max_mib))
    documents = read_documents(files, skip_bad=options.skip_bad, max_mib=options.max_mib, stats=stats)
    with ExitStack() as stack:
        pairs = {
            name: stack.enter_context(
                PairWriter(options.out / name, vocab_size=tokenizer.vocab_size, join=options.join)
            )
            for name in ("train", "valid")
        }
        frame = Frame(list(tokenizer.begin_ids), [tokenizer.eod_id])
        if options.join and frame.before:
            for pair in pairs.values():
                pair.add_text(frame.before)
        coding = Coding(found.threshold, Frame([], []) if options.join else frame, gate.template)
        for batch in encoded(in_batches(gate.passed(documents)), coding, tokenizer, options.workers):
            if batch.broken and not options.skip_bad:
                raise broken(*batch.broken[0])
            refused += len(batch.broken)
            first_refused = first_refused or next((f"{where}: {why}" for where, why in batch.broken), "")
            silent += _add_batch(batch, pairs)
            endless += batch.endless
            progress.update(task, completed=stats.num_bytes)
        if options.join:
            for pair in pairs.values():
                pair.add_text(frame.after)
    progress.update(task, total=max(1, stats.num_bytes), completed=max(1, stats.num_bytes))
    # Counted at the end: how far the reader is ahead depends on the number of processes.
    stats.documents -= refused
    stats.bad += refused
    stats.first_bad = stats.first_bad or first_refused
    return stats, pairs, _chat_counts(pairs, silent, endless)


def _add_batch(batch: Batch, pairs: dict[str, PairWriter]) -> int:
    """Write the documents of a batch; returns how many conversations there are in which the assistant says nothing."""
    ends = np.cumsum(batch.lengths)
    for place, (held_out, end, length) in enumerate(zip(batch.held_out, ends, batch.lengths, strict=True)):
        pair, tokens = pairs["valid" if held_out else "train"], batch.ids[end - length : end]
        if not length:  # a tokenizer may leave nothing of a text
            continue
        if place in batch.spans:
            pair.add_chat(tokens, batch.spans[place])
        else:
            pair.add_text(tokens)
    return sum(not len(spans_N2) for spans_N2 in batch.spans.values())


def _chat_counts(pairs: dict[str, PairWriter], silent: int, endless: int) -> ChatCounts | None:
    documents = sum(pair.conversations for pair in pairs.values())
    if not documents and not silent:
        return None
    tokens, loss = (
        sum(counts) for counts in zip(*((pair.chat_tokens, pair.loss_tokens) for pair in pairs.values()), strict=True)
    )
    return ChatCounts(documents, tokens, loss, silent, endless)


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
