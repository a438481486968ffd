"""Steps that are not finite: told at once, counted over the whole run, and the end of it when there are too many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moba_train.config.schema import StageConfig
from moba_train.engine.base import StepResult
from moba_train.errors import TrainingDiverged
from moba_train.parallel.topology import Topology
from moba_train.train.bad_steps import BadSteps
from moba_train.train.metrics import read_metrics, to_json_line
from moba_train.train.progress import Progress, progress_from_state
from moba_train.train.record import step_record
from tests.unit.train.toy import ToyRun

NAN, INF = float("nan"), float("inf")


def record(step: int, loss: float = 1.0, norm: float = 1.0, *, is_bad: bool = True) -> dict[str, Any]:
    bad = {"train/bad": True} if is_bad else {}
    return {"step": step, "stage": "moba", "tokens": 512 * step, "train/loss": loss, "train/grad_norm": norm, **bad}


@pytest.mark.parametrize(
    ("loss", "norm", "broken"),
    [(NAN, NAN, "loss NAN and gradient norm NAN"), (2.0, INF, "gradient norm INF"), (-INF, 1.0, "loss -INF")],
)
def test_a_bad_step_is_told_with_what_broke_and_on_which_data(loss: float, norm: float, broken: str) -> None:
    (line,) = BadSteps(3, total=4).note(record(12, loss, norm), range(22, 24))
    assert line.startswith("step 12 skipped on all ranks, weights and optimizer left as they were: ")
    assert f": {broken}; stage 'moba', 6,144 tokens, rows (sample ids) 22..23; 1 in a row" in line
    assert "(run.max_bad_steps 3), 5 in the run" in line and line.endswith("moba-train data show RUN --step 12")


def test_a_good_step_ends_the_row_and_keeps_the_count() -> None:
    steps = BadSteps(2)
    steps.note(record(1), range(2))
    good = record(2, is_bad=False)
    assert steps.note(good, range(2, 4)) == ()
    assert (steps.in_a_row, steps.total, good["train/bad_steps"]) == (0, 1, 1)
    steps.raise_if_too_many()
    for step in (3, 4):
        steps.note(record(step), range(2 * step - 2, 2 * step))
    with pytest.raises(TrainingDiverged) as caught:
        steps.raise_if_too_many()
    assert caught.value.where == "step 3: rows 4..5 of stage 'moba'; step 4: rows 6..7 of stage 'moba'"


def test_a_step_in_which_no_token_counts_is_skipped_and_told_but_is_no_bad_step() -> None:
    steps = BadSteps(2)
    steps.note(record(1), range(2))
    result = StepResult(loss=NAN, num_loss_tokens=0, grad_norm=NAN, skipped=True)
    empty = step_record(step=2, stage=StageConfig(name="sft"), stage_index=0, tokens=64, lr=0.1, result=result)
    (line,) = steps.note(empty, range(2, 4))
    assert line.startswith(
        "step 2 skipped on all ranks, since none of its tokens counts in the loss; stage 'sft', rows"
    )
    assert (steps.in_a_row, steps.total, empty["train/bad_steps"]) == (1, 1, 1)
    written = json.loads(to_json_line(empty))
    assert (written["train/loss"], written["train/empty"]) == (None, True) and "train/bad" not in written


def test_the_log_tells_a_bad_step_at_once_and_metrics_count_over_a_resume(tmp_path: Path, topology: Topology) -> None:
    poisoned = frozenset({2})  # step 2 of stage "short", step 6 of the run in stage "long"
    first = ToyRun(tmp_path, topology, poisoned=poisoned, stop_after_steps=3)
    first.go()
    told = [line for line in first.log.lines if "skipped" in line]
    assert len(told) == 1 and "stage 'short', 32 tokens, rows (sample ids) 2..3;" in told[0]
    second = ToyRun(tmp_path, topology, poisoned=poisoned)
    second.go()
    (line,) = [line for line in second.log.lines if "step 6 skipped" in line]
    assert "stage 'long'" in line and "1 in a row" in line and "2 in the run" in line
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["train/bad_steps"] for row in rows] == [0, 1, 1, 1, 1, 2, 2]
    assert [row.get("train/bad", False) for row in rows] == [False, True, False, False, False, True, False]


def test_a_checkpoint_that_does_not_know_the_count_still_resumes() -> None:
    state = {"step": 3, "stage_index": 0, "step_in_stage": 3, "tokens": 48, "bad_steps": 1}
    assert progress_from_state(state) == Progress(3, 0, 3, 48, 1, 0)
    with pytest.raises(KeyError):
        progress_from_state({name: value for name, value in state.items() if name != "bad_steps"})
