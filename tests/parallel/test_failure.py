"""A rank that dies, stalls or fails makes all others end in time, with a message that says what happened."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from moba_kernels import MoBA, Pack
from moba_train import cli
from moba_train.errors import EXIT_RANKS, ExchangeError
from moba_train.parallel import context_attend
from moba_train.parallel.sentry import collective_timeout_s, guarded
from moba_train.parallel.traffic import Traffic
from moba_train.parallel.watch import Watch
from moba_train.parallel.wire import Wire
from tests.distributed import run_ranks

CPU = torch.device("cpu")
TIMEOUT_S = 8.0
LAUNCH_S = 60.0
"""What starting the processes may take on a busy machine; it is no part of what is measured."""

Body = Callable[[int, Watch], None]


class Ended(NamedTuple):
    """How a rank ended: its exit code, what it printed to stderr, and when, in seconds since the rank that ended first
    and since its body began."""

    code: int | None
    message: str
    after_s: float
    lasted_s: float


def outcomes(body: Body, num_ranks: int, folder: Path) -> list[Ended]:
    """Run `body(rank, watch)` on ranks that are guarded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "numpy", "megatron.core.parallel_state"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    jobs = [(body, rank, num_ranks, store.port, folder / f"{rank}.txt") for rank in range(num_ranks)]
    processes = [context.Process(target=_rank_main, args=job, daemon=True) for job in jobs]
    for process in processes:
        process.start()
    ends: dict[int, float] = {}
    deadline_s = time.monotonic() + LAUNCH_S + TIMEOUT_S
    while len(ends) < num_ranks and time.monotonic() < deadline_s:
        for rank, process in enumerate(processes):
            if rank not in ends and process.exitcode is not None:
                ends[rank] = time.monotonic()
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.join()
    first_s = min(ends.values(), default=0.0)
    found = []
    for rank, (process, job) in enumerate(zip(processes, jobs, strict=True)):
        end_s, began = ends.get(rank, float("inf")), job[-1].with_suffix(".began")
        lasted_s = end_s - float(began.read_text()) if began.exists() else float("inf")
        found.append(Ended(process.exitcode, job[-1].read_text(), end_s - first_s, lasted_s))
    return found


def _rank_main(body: Body, rank: int, num_ranks: int, port: int, stderr: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    sys.stderr = stderr.open("w")
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    limit = timedelta(seconds=LAUNCH_S)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=limit)
    dist.barrier()
    stderr.with_suffix(".began").write_text(str(time.monotonic()))  # the same clock in all processes
    watch = Watch(CPU)
    try:
        with guarded(watch, timeout_s=TIMEOUT_S):
            body(rank, watch)
    except ExchangeError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(EXIT_RANKS)
    except ValueError:
        os._exit(1)
    os._exit(0)


