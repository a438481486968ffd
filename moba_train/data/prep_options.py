"""What `moba-train prep` can be asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from moba_train.errors import ConfigError

TRAIN = "train"
"""Value of `PrepOptions.tokenizer` that trains one."""


@dataclass(frozen=True)
class PrepOptions:
    """What to prepare.

    Attributes:
        out: folder to write.
        sources: files, folders, or "stdlib".
        tokenizer: "train", or the path of a sentencepiece model or of a tokenizer.json.
        eod: of a tokenizer.json, the token that ends a document; "" = its eos_token.
        chat_template: file with the template that renders conversations; "" = the one beside the tokenizer.json.
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
    chat_template: str = ""
    vocab_size: int = 4096
    held_out: float = 0.02
    max_mib: float = 0.0
    skip_bad: bool = False
    join: bool = False
    workers: int = 1
    needles: dict[int, int] = field(default_factory=dict)
    seed: int = 1234


def check_options(options: PrepOptions) -> None:
    """Refuse what contradicts itself or is out of range. Raises ConfigError."""
    if not 0 < options.held_out < 1:
        raise ConfigError("held-out share out of range", where="--held-out", got=options.held_out, allowed="0 < x < 1")
    if options.eod and options.tokenizer == TRAIN:
        fix = "name it with --tokenizer"
        raise ConfigError(
            "the end of documents is chosen for a tokenizer.json", where="--eod", got=options.eod, fix=fix
        )
    if options.chat_template and not options.tokenizer.endswith(".json"):
        fix = "name that of the chat model: --tokenizer PATH/tokenizer.json"
        where, got = "--chat-template", options.tokenizer
        raise ConfigError(
            "a chat template needs the tokenizer.json that it was made for", where=where, got=got, fix=fix
        )
    if not 0 <= options.max_mib < math.inf:
        allowed = "a number of MiB; 0 = everything"
        raise ConfigError("no such amount of text", where="--max-mib", got=options.max_mib, allowed=allowed)
    if options.seed < 0:
        raise ConfigError("a seed must not be negative", where="--seed", got=options.seed, allowed=">= 0")
    if options.workers < 1:
        raise ConfigError("at least one process must encode", where="--workers", got=options.workers, allowed=">= 1")
    for length, count in options.needles.items():
        if length < 1 or count < 1:
            got = f"{length}:{count}"
            raise ConfigError("length and number of needle documents must be positive", where="--needles", got=got)
