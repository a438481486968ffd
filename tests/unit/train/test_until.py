"""When a stage with `until` ends: the rule, what a checkpoint keeps of it, and what is told."""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moba_train.config.schema import StageConfig, UntilConfig
from moba_train.errors import CheckpointError, DataError
from moba_train.train.console import ConsoleLogger
from moba_train.train.metrics import JsonlWriter, TensorBoardWriter
from moba_train.train.progress import Progress, progress_from_state
from moba_train.train.run_folder import read_state
from moba_train.train.until import decide, describe_rule, fall_of, kept

UNTIL = UntilConfig(trailing_gap=0.05, evaluations=2)
STAGE = StageConfig(name="moba", tokens=320, tokens_per_step=16, seq_len=8, chunk_size=2, topk=2, until=UNTIL)


def test_a_fall_is_from_the_lowest_value_before_to_the_lowest_of_the_last_ones() -> None:
    assert fall_of([3.0, 2.0], 2) is None
    assert fall_of([3.0, 2.0, 1.0], 2) == 2.0
    assert fall_of([1.0, 5.0, 2.0, 4.0], 2) == -1.0, "a spike before does not count as a fall"
    assert fall_of([2.0, 2.0], 1) == 0.0


def test_a_few_values_say_all_that_later_decisions_need() -> None:
    values, short = [math.sin(7 * i) / (1 + i) for i in range(40)], ()
    for i, value in enumerate(values):
        assert fall_of((*short, value), 3) == fall_of(values[: i + 1], 3)
        short = kept((*short, value), 3)
        assert len(short) <= 4


def evaluated(gap: float) -> dict[str, float]:
    return {"eval/loss_full": 1.0, "eval/trailing_loss_moba": 1.0 + gap, "eval/trailing_loss_full": 1.0}


@pytest.mark.parametrize(("gap", "ends"), [(0.25, False), (0.2500001, True), (0.75, True)])
def test_a_stage_goes_on_as_long_as_its_number_falls_by_what_was_asked_for(gap: float, ends: bool) -> None:
    stage = replace(STAGE, until=UntilConfig(trailing_gap=0.25, evaluations=1))
    progress = Progress(6, 0, 6, 96, watched="trailing_gap", watched_values=(0.5,))
    found = decide(stage, progress, evaluated(gap), is_end=False)
    assert found.progress.decided == ({0: 6} if ends else {})
    assert (found.lines != ()) == ends == ("until/decided" in found.record)
    assert ("rose by" in "".join(found.lines)) == (gap > 0.5)


def test_a_number_that_is_not_finite_does_not_count() -> None:
    progress = Progress(6, 0, 6, 96, watched="trailing_gap", watched_values=(0.5, 0.25))
    found = decide(STAGE, progress, evaluated(math.nan), is_end=False)
    assert found.progress == progress and "is nan: it does not count" in found.lines[0]
    assert math.isnan(found.record["until/value"])


def test_what_another_rule_has_watched_does_not_count() -> None:
    progress = Progress(6, 0, 6, 96, watched="loss_plateau", watched_values=(0.5, 0.25))
    assert decide(STAGE, progress, evaluated(0.5), is_end=False).progress.watched_values == (0.5,)


def test_held_out_rows_without_trailing_positions_are_an_error_not_a_stage_that_never_ends() -> None:
    with pytest.raises(DataError, match="no held-out token lies there"):
        decide(STAGE, Progress(2, 0, 2, 32), {"eval/loss_full": 1.0}, is_end=False)
    assert decide(STAGE, Progress(2, 0, 2, 32), {"eval/niah_full": 1.0}, is_end=False).record == {}