def _attend_until_it_breaks(rank: int, watch: Watch, transport: str, fatal: str) -> None:
    """The last rank is killed in the exchange `fatal` of the second of many layers; its connections close."""
    group = dist.new_group(timeout=timedelta(seconds=LAUNCH_S))
    assert group is not None
    n = group.size()
    if rank == n - 1:
        _die_in(fatal)
    watch.begin("step 12, forward and backward")
    pack = Pack([0, 1500, 3000])
    generator = torch.Generator().manual_seed(rank)
    for layer in range(20):
        q, k, v = (torch.randn(3000 // n, n, 64, generator=generator, requires_grad=True) for _ in range(3))
        result = context_attend(
            q, k, v, MoBA(128, 2), layout="contiguous", group=group, transport=transport, cu_seqlens=pack,
            node_ranks=2, layer=layer, watch=watch,
        )  # fmt: skip
        result.out.sum().backward()
        assert q.grad is not None and bool(torch.isfinite(q.grad).all())


def _die_in(fatal: str) -> None:
    """From now on this process kills itself where it enters the second exchange of that phase; the others are in it."""
    seen: list[str] = []

    def count(_: Traffic, phase: str, *, sent: int, received: int) -> None:
        seen.extend([phase] if phase == fatal else [])
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    Traffic.add = count  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("transport", "phase"),
    [
        ("all_gather", "forward/kv"),
        ("all_gather", "backward/dkv"),
        ("a2a", "backward/dqkv"),
        ("pull", "forward/kv"),
        ("route_queries", "backward/dq"),
    ],
)
def test_ranks_end_and_name_one_that_was_killed_in_mid_collective(transport: str, phase: str, tmp_path: Path) -> None:
    body = partial(_attend_until_it_breaks, transport=transport, fatal=phase)
    *survivors, dead = outcomes(body, 3, tmp_path)
    assert dead[0] == -signal.SIGKILL
    for rank, (code, message, after_s, _) in enumerate(survivors):
        assert code == EXIT_RANKS, message
        assert f"rank {rank} of 3" in message
        assert f"layer 1, transport {transport}, phase {phase}" in message
        assert "in step 12, forward and backward" in message
        assert "rank 2: gone: it has not answered" in message
        assert "🏖" not in message and ".cc:" not in message  # the library's own words, without its postscript
        assert after_s < TIMEOUT_S


@pytest.mark.parametrize("phase", ["forward/qkv", "forward/kv", "backward/dkv"])
def test_ranks_of_a_grid_end_too_though_not_all_exchange_with_the_one_that_was_killed(
    phase: str, tmp_path: Path
) -> None:
    body = partial(_attend_until_it_breaks, transport="a2a+all_gather", fatal=phase)
    *survivors, dead = outcomes(body, 4, tmp_path)
    assert dead[0] == -signal.SIGKILL
    for code, message, after_s, _ in survivors:
        assert code == EXIT_RANKS, message
        assert "rank 3: gone: it has not answered" in message and after_s < TIMEOUT_S
    mate = survivors[2 if phase == "forward/qkv" else 1].message  # of its node, or of its place in the other node
    assert f"of 4: layer 1, transport a2a+all_gather, phase {phase}" in mate


def _die_while_bytes_move(rank: int, watch: Watch) -> None:
    """A quarter of a gigabyte for each rank to receive; rank 2 is killed when it has taken part for a moment."""
    group = dist.new_group(timeout=timedelta(seconds=LAUNCH_S))
    assert group is not None
    wire = Wire(group, transport="all_gather", layer=5, watch=watch)
    watch.begin("step 7, forward and backward")
    large = torch.ones(1 << 25)
    wire.all_gather(torch.ones(4), phase="forward/kv").wait()  # all are here
    pending = wire.all_gather(large, phase="backward/kv")
    if rank == 2:
        time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
    pending.wait()
    raise ValueError("the exchange was over before its rank was killed")


def test_ranks_end_when_one_is_killed_while_its_own_bytes_move(tmp_path: Path) -> None:
    *survivors, dead = outcomes(_die_while_bytes_move, 3, tmp_path)
    assert dead.code == -signal.SIGKILL
    for rank, (code, message, after_s, _) in enumerate(survivors):
        assert code == EXIT_RANKS and after_s < TIMEOUT_S, message
        assert f"rank {rank} of 3: layer 5, transport all_gather, phase backward/kv" in message
        assert "rank 2: gone: it has not answered" in message and "in step 7, forward and backward" in message


def _stall(rank: int, watch: Watch) -> None:
    group = dist.new_group(timeout=timedelta(seconds=collective_timeout_s(TIMEOUT_S)))
    assert group is not None
    wire = Wire(group, transport="all_gather", layer=3, watch=watch)
    watch.begin("step 5, reading rows")
    if rank == 1:
        time.sleep(10 * TIMEOUT_S)
    watch.begin("step 5, forward and backward")
    wire.all_gather(torch.ones(4), phase="forward/kv").wait()


def test_a_rank_that_stalls_is_found_out_and_ended_with_the_others(tmp_path: Path) -> None:
    found = outcomes(_stall, 3, tmp_path)
    assert [ended.code for ended in found] == [EXIT_RANKS] * 3, found
    assert all(ended.lasted_s < TIMEOUT_S for ended in found), found
    for rank in (0, 2):
        message = found[rank].message
        assert f"rank {rank} of 3 " in message and "layer 3, transport all_gather, phase forward/kv" in message
        assert "rank 1: alive, but in no exchange of attention; it was in step 5, reading rows" in message
        assert "gone:" not in message
    assert "rank 1 of 3 busy: step 5, reading rows" in found[1].message


def _fail_alone(rank: int, watch: Watch) -> None:
    watch.begin("step 9, reading rows")
    if rank == 0:
        raise ValueError("no such row")
    Wire(dist.group.WORLD, transport="pull", layer=0, watch=watch).all_reduce(torch.ones(4), phase="forward/x").wait()


def test_a_rank_that_fails_alone_tells_the_others_who_do_not_wait_for_the_timeout(tmp_path: Path) -> None:
    failed, other = outcomes(_fail_alone, 2, tmp_path)
    assert failed.code == 1
    assert other.code == EXIT_RANKS and other.after_s < TIMEOUT_S
    assert "transport pull, phase forward/x" in other.message
    assert "rank 0: failed by itself: ValueError: no such row, in step 9, reading rows" in other.message


def test_the_program_tells_the_story_and_ends_at_once_with_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(*_: object) -> int:
        raise ExchangeError("ranks lost each other")

    monkeypatch.setattr(cli, "_run", lost)
    monkeypatch.setattr(cli.os, "_exit", sys.exit)  # the real one ends this process too
    monkeypatch.setenv("RANK", "5")
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "x.toml"])
    assert ended.value.code == EXIT_RANKS == 3
    assert capsys.readouterr().err == "moba-train (rank 5): error: ranks lost each other\n"


def _breaks(rank: int, n: int) -> tuple[Any, ...]:
    """A collective outside of a wire breaks off: what `during` makes of it, and what it leaves alone."""
    watch = Watch(CPU)
    group = dist.new_group(timeout=timedelta(seconds=0.5))
    texts = []
    for fail in (lambda: rank and dist.all_reduce(torch.ones(1), group=group), lambda: torch.ones(2) @ torch.ones(3)):
        try:
            with watch.during("step 8, optimizer"):
                fail()
        except RuntimeError as error:
            texts.append((type(error).__name__, str(error)))
    dist.barrier()  # who leaves early closes connections that the other still waits on
    return tuple(texts)


def test_a_collective_of_megatron_that_breaks_off_is_named_by_the_step_and_other_errors_stay_as_they_are() -> None:
    fine, broken = run_ranks(_breaks, 2)
    assert len(fine) == 1
    (kind, text), (other, _) = broken
    assert kind == "ExchangeError" and text.startswith("a collective broke off in step 8, optimizer: Timed out")
    assert other == "RuntimeError"
