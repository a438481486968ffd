"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import errno
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from moba_train.config.schema import ParallelConfig
from moba_train.errors import CheckpointError, DataError, ExchangeError
from moba_train.parallel.topology import Topology, close_topology, init_topology
from moba_train.train import checkpoint, megatron_io
from moba_train.train.checkpoint import CheckpointStore, list_checkpoints, load_checkpoint
from moba_train.train.manifest import find_damage
from moba_train.train.metrics import read_metrics
from moba_train.train.progress import Progress
from moba_train.train.resume import find_start
from moba_train.train.run_lock import run_lock
from tests.distributed import run_ranks
from tests.unit.train.toy import STAGES, ToyEngine, ToyRun, identity


def at(step: int) -> Progress:
    return Progress(step=step, stage_index=0, step_in_stage=step, tokens=16 * step)


def a_store(run_dir: Path, **options: Any) -> CheckpointStore:
    return CheckpointStore(run_dir, identity(), "", STAGES, keep_last=2, asynchronous=True, **options)


def names(run_dir: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run_dir)]


class Gate:
    """Stands in front of the disk: saving threads wait until it opens, or meet the error that stands there."""

    def __init__(self, through: Callable[..., Any]) -> None:
        self.opened = threading.Event()
        self.error: BaseException | None = None
        self._through = through

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self.opened.wait(20.0)
        if self.error is not None:
            raise self.error
        return self._through(*args, **kwargs)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Before the first byte of a shard is written."""
    gate = Gate(vars(megatron_io)["save"])
    monkeypatch.setattr(megatron_io, "save", gate)
    yield gate
    gate.opened.set()


class CountingEngine(ToyEngine):
    """Besides its shards it has a step count, which is no shard and changes in place, as AdamW's."""

    def __init__(self, topology: Topology) -> None:
        super().__init__(topology)
        self.count = torch.zeros(())

    def fill(self, weight: float, momentum: float, count: float) -> None:
        """In place, as an optimizer does it."""
        self.weight.fill_(weight)
        self.momentum.fill_(momentum)
        self.count.fill_(count)

    def sharded_state_dict(self, *, is_loading: bool) -> dict[str, Any]:
        return super().sharded_state_dict(is_loading=is_loading) | {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.count = state["count"]


def test_what_is_saved_is_the_state_at_the_call_although_training_changes_it_in_place(
    tmp_path: Path, topology: Topology, gate: Gate
) -> None:
    engine = CountingEngine(topology)
    store = a_store(tmp_path)
    for step in (1, 2):
        engine.fill(step, -step, step)
        store.save(engine, at(step), stage_end=False)
        assert names(tmp_path) == ["step_00000001"][: step - 1]  # the call came back before anything was written
        engine.fill(7, 7, 7)
        gate.opened.set()
        store.finish()
        gate.opened.clear()
    for step in (1, 2):
        loaded = CountingEngine(topology)
        load_checkpoint(tmp_path / "checkpoints" / f"step_{step:08d}", loaded, identity())
        assert loaded.weight.tolist() == [step, step] and loaded.momentum.tolist() == [-step, -step]
        assert loaded.count.item() == step


def test_the_next_save_waits_for_the_one_before_and_both_are_told_of(
    tmp_path: Path, topology: Topology, gate: Gate
) -> None:
    store, engine = a_store(tmp_path), ToyEngine(topology)
    store.save(engine, at(1), stage_end=False)
    assert store.news() == [] and store.save_time_s == 0.0
    threading.Timer(0.3, gate.opened.set).start()
    begun = time.perf_counter()
    store.save(engine, at(2), stage_end=False)
    assert time.perf_counter() - begun >= 0.25
    assert names(tmp_path)[0] == "step_00000001"
    store.finish()
    first, second = store.news()
    assert first.startswith(f"saved {tmp_path}/checkpoints/step_00000001 in ")
    waited = [float(line.removesuffix(" s)").rpartition(" ")[2]) for line in (first, second)]
    assert waited[0] < 0.2 and waited[1] >= 0.3
    assert store.news() == [] and 0.3 <= store.save_time_s < 5.0
    figures = store.figures()  # of the second; either may be the longest
    assert figures["perf/save_wait_s"] == pytest.approx(waited[1], abs=0.06)
    assert 0.25 <= figures["perf/save_s"] <= store.save_time_s
    assert store.figures() == {}


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), MemoryError("no memory"), ZeroDivisionError("our own")]
)
def test_an_error_in_the_thread_reaches_the_log_at_once_and_the_main_thread_where_it_waits(
    tmp_path: Path, topology: Topology, gate: Gate, capfd: pytest.CaptureFixture[str], error: Exception
) -> None:
    store, engine = a_store(tmp_path), ToyEngine(topology)
    gate.opened.set()
    store.save(engine, at(1), stage_end=False)
    store.finish()
    gate.error = error
    store.save(engine, at(2), stage_end=False)
    deadline = time.monotonic() + 10.0
    while not store.has_failed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert store.has_failed
    assert "moba-train (rank 0): ERROR: step_00000002 was not saved: " in capfd.readouterr().err
    assert [line for line in store.news() if line.startswith("ERROR: step_00000002") and str(error) in line]
    for wait in (store.finish, store.finish, lambda: store.save(engine, at(3), stage_end=False)):
        with pytest.raises(CheckpointError if isinstance(error, OSError) else type(error)):
            wait()
    assert names(tmp_path) == ["step_00000001"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000001\n"


def test_a_limit_of_file_size_stands_for_a_full_disk(tmp_path: Path, topology: Topology) -> None:
    engine = ToyEngine(topology)
    store = a_store(tmp_path)
    store.save(engine, at(1), stage_end=False)
    store.finish()
    engine.weight = torch.zeros(1 << 20)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        store.save(engine, at(2), stage_end=False)
        with pytest.raises(CheckpointError) as caught:
            store.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "rank 0: [Errno 27] File too large" in str(caught.value.got)
    assert find_start(tmp_path, "auto").path == tmp_path / "checkpoints" / "step_00000001"


def test_a_failed_save_ends_the_run_after_the_current_step(
    tmp_path: Path, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    write_manifest = vars(checkpoint)["write_manifest"]

    def fails_the_second_time(folder: Path, entries: Mapping[str, Any]) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        write_manifest(folder, entries)

    def takes_a_while(step: int, stage: str, stage_end: bool) -> Mapping[str, Any]:
        time.sleep(0.5 if step == 5 else 0.0)  # the save of step 4 has failed when this is over
        return {}

    monkeypatch.setattr(checkpoint, "write_manifest", fails_the_second_time)
    run = ToyRun(tmp_path, topology, every_steps=2, evaluators=(takes_a_while,))
    with pytest.raises(CheckpointError, match="could not be written") as caught:
        run.go()
    assert "Disk quota exceeded" in str(caught.value.got)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")][-1] == 6
    assert any(line.startswith("ERROR: step_00000004 was not saved") for line in run.log.lines)
    assert names(tmp_path) == ["step_00000002"]
    assert ToyRun(tmp_path, topology).go().finished


class Crash(Exception):
    """Training breaks off."""


@pytest.mark.parametrize(("crash", "counts"), [(Crash, True), (ExchangeError, False), (KeyboardInterrupt, False)])
def test_a_save_in_flight_counts_if_training_breaks_off_but_not_if_ranks_are_lost(
    tmp_path: Path, topology: Topology, gate: Gate, crash: type[BaseException], counts: bool
) -> None:
    threading.Timer(0.2, gate.opened.set).start()
    with pytest.raises(crash), a_store(tmp_path) as store:
        store.save(ToyEngine(topology), at(1), stage_end=False)
        raise crash("training breaks off")
    assert names(tmp_path) == (["step_00000001"] if counts else [])
    if not counts:
        store.finish()  # nothing may be left of it when the groups are taken down


def test_a_slow_save_in_flight_is_not_given_up_for_an_error_that_all_ranks_meet(
    tmp_path: Path, topology: Topology, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "BREAK_OFF_S", 0.05)
    threading.Timer(0.4, gate.opened.set).start()
    with pytest.raises(DataError), a_store(tmp_path) as store:
        store.save(ToyEngine(topology), at(1), stage_end=True)
        raise DataError("the data of the next stage are damaged")
    assert names(tmp_path) == ["step_00000001"]


def test_a_disk_that_hangs_does_not_hold_back_an_error_of_training(
    tmp_path: Path, topology: Topology, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "BREAK_OFF_S", 0.1)
    with pytest.raises(Crash), a_store(tmp_path) as store:
        store.save(ToyEngine(topology), at(1), stage_end=False)
        raise Crash
    saving = [thread for thread in threading.enumerate() if thread.name == "save step_00000001"]
    assert [thread.daemon for thread in saving] == [True]  # nor does it keep the process alive
    gate.opened.set()
    store.finish()


def test_checkpoints_of_every_nth_step_are_kept(tmp_path: Path, topology: Topology) -> None:
    ToyRun(tmp_path, topology, every_steps=1, keep_last=1, keep_every=3).go()
    assert names(tmp_path) == ["step_00000003", "step_00000004", "step_00000006", "step_00000007"]


def test_a_job_that_has_lost_its_lock_publishes_and_deletes_nothing(
    tmp_path: Path, topology: Topology, gate: Gate
) -> None:
    lost = False

    def check() -> None:
        if lost:
            raise CheckpointError("another job has taken over the run folder")

    store, engine = a_store(tmp_path, check_lock=check), ToyEngine(topology)
    gate.opened.set()
    store.save(engine, at(1), stage_end=False)
    store.finish()
    gate.opened.clear()
    store.save(engine, at(2), stage_end=False)
    lost = True
    gate.opened.set()
    with pytest.raises(CheckpointError, match="taken over"):
        store.finish()
    assert names(tmp_path) == ["step_00000001"]


def test_an_old_checkpoint_that_cannot_be_deleted_is_told_of_and_the_new_one_counts(
    tmp_path: Path, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(path: Path) -> None:
        raise OSError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "delete_checkpoint", refuses)
    store, engine = a_store(tmp_path), ToyEngine(topology)
    for step in (1, 2, 3):
        store.save(engine, at(step), stage_end=False)
    store.finish()
    assert names(tmp_path) == ["step_00000001", "step_00000002", "step_00000003"]
    assert [line for line in store.news() if line.startswith("WARNING: an old checkpoint cannot be deleted")]


class ShardedEngine(ToyEngine):
    """Every rank holds its own part of the weight."""

    def sharded_state_dict(self, *, is_loading: bool) -> dict[str, Any]:
        rank, n = self.topology.rank, self.topology.world_size
        return {"weight": ShardedTensor.from_rank_offsets("weight", self.weight, (0, rank, n))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight = state["weight"].clone()


def save_on_ranks(rank: int, n: int, run_dir: Path) -> tuple[list[float], str, list[str], str, str]:
    """(weights after loading, message of the failed save, what was published, damage, second job) of this rank."""
    topology = init_topology(ParallelConfig(), device=torch.device("cpu"), timeout_s=60.0)
    engine, store = ShardedEngine(topology), a_store(run_dir)
    write = vars(megatron_io)["save"]

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.3 * rank)
        return write(*args, **kwargs)

    vars(megatron_io)["save"] = slow
    for step in (1, 2):
        engine.weight.fill_(10 * step + rank)
        store.save(engine, at(step), stage_end=False)
        for i in range(200):  # training's own collectives, in between those of the saving thread
            engine.weight.fill_(i + rank)
            dist.all_reduce(engine.weight)
            assert engine.weight.tolist() == [2 * i + 1] * 2
    store.finish()
    load_checkpoint(run_dir / "checkpoints" / "step_00000001", engine, identity())
    loaded = engine.weight.tolist()

    def refuses(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    if rank == 1:
        vars(megatron_io)["FileSystemWriter"]._write_data = refuses
    store.save(engine, at(3), stage_end=False)
    told = ""
    try:
        store.finish()
    except CheckpointError as error:
        told = str(error.got)
    damage = find_damage(run_dir / "checkpoints" / "step_00000002")
    with run_lock(run_dir, say=print):
        second = ""
        try:
            with run_lock(run_dir, say=print):
                pass
        except CheckpointError as error:
            second = error.what
    close_topology(keep_process_group=True)
    return loaded, told, names(run_dir), damage, second


def test_two_ranks_save_while_they_train_and_fail_alike(tmp_path: Path) -> None:
    loaded, told, published, damage, second = zip(*run_ranks(save_on_ranks, 2, tmp_path), strict=True)
    assert loaded == ([10.0, 10.0], [11.0, 11.0])
    assert told == ("rank 1: [Errno 28] No space left on device",) * 2
    assert published == (["step_00000001", "step_00000002"],) * 2 and damage == ("", "")
    assert second == ("another job is writing to the run folder",) * 2
