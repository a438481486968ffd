"""A part of the run that takes too long: all ranks say what they are at, and end with the code that means "restart"."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moba_train.commands.parts import joined_ranks
from moba_train.config.schema import EngineConfig, RunConfig, WatchdogConfig
from moba_train.errors import EXIT_RANKS, ExchangeError
from moba_train.parallel import ranks
from moba_train.parallel.sentry import guarded
from moba_train.parallel.watch import Stretch, Watch
from moba_train.parallel.watchdog import Watchdog
from moba_train.parallel.wire import Wire
from moba_train.train.stopping import process_age_s

CPU = torch.device("cpu")
LIMIT_S = 2.0
"""Of whatever hangs below."""
SLACK_S = 40.0
"""What ending may take on a busy machine; it is some two seconds for one rank, four for several."""
AMPLE_S = 100.0
LAUNCH_S = 150.0
"""What starting all the processes may take on a busy machine; it is no part of what is measured."""
HANG_S = 600.0

Body = Callable[[int, Watch], None]


def sleep_in_an_evaluation(rank: int, watch: Watch) -> None:
    """Rank 1 does; rank 0 is done with its share, and waits to collect the other's."""
    watch.begin("step 12, reading rows", limit="step")
    watch.begin("evaluation after step 12", limit="step")
    ranks.on_all_ranks(lambda: time.sleep(rank * HANG_S))


def block_in_an_exchange(rank: int, watch: Watch) -> None:
    """Both ranks wait in exchanges of different layers, which nobody answers."""
    watch.begin("step 7, forward and backward", limit="step")
    group = dist.new_group([rank], use_local_synchronization=True)
    assert group is not None
    wire = Wire(group, transport="pull", layer=3 + rank, watch=watch)
    watch.wait_begins(wire, "forward/kv")
    threading.Event().wait(HANG_S)


def block_in_a_save(rank: int, watch: Watch) -> None:
    """The thread of rank 1 never gets its file written; both ranks train on meanwhile."""

    group = dist.new_group(timeout=timedelta(seconds=AMPLE_S))

    def save() -> None:
        with watch.background("saving step 4", limit="save"):
            time.sleep(rank * HANG_S)
            ranks.gather_all("written", group)

    threading.Thread(target=save, name="save step_00000004", daemon=True).start()
    train_on(watch, HANG_S)


def train_on(watch: Watch, for_s: float) -> None:
    """Steps that are short, one after the other."""
    end_s, step = time.monotonic() + for_s, 4
    while time.monotonic() < end_s:
        step += 1
        watch.begin(f"step {step}, reading rows", limit="step")
        ranks.gather_all(step)
        time.sleep(0.2)


def be_quick(rank: int, watch: Watch) -> None:
    """Every part is shorter than its limit, all of them together are not."""
    for step in range(4):
        watch.begin(f"step {step}, reading rows", limit="step")
        with watch.background("saving", limit="save"):
            time.sleep(LIMIT_S / 4)
        watch.begin("saving", limit="save")
        time.sleep(LIMIT_S / 4)


def block_at_the_start(rank: int, watch: Watch) -> None:
    threading.Event().wait(HANG_S)


def block_in_a_job(rank: int, watch: Watch) -> None:
    """A job as the command line puts it together, whose start has taken a while already."""
    limits = WatchdogConfig(start_s=process_age_s() + LIMIT_S, step_s=0.0, save_s=0.0)
    with joined_ranks(RunConfig(watchdog=limits, engine=EngineConfig(device="cpu"))):
        threading.Event().wait(HANG_S)


def wait_longer_than_the_timeout(rank: int, watch: Watch) -> None:
    """No limit of the watchdog is over, but that of collectives is."""
    watch.begin("step 3, reading rows", limit="step")
    if rank == 1:
        time.sleep(HANG_S)
    group = dist.new_group([0, 1], timeout=timedelta(seconds=LIMIT_S), use_local_synchronization=True)
    dist.all_reduce(torch.ones(1), group=group)


