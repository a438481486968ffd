"""launch/run_ranks.py with small programs instead of a training run, on one node and two: restarts, logs, messages.

One test at the end kills a rank of a real run on the other of two nodes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.test_launch import (
    ROOT,
    STEPS,
    ended,
    launch,
    make_workspace,
    ranks_after_step,
    records,
    weights,
)
from tests.integration.test_stage_mesh import free_port

# What every program has: `times` counts its starts, by files of its own.
HEAD = """
import os, pathlib, signal, sys, time
from moba_train import last_words
rank = int(os.environ["RANK"])
mark = pathlib.Path(f"starts_{rank}")
mark.write_text("x" * ((len(mark.read_text()) if mark.exists() else 0) + 1))
times = len(mark.read_text())
"""
MEET = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
sum = torch.tensor([rank + 1])
dist.all_reduce(sum)
assert sum.item() == 3
"""


def run_ranks(
    folder: Path, program: str, *words: str, node: tuple[str, ...] = ("--standalone", "--nproc-per-node", "2")
) -> subprocess.Popen[str]:
    (folder / "program.py").write_text(HEAD + program)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    before = [word for word in words if word.startswith(("--max-restarts", "--log-dir"))]
    after = [word for word in words if word not in before]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "run_ranks.py"), *node, *before, "program.py", *after],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def starts(folder: Path) -> list[int]:
    """How often each rank was started."""
    return [len(path.read_text()) for path in sorted(folder.glob("starts_*"))]


def test_the_rank_that_failed_first_is_the_one_that_is_told_of(tmp_path: Path) -> None:
    """Rank 1 meets an error, and takes its time to end; rank 0 loses it and ends before."""
    program = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
told = pathlib.Path("told")
if rank == 1:
    last_words.leave("ValueError: a bad row", where="step 7: forward, layer 3/8")
    told.touch()
    time.sleep(1.0)
    print("Traceback of rank 1", file=sys.stderr)
    sys.exit(1)
while not told.exists():
    time.sleep(0.05)
last_words.leave("ranks lost each other; rank 0 broke off", where="step 7: optimizer")
sys.exit(3)
"""
    code, out, err = ended(run_ranks(tmp_path, program))
    assert (code, out) == (1, "")
    told = err.splitlines()
    assert "[rank 1] Traceback of rank 1" in told
    first = next(i for i, line in enumerate(told) if line.startswith("launch: "))
    assert told[first].startswith("launch: rank 1 (host ") and told[first].endswith("ended first, with exit code 1")
    assert told[first + 1 :] == ["  in step 7: forward, layer 3/8", "  ValueError: a bad row"]


def test_ranks_are_started_again_as_often_as_allowed_and_go_on_from_what_they_saved(tmp_path: Path) -> None:
    """The first start dies before the first checkpoint, the second after it; --resume PATH holds until there is one."""
    config = tmp_path / "c.toml"
    config.write_text((ROOT / "configs" / "smoke.toml").read_text())
    program = """
print(f"start {times} of rank {rank}: {sys.argv[5:]}", file=sys.stderr)
if rank == 1 and times == 2:
    checkpoint = pathlib.Path("run/checkpoints/step_00000004")
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
other = pathlib.Path(f"starts_{1 - rank}")
while not other.exists() or len(other.read_text()) < times:
    time.sleep(0.05)
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""
    words = ("train", str(config), "--run-dir", "run", "--resume", "old")
    code, _, err = ended(run_ranks(tmp_path, program, "--max-restarts=2", "--log-dir=logs", *words))
    assert code == 128 + signal.SIGKILL
    assert starts(tmp_path) == [3, 3]
    of_rank_0 = [line for line in err.splitlines() if line.startswith("start ")]
    assert of_rank_0 == [
        "start 1 of rank 0: ['--resume', 'old']",
        "start 2 of rank 0: ['--resume', 'old']",
        "start 3 of rank 0: ['--resume', 'old', '--resume', 'auto']",
    ]
    assert err.count("launch: starting again, restart ") == 2 and "restart 2 of at most 2" in err
    assert "of rank 1" not in err, "with a folder for logs the terminal is rank 0's"
    (log,) = tmp_path.glob("logs/*/start_3/rank_1/stderr.log")
    assert log.read_text() == "start 3 of rank 1: ['--resume', 'old', '--resume', 'auto']\n"
    assert f"  log: {log.parent.relative_to(tmp_path)}" in err


@pytest.mark.parametrize(
    ("program", "code", "starts_of_rank_0"),
    [
        ("last_words.leave('mesh', step=min(times, 3)); sys.exit(4 if times < 9 else 0)", 4, 4),
        ("last_words.leave('mesh', step=times); sys.exit(4 if times < 4 else 0)", 0, 4),
        ("sys.exit(2)", 2, 1),
        ("sys.exit(3 if times == 1 else 0)", 0, 2),
    ],
    ids=["a run that does not get on ends", "a new mesh is no failure", "a mistake is not repeated", "a hang is"],
)
def test_what_an_exit_code_means_for_restarts(tmp_path: Path, program: str, code: int, starts_of_rank_0: int) -> None:
    node = ("--standalone", "--nproc-per-node", "1")
    restarts = () if "sys.exit(4" in program else ("--max-restarts=3",)
    found, _, err = ended(run_ranks(tmp_path, program, *restarts, node=node))
    assert found == code
    assert starts(tmp_path) == [starts_of_rank_0]
    assert code != 4 or err.endswith(" ended first, with exit code 4\n  mesh\n"), "what rank 0 had to say ends it"


