"""niah.jsonl: what survives a kill, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from moba_train.errors import DataError
from moba_train.eval.cells import NiahRecord
from moba_train.eval.records import RecordWriter, latest_records, read_records

from .test_cells import RECORD


def write(path: Path, *records: NiahRecord) -> None:
    writer = RecordWriter(path)
    writer.write(records)
    writer.close()


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    records = (RECORD, dataclasses.replace(RECORD, sample=1, routed=None, model_response='"Ü\n🙂'))
    write(tmp_path / "run" / "niah.jsonl", *records)
    assert read_records(tmp_path / "run" / "niah.jsonl") == records


def test_every_line_has_the_promised_fields(tmp_path: Path) -> None:
    write(tmp_path / "niah.jsonl", RECORD)
    line = json.loads((tmp_path / "niah.jsonl").read_text())
    promised = {"context_length", "depth_percent", "attention", "score", "log_prob", "routed", "model_response"}
    assert promised | {"expected"} <= line.keys()


def test_a_missing_file_holds_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path / "niah.jsonl") == ()


def test_a_cut_last_line_is_dropped_when_reading_and_removed_when_writing(tmp_path: Path) -> None:
    path = tmp_path / "niah.jsonl"
    write(path, RECORD, dataclasses.replace(RECORD, sample=1))
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    assert read_records(path) == (RECORD,)
    write(path, dataclasses.replace(RECORD, sample=2))
    assert [record.sample for record in read_records(path)] == [0, 2]


def test_the_later_of_two_equal_measurements_counts(tmp_path: Path) -> None:
    write(tmp_path / "niah.jsonl", RECORD, dataclasses.replace(RECORD, score=0.0))
    assert [record.score for record in read_records(tmp_path / "niah.jsonl")] == [0.0]


@pytest.mark.parametrize(
    "damaged", ["{not json}", "[1, 2]", json.dumps({"context_length": 5}), "true", json.dumps({"score": True})]
)
def test_a_damaged_line_is_named_with_its_number(tmp_path: Path, damaged: str) -> None:
    path = tmp_path / "niah.jsonl"
    write(path, RECORD)
    with path.open("a") as file:
        file.write(damaged + "\n")
    with pytest.raises(DataError, match=r"niah\.jsonl, line 2"):
        read_records(path)


def test_a_field_of_the_wrong_type_is_named(tmp_path: Path) -> None:
    line = dataclasses.asdict(RECORD) | {"topk": "three"}
    (tmp_path / "niah.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match="'topk'"):
        read_records(tmp_path / "niah.jsonl")


def test_the_latest_records_are_those_of_the_newest_weights() -> None:
    old = dataclasses.replace(RECORD, step=50, weights="aa")
    other_seed = dataclasses.replace(RECORD, seed=2)
    assert latest_records([other_seed, RECORD, old]) == (RECORD,)
    assert latest_records([]) == ()


def test_records_of_a_branch_that_the_run_has_left_are_not_the_latest() -> None:
    first, second, later = (dataclasses.replace(RECORD, step=step, weights=f"w{step}") for step in (10, 20, 30))
    assert latest_records([first, second, later]) == (later,)
    assert latest_records([first, later, second], last_step=23) == (second,)
    assert latest_records([first, second, later], last_step=23, left={"w20"}) == (first,)
    assert latest_records([later], last_step=23) == ()


def test_records_of_another_function_are_another_measurement() -> None:
    other = dataclasses.replace(RECORD, function="b")
    assert other.identity != RECORD.identity
    assert latest_records([other, RECORD]) == (RECORD,)
    assert latest_records([RECORD, other]) == (other,)


def test_a_file_from_before_functions_had_names_is_read(tmp_path: Path) -> None:
    line = dataclasses.asdict(RECORD)
    del line["function"]
    (tmp_path / "niah.jsonl").write_text(json.dumps(line) + "\n")
    assert read_records(tmp_path / "niah.jsonl") == (dataclasses.replace(RECORD, function=""),)