def sleep_through_a_stop(rank: int, watch: Watch) -> None:
    """The parent stops the process for longer than the limit."""
    watch.begin("step 1, reading rows", limit="step")
    time.sleep(LIMIT_S / 4)  # the watchdog has seen the step
    print("stop me", file=sys.stderr, flush=True)
    for _ in range(8):  # a single sleep would be over when the process goes on
        time.sleep(LIMIT_S / 40)


def hold_python(rank: int, watch: Watch) -> None:
    """Inside a call into C that keeps Python's lock, so that no thread of Python runs."""
    limits = WatchdogConfig(start_s=0.0, step_s=LIMIT_S, save_s=0.0)
    watch.begin("step 1, reading rows", limit="step")
    with Watchdog(watch, limits, expire=lambda _: None, grace_s=0.5):
        time.sleep(0.5)
        ctypes.PyDLL(None).sleep(int(HANG_S))


@dataclass(frozen=True)
class Case:
    """One job: what its ranks do, and under which limits."""

    body: Body
    num_ranks: int = 1
    start_s: float = AMPLE_S
    step_s: float = AMPLE_S
    save_s: float = AMPLE_S

    @property
    def limits(self) -> WatchdogConfig:
        return WatchdogConfig(start_s=self.start_s, step_s=self.step_s, save_s=self.save_s)


@dataclass
class Outcome:
    """What became of a job.

    Attributes:
        codes: exit code of each rank; None = it still ran and was killed.
        texts: what each rank printed to standard error.
        ended_s: when each rank had ended, in seconds since all had met.
        folder: the run folder.
    """

    codes: list[int | None]
    texts: list[str]
    ended_s: list[float]
    folder: Path


