from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moba_train.train.console import format_duration, format_step
from moba_train.train.metrics import JsonlWriter, TensorBoardWriter, read_metrics, to_json_line


def a_record(step: int, **changes: Any) -> dict[str, Any]:
    usual = {
        "step": step,
        "stage": "short",
        "tokens": step * 16,
        "train/loss": 1.0 / 3.0,
        "train/lr": 3e-3,
        "train/grad_norm": 0.5,
        "perf/step_time_s": 0.5,
        "perf/tokens_per_s": 32.0,
        "perf/tokens_per_s_per_rank": 16.0,
        "memory/peak_gib": 0.25,
        "train/density": 0.75,
    }
    return usual | changes


def write(path: Path, steps: range, *, resume_step: int) -> None:
    writer = JsonlWriter(path, resume_step=resume_step)
    for step in steps:
        writer.write(a_record(step, writer=resume_step))
    writer.close()


def test_numbers_survive_in_full_precision(tmp_path: Path) -> None:
    write(tmp_path / "m.jsonl", range(1, 2), resume_step=0)
    assert read_metrics(tmp_path / "m.jsonl")[0]["train/loss"] == 1.0 / 3.0


def test_nan_is_null_and_marks_the_step_as_bad() -> None:
    line = to_json_line({"step": 3, "train/loss": math.nan, "eval/position_loss_moba": [1.0, math.inf]})
    assert json.loads(line) == {
        "step": 3,
        "train/loss": None,
        "eval/position_loss_moba": [1.0, None],
        "train/bad": True,
    }
    assert "train/bad" not in json.loads(to_json_line({"step": 3, "train/loss": 2.0}))


def test_after_a_resume_no_step_stands_twice_and_none_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, range(1, 8), resume_step=0)
    write(path, range(5, 11), resume_step=4)
    records = read_metrics(path)
    assert [record["step"] for record in records] == list(range(1, 11))
    assert [record["writer"] for record in records] == [0] * 4 + [4] * 6


def test_what_is_evaluated_again_replaces_what_an_earlier_process_said_of_it(tmp_path: Path) -> None:
    """It died before it had saved; the next one has other ranks, or another rule, and decides otherwise."""
    path = tmp_path / "m.jsonl"
    write(path, range(1, 4), resume_step=0)
    trained = read_metrics(path)
    where = {"step": 3, "stage": "short"}
    for numbers in ({"eval/loss_moba": 2.0, "eval/niah_moba": 1.0, "until/decided": 1.0}, {"eval/loss_moba": 2.5}):
        writer = JsonlWriter(path, resume_step=3)
        writer.amend(where | numbers)
        writer.close()
    assert read_metrics(path) == [*trained[:2], trained[2] | where | {"eval/loss_moba": 2.5}]


def test_a_new_run_drops_what_an_unsaved_one_left(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, range(1, 4), resume_step=0)
    write(path, range(1, 3), resume_step=0)
    assert [record["step"] for record in read_metrics(path)] == [1, 2]


def test_a_line_torn_by_a_crash_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, range(1, 4), resume_step=0)
    path.write_text(path.read_text() + '{"step": 4, "train/lo')
    write(path, range(4, 5), resume_step=5)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = TensorBoardWriter(tmp_path, resume_step=0)
    for step in (1, 2):
        losses = {"eval/position_loss_moba": [2.0, 1.5], "eval/position_loss_full": [2.0, None]}  # None: no token there
        writer.write(a_record(step, **losses, **{"eval/position_edges": [0, 8, 16]}))
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert "train/loss" in tags and "step" not in tags and "eval/position_edges/0" not in tags
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert events.Scalars("eval/position_loss_moba/1")[0].value == 1.5
    assert "eval/position_loss_full/0" in tags and "eval/position_loss_full/1" not in tags


def test_the_log_line_names_everything_and_says_na_without_a_peak() -> None:
    line = format_step(a_record(3), total_steps=10, mean_step_s=0.5, remaining_s=3.5)
    assert line == (
        "step  3/10 | short | loss 0.3333 | lr 3.00e-03 | grad 0.500 | 32 tok/s (16/rank) | MFU n/a | mem 0.25 GiB"
        " | density 0.750 | ETA 4s"
    )
    assert "MFU 41.5%" in format_step(
        a_record(3, **{"perf/mfu": 0.415}), total_steps=10, mean_step_s=0.5, remaining_s=3.5
    )


def test_nan_is_seen_in_the_log_line() -> None:
    record = a_record(3, **{"train/loss": math.nan, "train/grad_norm": math.inf, "train/bad": True})
    line = format_step(record, total_steps=10, mean_step_s=0.5, remaining_s=3.5)
    assert "loss NAN" in line and "grad INF" in line and "step skipped" in line


def test_evaluations_stand_under_the_log_line() -> None:
    record = a_record(3, **{"eval/loss_moba": 2.5, "eval/position_loss_moba": [1.0]})
    lines = format_step(record, total_steps=10, mean_step_s=0.5, remaining_s=3.5).splitlines()
    assert lines[1:] == ["  eval | held-out 2.500 MoBA"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59, "59s"), (185, "3m05s"), (7620, "2h07m"), (356400, "4d03h")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
