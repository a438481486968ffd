"""Bytes between ranks on their way to the log: of a step, and the documents by which transports are chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moba_train.engine.base import StepResult
from moba_train.parallel.topology import Topology
from moba_train.train.console import format_step
from moba_train.train.record import step_record
from moba_train.train.step import TYPICAL_ROWS, typical_documents
from tests.unit.train.test_metrics import a_record
from tests.unit.train.toy import STAGES, ToyEngine, ToyRows, ToyRun


def line(record: dict[str, object]) -> str:
    return format_step(record, total_steps=10, mean_step_s=1.0, remaining_s=0.0)


def test_the_step_line_shows_received_bytes_where_there_are_any() -> None:
    assert "| comm 1.5 GB |" in line(a_record(1) | {"comm/received_bytes": 1.5e9})
    assert "| comm 1.5 GB, waited 43.2 ms |" in line(
        a_record(1) | {"comm/received_bytes": 1.5e9, "perf/comm_waited_s": 0.0432}
    )
    assert "comm" not in line(a_record(1))


def test_a_step_s_bytes_stand_in_its_record() -> None:
    result = StepResult(1.0, 8, 1.0, False, comm={"received_bytes": 5.0, "transport_moba": "pull"})
    record = step_record(step=1, stage=STAGES[0], stage_index=0, tokens=16, lr=0.1, result=result)
    assert record["comm/received_bytes"] == 5.0 and record["comm/transport_moba"] == "pull"


def test_a_stage_s_first_rows_say_how_long_its_documents_are() -> None:
    rows = ToyRows(0)
    assert typical_documents(rows, STAGES[0]) == [(0, 5, 8)] * TYPICAL_ROWS
    assert rows.asked == list(range(TYPICAL_ROWS))
    assert len(typical_documents(rows, replace(STAGES[0], tokens=16))) == 2  # there are no more


def test_what_an_engine_says_of_a_stage_is_logged_when_the_stage_begins(
    tmp_path: Path, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToyEngine, "set_stage", lambda self, index, *, documents: (f"note {index} {documents}",))
    run = ToyRun(tmp_path, replace(topology, cp=2))
    run.go()
    lines = [line for line in run.log.lines if line.startswith(("stage", "note"))]
    documents = [(0, 5, 8)] * TYPICAL_ROWS
    assert [line[:9] for line in lines] == ["stage 1/2", "note 0 [(", "stage 2/2", "note 1 [("]
    assert lines[1] == f"note 0 {documents}"
    alone = ToyRun(tmp_path / "alone", topology)
    alone.go()
    assert "note 0 ()" in alone.log.lines  # one rank chooses no transport, and reads no row for it
