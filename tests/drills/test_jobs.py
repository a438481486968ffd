"""Two jobs on one run folder, and ranks that die while others wait for them."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.drills.faults import read_trace
from tests.drills.nursery import Ending, Nursery
from tests.drills.runs import HALF, Drill, digests, records


def until_step(run_dir: Path, step: int) -> None:
    """Wait until a run has come so far."""
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        if (run_dir / "metrics.jsonl").exists() and len(records(run_dir)) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"the run did not reach step {step}")


def test_a_second_job_on_a_run_folder_is_refused_and_disturbs_nothing(drill: Drill) -> None:
    first = drill.nursery.start(drill.job(pause_s=0.5))
    until_step(drill.run_dir, HALF + 1)
    second = drill.go()
    assert second.code == 2 and f"process {first} on {socket.gethostname()}" in second.log
    assert drill.nursery.wait(first).code == 0
    drill.is_undisturbed()


def test_the_folder_of_a_job_that_died_is_taken_over(drill: Drill) -> None:
    first = drill.nursery.start(drill.job(pause_s=0.5))
    until_step(drill.run_dir, HALF + 2)
    os.kill(first, signal.SIGKILL)
    assert drill.nursery.wait(first).was_killed
    assert drill.goes_on()


def a_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


Fault = dict[str, object]
TwoRanks = tuple[Path, Path, list[list[str]]]
"""(straight run, half run, every moment of each rank in the save that follows the half)."""


def on_two_ranks(drill: Drill, faults: tuple[Fault, Fault] = ({}, {}), **options: object) -> list[Ending]:
    """Run both ranks to their end."""
    port = str(a_free_port())
    jobs = []
    for rank, fault in enumerate(faults):
        environment = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        jobs.append(drill.nursery.start(drill.job(environment=environment, fault=fault, **options)))
    return [drill.nursery.wait(job, limit_s=60.0) for job in jobs]


@pytest.fixture(scope="module")
def two_ranks(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> TwoRanks:
    """Runs of two ranks, as `toy_runs`, and every moment of each rank in the save that follows the half."""
    folder = tmp_path_factory.mktemp("two_ranks")
    drill = Drill(nursery, folder, folder / "straight", folder / "half")
    for name, options in (("straight", {"keep_last": 1}), ("half", {"stop_after_steps": HALF, "keep_last": 2})):
        drill.begin(name, half=False)
        endings = on_two_ranks(drill, **options)
        assert [ending.code for ending in endings] == [0, 0], endings
    drill.begin("traced")
    traces = [folder / f"trace{rank}" for rank in (0, 1)]
    on_two_ranks(drill, ({"trace": str(traces[0])}, {"trace": str(traces[1])}), stop_after_steps=2)
    return folder / "straight", folder / "half", [read_trace(trace, drill.checkpoints) for trace in traces]


@pytest.mark.parametrize(
    ("rank", "moment"),
    [
        (1, "open step_00000006.tmp/__1_0.distcp"),
        (1, "fsync step_00000006.tmp/__1_0.distcp"),
        (0, "open step_00000006.tmp/manifest.json"),
        (0, "rename step_00000006.tmp -> step_00000006"),
        (0, "rename latest.tmp -> latest"),
    ],
)
def test_a_rank_killed_while_another_waits_ends_both_and_the_run_goes_on(
    nursery: Nursery, two_ranks: TwoRanks, tmp_path: Path, rank: int, moment: str
) -> None:
    straight, half, moments = two_ranks
    drill = Drill(nursery, tmp_path, straight, half)
    drill.begin()
    fault: Fault = {"kill_at": 1 + moments[rank].index(moment)}
    killed = on_two_ranks(drill, ({}, fault) if rank else (fault, {}), stop_after_steps=2)
    assert killed[rank].was_killed
    assert killed[1 - rank].code not in (0, 2), killed[1 - rank].log
    expected = ["step_00000002", "step_00000004"] + ["step_00000006"] * (moment == "rename latest.tmp -> latest")
    assert drill.whole() == expected
    endings = on_two_ranks(drill)
    assert [ending.code for ending in endings] == [0, 0], endings
    assert f"resuming from {drill.checkpoints}/{expected[-1]}\n" in endings[0].log
    drill.is_undisturbed()


def test_two_ranks_learn_what_one_learns(two_ranks: TwoRanks, toy_runs: tuple[Path, Path]) -> None:
    of_two, of_one = ([row["train/loss"] for row in records(run)] for run in (two_ranks[0], toy_runs[0]))
    assert of_two == of_one
    assert digests(two_ranks[0]).keys() == {"__0_0.distcp", "__1_0.distcp"}