CASES = {
    "evaluation": Case(sleep_in_an_evaluation, 2, step_s=LIMIT_S),
    "exchange": Case(block_in_an_exchange, 2, step_s=LIMIT_S),
    "save": Case(block_in_a_save, 2, save_s=LIMIT_S),
    "start": Case(block_at_the_start, start_s=LIMIT_S),
    "job": Case(block_in_a_job),
    "timeout": Case(wait_longer_than_the_timeout, 2),
    "quick": Case(be_quick, 2, step_s=LIMIT_S, save_s=LIMIT_S),
    "off": Case(sleep_through_a_stop, start_s=0.0, step_s=0.0, save_s=0.0),
    "stopped": Case(sleep_through_a_stop, step_s=LIMIT_S),
    "held": Case(hold_python),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """All jobs at once, since they do little but wait."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "numpy", "megatron.core.parallel_state"])
    stores, processes = [], {}
    folders = {name: tmp_path_factory.mktemp(name) for name in CASES}
    for name, case in CASES.items():
        stores.append(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        for rank in range(case.num_ranks):
            job = (case, rank, stores[-1].port, folders[name])
            processes[name, rank] = context.Process(target=rank_main, args=job, daemon=True)
            processes[name, rank].start()
    stop = threading.Thread(target=stop_for_a_while, args=(processes["stopped", 0], folders["stopped"]))
    stop.start()
    ends_s: dict[tuple[str, int], float] = {}
    deadline_s = time.monotonic() + LAUNCH_S
    while len(ends_s) < len(processes) and time.monotonic() < deadline_s:
        ends_s |= {key: time.time() for key, p in processes.items() if key not in ends_s and p.exitcode is not None}
        time.sleep(0.05)
    for process in processes.values():
        process.kill()
        process.join()
    stop.join()
    found = {}
    for name, case in CASES.items():
        keys = [(name, rank) for rank in range(case.num_ranks)]
        met_s = float((folders[name] / "met").read_text())
        found[name] = Outcome(
            [processes[key].exitcode if key in ends_s else None for key in keys],
            [(folders[name] / f"{rank}.err").read_text() for _, rank in keys],
            [ends_s.get(key, float("inf")) - met_s for key in keys],
            folders[name],
        )
    return found


def rank_main(case: Case, rank: int, port: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    sys.stderr = (folder / f"{rank}.err").open("w")
    os.dup2(sys.stderr.fileno(), 2)  # faulthandler writes there
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    limit = timedelta(seconds=LAUNCH_S)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=case.num_ranks, timeout=limit)
    dist.barrier()
    (folder / "met").write_text(str(time.time()))
    watch = Watch(CPU)
    try:
        with guarded(watch, timeout_s=AMPLE_S, limits=case.limits, run_dir=folder):
            case.body(rank, watch)
    except ExchangeError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(EXIT_RANKS)
    os._exit(0)


def stop_for_a_while(process: Any, folder: Path) -> None:
    """SIGSTOP once the process asks for it, SIGCONT after more than its limit."""
    deadline_s = time.monotonic() + LAUNCH_S
    said = folder / "0.err"
    while not (said.exists() and "stop me" in said.read_text()) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.5 * LIMIT_S)
    os.kill(process.pid, signal.SIGCONT)


def stacks_of(text: str) -> str:
    """The part of a rank's standard error that shows its stacks."""
    begin = text.index("stacks of rank")
    return text[begin:]


def test_a_rank_that_sleeps_in_an_evaluation_is_shown_with_the_one_that_waits_for_it(
    outcomes: dict[str, Outcome],
) -> None:
    found = outcomes["evaluation"]
    assert found.codes == [EXIT_RANKS] * 2, found.texts
    assert min(found.ended_s) > LIMIT_S and max(found.ended_s) < LIMIT_S + SLACK_S
    waits, sleeps = found.texts
    assert "the watchdog ends the run; rank" in waits + sleeps
    assert "watchdog.step_s = 2 s is over since it began with evaluation after step 12" in waits + sleeps
    assert "torch.distributed.all_gather_object, called by moba_train.parallel.ranks.gather_all" in waits
    assert "in sleep_in_an_evaluation" in stacks_of(sleeps) and "in gather_all" in stacks_of(waits)
    assert "in gather_all" not in stacks_of(sleeps)
    for rank in (0, 1):
        kept = (found.folder / "hang" / f"rank_{rank}.txt").read_text()
        assert kept.startswith(f"stacks of rank {rank} (process ") and "in sleep_in_an_evaluation" in kept


def test_the_flight_recorder_of_pytorch_is_kept_where_it_has_recorded_something(outcomes: dict[str, Outcome]) -> None:
    file = outcomes["evaluation"].folder / "hang" / "rank_0.flight.json"
    entries = json.loads(file.read_text())["entries"]
    assert any("gather" in entry["profiling_name"] for entry in entries)


def test_the_exchange_that_waits_is_named_by_layer_transport_and_phase(outcomes: dict[str, Outcome]) -> None:
    found = outcomes["exchange"]
    assert found.codes == [EXIT_RANKS] * 2, found.texts
    for rank, text in enumerate(found.texts):
        assert f"layer {3 + rank}, transport pull, phase forward/kv" in text
        assert "in step 7, forward and backward" in text and "in block_in_an_exchange" in stacks_of(text)


def test_a_save_that_blocks_beside_the_training_ends_the_run(outcomes: dict[str, Outcome]) -> None:
    found = outcomes["save"]
    assert found.codes == [EXIT_RANKS] * 2, found.texts
    assert min(found.ended_s) > LIMIT_S and max(found.ended_s) < LIMIT_S + SLACK_S
    assert "rank 1 of 2 hung: watchdog.save_s = 2 s is over since it began with saving step 4" in found.texts[1]
    assert "thread save step_00000004 (most recent call last)" in stacks_of(found.texts[1])
    assert "in train_on" in stacks_of(found.texts[0])
    waits = "; thread save step_00000004 waits in torch.distributed.all_gather_object, called by moba_train"
    assert waits in found.texts[0] + found.texts[1] and "called by" not in found.texts[1].split("rank 0:")[0]


def test_a_rank_by_itself_that_blocks_at_the_start_ends_too(outcomes: dict[str, Outcome]) -> None:
    found = outcomes["start"]
    assert found.codes == [EXIT_RANKS] and LIMIT_S < found.ended_s[0] < LIMIT_S + SLACK_S
    assert "error: the watchdog ends the run; watchdog.start_s = 2 s is over" in found.texts[0]
    assert "in block_at_the_start" in stacks_of(found.texts[0])


def test_the_limits_of_a_job_are_those_of_its_configuration_and_the_start_counts_from_that_of_the_process(
    outcomes: dict[str, Outcome],
) -> None:
    found = outcomes["job"]
    assert found.codes == [EXIT_RANKS] and found.ended_s[0] > 0.9 * LIMIT_S, found.texts
    assert "watchdog.start_s = " in found.texts[0] and "in block_in_a_job" in stacks_of(found.texts[0])


def test_a_rank_that_keeps_the_others_waiting_beyond_their_timeout_shows_its_stacks(
    outcomes: dict[str, Outcome],
) -> None:
    found = outcomes["timeout"]
    assert found.codes[1] == EXIT_RANKS, found.texts
    assert "in wait_longer_than_the_timeout" in stacks_of(found.texts[1])
    assert "rank 1: alive, but in no exchange of attention; it was in step 3, reading rows" in found.texts[0]


def test_a_run_without_trouble_is_left_alone(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["quick"].codes == [0, 0] and outcomes["quick"].texts == ["", ""]
    assert min(outcomes["quick"].ended_s) > LIMIT_S
    assert not (outcomes["quick"].folder / "hang").exists()


def test_a_limit_of_0_is_none(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["off"].codes == [0]


def test_a_process_that_was_stopped_and_goes_on_is_left_alone(outcomes: dict[str, Outcome]) -> None:
    found = outcomes["stopped"]
    assert found.codes == [0], found.texts
    assert found.ended_s[0] > 1.5 * LIMIT_S


def test_a_call_that_holds_python_itself_is_ended_with_all_stacks_but_another_code(
    outcomes: dict[str, Outcome],
) -> None:
    found = outcomes["held"]
    assert found.codes == [1] and LIMIT_S < found.ended_s[0] < LIMIT_S + SLACK_S
    assert "Timeout (0:00:02.5" in found.texts[0] and "in hold_python" in found.texts[0]


class _Stretches:
    """A watch that says what it is told to say."""

    def __init__(self, *stretches: Stretch) -> None:
        self.now = stretches

    def stretches(self) -> tuple[Stretch, ...]:
        return self.now


def test_every_stretch_is_counted_from_its_own_beginning() -> None:
    start, step, save = Stretch("start", "the start"), Stretch("step", "step 1"), Stretch("save", "saving step 1")
    watch: Any = _Stretches(start)
    dog = Watchdog(watch, WatchdogConfig(start_s=20.0, step_s=5.0, save_s=9.0), expire=print, age_s=15.0)
    assert not dog.look(5.0), "15 + 5 s, no more"
    watch.now = (step,)
    assert not dog.look(5.0), "it began within these 5 s"
    watch.now = (step, save)
    assert not dog.look(5.0)
    watch.now = (Stretch("step", "step 2"), save)
    assert not dog.look(5.0) and not dog.look(4.0)
    assert dog.look(1.0).startswith("watchdog.save_s = 9 s is over since it began with saving step 1")


def test_a_step_is_told_to_the_watch_in_microseconds() -> None:
    watch = Watch(CPU)
    began_s = time.perf_counter()
    for step in range(1000):
        watch.begin(f"step {step}, reading rows", limit="step")
    assert (time.perf_counter() - began_s) / 1000 < 1e-4
