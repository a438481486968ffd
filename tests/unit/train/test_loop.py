from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moba_train.errors import TrainingDiverged, UserError
from moba_train.parallel.topology import Topology
from moba_train.train import checkpoint
from moba_train.train.checkpoint import list_checkpoints, read_state
from moba_train.train.metrics import JsonlWriter, Record, read_metrics
from moba_train.train.progress import Progress
from moba_train.train.signals import StopSignals
from moba_train.train.stopping import Stopping
from tests.unit.train import toy
from tests.unit.train.toy import STAGES, TOTAL_STEPS, ToyRun

TIMES = ("perf/step_time_s", "perf/tokens_per_s", "perf/tokens_per_s_per_rank", "memory/peak_gib")


def records(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMES and not k.startswith("perf/")} for row in rows]


def test_a_run_goes_through_all_stages_without_a_restart(tmp_path: Path, topology: Topology) -> None:
    run = ToyRun(tmp_path, topology)
    outcome = run.go()
    assert outcome.finished and outcome.reason == "finished"
    assert outcome.progress == Progress(step=7, stage_index=1, step_in_stage=3, tokens=112)
    assert run.engine.stages_seen == [0, 1]
    assert run.asked() == [(0, i) for i in range(8)] + [(1, i) for i in range(6)]
    seen = records(tmp_path)
    assert [row["stage"] for row in seen] == ["short"] * 4 + ["long"] * 3
    assert [row["tokens"] for row in seen] == [16 * step for step in range(1, 8)]
    assert [row["train/density"] == 1.0 for row in seen] == [False] * 4 + [True] * 3
    assert any("stage 2/2 'long' from step 5: full attention" in line for line in run.log.lines)


def test_the_ends_of_stages_are_saved_and_kept(tmp_path: Path, topology: Topology) -> None:
    ToyRun(tmp_path, topology, every_steps=1, keep_last=1).go()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000004", "step_00000007"]
    assert all(read_state(path)["stage_end"] for path in list_checkpoints(tmp_path))


def test_routing_is_collected_on_log_steps_and_at_the_ends_of_stages(tmp_path: Path, topology: Topology) -> None:
    ToyRun(tmp_path, topology).go()
    assert ["moba/entropy" in row for row in records(tmp_path)] == [False, True, False, True, False, True, True]


@pytest.mark.parametrize("stops", [(3,), (4,), (1, 1, 3)])
def test_a_stopped_and_resumed_run_equals_a_straight_one(tmp_path: Path, topology: Topology, stops: tuple[int]) -> None:
    straight = ToyRun(tmp_path / "straight", topology)
    straight.go()
    asked = []
    for steps in stops:
        part = ToyRun(tmp_path / "parts", topology, stop_after_steps=steps, every_steps=0)
        outcome = part.go()
        assert not outcome.finished and outcome.reason == "stop_after_steps"
        asked += part.asked()
    last = ToyRun(tmp_path / "parts", topology, every_steps=0)
    assert last.go().finished
    assert asked + last.asked() == straight.asked()
    assert records(tmp_path / "parts") == records(tmp_path / "straight")
    assert last.engine.weight.equal(straight.engine.weight) and last.engine.momentum.equal(straight.engine.momentum)


def test_steps_that_were_not_saved_are_done_again_and_stand_once(tmp_path: Path, topology: Topology) -> None:
    straight = ToyRun(tmp_path / "straight", topology)
    straight.go()

    class Crash(Exception):
        pass

    def crash(step: int, stage: str, stage_end: bool) -> Mapping[str, Any]:
        if step == 6:
            raise Crash
        return {}

    with pytest.raises(Crash):
        ToyRun(tmp_path / "crashed", topology, evaluators=(crash,), every_steps=3).go()
    resumed = ToyRun(tmp_path / "crashed", topology)
    resumed.go()
    assert resumed.asked() == [(1, i) for i in range(6)]  # step 4 ended the stage and was saved; 5 was not
    assert records(tmp_path / "crashed") == records(tmp_path / "straight")
    assert resumed.engine.weight.equal(straight.engine.weight)


