"""Parallel degrees, process groups and the mistakes that users make with them."""

from __future__ import annotations

import gc
import os
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moba_train.config.schema import ParallelConfig
from moba_train.errors import BackendError, ConfigError, ExchangeError
from moba_train.parallel import process_groups, ranks
from moba_train.parallel.process_groups import group_among, meet, start_process_group
from moba_train.parallel.topology import RANK_VARIABLES, _own_device, close_topology, init_topology
from tests.distributed import run_ranks

CPU = torch.device("cpu")


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def _ranks_of(group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


def _meshes(rank: int, n: int) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    mesh = init_topology(ParallelConfig(tp=2, cp=2), device=CPU, timeout_s=60)
    seen["tp2cp2"] = (mesh.tp_rank, mesh.cp_rank, mesh.dp, _ranks_of(mesh.tp_group), _ranks_of(mesh.cp_group))
    close_topology(keep_process_group=True)
    mesh = init_topology(ParallelConfig(cp=2, dp=2), device=CPU, timeout_s=60)
    seen["cp2dp2"] = (mesh.cp_rank, mesh.dp_rank, _ranks_of(mesh.dp_group), _ranks_of(mesh.dp_cp_group))
    close_topology(keep_process_group=True)
    try:
        init_topology(ParallelConfig(cp=3), device=CPU, timeout_s=60)
    except ConfigError as error:
        seen["cp3"] = str(error)
    return seen


def _gloo_threads() -> int:
    return [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")].count("gloo_tcp_loop")


def _threads_and_sums(rank: int, n: int) -> tuple[int, list[float]]:
    """Threads of gloo beyond the default group's, and sums over two groups that ranks take in different orders."""
    before = _gloo_threads()
    mesh = init_topology(ParallelConfig(cp=2), device=CPU, timeout_s=60, save_timeout_s=777.0)
    among = group_among(mesh.cp_group, (0, 1))
    threads = _gloo_threads() - before
    groups = (mesh.save_group, among)
    sums = [torch.tensor(float(rank + 10 * i)) for i in range(2)]
    order = (0, 1) if rank == 0 else (1, 0)
    works = [dist.all_reduce(sums[i], group=groups[i], async_op=True) for i in order]
    for work in works:
        work.wait()
    limits: list[Any] = [group._get_backend(CPU).options for group in groups]
    assert limits[0]._timeout == timedelta(seconds=777) > limits[1]._timeout
    assert dist.distributed_c10d.ProcessGroupGloo is dist.ProcessGroupGloo  # groups of others are made as ever
    return threads, [x.item() for x in sums]


def _threads_beside_another_backend(rank: int, n: int) -> int:
    """As in a job on GPUs, whose default group is NCCL's: the first group over gloo brings what the others share."""
    before = _gloo_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend", lambda *group: "nccl")
        with process_groups.shared_gloo_devices():
            groups = [dist.new_group(backend="gloo") for _ in range(3)]
    for group in groups:
        dist.barrier(group)
    return _gloo_threads() - before


def _wait_for_rank_0(rank: int, n: int) -> str:
    """Wait in the group for starts for longer than a collective may take otherwise (2.5 s)."""
    mesh = init_topology(ParallelConfig(cp=2), device=CPU, timeout_s=4.0, start_timeout_s=30.0)
    return ranks.from_rank_0(lambda: time.sleep(4.0) or "it came", mesh.start_group)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted on Linux")
def test_all_groups_of_a_rank_share_one_thread_of_gloo_and_keep_orders_and_timeouts_of_their_own() -> None:
    assert run_ranks(_threads_and_sums, 2) == [(0, [1.0, 21.0])] * 2
    assert run_ranks(_threads_beside_another_backend, 2) == [1, 1]


def test_ranks_wait_for_an_index_beyond_the_limit_of_a_step() -> None:
    assert run_ranks(_wait_for_rank_0, 2) == ["it came", "it came"]


def test_tensor_ranks_are_neighbours_then_context_then_data() -> None:
    results = run_ranks(_meshes, 4)
    assert [r["tp2cp2"] for r in results] == [
        (0, 0, 1, [0, 1], [0, 2]),
        (1, 0, 1, [0, 1], [1, 3]),
        (0, 1, 1, [2, 3], [0, 2]),
        (1, 1, 1, [2, 3], [1, 3]),
    ]
    assert [r["cp2dp2"] for r in results] == [
        (0, 0, [0, 2], [0, 1, 2, 3]),
        (1, 0, [1, 3], [0, 1, 2, 3]),
        (0, 1, [0, 2], [0, 1, 2, 3]),
        (1, 1, [1, 3], [0, 1, 2, 3]),
    ]
    for result in results:
        assert "4 ranks for tp 1 * cp 3 * pp 1 * dp auto" in result["cp3"]
        assert "torchrun --nproc-per-node 3" in result["cp3"]


def _opened_and_closed(rank: int, n: int, times: int) -> int:
    """Closed at once after a collective, when the group's threads still hold its tensors."""
    for _ in range(times):
        close_topology()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        ranks.from_rank_0(lambda: {"step": 1})
    return times


def test_a_group_is_closed_right_after_a_collective_without_a_hang() -> None:
    assert run_ranks(_opened_and_closed, 1, 50, timeout_s=30.0) == [50]


def _kept(rank: int, n: int) -> tuple[bool, bool]:
    """Is a group still there when nobody names it any more: of a PyTorch where it can go, and of one where not?"""
    found = []
    close_topology()
    for version in ("0.1", "99"):
        process_groups.PLAIN_SINCE = version
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        group = weakref.ref(dist.group.WORLD)
        close_topology()
        gc.collect()
        found.append(group() is not None)
    return found[0], found[1]


def test_groups_that_pytorch_cannot_let_go_of_live_until_the_process_ends() -> None:
    assert run_ranks(_kept, 1) == [(False, True)]


def test_a_process_without_a_launcher_is_a_job_of_one_rank(bare_environment: pytest.MonkeyPatch) -> None:
    try:
        mesh = init_topology(ParallelConfig(), device=CPU, timeout_s=30)
        assert (mesh.rank, mesh.world_size, mesh.dp, mesh.cp_rank, mesh.is_first_rank) == (0, 1, 1, 0, True)
        assert mesh.cp_group.size() == mesh.dp_cp_group.size() == 1
    finally:
        close_topology()
    assert not dist.is_initialized()


def test_degrees_that_do_not_multiply_to_the_ranks_are_refused_before_any_group_is_made(
    bare_environment: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match=r"does not fit the mesh\n(.|\n)*1 ranks for tp 1 \* cp 2"):
        init_topology(ParallelConfig(cp=2), device=CPU, timeout_s=30)
    assert not dist.is_initialized()


def test_half_a_launcher_environment_is_refused(bare_environment: pytest.MonkeyPatch) -> None:
    bare_environment.setenv("RANK", "0")
    bare_environment.setenv("WORLD_SIZE", "1")
    with pytest.raises(ConfigError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing"):
        init_topology(ParallelConfig(), device=CPU, timeout_s=30)


def _grid(rank: int, n: int) -> dict[str, Any]:
    group = dist.new_group([3, 2, 1, 0], timeout=timedelta(seconds=33))
    assert group is not None
    mine = tuple(r for r in range(n) if r % 2 == group.rank() % 2)
    among = group_among(group, mine)
    again = group_among(group, mine)
    timeout = among._get_backend(CPU).options._timeout
    return {"ranks": _ranks_of(among), "same": again is among, "timeout_s": timeout.total_seconds()}


def test_some_ranks_of_a_group_form_one_with_its_timeout_once() -> None:
    for rank, found in enumerate(run_ranks(_grid, 4)):
        assert sorted(found["ranks"]) == [rank % 2, rank % 2 + 2] and found["same"] and found["timeout_s"] == 33


def _disagree(rank: int, n: int) -> str:
    try:
        init_topology(ParallelConfig(cp=2) if rank == 1 else ParallelConfig(tp=2), device=CPU, timeout_s=60)
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_that_mean_different_meshes_are_named_at_once() -> None:
    for message in run_ranks(_disagree, 4, timeout_s=30.0):
        assert "tp 1, cp 2, pp 1, dp 2 on rank 1, tp 2, cp 1, pp 1, dp 2 on the others" in message
        assert "the start of the job" in message


def _together(*each: Callable[[], object]) -> list[object]:
    """What each returns or raises, run as threads."""

    def outcome(run: Callable[[], object]) -> object:
        try:
            return run()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(each)) as pool:
        return [future.result() for future in [pool.submit(outcome, run) for run in each]]


def test_ranks_of_which_some_found_no_gpu_are_named_before_they_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # the launcher keeps the store
    devices = [torch.device("cuda", 0), CPU, torch.device("cuda", 2)]
    starts = [partial(start_process_group, r, 3, d, timeout=timedelta(seconds=30)) for r, d in enumerate(devices)]
    for error in _together(*starts):
        assert isinstance(error, BackendError) and "device: cpu on rank 1, cuda on the others" in str(error)
        assert "PyTorch" not in str(error)
    assert not dist.is_initialized()


def test_a_rank_that_does_not_come_is_named_and_the_next_meeting_is_a_new_one() -> None:
    store, says = dist.HashStore(), [{"version": "1"}, {"version": "2"}]
    come = [partial(meet, store, rank, 2, says[rank], timeout=timedelta(seconds=20)) for rank in range(2)]
    assert _together(*come) == [says, says]
    (error,) = _together(partial(meet, store, 1, 2, says[1], timeout=timedelta(seconds=0.2)))
    assert isinstance(error, ExchangeError) and "rank 1 of 2: at the start of the job rank 0 did not come" in str(error)


def test_ranks_whose_store_is_lost_while_they_wait_say_so() -> None:
    class Store(dist.PrefixStore):  # type: ignore[misc,name-defined]
        def get(self, key: str) -> bytes:
            raise RuntimeError("Connection reset by peer")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "PrefixStore", Store)
        (error,) = _together(partial(meet, dist.HashStore(), 1, 2, {}, timeout=timedelta(seconds=0.2)))
    assert isinstance(error, ExchangeError)
    assert "the store was lost, with rank 0 or the launcher (Connection reset by peer)" in str(error)


@pytest.mark.parametrize(("version", "told"), [("2.7.1", "1"), ("2.8.0", None)])
def test_buffers_of_nccl_are_used_again_also_where_pytorch_must_be_told(
    version: str, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_NCCL_AVOID_RECORD_STREAMS", raising=False)
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)(version))
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 1)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    start_process_group(0, 1, torch.device("cuda", 0), timeout=timedelta(seconds=5))
    assert os.environ.pop("TORCH_NCCL_AVOID_RECORD_STREAMS", None) == told


def test_a_task_of_srun_that_sees_one_device_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert _own_device(torch.device("cuda"), 3) == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert _own_device(torch.device("cuda"), 3) == torch.device("cuda", 3)
    assert taken == [0, 3]


def test_ranks_of_torchrun_under_slurm_do_not_share_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("SLURM_LOCALID", "0")  # one task per node
    with pytest.raises(BackendError, match="no CUDA device to itself"):
        _own_device(torch.device("cuda"), 1)


def test_a_rank_without_a_cuda_device_is_told_so(bare_environment: pytest.MonkeyPatch) -> None:
    bare_environment.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(BackendError, match="no CUDA device to itself"):
        init_topology(ParallelConfig(), device=torch.device("cuda"), timeout_s=30)
