"""`moba-train prep`: text -> tokenizer, `.bin/.idx` pairs and needle documents; prints what was written."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moba_train.data.prep import PrepReport, prepare
from moba_train.data.prep_options import TRAIN, PrepOptions


def run_prep(
    *,
    sources: tuple[str, ...],
    out: Path,
    vocab_size: int,
    tokenizer: Path | None,
    eod: str,
    chat_template: Path | None,
    needles: dict[int, int],
    held_out: float,
    seed: int,
    workers: int,
    skip_bad: bool,
    join: bool,
    max_mib: float,
) -> int:
    """Prepare and print a summary; returns the exit code.

    Args:
        tokenizer: a sentencepiece model or a tokenizer.json to take; None = train one of `vocab_size` ids.
        eod: of a tokenizer.json, the token that ends a document; "" = its eos_token.
        chat_template: renders conversations; None = the template beside the tokenizer.json.
        workers: encoding processes; 0 = one for each core that this process may use.

    Raises:
        ConfigError, DataError: see `moba_train.data.prep.prepare`.
    """
    options = PrepOptions(
        out=out,
        sources=sources,
        tokenizer=str(tokenizer) if tokenizer is not None else TRAIN,
        eod=eod,
        chat_template=str(chat_template) if chat_template is not None else "",
        vocab_size=vocab_size,
        held_out=held_out,
        max_mib=max_mib,
        skip_bad=skip_bad,
        join=join,
        workers=workers or len(os.sched_getaffinity(0)),
        needles=needles,
        seed=seed,
    )
    _print_report(prepare(options), options)
    return 0


def _print_report(report: PrepReport, options: PrepOptions) -> None:
    console = Console(highlight=False, soft_wrap=True)
    read = report.read
    if report.up_to_date:
        console.print(f"{options.out} is up to date: same sources, same options", markup=False)
    console.print(
        f"read {read.documents:,} documents, {read.num_bytes / 2**20:.1f} MiB, from {read.files:,} files", markup=False
    )
    if read.bad:
        console.print(f"left out {read.bad:,} broken records, the first: {read.first_bad}", markup=False)
    if report.chat is not None:
        chat = report.chat
        share = chat.loss_tokens / max(1, chat.tokens)
        console.print(
            f"{chat.documents:,} of the documents are conversations: the loss is on what the assistant says, "
            f"{share:.1%} of their {chat.tokens:,} tokens",
            markup=False,
        )
        if chat.silent:
            console.print(f"left out {chat.silent:,} conversations in which the assistant says nothing", markup=False)
        if chat.endless:
            console.print(
                f"warning: in {chat.endless:,} conversations no answer ends in a special token: from these the model "
                "does not learn when to stop",
                markup=False,
            )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("written", overflow="fold")  # a path is to be read whole
    table.add_column("documents", justify="right")
    table.add_column("tokens", justify="right")
    for name, documents in report.documents.items():
        table.add_row(str(options.out / name), f"{documents:,}", f"{report.tokens[name]:,}")
    console.print(table)
    console.print(
        f"tokenizer {options.out / report.tokenizer}: {report.vocab_size:,} ids, sha256 {report.fingerprint[:12]}",
        markup=False,
    )
