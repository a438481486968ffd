"""Stages that decide where they end: no stop, kill or resume changes what is decided, nor anything else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from moba_train.config.schema import ParallelConfig, UntilConfig
from moba_train.errors import CheckpointError
from moba_train.parallel.topology import Topology, close_topology, init_topology
from moba_train.train.checkpoint import CheckpointStore, read_state
from moba_train.train.progress import Progress
from moba_train.train.run_folder import list_checkpoints
from moba_train.train.signals import StopSignals
from moba_train.train.stopping import Deadline, Stopping
from tests.distributed import run_ranks
from tests.unit.train import toy
from tests.unit.train.until_case import DECIDED, OPTIMIZER, STAGES, TOTAL, Killed, UntilRun, records


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield init_topology(ParallelConfig(), device=torch.device("cpu"), timeout_s=60.0)
    close_topology()


def assert_same(run: UntilRun, straight: UntilRun) -> None:
    """Metrics, weights, optimizer state, and what the checkpoints that are kept for ever say."""
    assert records(run.run_dir) == records(straight.run_dir)
    assert torch.equal(run.engine.weight, straight.engine.weight)
    assert torch.equal(run.engine.momentum, straight.engine.momentum)
    assert [row["eval/in_stage"] for row in records(run.run_dir) if "eval/in_stage" in row] == 6 * [0] + [1, 1]
    for step in (DECIDED, TOTAL):
        mine, theirs = (read_state(each.run_dir / "checkpoints" / f"step_{step:08d}") for each in (run, straight))
        assert mine == theirs


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, topology: Topology) -> UntilRun:
    """The run that nobody disturbs."""
    run = UntilRun(tmp_path_factory.mktemp("straight"), topology)
    assert run.go().finished
    return run


def test_the_stage_ends_where_its_number_stops_falling_and_all_that_follows_moves_up(straight: UntilRun) -> None:
    seen = records(straight.run_dir)
    assert [row["stage"] for row in seen] == ["moba"] * DECIDED + ["full"] * 3
    assert [row["step"] for row in seen if "until/value" in row] == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in seen if "until/fall" in row] == [6, 8, 10, 12]
    assert [row["step"] for row in seen if "until/decided" in row] == [DECIDED]
    assert seen[DECIDED - 1]["until/fall"] == pytest.approx(1 / 8 - 1 / 12)
    assert [row["step"] for row in seen if "eval/niah_moba" in row] == [DECIDED, TOTAL], "ends of stages"
    assert [row["train/lr"] for row in seen] == pytest.approx([0.25] + 12 * [0.5] + [0.275, 0.05])
    state = read_state(straight.run_dir / "checkpoints" / f"step_{DECIDED:08d}")
    assert (state["stage_end"], state["decided"], state["evaluated"]) == (True, {"0": DECIDED}, True)
    assert straight.log.total == TOTAL
    told = (
        "stage 'moba' ends after 192 of at most 320 tokens: the trailing gap fell by 0.04167 nats in its last 2 "
        "evaluations (until.trailing_gap 0.05): 0.125 -> 0.0833333"
    )
    assert straight.log.lines[1] == (
        "stage 'moba' ends when the trailing gap has fallen by less than 0.05 nats in its last 2 evaluations "
        "(until.trailing_gap)"
    )
    assert straight.log.lines.index(told) < straight.log.lines.index(
        f"stage 2/2 'full' from step {DECIDED + 1}: full attention, seq_len 8, 2 rows a step"
    )
    assert straight.asked() == [(0, i) for i in range(2 * DECIDED)] + [(1, i) for i in range(6)]


SIGNALS = [(5,), (2,), (8,), (6, 2), (12,), (13,), (14,), (15,), (4, 8, 2, 1)]


@pytest.mark.parametrize("steps", SIGNALS, ids=str)
def test_signals_change_nothing_wherever_they_stop_the_run(
    tmp_path: Path, topology: Topology, straight: UntilRun, steps: tuple[int, ...]
) -> None:
    """Between evaluations, on a step with one, on the deciding one, in the next stage, on the last step."""
    at = 0
    for count in steps:
        part = UntilRun(tmp_path, topology, signal_after_steps=count)
        outcome, at = part.go(), at + count
        is_due = at % 2 == 0 or at == TOTAL
        assert (outcome.finished, outcome.reason) == (False, "SIGTERM")
        assert (outcome.progress.step, outcome.progress.evaluated) == (at, not is_due)
        assert "eval/loss_moba" not in records(tmp_path)[-1]
        assert part.log.lines[-1].endswith("; its evaluation takes place when the run goes on") == is_due
    last = UntilRun(tmp_path, topology)
    assert last.go().finished
    assert any(f"first the evaluation of step {at}" in line for line in last.log.lines) == is_due
    assert_same(last, straight)


KILLS = [("evaluated", 8), ("evaluated", 12), ("saving", 12), ("evaluated", 14), ("saving", 15)]


@pytest.mark.parametrize("signal", [0, 12, 15], ids=["", "signal at 12", "signal at 15"])
@pytest.mark.parametrize("killed", KILLS, ids=str)
def test_a_run_that_is_killed_before_or_after_its_decision_decides_the_same(
    tmp_path: Path,
    topology: Topology,
    straight: UntilRun,
    killed: tuple[str, int],
    signal: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where it is killed while it makes up for the evaluation that a signal has put off."""
    save = CheckpointStore.save

    def dies(self: CheckpointStore, engine: Any, progress: Progress, *, stage_end: bool) -> Path:
        run.die("saving", progress.step)
        return save(self, engine, progress, stage_end=stage_end)

    monkeypatch.setattr(CheckpointStore, "save", dies)
    run = UntilRun(tmp_path, topology, signal_after_steps=signal)
    if signal:
        assert not run.go().finished
    if signal <= killed[1]:
        run = UntilRun(tmp_path, topology, killed=killed)
        with pytest.raises(Killed):
            run.go()
    run = UntilRun(tmp_path, topology)
    assert run.go().finished
    assert_same(run, straight)


