"""Are the files that a run needs there, sound, and of one vocabulary? Asked before anything slow is imported.

Every rank asks for itself: all of them map these files, and a mistake that all ranks find alike ends all of them at
once, before any waits for another. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from moba_train.config.mix_rules import doc_floor
from moba_train.config.schema import ModelConfig, RunConfig, SourceLengths
from moba_train.data.indexed import IndexedDocuments, open_indexed
from moba_train.data.stage_data import check_lengths
from moba_train.data.tokenizer import Tokenizer, load_tokenizer
from moba_train.data.vocabulary import check_vocabulary
from moba_train.errors import ConfigError, DataError, InputErrors, UserError


def check_training_inputs(config: RunConfig) -> None:
    """Check tokenizer, every source, held-out text and run folder.

    Raises:
        UserError: the one mistake (DataError, ConfigError), or all of them together as InputErrors.
    """
    _raise_all([*training_data_errors(config), *_errors_of("run.dir", partial(_check_folder, Path(config.run.dir)))])


def training_data_errors(config: RunConfig) -> list[UserError]:
    """What is wrong with tokenizer, sources and held-out text, also with documents that a later stage wants."""
    sources = {f"data.sources.{name}.path": source.path for name, source in config.data.sources.items()}
    opened: dict[str, IndexedDocuments] = {}
    errors = _data_errors(config, [*sources.items(), ("data.valid.path", config.data.valid.path)], opened)
    return [*errors, *_length_errors(config, opened)]


def check_evaluation_inputs(config: RunConfig) -> None:
    """Check tokenizer and held-out text; the training sources need not be there. Raises as `check_training_inputs`."""
    _raise_all(_data_errors(config, [("data.valid.path", config.data.valid.path)], {}))


def _data_errors(
    config: RunConfig, sources: Sequence[tuple[str, str]], opened: dict[str, IndexedDocuments]
) -> list[UserError]:
    """Errors of the tokenizer and of (key, path) pairs; `opened` gets those that can be read, by key."""
    loaded: list[Tokenizer] = []  # once: a large tokenizer.json takes seconds
    errors = _errors_of("data.tokenizer", lambda: loaded.append(load_tokenizer(config.data.tokenizer)))
    tokenizer = loaded[0] if loaded else None
    for key, path in sources:
        for error in _errors_of(key, partial(_check_source, key, path, tokenizer, config.model, opened)):
            if error.message() not in [known.message() for known in errors]:  # a small model is told of once
                errors.append(error)
    return errors


def _check_source(
    key: str, path: str, tokenizer: Tokenizer | None, model: ModelConfig, opened: dict[str, IndexedDocuments]
) -> None:
    documents = opened[key] = open_indexed(path)
    if tokenizer is not None:
        check_vocabulary(tokenizer, documents, vocab_size=model.vocab_size, padding=model.vocab_padding)


def _length_errors(config: RunConfig, opened: dict[str, IndexedDocuments]) -> list[UserError]:
    """Lengths that a stage wants and its source does not have; each once, of the first stage that wants them."""
    errors: list[UserError] = []
    asked = set()
    for index, stage in enumerate(config.stages):
        for name in stage.mix:
            documents = opened.get(f"data.sources.{name}.path")
            if documents is None:
                continue
            source, lengths = config.data.sources[name], stage.lengths.get(name, SourceLengths())
            seq_len = stage.seq_len if source.packing == "whole" else 0
            wanted = (name, doc_floor(source, lengths), lengths.long_doc_tokens, lengths.long_share < 1, seq_len)
            if wanted not in asked:
                asked.add(wanted)
                try:
                    check_lengths(documents, name, source, lengths, stage_index=index, seq_len=seq_len)
                except DataError as error:
                    errors.append(error)
    return errors


def _check_folder(run_dir: Path) -> None:
    """Can the run folder be made and written to?"""
    there = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not there.is_dir():
        fix = "choose another --run-dir"
        raise ConfigError("the run folder is a file, or lies inside one", where="run.dir", got=str(there), fix=fix)
    if not os.access(there, os.W_OK | os.X_OK):
        fix = "choose another --run-dir, or mend the permissions"
        raise ConfigError("the run folder cannot be written to", where="run.dir", got=str(run_dir), fix=fix)


def _errors_of(key: str, check: Callable[[], object]) -> list[UserError]:
    """What `check` objects to, with the configuration key in front of the file's name."""
    try:
        check()
    except ConfigError as error:
        return [error]
    except UserError as error:
        where = f"{key}: {error.where}"
        return [type(error)(error.what, where=where, got=error.got, allowed=error.allowed, fix=error.fix)]
    return []


def _raise_all(errors: Sequence[UserError]) -> None:
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise InputErrors(errors)
