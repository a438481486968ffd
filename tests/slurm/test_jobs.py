"""Jobs of `moba-train slurm submit` under a real Slurm: they end by themselves, whatever happens to them on the way.

Two ranks that share every row: one on each of two nodes, or both on one. The weights, the optimizer state and the
metrics at the end are those of a job that was left alone, bit for bit. `make test-slurm` runs this file.

A run takes seconds, Slurm's clocks tick in minutes: where a test waits for Slurm, the ranks are halted (SIGSTOP) in the
middle of the run. Slurm's own signals set them going again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_launch import make_workspace, records, weights
from tests.slurm.private_slurm import PrivateSlurm, wait

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
COMMANDS = re.findall(r"^```sh\n(.*?)```", (ROOT / "docs" / "slurm.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
STEPS = 80
TWO_NODES = ("--nodes", "2", "--ranks-per-node", "1", "--cpus-per-node", "1")
ONE_NODE = ("--nodes", "1", "--ranks-per-node", "2", "--cpus-per-node", "2")


@pytest.fixture(scope="module")
def slurm() -> Iterator[PrivateSlurm]:
    with PrivateSlurm(("a", "b", "c")) as private:
        yield private


class Site:
    """A user's folder: a corpus, c.toml, and the commands of a user in it."""

    def __init__(self, folder: Path, slurm: PrivateSlurm) -> None:
        self.folder = folder
        self.slurm = slurm
        make_workspace(folder, steps=STEPS, save_every=20)

    def submit(self, name: str, *words: str) -> str:
        """Job id of `moba-train slurm submit` with these options and the run folder `name`."""
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        done = subprocess.run(
            [sys.executable, "-m", "moba_train", "slurm", "submit", "c.toml", *words, "--run-dir", name],
            cwd=self.folder,
            env={**self.slurm.environment, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.removeprefix("submitted job ").partition(":")[0]

    def documented(self, line: str, name: str, job_id: str) -> str:
        """Run a line of docs/slurm.md for this run folder and job; its output."""
        assert line in "".join(COMMANDS).splitlines()
        words = [word.replace("RUN", str(self.folder / name)).replace("JOB", job_id) for word in line.split()]
        return self.slurm.run(*words)

    def finish(self, name: str, job_id: str) -> dict[str, str]:
        """What is known of the job once it has ended; AssertionError with its log when it failed."""
        ended = self.slurm.wait_for(job_id, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", within_s=240)
        assert ended["JobState"] == "COMPLETED", f"{ended}\n{self.log(name, job_id)}"
        return ended

    def ranks_at_step(self, name: str, step: int) -> list[int]:
        """Process ids of the ranks, as soon as the run has got so far."""
        wait(lambda: len(self.records(name)) >= step, f"step {step} of {name}", 150)
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                words = (folder / "cmdline").read_text("utf-8", "replace").split("\0")
                variables = (folder / "environ").read_text("utf-8", "replace").split("\0")
                if str(self.folder / name) in words and any(word.startswith("RANK=") for word in variables):
                    found.append(int(folder.name))
        assert len(found) == 2
        return found

    def halted_at_step(self, name: str, step: int) -> list[int]:
        """The ranks of a run that makes no further step until they get SIGCONT."""
        ranks = self.ranks_at_step(name, step)
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        assert len(self.records(name)) < STEPS - 20
        return ranks

    def records(self, name: str) -> list[dict[str, Any]]:
        return records(self.folder / name)

    def log(self, name: str, job_id: str) -> str:
        return (self.folder / name / f"slurm-{job_id}.log").read_text()

    def result(self, name: str) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Metrics without what clocks and memory decide, and the SHA-256 of the last weights and optimizer states."""
        return self.records(name), weights(self.folder / name, STEPS)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, slurm: PrivateSlurm) -> Site:
    """With "straight", a run on two nodes that was left alone."""
    site = Site(tmp_path_factory.mktemp("site"), slurm)
    assert site.finish("straight", site.submit("straight", *TWO_NODES, "--time", "00:10:00"))["Restarts"] == "0"
    return site


def test_a_job_that_is_left_alone_says_where_it_runs_and_that_it_is_finished(site: Site, slurm: PrivateSlurm) -> None:
    log = next((site.folder / "straight").glob("slurm-*.log")).read_text()
    assert re.search(r"slurm.sbatch: job \d+, start 1, on a,b; newest checkpoint: none", log)
    assert re.search(r"deadline: .*, in 5\d\d s \(the end of the Slurm job", log)
    assert log.endswith("slurm.sbatch: the run is finished\n")
    assert json.loads((site.folder / "straight" / "outcome.json").read_text())["finished"] is True
    assert slurm.run("squeue", "-h") == ""


def test_a_job_that_is_preempted_and_reaches_its_time_limit_ends_as_the_one_left_alone(
    site: Site, slurm: PrivateSlurm
) -> None:
    job = site.submit("preempted", *TWO_NODES, "--time", "00:02:00", "--lead", "1")
    site.halted_at_step("preempted", 5)
    slurm.run("sbatch", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=srun sleep 2")
    slurm.start_now(job)
    slurm.wait_for(job, "RUNNING")
    began_s = time.time()
    seen = len(site.records("preempted"))
    ranks = site.halted_at_step("preempted", seen + 1)
    time.sleep(max(0.0, began_s + 57 - time.time()))  # the run leaves a minute of the two
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)
    slurm.wait_for(job, "PENDING", within_s=30)
    log = site.log("preempted", job)
    assert "DUE TO PREEMPTION" in log and "start 2, on a,b; newest checkpoint: step_" in log
    assert "slurm.sbatch: stopped for the time limit (the end of the Slurm job, SLURM_JOB_END_TIME" in log
    assert seen < len(site.records("preempted")) < STEPS
    slurm.start_now(job)
    assert site.finish("preempted", job)["Restarts"] == "2"
    assert site.result("preempted") == site.result("straight")


def test_slurms_signal_before_the_time_limit_leads_to_a_stop_and_another_start(site: Site, slurm: PrivateSlurm) -> None:
    """On one node. A person has edited the script, and submits it with sbatch."""
    slurm.run("scancel", site.submit("signalled", *ONE_NODE, "--time", "00:10:00", "--sbatch", "hold"))
    script = site.folder / "signalled" / "slurm.sbatch"
    script.write_text(script.read_text().replace("#SBATCH --hold\n", "").replace("USR1@300", "USR1@240"))
    job = slurm.run("sbatch", "--parsable", str(script)).strip()
    site.halted_at_step("signalled", 5)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=4")  # less than lead_s = 300 s are left
    slurm.wait_for(job, "PENDING", within_s=60)
    assert "slurm.sbatch: stopped for the time limit (SIGUSR1); the job is requeued" in site.log("signalled", job)
    assert 5 <= len(site.records("signalled")) < STEPS
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    slurm.start_now(job)
    assert site.finish("signalled", job)["Restarts"] == "1"
    assert site.result("signalled") == site.result("straight")


def test_a_job_stopped_by_hand_stays_ended_and_the_next_survives_a_lost_node(site: Site, slurm: PrivateSlurm) -> None:
    stopped = site.submit("by_hand", *TWO_NODES, "--time", "00:10:00")
    site.ranks_at_step("by_hand", 5)
    assert " R " in site.documented("squeue -j JOB", "by_hand", stopped)
    site.documented("scancel --signal=USR1 JOB", "by_hand", stopped)
    ended = site.finish("by_hand", stopped)
    assert site.documented("tail -n 100 RUN/slurm-JOB.log", "by_hand", stopped) == site.log("by_hand", stopped)
    assert (ended["Restarts"], ended["ExitCode"]) == ("0", "0:0")
    assert site.log("by_hand", stopped).endswith("slurm.sbatch: stopped by hand; to go on, submit it again\n")
    seen = len(site.records("by_hand"))
    assert 5 <= seen < STEPS

    job = site.documented("sbatch RUN/slurm.sbatch", "by_hand", stopped).split()[-1]
    site.ranks_at_step("by_hand", seen + 3)
    slurm.lose_node("b")
    slurm.wait_for(job, "PENDING", within_s=90)
    slurm.start_now(job)
    site.finish("by_hand", job)
    log = site.log("by_hand", job)
    assert "start 1, on a,b;" in log and "start 2, on a,c;" in log
    assert log.count(f"resuming from {site.folder / 'by_hand'}") == 2
    assert site.result("by_hand") == site.result("straight")


def test_a_job_that_is_not_to_be_requeued_stays_ended_at_its_time_limit(site: Site, slurm: PrivateSlurm) -> None:
    # Five seconds after the start a signal is one for the time limit; Slurm's own comes a minute later.
    job = site.submit("last", *TWO_NODES, "--time", "00:20:00", "--lead", "1105")
    site.documented("scontrol update JobId=JOB Requeue=0", "last", job)
    site.ranks_at_step("last", 5)
    site.documented("scancel --signal=USR1 JOB", "last", job)
    assert site.finish("last", job)["Restarts"] == "0"
    assert "stopped for the time limit (SIGUSR1)" in site.log("last", job)
    assert site.log("last", job).endswith("slurm.sbatch: Slurm has refused that; to go on, submit it again\n")


def test_a_mistake_ends_the_job_and_a_lost_rank_starts_it_again(site: Site, slurm: PrivateSlurm) -> None:
    wrong = site.submit("wrong", *ONE_NODE, "--time", "00:10:00", "--data.tokenizer", "no.model")
    ended = slurm.wait_for(wrong, "COMPLETED", "FAILED", within_s=60)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    assert "moba-train: error: " in site.log("wrong", wrong)

    job = site.submit("killed", *ONE_NODE, "--time", "00:10:00")
    os.kill(site.ranks_at_step("killed", 5)[1], signal.SIGKILL)
    slurm.wait_for(job, "RUNNING")
    slurm.wait_for(job, "PENDING", within_s=60)
    assert "failed, for the 1. time without a new checkpoint" in site.log("killed", job)
    slurm.start_now(job)
    assert site.finish("killed", job)["Restarts"] == "1"
    assert site.result("killed") == site.result("straight")
