"""launch/torchrun.sh as a user runs it: exit codes, signals to the ranks, a killed rank, and the run that goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moba_train.data.indexed import write_indexed
from moba_train.data.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
STEPS = 24
CONFIG = """
run.dir = "straight"
model = {{ preset = "tiny", vocab_size = 512, key_conv = 3 }}
data = {{ tokenizer = "{0}/t.model", sources.text.path = "{0}/text", valid.path = "{0}/text" }}
eval = {{ every_steps = 0, rows = 1, buckets = 4 }}
niah.loop_samples = 0
checkpoint.every_steps = {1}
parallel.cp = 2
stages = [{{ name = "moba", tokens = {2}, tokens_per_step = 512, seq_len = 256, mix.text = 1.0, chunk_size = 16 }}]
"""


def make_workspace(folder: Path, *, steps: int = STEPS, save_every: int = 4) -> Path:
    """A small corpus and c.toml, a run of so many steps, in `folder`."""
    text = Path(shutil.__file__).read_text("utf-8")
    tokenizer = train_tokenizer([text], folder / "t.model", vocab_size=512)
    write_indexed(folder / "text", [tokenizer.encode(text)], vocab_size=512)
    (folder / "c.toml").write_text(CONFIG.format(folder, save_every, 512 * steps))
    return folder


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("launch"))


def launch(workspace: Path, *words: str, ranks: int = 2, settings: Mapping[str, str] = {}) -> subprocess.Popen[str]:
    """torchrun.sh with its settings in the environment."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.Popen(
        [str(ROOT / "launch" / "torchrun.sh"), str(ranks), "c.toml", *words],
        cwd=workspace,
        env={**os.environ, "PATH": programs, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, out, err


def records(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock or the memory of the machine decides."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    parsed = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if not k.startswith(("perf/", "memory/"))} for r in parsed]


def ranks_after_step(process: subprocess.Popen[str], run: Path, step: int) -> list[int]:
    """Process ids of the ranks, once the run has got so far."""
    deadline_s = time.monotonic() + 90
    while len(records(run)) < step and process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.02)
    listing = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return [int(line.split()[0]) for line in listing.stdout.splitlines() if "moba_train" in line]


def weights(run: Path, step: int = STEPS) -> dict[str, str]:
    """SHA-256 of the shards of the last checkpoint: weights and optimizer state."""
    files = json.loads((run / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".distcp")}


def test_a_mistake_is_told_once_and_its_exit_code_is_passed_on(workspace: Path) -> None:
    code, out, err = ended(launch(workspace, "--parallel.cp", "4", "--run-dir", "none"))
    assert (code, out) == (2, "")
    assert err.startswith("moba-train: error: the number of ranks does not fit the mesh\n")
    assert err.count("error") == 1 and "Traceback" not in err
    assert not (workspace / "none").exists()


@pytest.mark.parametrize("first", ["c.toml", "0", ""])
def test_a_first_argument_that_is_no_number_of_ranks_is_refused_by_name(tmp_path: Path, first: str) -> None:
    words = [str(ROOT / "launch" / "torchrun.sh"), first, "c.toml"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"the number of ranks on each node (gpu: one for each GPU), not '{first}'" in done.stderr


def test_a_mistake_that_shows_once_the_ranks_have_met_ends_them_in_good_order(workspace: Path) -> None:
    (workspace / "used").mkdir()
    (workspace / "used" / "metrics.jsonl").write_text("")
    code, out, err = ended(launch(workspace, "--resume", "never", "--run-dir", "used"))
    assert (code, out) == (2, "")
    assert err.startswith("moba-train: error: --resume never starts afresh, but the run folder already holds a run\n")
    assert len(err.splitlines()) == 5, "no traceback, no abort of a thread"


def test_a_run_that_is_stopped_killed_and_resumed_is_the_run_that_never_was(workspace: Path) -> None:
    assert ended(launch(workspace))[::2] == (0, "")

    run, words = workspace / "disturbed", ("--run-dir", "disturbed")
    stopped = launch(workspace, *words)
    for pid in (stopped.pid, *ranks_after_step(stopped, run, 3)):
        os.kill(pid, signal.SIGUSR1)  # the launcher ignores it
    code, out, err = ended(stopped)
    assert (code, err) == (0, "") and "stopped (SIGUSR1)" in out
    assert len(records(run)) < STEPS

    killed = launch(workspace, *words, settings={"MAX_RESTARTS": "1"})
    os.kill(ranks_after_step(killed, run, len(records(run)) + 6)[1], signal.SIGKILL)
    code, out, err = ended(killed)
    assert code == 0 and out.count("resuming from disturbed/checkpoints/step_") == 2
    assert "(rank 0): error: ranks lost each other" in err and "rank 1: gone" in err, out
    told = next(line for line in err.splitlines() if line.startswith("launch: rank 1 (host "))
    assert told.endswith("ended first, with SIGKILL")
    assert err.splitlines()[-1] == "launch: starting again, restart 1 of at most 1"
    assert f"finished after step {STEPS}/{STEPS}" in out
    assert records(run) == records(workspace / "straight")
    assert weights(run) == weights(workspace / "straight")
