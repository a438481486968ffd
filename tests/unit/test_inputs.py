"""The files that a run needs are checked together, before anything slow is imported."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moba_train.commands.inputs import check_evaluation_inputs, check_training_inputs
from moba_train.config.load import decode_toml
from moba_train.config.schema import RunConfig, SourceLengths, StageConfig
from moba_train.data.indexed import write_indexed
from moba_train.data.tokenizer import train_tokenizer
from moba_train.errors import ConfigError, DataError, InputErrors, UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 400 ids and two small pairs."""
    folder = tmp_path_factory.mktemp("prepared")
    train_tokenizer([Path(shutil.__file__).read_text("utf-8")], folder / "t.model", vocab_size=400)
    for name in ("train", "valid"):
        write_indexed(folder / name, [np.arange(50, dtype=np.int64)] * 3, vocab_size=500)
    return folder


@pytest.fixture
def config(prepared: Path, tmp_path: Path) -> RunConfig:
    """A run on a copy of the files, which a test may spoil."""
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    toml = (
        f'run.dir = "{tmp_path / "runs" / "a"}"\nmodel.vocab_size = 400\n'
        f'[data]\ntokenizer = "{data}/t.model"\nsources.text.path = "{data}/train"\nvalid.path = "{data}/valid"\n'
    )
    return decode_toml(toml)


def error_of(check: Callable[[RunConfig], None], config: RunConfig) -> UserError:
    with pytest.raises(UserError) as caught:
        check(config)
    return caught.value


def test_sound_files_pass_and_nothing_is_made(config: RunConfig) -> None:
    check_training_inputs(config)
    assert not Path(config.run.dir).exists()


@pytest.mark.parametrize(
    ("name", "keep_bytes", "what", "key"),
    [
        ("t.model", 0, "the tokenizer is empty", "data.tokenizer"),
        ("t.model", 999, "not a sentencepiece model", "data.tokenizer"),
        ("train.bin", 0, "data file is empty", "data.sources.text.path"),
        ("train.bin", 20, "the index does not fit the token file", "data.sources.text.path"),
        ("train.idx", 0, "data file is empty", "data.sources.text.path"),
        ("train.idx", 50, "the index file is cut", "data.sources.text.path"),
        ("valid.bin", None, "data file not found", "data.valid.path"),
    ],
)
def test_a_spoilt_file_is_named_with_its_key(
    config: RunConfig, name: str, keep_bytes: int | None, what: str, key: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = Path(config.data.tokenizer).parent / name
    if keep_bytes is None:
        path.unlink()
    else:
        os.truncate(path, keep_bytes)
    error = error_of(check_training_inputs, config)
    assert isinstance(error, DataError) and error.what.startswith(what)
    assert error.where == f"{key}: {path}" and error.fix
    assert capfd.readouterr() == ("", ""), "no library speaks in between"


@pytest.mark.parametrize(
    ("floor", "lengths", "where", "got", "allowed"),
    [
        (0, (99, 0, 0.0), "stages.0.lengths.text.min_doc_tokens", "the longest of 50", "at least 99 tokens"),
        (99, (), "data.sources.text.min_doc_tokens", "3 documents", "at least 99 tokens"),
        (0, (0, 99, 0.5), "stages.0.lengths.text.long_doc_tokens", "3 documents", "at least 99 tokens"),
        (0, (9, 50, 0.5), "stages.0.lengths.text.long_share", "none is below 50", "of 9 to 49 tokens"),
    ],
)
def test_lengths_that_no_document_has_are_told_once(
    config: RunConfig, floor: int, lengths: tuple[int, int, float], where: str, got: str, allowed: str
) -> None:
    source = dataclasses.replace(config.data.sources["text"], min_doc_tokens=floor)
    stage = StageConfig(mix={"text": 1.0}, lengths={"text": SourceLengths(*lengths)} if lengths else {})
    data = dataclasses.replace(config.data, sources={"text": source})
    error = error_of(check_training_inputs, dataclasses.replace(config, data=data, stages=(stage, stage)))
    assert isinstance(error, DataError) and error.where == f"{where} ({source.path})"
    assert got in str(error.got) and allowed in error.allowed and error.fix


def test_a_whole_document_that_does_not_fit_a_row_of_a_later_stage_is_told_before_the_first(config: RunConfig) -> None:
    source = dataclasses.replace(config.data.sources["text"], packing="whole")
    data = dataclasses.replace(config.data, sources={"text": source})
    stages = tuple(StageConfig(mix={"text": 1.0}, seq_len=tokens) for tokens in (64, 50, 49, 49))
    error = error_of(check_training_inputs, dataclasses.replace(config, data=data, stages=stages))
    assert isinstance(error, DataError) and "packs whole documents" in error.what
    assert error.where == f"stages.2.seq_len, data.sources.text ({source.path})"
    check_training_inputs(dataclasses.replace(config, data=data, stages=stages[:2]))


def test_an_index_of_another_pair_is_refused(config: RunConfig) -> None:
    data = Path(config.data.tokenizer).parent
    write_indexed(data / "other", [np.arange(7, dtype=np.int64)], vocab_size=500)
    shutil.copy(data / "other.idx", data / "train.idx")
    assert error_of(check_training_inputs, config).what == "the index does not fit the token file"


def test_all_spoilt_files_are_reported_together(config: RunConfig) -> None:
    data = Path(config.data.tokenizer).parent
    (data / "t.model").unlink()
    os.truncate(data / "train.bin", 10)
    Path(config.run.dir).parent.write_text("a file stands here")
    error = error_of(check_training_inputs, config)
    assert isinstance(error, InputErrors)
    assert [e.where.split(":")[0] for e in error.errors] == ["data.tokenizer", "data.sources.text.path", "run.dir"]
    assert error.message().startswith("3 errors in the files that the run needs\n1. tokenizer not found\n  where:")


def test_a_model_that_is_too_small_for_the_tokenizer_is_told_of_once(config: RunConfig) -> None:
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=300))
    error = error_of(check_training_inputs, small)
    assert isinstance(error, ConfigError) and error.where == "model.vocab_size"


@pytest.mark.parametrize(
    ("vocab_size", "fix"),
    [
        (400, "lower model.vocab_padding to 0, or set model.vocab_size to at least 500"),
        (420, "lower model.vocab_padding to 20, or set model.vocab_size to at least 500"),
        (300, "set model.vocab_size to at least 500"),
    ],
)
def test_a_model_that_padding_makes_too_small_is_told_of_its_padding(
    config: RunConfig, vocab_size: int, fix: str
) -> None:
    model = dataclasses.replace(config.model, vocab_size=vocab_size, vocab_padding=100)
    error = error_of(check_training_inputs, dataclasses.replace(config, model=model))
    assert error.got == f"{vocab_size}, less 100 of model.vocab_padding" and error.fix == fix


def test_ids_that_the_tokenizer_does_not_have_are_refused(config: RunConfig) -> None:
    write_indexed(config.data.valid.path, [np.array([1, 2, 400], dtype=np.int64)], vocab_size=500)
    assert error_of(check_training_inputs, config).what == "the data holds ids that the tokenizer does not have"


def test_an_evaluation_needs_no_training_source_and_no_run_folder(config: RunConfig) -> None:
    data = Path(config.data.tokenizer).parent
    (data / "train.bin").unlink()
    check_evaluation_inputs(config)
    (data / "valid.bin").unlink()
    assert error_of(check_evaluation_inputs, config).where.startswith("data.valid.path")
