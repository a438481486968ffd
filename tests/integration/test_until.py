"""Stages that decide, with the real engine and the command line: stopped, resumed, on other meshes, and looked at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from moba_train.cli import main
from moba_train.data.indexed import write_indexed, write_spans
from moba_train.data.tokenizer import train_tokenizer
from moba_train.train.stopping import Stopping
from tests.drills.runs import digests_of, records

CONFIG = """
model = {{ preset = "tiny", vocab_size = 512 }}
data = {{ tokenizer = "{0}/t.model", sources.text.path = "{0}/text", valid.path = "{0}/{1}" }}
optimizer = {{ schedule = "wsd", decay_tokens = 512, warmup_tokens = 256 }}
eval = {{ every_steps = 2, rows = 1, buckets = 4 }}
niah = {{ lengths = [64], loop_samples = 1, depths = 3 }}
checkpoint = {{ every_steps = 3, keep_last = 1 }}
stages = [{2}, {3}]
"""
ROWS = "tokens_per_step = 256, seq_len = 128, mix.text = 1.0, chunk_size = 16"
MOBA = f'{{ name = "moba", tokens = 2560, {ROWS}, until = {{ trailing_gap = 9.0, evaluations = 1 }} }}'
FULL = f'{{ name = "full", tokens = 512, {ROWS}, attention = "full" }}'
DECIDED = 4
"""The second evaluation: the gap cannot fall by 9 nats."""
OWN_MESH = ("--stages.1.mesh.cp", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus, c.toml, short.toml whose held-out documents are short, and a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("until")
    text = Path(shutil.__file__).read_text("utf-8")
    tokenizer = train_tokenizer([text], folder / "t.model", vocab_size=512)
    tokens = tokenizer.encode(text)
    write_indexed(folder / "text", [tokens], vocab_size=512)
    write_indexed(folder / "short", [tokens[i : i + 100] for i in range(0, 4000, 100)], vocab_size=512)
    (folder / "c.toml").write_text(CONFIG.format(folder, "text", MOBA, FULL))
    (folder / "short.toml").write_text(CONFIG.format(folder, "short", MOBA, FULL))
    assert train(folder, "straight") == 0
    return folder


def train(folder: Path, run: str, *words: str, config: str = "c.toml") -> int:
    return main(["train", str(folder / config), "--run-dir", str(folder / run), *words])


def stop_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """A signal is there after so many steps of the next process."""
    left = [steps]

    def wish(self: Stopping, save_time_s: float, in_flight_s: float | None = None) -> str:
        left[0] -= 1
        self.reason = "" if left[0] else "SIGTERM"
        return self.reason

    patch.setattr(Stopping, "wish", wish)


def assert_same(run: Path, straight: Path) -> None:
    assert records(run) == records(straight)
    for step in (DECIDED, 6):
        last = f"checkpoints/step_{step:08d}"
        assert digests_of(run / last) == digests_of(straight / last)


def test_a_run_stopped_on_its_deciding_step_evaluates_decides_and_ends_as_if_it_had_not_been(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen = records(folder / "straight")
    assert [row["stage"] for row in seen] == ["moba"] * DECIDED + ["full"] * 2
    assert seen[DECIDED - 1]["until/decided"] == 1.0 and "eval/niah_moba" in seen[DECIDED - 1]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(DECIDED, patch)
        assert train(folder, "stopped") == 0
    assert "eval/loss_moba" not in records(folder / "stopped")[-1]
    assert json.loads((folder / "stopped" / "outcome.json").read_text())["finished"] is False
    told = capfd.readouterr().out
    assert "stopped (SIGTERM) after step 4/12; its evaluation takes place when the run goes on" in told
    assert "at most 3,072 tokens in 12 steps" in told
    main(["checkpoint", "ls", str(folder / "stopped")])
    assert "moba, not evaluated yet" in capfd.readouterr().out
    shutil.copytree(folder / "stopped", folder / "meshes")

    assert train(folder, "stopped") == 0
    told = capfd.readouterr().out
    order = [
        "first the evaluation of step 4",
        "stage 'moba' ends after 1,024 of at most 2,560 tokens",
        "stage 2/2 'full'",
    ]
    assert [told.count(text) for text in order] == [1, 1, 1]
    assert sorted(order, key=told.index) == order
    assert "finished after step 6/6" in told
    assert_same(folder / "stopped", folder / "straight")


def test_an_evaluation_that_was_put_off_takes_place_on_the_mesh_of_its_stage(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The next stage asks for two ranks; the one that is here evaluates, decides, saves and gives way."""
    assert train(folder, "meshes", *OWN_MESH) == 4
    told = capfd.readouterr().out
    assert "stopped (mesh) after step 4/6" in told and "stage 'full' runs on tp 1, cp 2" in told
    assert records(folder / "meshes") == records(folder / "straight")[:DECIDED]
    state = json.loads((folder / "meshes" / "checkpoints" / "step_00000004" / "state.json").read_text())
    assert (state["evaluated"], state["stage_end"], state["decided"]) == (True, True, {"0": DECIDED})
    assert train(folder, "meshes", *OWN_MESH) == 2
    assert "where:   stages.1.mesh\n" in capfd.readouterr().err
    assert main(["preflight", str(folder / "c.toml"), "--run-dir", str(folder / "meshes"), *OWN_MESH]) == 0
    assert "--nproc-per-node 2 -m moba_train preflight" in capfd.readouterr().out, "of the stage that it goes on in"


