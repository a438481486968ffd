"""Stages that ask for meshes of their own: the run saves, ends, and goes on by itself; launched on two nodes."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moba_train.cli import main
from moba_train.commands.train import _until_step
from moba_train.config.load import load_config
from moba_train.config.mesh import parallel_of_stage
from moba_train.train.progress import Progress
from moba_train.train.resume import newest_step
from moba_train.train.schedule import build_schedule
from tests.integration.test_launch import ended, launch, make_workspace, records

SHORT = '{ name = "short", tokens = 1536, tokens_per_step = 512, seq_len = 128, mix.text = 1.0, chunk_size = 16 }'
LONG = '{ name = "long", tokens = 1536, tokens_per_step = 512, seq_len = 256, mix.text = 1.0, chunk_size = 16 }'
OWN = ("--stages.1.mesh.cp", "2")


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with c.toml in two stages of three steps, on data-parallel ranks."""
    workspace = make_workspace(tmp_path_factory.mktemp("stages"))
    plain = (workspace / "c.toml").read_text().partition("parallel.cp")[0]
    (workspace / "c.toml").write_text(f"{plain}stages = [{SHORT}, {LONG}]\n")
    return workspace


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def saved_on(run: Path, step: int) -> dict[str, Any]:
    mesh: dict[str, Any] = json.loads((run / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())["mesh"]
    return mesh


def test_a_run_changes_its_mesh_by_itself_and_has_the_losses_of_a_run_on_one_mesh(staged: Path) -> None:
    nodes = {"NNODES": "2", "RDZV_ENDPOINT": f"127.0.0.1:{free_port()}", "LOG_DIR": "logs"}
    agents = [launch(staged, "--run-dir", "meshes", *OWN, ranks=1, settings=nodes) for _ in range(2)]
    told = [ended(agent) for agent in agents]
    assert [code for code, _, _ in told] == [0, 0]
    (out,) = [out for _, out, _ in told if out]  # of the node of rank 0
    assert "stage 'long' runs on tp 1, cp 2, pp 1, dp auto: start again to go on" in out
    assert "finished after step 6/6" in out
    changed = "launch: starting again after step 3, on the mesh of the next stage"
    followed = "launch: another node starts its ranks again, and so does this one"  # if that one was faster
    # torch adds lines of its own where the node that keeps the store ends first
    lines = [[line for line in err.splitlines() if line.startswith("launch:")] for _, _, err in told]
    assert [changed] in lines and all(of_node in ([changed], [followed]) for of_node in lines)
    assert saved_on(staged / "meshes", 3) == {"tp": 1, "cp": 1, "pp": 1, "dp": 2}
    assert saved_on(staged / "meshes", 6) == {"tp": 1, "cp": 2, "pp": 1, "dp": 1}
    assert {path.parent.name for path in (staged / "logs").glob("*/start_2/rank_*/stderr.log")} == {"rank_1"}

    alone = [sys.executable, "-m", "moba_train", "train", "c.toml", "--run-dir", "alone"]
    subprocess.run(alone, cwd=staged, check=True, capture_output=True)
    assert [record["step"] for record in records(staged / "meshes")] == [1, 2, 3, 4, 5, 6]
    losses, expected = ([r["train/loss"] for r in records(staged / run)] for run in ("meshes", "alone"))
    assert losses == pytest.approx(expected, rel=1e-5)


def test_ranks_that_do_not_fit_the_mesh_of_the_stage_in_which_a_run_goes_on_are_refused(
    staged: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank fits the first stage, but the checkpoint lies at its end."""
    monkeypatch.chdir(staged)
    words = ["train", "c.toml", *OWN, "--run-dir", "other", "--resume"]
    assert main([*words, "meshes/checkpoints/step_00000003"]) == 2
    assert "where:   stages.1.mesh\n  got:     1 ranks for tp 1 * cp 2 * pp 1 * dp auto" in capfd.readouterr().err
    assert not (staged / "other").exists()


def test_a_run_ends_where_the_mesh_changes_and_at_once_where_it_began_on_the_wrong_one(staged: Path) -> None:
    """The wrong one: the newest checkpoint turned out to be damaged, and the one before is of another stage."""
    config = load_config(staged / "c.toml", OWN)
    schedule = build_schedule(config.stages, config.optimizer)
    first, second = (replace(config, parallel=parallel_of_stage(config.parallel, stage)) for stage in config.stages)
    assert [_until_step(config, first, schedule, Progress(step)) for step in (0, 2)] == [3, 3]
    assert [_until_step(config, second, schedule, Progress(step)) for step in (3, 5, 6)] == [6, 6, 6]
    assert [_until_step(config, second, schedule, Progress(step)) for step in (0, 2)] == [0, 2]


def test_the_newest_checkpoint_whose_state_reads_says_where_a_run_goes_on(staged: Path, tmp_path: Path) -> None:
    run = shutil.copytree(staged / "meshes" / "checkpoints", tmp_path / "run" / "checkpoints").parent
    assert [newest_step(run, resume) for resume in ("auto", "never")] == [6, 0]
    assert newest_step(tmp_path / "new", "auto") == 0
    assert newest_step(tmp_path / "new", str(run)) == 6
    assert newest_step(run, str(run / "checkpoints" / "step_00000003")) == 3
    (run / "checkpoints" / "step_00000006" / "state.json").write_text("{")
    assert newest_step(run, "auto") == 4
    assert newest_step(run, str(tmp_path / "nothing")) == 0, "what is wrong is said later"