def test_resuming_a_finished_run_does_nothing(tmp_path: Path, topology: Topology) -> None:
    ToyRun(tmp_path, topology).go()
    again = ToyRun(tmp_path, topology)
    assert again.go().finished
    assert again.asked() == [] and len(records(tmp_path)) == TOTAL_STEPS


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_stops_cleanly_after_the_current_step(tmp_path: Path, topology: Topology, name: str) -> None:
    evaluated = []

    def note(step: int, stage: str, stage_end: bool) -> Mapping[str, Any]:
        evaluated.append(step)
        if step == 2:
            os.kill(os.getpid(), getattr(signal, name))
        return {}

    with StopSignals() as signals:
        outcome = ToyRun(tmp_path, topology, signals=signals, evaluators=(note,), every_steps=0).go()
    assert (outcome.finished, outcome.reason, outcome.progress.step) == (False, name, 3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000003"]
    assert evaluated == [1, 2]  # a signal's grace may be shorter than an evaluation


def test_a_signal_during_an_evaluation_stops_before_another_step(tmp_path: Path, topology: Topology) -> None:
    def interrupt(step: int, stage: str, is_stage_end: bool) -> Mapping[str, Any]:
        if step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return {"eval/loss": 1.0} if step == 3 else {}

    with StopSignals() as signals:
        outcome = ToyRun(tmp_path, topology, evaluators=(interrupt,), signals=signals).go()
    assert (outcome.finished, outcome.progress.step, outcome.reason) == (False, 3, "SIGUSR1")
    assert records(tmp_path)[-1]["eval/loss"] == 1.0
    assert list_checkpoints(tmp_path)[-1].name == "step_00000003"


def test_deadlines_are_reckoned_with_the_save_that_was_measured(
    tmp_path: Path, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[float, float | None]] = []

    class Noting(Stopping):
        def wish(self, save_time_s: float, in_flight_s: float | None = None) -> str:
            told.append((save_time_s, in_flight_s))
            return super().wish(save_time_s, in_flight_s)

    def slow_seal(paths: Any) -> Any:
        time.sleep(0.2)
        return seal_files(paths)

    seal_files = vars(checkpoint)["seal_files"]
    monkeypatch.setattr(checkpoint, "seal_files", slow_seal)
    monkeypatch.setattr(toy, "Stopping", Noting)
    run = ToyRun(tmp_path, topology, every_steps=2)
    run.go()
    before, during, *_, last = told
    assert before == (0.0, None), "no save has been measured, and none is under way"
    assert during == (0.0, None) and told[2][0] == 0.0 and (told[2][1] or 0.0) > 0.0, "the save of step 2 is under way"
    assert last[0] > 0.2, "from its begin to its publication"


def test_where_too_little_time_is_left_nothing_is_trained_and_the_reason_is_told(
    tmp_path: Path, topology: Topology
) -> None:
    ToyRun(tmp_path, topology, stop_after_steps=2).go()
    late = ToyRun(tmp_path, topology, too_late="the end of the Slurm job: 30 s left")
    outcome = late.go()
    assert (outcome.finished, outcome.reason, outcome.progress.step) == (
        False,
        "the end of the Slurm job: 30 s left",
        2,
    )
    assert late.asked() == [] and len(records(tmp_path)) == 2
    assert late.log.lines[-1] == f"stopped (the end of the Slurm job: 30 s left) after step 2/{TOTAL_STEPS}"
    ToyRun(tmp_path, topology).go()
    done = ToyRun(tmp_path, topology, too_late="30 s left").go()
    assert (done.finished, done.reason) == (True, "finished")


def test_evaluations_land_in_the_record_of_their_step(tmp_path: Path, topology: Topology) -> None:
    calls = []

    def at_stage_ends(step: int, stage: str, stage_end: bool) -> Mapping[str, Any]:
        calls.append((step, stage, stage_end))
        return {"eval/loss_moba": 0.1 * step} if stage_end else {}

    ToyRun(tmp_path, topology, evaluators=(at_stage_ends,)).go()
    assert calls[3] == (4, "short", True) and calls[6] == (7, "long", True)
    assert {row["step"]: row["eval/loss_moba"] for row in records(tmp_path) if "eval/loss_moba" in row} == {
        4: 0.1 * 4,
        7: 0.1 * 7,
    }


def test_a_nan_step_is_skipped_and_marked_and_the_run_goes_on(tmp_path: Path, topology: Topology) -> None:
    run = ToyRun(tmp_path, topology, poisoned=frozenset({2}))  # in step 2 of stage "short" and of stage "long"
    assert run.go().finished
    assert [row["step"] for row in records(tmp_path) if row.get("train/bad")] == [2, 6]
    assert [row["train/loss"] for row in records(tmp_path)][1] is None


def test_too_many_nan_steps_save_and_name_step_and_samples(tmp_path: Path, topology: Topology) -> None:
    run = ToyRun(tmp_path, topology, poisoned=frozenset({3, 4}), every_steps=0)
    with pytest.raises(TrainingDiverged) as caught:
        run.go()
    assert caught.value.where == "step 2: rows 2..3 of stage 'short'; step 3: rows 4..5 of stage 'short'"
    state = read_state(list_checkpoints(tmp_path)[-1])
    assert (state["step"], state["bad_steps"]) == (3, 2)
    healed = ToyRun(tmp_path, topology)
    assert healed.go().finished and healed.asked()[0] == (0, 6)


def test_bad_steps_are_counted_across_a_resume(tmp_path: Path, topology: Topology) -> None:
    poisoned = frozenset({3, 4})
    ToyRun(tmp_path, topology, poisoned=poisoned, stop_after_steps=2).go()
    with pytest.raises(TrainingDiverged, match="2 steps in a row"):
        ToyRun(tmp_path, topology, poisoned=poisoned).go()


def test_a_stage_may_be_appended_between_two_processes(tmp_path: Path, topology: Topology) -> None:
    ToyRun(tmp_path, topology).go()
    longer = ToyRun(tmp_path, topology, stages=(*STAGES, replace(STAGES[1], name="more", tokens=32)))
    assert longer.go().progress.step == 9
    assert longer.asked() == [(2, i) for i in range(4)]


def test_a_disk_that_refuses_the_metrics_ends_the_run_with_everything_saved(
    tmp_path: Path, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other ranks do not see it: the run ends when all have agreed, one step later."""
    write = JsonlWriter.write

    def refuses(self: JsonlWriter, record: Record) -> None:
        if record["step"] >= 2:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        write(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(JsonlWriter, "write", refuses)
        run = ToyRun(tmp_path, topology, every_steps=0)
        with pytest.raises(UserError, match="metrics could not be written") as caught:
            run.go()
    assert "Disk quota exceeded" in str(caught.value.got)
    told = [line for line in run.log.lines if "ERROR: metrics cannot be written" in line]
    assert len(told) == 1 and "Disk quota exceeded" in told[0]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000003"]
    assert ToyRun(tmp_path, topology).go().finished


def test_metrics_that_cannot_be_written_at_the_very_end_are_an_error_too(
    tmp_path: Path, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(self: JsonlWriter, record: Record) -> None:
        if record["step"] == TOTAL_STEPS:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(JsonlWriter, "write", refuses)
    with pytest.raises(UserError, match="metrics could not be written"):
        ToyRun(tmp_path, topology).go()
    assert list_checkpoints(tmp_path)[-1].name == f"step_{TOTAL_STEPS:08d}"