def test_no_step_is_begun_when_the_evaluation_that_was_put_off_has_taken_the_time_that_was_left(
    tmp_path: Path, topology: Topology, straight: UntilRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [0.0]

    class Slow(UntilRun):
        def held_out(self, step: int, stage: str, is_stage_end: bool) -> Mapping[str, Any]:
            now_s[0] += 500.0
            return super().held_out(step, stage, is_stage_end)

    def stopping(signals: StopSignals) -> Stopping:
        return Stopping(signals, (Deadline("stop_after 530s", 530.0),), clock=lambda: now_s[0])

    UntilRun(tmp_path, topology, signal_after_steps=8).go()
    with monkeypatch.context() as patch:
        patch.setattr(toy, "Stopping", stopping)
        outcome = Slow(tmp_path, topology).go()
    assert (outcome.progress.step, outcome.progress.evaluated, outcome.finished) == (8, True, False)
    assert outcome.reason.startswith("stop_after 530s: 30 s left")
    last = UntilRun(tmp_path, topology)
    assert last.go().finished and not any("first the evaluation" in line for line in last.log.lines)
    assert_same(last, straight)


def test_a_run_resumed_from_before_the_decision_decides_anew_and_the_same(
    tmp_path: Path, topology: Topology, straight: UntilRun
) -> None:
    shutil.copytree(straight.run_dir, tmp_path / "run")
    again = UntilRun(tmp_path / "run", topology, resume=str(tmp_path / "run" / "checkpoints" / "step_00000005"))
    assert again.go().finished
    assert again.asked()[0] == (0, 10)
    assert_same(again, straight)


def test_the_end_of_a_stage_of_fixed_length_is_evaluated_in_its_stage_before_the_next_begins(
    tmp_path: Path, topology: Topology
) -> None:
    for name, signal in (("straight", 0), ("stopped", 4), ("stopped", 0)):
        run = UntilRun(tmp_path / name, topology, stages=toy.STAGES, signal_after_steps=signal)
        run.go()
    assert run.engine.stages_seen == [0, 1] and run.asked() == [(1, i) for i in range(6)]
    seen = records(tmp_path / "stopped")
    assert [row["eval/in_stage"] for row in seen if "eval/in_stage" in row] == [0, 0, 1, 1]
    assert seen == records(tmp_path / "straight")


def test_a_finished_run_that_was_not_evaluated_is_evaluated_once(tmp_path: Path, topology: Topology) -> None:
    UntilRun(tmp_path, topology, signal_after_steps=TOTAL).go()
    late = UntilRun(tmp_path, topology, too_late="30 s left").go()
    assert (late.finished, late.reason) == (False, "30 s left")
    assert "eval/loss_moba" not in records(tmp_path)[-1]
    first, second = UntilRun(tmp_path, topology), UntilRun(tmp_path, topology)
    assert first.go().finished and second.go().finished
    assert first.asked() == second.asked() == []
    assert "eval/loss_moba" in records(tmp_path)[-1] and len(records(tmp_path)) == TOTAL
    assert any("first the evaluation" in line for line in first.log.lines)
    assert not any("first the evaluation" in line for line in second.log.lines)


def test_an_evaluation_in_a_new_folder_stands_in_a_record_of_its_own(tmp_path: Path, topology: Topology) -> None:
    """`--resume PATH` of another run: the record of the step is in the other folder."""
    UntilRun(tmp_path / "one", topology, signal_after_steps=4).go()
    UntilRun(tmp_path / "two", topology, resume=str(tmp_path / "one"), stop_after_steps=1).go()
    first, second = records(tmp_path / "two")
    assert (first["step"], first["stage"], first["tokens"], first["until/value"]) == (4, "moba", 64, 0.25)
    assert "train/loss" not in first and second["step"] == 5


def test_a_checkpoint_that_is_being_replaced_when_the_job_dies_is_not_lost(
    tmp_path: Path, topology: Topology, straight: UntilRun
) -> None:
    """The stage's end is saved anew once its evaluation has been made up for; there is no other checkpoint here."""
    UntilRun(tmp_path, topology, signal_after_steps=DECIDED, every_steps=0).go()
    (only,) = list_checkpoints(tmp_path)
    only.rename(only.with_name(only.name + ".old"))
    run = UntilRun(tmp_path, topology)
    assert run.go().finished
    assert run.notes[0] == "restored step_00000012: it was being replaced by one of the same step"
    assert_same(run, straight)


def test_a_job_that_dies_at_any_rename_of_such_a_save_goes_on_to_the_same_end(
    tmp_path: Path, topology: Topology, straight: UntilRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    UntilRun(tmp_path / "stopped", topology, signal_after_steps=DECIDED, every_steps=0).go()
    replace_file, left = os.replace, [0]

    def dies(source: Any, target: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        replace_file(source, target)

    seen = []
    for number in range(1, 20):
        run_dir = shutil.copytree(tmp_path / "stopped", tmp_path / f"killed_{number}")
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dies)
            left[0] = number
            run = UntilRun(run_dir, topology, asynchronous=False, every_steps=0, keep_last=1, stop_after_steps=1)
            try:
                run.go()
            except Killed:
                seen.append(sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir()))
        last = UntilRun(run_dir, topology)
        assert last.go().finished
        assert_same(last, straight)
        if left[0] > 0:
            break
    names = ["step_00000012.old", "step_00000012.tmp"]
    assert names in seen and len(seen) >= 6, "truncation, metrics, twice the checkpoint, the pointer, the next one"


def test_stages_may_decide_one_after_the_other_and_the_last_one_too(tmp_path: Path, topology: Topology) -> None:
    plateau = replace(STAGES[1], tokens=320, until=UntilConfig(loss_plateau=9.0, evaluations=1))
    optimizer = replace(OPTIMIZER, decay_tokens=0)
    run = UntilRun(tmp_path / "straight", topology, stages=(STAGES[0], plateau), optimizer=optimizer)
    outcome = run.go()
    assert outcome.finished and outcome.progress.decided == {0: 12, 1: 4}
    seen = records(tmp_path / "straight")
    assert [row["until/value"] for row in seen[12:] if "until/value" in row] == [
        row["eval/loss_full"] for row in seen[12:] if "eval/loss_full" in row
    ]
    for steps in (14, 2):
        UntilRun(
            tmp_path / "parts", topology, stages=(STAGES[0], plateau), optimizer=optimizer, signal_after_steps=steps
        ).go()
    UntilRun(tmp_path / "parts", topology, stages=(STAGES[0], plateau), optimizer=optimizer).go()
    assert records(tmp_path / "parts") == seen


def test_what_one_stage_has_watched_does_not_count_in_the_next(tmp_path: Path, topology: Topology) -> None:
    """Two evaluations and one more are made in each, although both watch the same."""
    stages = (STAGES[0], replace(STAGES[0], name="again"), STAGES[1])
    assert UntilRun(tmp_path, topology, stages=stages).go().progress.decided == {0: DECIDED, 1: 6}


@pytest.mark.parametrize(("evaluations", "told"), [(2, "fell by 0.1071 nats"), (9, "4 of the 10 evaluations")])
def test_a_stage_that_reaches_its_greatest_length_says_so(
    tmp_path: Path, topology: Topology, evaluations: int, told: str
) -> None:
    until = UntilConfig(trailing_gap=1e-9, evaluations=evaluations)
    run = UntilRun(tmp_path, topology, stages=(replace(STAGES[0], tokens=7 * 16, until=until), STAGES[1]))
    assert run.go().progress.decided == {}
    (line,) = [line for line in run.log.lines if "at its greatest length, 112 tokens, undecided" in line]
    assert told in line


class HalfEngine(toy.ToyEngine):
    """One of two ranks: it holds and learns one of the two weights."""

    def __init__(self, topology: Topology) -> None:
        super().__init__(topology)
        self.weight, self.momentum = self.weight[:1], self.momentum[:1]

    def sharded_state_dict(self, *, is_loading: bool) -> dict[str, Any]:
        mine = (0, self.topology.rank, self.topology.world_size)
        return {
            "model": {"weight": ShardedTensor.from_rank_offsets("weight", self.weight, mine)},
            "optimizer": {"momentum": ShardedTensor.from_rank_offsets("momentum", self.momentum, mine)},
        }


class EverFalling(UntilRun):
    """Its own numbers would never end the stage."""

    def held_out(self, step: int, stage: str, is_stage_end: bool) -> Mapping[str, Any]:
        return {"eval/loss_full": 0.0, "eval/trailing_loss_moba": -step, "eval/trailing_loss_full": 0.0}


def run_on_two_ranks(rank: int, n: int, run_dir: Path) -> list[Any]:
    """The signal reaches rank 1 alone, on the deciding step; then the run goes on."""
    toy.ToyEngine = HalfEngine  # type: ignore[misc]
    topology = init_topology(ParallelConfig(cp=n), device=torch.device("cpu"), timeout_s=30.0)
    outcomes = []
    for count in (DECIDED, 99):
        kind, signal = (EverFalling, count) if rank == 1 else (UntilRun, 0)
        outcomes.append(kind(run_dir, topology, signal_after_steps=signal).go())
    return outcomes


def test_rank_0_decides_for_all_ranks(tmp_path: Path, straight: UntilRun) -> None:
    first, second = run_ranks(run_on_two_ranks, 2, tmp_path)
    assert first == second
    assert [outcome.reason for outcome in first] == ["SIGTERM", "finished"]
    assert first[1].progress == Progress(15, 1, 3, 240, decided={0: DECIDED})
    assert [row.get("until/value") for row in records(tmp_path)] == [
        row.get("until/value") for row in records(straight.run_dir)
    ]


def test_another_rule_in_the_same_stage_begins_anew_and_says_so(tmp_path: Path, topology: Topology) -> None:
    UntilRun(tmp_path, topology, stop_after_steps=5).go()
    other = (replace(STAGES[0], until=UntilConfig(loss_plateau=9.0, evaluations=2)), STAGES[1])
    run = UntilRun(tmp_path, topology, stages=other)
    assert run.go().progress.decided == {0: 10}, "its evaluations are those of steps 6, 8 and 10"
    assert run.notes[-1] == "stage 'moba' does not watch trailing_gap any more: its numbers so far do not count"


def test_a_rule_that_was_away_for_a_while_begins_anew(tmp_path: Path, topology: Topology) -> None:
    """What it had watched before is no neighbour of what comes now."""
    without = (replace(STAGES[0], until=UntilConfig()), STAGES[1])
    UntilRun(tmp_path, topology, stop_after_steps=5).go()
    UntilRun(tmp_path, topology, stop_after_steps=4, stages=without).go()
    run = UntilRun(tmp_path, topology)
    assert run.go().progress.decided == {0: 14}, "its evaluations are those of steps 10, 12 and 14"
    assert [row["step"] for row in records(tmp_path) if "until/fall" in row] == [14]
    assert not any("does not watch" in note for note in run.notes)


def test_a_stage_may_not_become_shorter_than_it_was_when_it_was_decided(
    tmp_path: Path, topology: Topology, straight: UntilRun
) -> None:
    shorter = (replace(STAGES[0], tokens=10 * 16), STAGES[1])
    with pytest.raises(CheckpointError, match="shorter than it was when `until` ended it"):
        UntilRun(tmp_path, topology, stages=shorter, resume=str(straight.run_dir)).go()
    longer = (replace(STAGES[0], tokens=640, until=UntilConfig()), *STAGES[1:], replace(STAGES[1], name="more"))
    assert UntilRun(tmp_path, topology, stages=longer, resume=str(straight.run_dir)).go().progress.step == TOTAL + 3
