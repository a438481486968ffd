"""What a rank leaves for its launcher: when and where its first error was, and what its last one says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moba_train import last_words
from moba_train.commands.parts import joined_ranks
from moba_train.config.schema import EngineConfig, RunConfig


def test_the_first_error_gives_time_and_place_and_the_last_one_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setenv("RANK", "5")
    last_words.leave("RuntimeError: reset", where="step 7")
    first = json.loads(file.read_text())["message"]
    last_words.leave("ranks lost each other", code=3)
    told = json.loads(file.read_text())["message"]
    assert told["message"] == told["extraInfo"]["py_callstack"] == "ranks lost each other"
    for name, value in {"where": "step 7", "time_s": first["extraInfo"]["time_s"], "rank": 5, "code": 3}.items():
        assert told["extraInfo"][name] == value
    assert int(told["extraInfo"]["timestamp"]) == int(first["extraInfo"]["time_s"]), "torchrun reads it"


def test_an_error_of_training_is_left_with_the_part_of_the_step_in_which_it_was_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with pytest.raises(ZeroDivisionError), joined_ranks(RunConfig(engine=EngineConfig(device="cpu"))) as topology:
        topology.watch.begin("step 7: forward, layer 3/8")
        raise ZeroDivisionError("a bad row")
    told = json.loads(file.read_text())["message"]
    assert told["message"] == "ZeroDivisionError: a bad row"
    assert told["extraInfo"]["where"].startswith("step 7: forward, layer 3/8")


def test_nothing_happens_without_a_launcher_or_where_its_file_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    last_words.leave("nobody asks")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "not there" / "error.json"))
    last_words.leave("nowhere to write")


@pytest.mark.parametrize("left", ["", "[]", '{"message": 3}', '{"message": {"extraInfo": {"pid": 1, "where": "old"}}}'])
def test_what_another_process_has_left_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str) -> None:
    file = tmp_path / "error.json"
    file.write_text(left)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    last_words.leave("mine", where="here")
    assert json.loads(file.read_text())["message"]["extraInfo"]["where"] == "here"