def test_a_stage_of_fixed_length_is_evaluated_on_its_own_mesh_too(folder: Path) -> None:
    fixed = (*OWN_MESH, "--stages.0.until.trailing-gap", "0", "--stages.0.tokens", "768", "--eval.every-steps", "0")
    assert train(folder, "fixed", *fixed) == 4
    assert "eval/niah_moba" in records(folder / "fixed")[-1]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(3, patch)
        assert train(folder, "fixed_stopped", *fixed) == 0
    assert "eval/niah_moba" not in records(folder / "fixed_stopped")[-1]
    assert train(folder, "fixed_stopped", *fixed) == 4
    assert records(folder / "fixed_stopped") == records(folder / "fixed")
    assert train(folder, "fixed_stopped", *fixed) == 2, "two ranks are missing, and nothing is left to be done here"


def test_held_out_documents_that_never_come_to_trailing_positions_are_refused_before_training(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(folder, "short", config="short.toml") == 2
    error = capfd.readouterr().err
    assert "stage 'moba' watches the loss of trailing positions, but no held-out token lies there" in error
    assert "reaches position 120" in error and not (folder / "short" / "checkpoints").exists()


def test_the_rows_of_a_step_are_those_of_the_stage_that_it_fell_to(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for run, step, expected in (
        ("straight", "5", "step 5 of 6: stage 2/2 'full'"),
        ("straight", "4", "step 4 of 6: stage 1/2 'moba'"),
    ):
        assert main(["data", "show", str(folder / run), "--step", step, "--tokens", "1"]) == 0
        assert expected in capfd.readouterr().out
    early = folder / "early"
    shutil.copytree(folder / "straight", early)
    shutil.rmtree(early / "checkpoints")
    lines = (early / "metrics.jsonl").read_text().splitlines(keepends=True)
    (early / "metrics.jsonl").write_text("".join(lines[:3]))
    assert main(["data", "show", str(early), "--step", "5", "--tokens", "1"]) == 0
    told = capfd.readouterr().out
    assert "step 5 of at most 12: stage 1/2 'moba'" in told
    assert "note: the run has done 3 steps; stage 'moba' may end earlier, and step 5 train other rows" in told


def test_plan_and_report_tell_of_the_rule_and_of_the_decision(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder / "c.toml")]) == 0
    plan = capfd.readouterr().out
    assert "schedule    at most 3,072 tokens in 12 steps, wsd" in plan
    (row,) = [line for line in plan.splitlines() if line.startswith("moba ")]
    assert row.split()[1:5] == ["<=", "2,560", "<=", "10"]
    assert "moba  ends when the trailing gap has fallen by less than 9 nats in its last evaluation" in plan
    assert main(["report", str(folder / "straight")]) == 0
    page = (folder / "straight" / "report.html").read_text()
    assert "1 to 4 (decided)" in page and "by decision, step 4" in page
    assert "trailing_gap falls by less than 9.0 in 1 evaluations" in page


def test_held_out_documents_of_which_no_token_counts_are_refused_before_training(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prefix = folder / "prompts"
    write_indexed(prefix, [np.arange(100) for _ in range(4)], vocab_size=512)
    write_spans(prefix, np.array([[3, 50, 60]]))  # an answer, but not in the one row that is scored
    words = ("--data.valid.path", str(prefix), "--stages.0.until.trailing-gap", "0", "--run-dir", str(folder / "mute"))
    assert main(["train", str(folder / "c.toml"), *words]) == 2
    error = capfd.readouterr().err
    assert "no held-out token of stage 'moba' counts" in error and "first 1 row(s) of 128 tokens" in error
    assert not (folder / "mute" / "checkpoints").exists()
    words = (*words, "--eval.rows", "3", "--stages.0.tokens", "256", "--optimizer.decay-tokens", "256")
    assert main(["train", str(folder / "c.toml"), *words]) == 0
    assert records(folder / "mute")[-1]["eval/loss_moba"] > 0