def test_the_line_of_a_step_is_completed_once_and_nothing_else_changes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "train/loss": 1.0}\n', '{"step": 2, "train/loss": null, "train/bad": true}\n']
    path.write_text("".join(lines))
    for _ in range(2):  # the second time it was killed after the first
        writer = JsonlWriter(path, resume_step=2)
        writer.amend({"step": 2, "stage": "a", "eval/loss_full": 0.5})
        writer.write({"step": 3})
        writer.close()
    kept = '{"step": 2, "train/loss": null, "train/bad": true, "stage": "a", "eval/loss_full": 0.5}\n'
    assert path.read_text() == lines[0] + kept + '{"step": 3}\n'


def test_tensorboard_gets_the_points_that_a_step_did_not_have(tmp_path: Path) -> None:
    first, second = ({"step": 2, key: 0.5} for key in ("train/loss", "eval/loss_full"))
    for resume_step in (0, 2):
        writer = TensorBoardWriter(tmp_path, resume_step=resume_step)
        writer.amend(second) if resume_step else writer.write(first)
        writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    for key in ("train/loss", "eval/loss_full"):
        assert [event.step for event in events.Scalars(key)] == [2]


def test_the_log_tells_what_was_evaluated_and_the_new_length_of_the_run() -> None:
    text = io.StringIO()
    logger = ConsoleLogger(log_every=1, total_steps=20, resume_step=4, console=Console(file=text, width=200))
    logger.total_steps(9)
    numbers = {"eval/loss_moba": 2.0, "eval/loss_full": 1.5, "until/value": 0.5, "until/fall": 0.0125}
    logger.amend({"step": 4, "stage": "moba", "stage_index": 0, "tokens": 64, **numbers})
    assert text.getvalue() == (
        "step 4/9 | moba\n  eval | held-out 2.000 MoBA, 1.500 full | until 0.5000, fall 0.0125\n"
    )


def test_the_rule_is_told_in_words() -> None:
    assert describe_rule(UntilConfig()) == ""
    assert describe_rule(UNTIL) == (
        "ends when the trailing gap has fallen by less than 0.05 nats in its last 2 evaluations (until.trailing_gap)"
    )


def test_state_of_older_checkpoints_has_nothing_pending_and_nothing_decided() -> None:
    old = {"step": 3, "stage_index": 0, "step_in_stage": 3, "tokens": 48, "bad_steps": 0}
    assert progress_from_state(old) == Progress(3, 0, 3, 48)


HOSTILE: list[dict[str, Any]] = [
    {"evaluated": 1},
    {"evaluated": None},
    {"watched": "train_loss"},
    {"watched": ["loss_plateau"]},
    {"watched_values": 3.0},
    {"watched_values": "12"},
    {"watched_values": [True]},
    {"watched_values": [math.nan]},
    {"watched_values": [math.inf]},
    {"watched_values": [10**400]},
    {"watched_values": [[1.0]]},
    {"decided": [12]},
    {"decided": {"0": 0}},
    {"decided": {"0": -12}},
    {"decided": {"0": 12.5}},
    {"decided": {"0": True}},
    {"decided": {"-1": 12}},
    {"decided": {"x": 12}},
    {"decided": {"2": 12}},
    {"decided": {"1": 2}},
    {"decided": {"9" * 5000: 1}},
]


def test_hostile_values_of_what_was_decided_are_refused(tmp_path: Path) -> None:
    """The checkpoint lies after step 3 of stage 1."""
    position = json.loads(json.dumps(asdict(Progress(15, 1, 3, 240, decided={0: 12}))))
    good = {**position, "stage_rows": {}, "stage_end": True, "model": {}, "tokenizer": "", "seed": 1}
    folder = tmp_path / "step_00000015"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps(good))
    assert progress_from_state(read_state(folder)) == Progress(15, 1, 3, 240, decided={0: 12})
    for change in HOSTILE:
        (folder / "state.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(CheckpointError, match=r"state.json of the checkpoint cannot be read"):
            read_state(folder)
    (folder / "state.json").write_text(json.dumps({**good, "decided": {"0": 12, "1": 3}, "watched_values": [1, 0.5]}))
    assert progress_from_state(read_state(folder)).decided == {0: 12, 1: 3}
