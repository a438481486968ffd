"""Training on one GPU by two NCCL ranks that share it: they train like one rank, and one that is killed ends the other.

NCCL refuses a GPU twice in one host, so each rank says that it is a host of its own; they exchange over sockets, by the
same calls as the GPUs of a cluster. Needs megatron-core and the rest of what `moba-train train` needs, and a GPU that
nothing else is using:

    python -m pytest -m gpu tests/gpu/test_training.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moba_train.errors import EXIT_RANKS
from tests.integration.test_launch import ROOT, make_workspace, records
from tests.integration.test_stage_mesh import free_port

pytestmark = pytest.mark.gpu

STEPS = 8
LIMIT_S = 120.0


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("training"), steps=STEPS, save_every=1000)


def start(workspace: Path, run: str, ranks: int, *words: str) -> list[subprocess.Popen[str]]:
    """The ranks of a run, each a process that sees the GPU."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    common = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PYTHONPATH": paths,
    }
    common |= {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    command = [sys.executable, "-m", "moba_train", "train", "c.toml", "--run-dir", run, "--engine.device", "cuda"]
    return [
        subprocess.Popen(
            [*command, *words],
            cwd=workspace,
            env={**os.environ, **common, **dict.fromkeys(("RANK", "LOCAL_RANK", "SLURM_LOCALID"), str(rank))}
            | {"NCCL_HOSTID": f"host {rank}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """(exit code, standard error) of each."""
    try:
        told = [process.communicate(timeout=LIMIT_S)[1] for process in processes]
        return [(process.returncode, err) for process, err in zip(processes, told, strict=True)]
    finally:
        for process in processes:
            process.kill()


def losses(workspace: Path, run: str, ranks: int, *words: str) -> list[float]:
    """Loss of every step of a run that ends well. fp32, since ranks add up in another order."""
    ends = finish(start(workspace, run, ranks, "--engine.precision", "fp32", *words))
    assert [code for code, _ in ends] == [0] * ranks, "\n".join(err for _, err in ends)
    return [record["train/loss"] for record in records(workspace / run)]


@pytest.fixture(scope="module")
def alone(workspace: Path) -> list[float]:
    """Losses of one rank."""
    return losses(workspace, "alone", 1, "--parallel.cp", "1")


@pytest.mark.parametrize("mesh", ["cp", "tp", "dp"])
def test_two_nccl_ranks_train_like_one(workspace: Path, alone: list[float], mesh: str) -> None:
    words = ("--parallel.cp", "2") if mesh == "cp" else ("--parallel.cp", "1", f"--parallel.{mesh}", "2")
    both = losses(workspace, mesh, 2, *words)
    assert len(alone) == STEPS and both == pytest.approx(alone, rel=2e-4)


def test_a_killed_nccl_rank_ends_the_other_which_names_it(workspace: Path) -> None:
    processes = start(workspace, "killed", 2, "--parallel.cp", "2", "--stages.0.tokens", str(512 * 4000))
    deadline_s = time.monotonic() + LIMIT_S
    while len(records(workspace / "killed")) < 3 and time.monotonic() < deadline_s:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGKILL)
    since_s = time.monotonic()
    (code, err), (other, _) = finish(processes)
    assert other == -signal.SIGKILL
    assert code == EXIT_RANKS, err
    assert "ranks lost each other" in err and "rank 1: gone" in err, err
    assert time.monotonic() - since_s < 60