@pytest.mark.parametrize(
    ("node", "words", "told"),
    [
        (("--nnodes", "2"), (), "launch: several nodes need --rdzv-backend c10d --rdzv-endpoint host:port"),
        (("--standalone",), ("--log-dir=/dev/null/logs",), "launch: the folder for logs cannot be made: "),
    ],
)
def test_a_launch_that_cannot_work_says_so_in_one_line(
    tmp_path: Path, node: tuple[str, ...], words: tuple[str, ...], told: str
) -> None:
    code, out, err = ended(run_ranks(tmp_path, "", *words, node=node))
    assert (code, out) == (2, "") and err.startswith(told) and err.count("\n") == 1
    assert starts(tmp_path) == []


def test_sigterm_reaches_the_ranks_which_have_time_to_save_and_under_nohup_the_terminal_may_close(
    tmp_path: Path,
) -> None:
    program = """
def save(signum, frame):
    time.sleep(1.0)
    pathlib.Path(f"saved_{rank}").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
pathlib.Path(f"handled_{rank}").write_text(os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"])
pathlib.Path(f"ready_{rank}").touch()
time.sleep(60)
"""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
    try:
        launcher = run_ranks(tmp_path, program, "--max-restarts=3")
    finally:
        signal.signal(signal.SIGHUP, before)
    while len(list(tmp_path.glob("ready_*"))) < 2 and launcher.poll() is None:
        time.sleep(0.05)
    launcher.send_signal(signal.SIGUSR1)  # is for the ranks alone
    launcher.send_signal(signal.SIGHUP)
    time.sleep(0.5)  # both signals would otherwise be there at once
    launcher.send_signal(signal.SIGTERM)
    code, out, err = ended(launcher)
    assert (code, out, err) == (128 + signal.SIGTERM, "", "launch: SIGTERM was passed on to the ranks\n")
    assert len(list(tmp_path.glob("saved_*"))) == 2
    assert starts(tmp_path) == [1, 1]
    assert (tmp_path / "handled_0").read_text() == "SIGTERM,SIGINT,SIGQUIT", "torchrun never has a handler of SIGHUP"


def test_a_second_signal_while_ranks_save_leaves_no_launcher_behind(tmp_path: Path) -> None:
    program = """
def save(signum, frame):
    pathlib.Path(f"saving_{rank}").touch()
    time.sleep(2.0)
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
pathlib.Path(f"ready_{rank}").touch()
time.sleep(60)
"""
    launcher = run_ranks(tmp_path, program)
    for mark in ("ready", "saving"):
        while len(list(tmp_path.glob(f"{mark}_*"))) < 2 and launcher.poll() is None:
            time.sleep(0.05)
        launcher.send_signal(signal.SIGTERM)
    try:
        assert launcher.wait(timeout=30) == 128 + signal.SIGTERM
    finally:
        launcher.kill()
        launcher.communicate()


def test_a_thread_that_torchrun_leaves_behind_is_not_waited_for(tmp_path: Path) -> None:
    path = ROOT / "launch" / "run_ranks.py"
    script = f"""
import runpy, signal, sys, threading, time
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.launcher import api

class Launch:
    def __init__(self, *of): pass
    def __call__(self, *words):
        threading.Thread(target=time.sleep, args=(600,)).start()
        raise SignalException("", signal.SIGTERM)

api.elastic_launch = Launch
sys.argv = [{str(path)!r}, "--standalone", "--nproc-per-node", "1", "program.py"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "launch: SIGTERM was passed on to the ranks\n")


@pytest.mark.slow
def test_two_nodes_start_again_together_and_meet_as_if_for_the_first_time(tmp_path: Path) -> None:
    """A new mesh; a rank that ends before it has met the others; one that is killed; and one failure too many."""
    program = """
if rank == 1 and times == 2:
    sys.exit(1)  # rank 0 waits for it
""" + MEET + """
print(f"met in start {times}", flush=True)
if times == 1:
    time.sleep(0.5 * rank)
    last_words.leave("mesh", step=4)
    os._exit(4)  # as the command line ends a rank: threads of an open group may abort one that takes its leave
if rank == 1 and times == 3:
    os.kill(os.getpid(), signal.SIGKILL)
if rank == 0 and times == 4:
    os._exit(1)
dist.barrier()
"""  # fmt: skip
    node = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test")
    node = (*node, "--rdzv-endpoint", f"127.0.0.1:{free_port()}")
    agents = [run_ranks(tmp_path, program, "--max-restarts=2", node=node) for _ in range(2)]
    told = [ended(agent) for agent in agents]
    assert starts(tmp_path) == [4, 4]
    (of_rank_0,) = [code for code, out, _ in told if "[rank 1]" not in out]
    assert of_rank_0 == 1, "restarts are counted for the job: this node knows that none is left"
    for _, out, _ in told:
        assert [line.removeprefix("[rank 1] ") for line in out.splitlines()] == [f"met in start {i}" for i in (1, 3, 4)]


@pytest.mark.slow
def test_a_rank_killed_on_the_other_node_costs_nothing_but_time(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    assert ended(launch(workspace))[::2] == (0, "")
    nodes = {"NNODES": "2", "RDZV_ENDPOINT": f"127.0.0.1:{free_port()}", "MAX_RESTARTS": "1"}
    agents = [launch(workspace, "--run-dir", "nodes", ranks=1, settings=nodes) for _ in range(2)]
    of_agent = [ranks_after_step(agent, workspace / "nodes", 6) for agent in agents]
    other = next(pid for (pid,) in of_agent if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(other, signal.SIGKILL)
    told = [ended(agent) for agent in agents]
    assert [code for code, _, _ in told] == [0, 0]
    assert any("rank 1 (host" in err and "with SIGKILL" in err for _, _, err in told)
    assert any(f"finished after step {STEPS}/{STEPS}" in out for _, out, _ in told)
    assert records(workspace / "nodes") == records(workspace / "straight")
    assert weights(workspace / "nodes") == weights(workspace / "straight")
