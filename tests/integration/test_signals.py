"""Signals and deadlines, in real processes: what is asked for, what is left behind, and that a resume goes on from it.

The runs are those of the toy engine, which takes the loop, the checkpoints and the signals through everything that a
real one does (test_launch.py stops the real engine on several ranks). All of them run at once.

    python -m tests.integration.test_signals RUN_DIR KIND      # one of them, by itself
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from moba_train.config.schema import ParallelConfig
from moba_train.parallel.topology import Topology, close_topology, init_topology
from moba_train.train import checkpoint
from moba_train.train.manifest import find_damage
from moba_train.train.metrics import read_metrics
from moba_train.train.run_folder import list_checkpoints
from moba_train.train.signals import StopSignals
from moba_train.train.stopping import Stopping, deadlines
from tests.unit.train import toy

ROOT = Path(__file__).parents[2]
WAIT_S = 150.0
STOP_AFTER = "62s"
"""A minute is kept as a margin, and to start takes more than the rest: the first step is the last."""


def train_slowly(run_dir: Path, kind: str) -> None:
    """A toy run whose steps take a while; `kind` says where it dwells, so that a signal can meet it there."""

    class SlowRows(toy.ToyRows):
        def row(self, index: int) -> Any:
            time.sleep(0.5)
            if kind == "long step" and (self.stage_index, index) == (0, 6):
                Path(run_dir, "dwells").touch()
                time.sleep(WAIT_S)
            return super().row(index)

    def slow_seal(paths: Any) -> Any:
        if any("step_00000004" in str(path) for path in paths):
            Path(run_dir, "dwells").touch()
            time.sleep(WAIT_S)
        return seal_files(paths)

    toy.ToyRows = SlowRows  # type: ignore[misc]
    if kind == "long save":
        seal_files, checkpoint.seal_files = checkpoint.seal_files, slow_seal
    if kind == "deadline":
        toy.Stopping = partial(Stopping, deadlines=deadlines(STOP_AFTER, {}))  # type: ignore[misc,assignment]
    topology = init_topology(ParallelConfig(), device=torch.device("cpu"), timeout_s=60.0)
    with StopSignals() as signals:
        outcome = toy.ToyRun(run_dir, topology, signals=signals, asynchronous=kind == "long save").go()
    print(f"stopped ({outcome.reason}) after step {outcome.progress.step}", flush=True)
    close_topology()


@dataclass
class Ended:
    """A run that was signalled.

    Attributes:
        code: exit code of the process that was started.
        took_s: from the last signal to its end.
    """

    run_dir: Path
    code: int
    out: str
    err: str
    took_s: float


Act = Callable[[subprocess.Popen[str]], None]


@dataclass(frozen=True)
class Case:
    """Where a run dwells, which launcher starts it, if any, and what is done to it after its second step."""

    kind: str
    act: Act
    launcher: tuple[str, ...] = ()

    def start(self, run_dir: Path) -> subprocess.Popen[str]:
        run_dir.mkdir()
        launcher = [*self.launcher, "--standalone", "--nproc-per-node", "1"] if self.launcher else []
        words = [*launcher, "-m", "tests.integration.test_signals", str(run_dir), self.kind]
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a process group of its own, which a terminal would send ctrl-C to
        )

    def is_there(self, run_dir: Path) -> bool:
        """The run is where the signal is to meet it."""
        metrics = run_dir / "metrics.jsonl"
        return (run_dir / "dwells").exists() or (
            not self.kind.startswith("long") and metrics.exists() and len(metrics.read_text().splitlines()) >= 2
        )


def once(signum: signal.Signals) -> Act:
    return lambda process: process.send_signal(signum)


def twice(send: Act) -> Act:
    def act(process: subprocess.Popen[str]) -> None:
        send(process)
        time.sleep(1.5)  # one second separates a second request from an echo of the first
        assert process.poll() is None, "the first one asks"
        send(process)

    return act


def ctrl_c(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGINT)


OURS = (str(ROOT / "launch" / "run_ranks.py"),)
PLAIN_TORCHRUN = ("-m", "torch.distributed.run")
CASES = {
    "SIGTERM to the launcher": Case("usual", once(signal.SIGTERM), OURS),
    "SIGTERM to plain torchrun": Case("usual", once(signal.SIGTERM), PLAIN_TORCHRUN),
    "ctrl-C": Case("usual", ctrl_c, OURS),
    "ctrl-C twice": Case("long step", twice(ctrl_c), OURS),
    "SIGTERM twice in a save": Case("long save", twice(once(signal.SIGTERM))),
    "deadline": Case("deadline", lambda process: None),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    folder = tmp_path_factory.mktemp("signals")
    runs = {name: folder / name.replace(" ", "_") for name in CASES}
    processes = {name: case.start(runs[name]) for name, case in CASES.items()}
    try:
        with ThreadPoolExecutor(len(CASES)) as pool:
            waiting = {name: pool.submit(finish, case, runs[name], processes[name]) for name, case in CASES.items()}
        return {name: future.result() for name, future in waiting.items()}
    finally:
        for process in processes.values():
            process.kill()


def finish(case: Case, run_dir: Path, process: subprocess.Popen[str]) -> Ended:
    """Wait until the run is where its case wants it, do what the case does, and wait for the end."""
    deadline_s = time.monotonic() + WAIT_S
    while process.poll() is None and not case.is_there(run_dir):
        assert time.monotonic() < deadline_s, "it does not get anywhere"
        time.sleep(0.02)
    if process.poll() is None:
        case.act(process)
    signalled_s = time.monotonic()
    out, err = process.communicate(timeout=WAIT_S)
    return Ended(run_dir, process.returncode, out, err, time.monotonic() - signalled_s)


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield init_topology(ParallelConfig(), device=torch.device("cpu"), timeout_s=60.0)
    close_topology()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, topology: Topology) -> toy.ToyRun:
    """The run that nobody disturbs."""
    run = toy.ToyRun(tmp_path_factory.mktemp("straight"), topology)
    run.go()
    return run


def records(run_dir: Path) -> list[dict[str, Any]]:
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("perf/", "memory/"))} for row in rows]


def assert_goes_on(run_dir: Path, straight: toy.ToyRun) -> None:
    """Every checkpoint is whole, `latest` names the newest, and a resume ends where the straight run ended."""
    known = list_checkpoints(run_dir)
    assert known and not any(find_damage(path) for path in known)
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == known[-1].name
    again = toy.ToyRun(run_dir, straight.topology)
    assert again.go().finished
    assert torch.equal(again.engine.weight, straight.engine.weight)
    assert torch.equal(again.engine.momentum, straight.engine.momentum)
    assert records(run_dir) == records(straight.run_dir)


def newest_step(run_dir: Path) -> int:
    return int(list_checkpoints(run_dir)[-1].name.removeprefix("step_"))


def test_sigterm_to_the_launcher_leaves_a_whole_checkpoint_of_the_step_that_was_under_way(
    ended: dict[str, Ended], straight: toy.ToyRun
) -> None:
    found = ended["SIGTERM to the launcher"]
    assert found.code == 128 + signal.SIGTERM, found.err
    assert "stopped (SIGTERM) after step" in found.out
    assert "SIGTERM was passed on to the ranks" in found.err and "Traceback" not in found.err
    assert newest_step(found.run_dir) == len(records(found.run_dir)) < toy.TOTAL_STEPS
    assert_goes_on(found.run_dir, straight)


def test_sigterm_to_plain_torchrun_leaves_the_same_and_its_exit_code_is_1(
    ended: dict[str, Ended], straight: toy.ToyRun
) -> None:
    found = ended["SIGTERM to plain torchrun"]
    assert found.code == 1, found.err
    assert "stopped (SIGTERM) after step" in found.out
    assert newest_step(found.run_dir) == len(records(found.run_dir)) < toy.TOTAL_STEPS
    assert_goes_on(found.run_dir, straight)


def test_ctrl_c_reaches_launcher_and_ranks_and_counts_once(ended: dict[str, Ended], straight: toy.ToyRun) -> None:
    found = ended["ctrl-C"]
    assert found.code == 128 + signal.SIGINT, found.err
    assert "stopped (SIGINT) after step" in found.out and "Traceback" not in found.err
    assert newest_step(found.run_dir) == len(records(found.run_dir)) < toy.TOTAL_STEPS
    assert_goes_on(found.run_dir, straight)


def test_ctrl_c_twice_ends_launcher_and_ranks_at_once_and_leaves_the_last_checkpoint_whole(
    ended: dict[str, Ended], straight: toy.ToyRun
) -> None:
    found = ended["ctrl-C twice"]
    assert found.code == 128 + signal.SIGINT, found.err
    assert found.took_s < 25.0 and "stopped" not in found.out and "Traceback" not in found.err
    assert newest_step(found.run_dir) == 2
    assert_goes_on(found.run_dir, straight)


def test_a_second_signal_does_not_wait_for_a_save_in_flight_whose_folder_is_never_resumed_from(
    ended: dict[str, Ended], straight: toy.ToyRun
) -> None:
    found = ended["SIGTERM twice in a save"]
    assert found.code == -signal.SIGTERM, found.err
    assert found.took_s < 25.0 and "stopped" not in found.out
    assert (found.run_dir / "checkpoints" / "step_00000004.tmp").is_dir()
    assert newest_step(found.run_dir) == 2
    assert_goes_on(found.run_dir, straight)
    assert not (found.run_dir / "checkpoints" / "step_00000004.tmp").exists()


def test_a_run_whose_time_is_up_stops_with_a_checkpoint_and_says_what_it_reckoned_with(
    ended: dict[str, Ended], straight: toy.ToyRun
) -> None:
    found = ended["deadline"]
    assert found.code == 0, found.err
    assert f"stopped (stop_after {STOP_AFTER}: " in found.out and "s left, a step takes" in found.out
    assert newest_step(found.run_dir) < toy.TOTAL_STEPS
    assert_goes_on(found.run_dir, straight)


if __name__ == "__main__":
    train_slowly(Path(sys.argv[1]), sys.argv[2])
