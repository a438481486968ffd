"""Before a run begins: what is wrong is found, on the right ranks, and stands in one table."""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from moba_train.config.schema import (
    CheckpointConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    RunSection,
    StageConfig,
    StageMesh,
)
from moba_train.errors import DataError, ExchangeError
from moba_train.parallel.topology import Topology
from moba_train.train import preflight_facts as facts_of
from moba_train.train.memory_plan import estimate_memory
from moba_train.train.preflight import PreflightFailed, Report, run_preflight
from moba_train.train.preflight_facts import free_disk, free_host_memory, leave_probe, reclaimed_disk
from moba_train.train.preflight_groups import check_groups, group_names
from moba_train.train.preflight_rules import (
    GIB,
    Failure,
    Need,
    RankFacts,
    Result,
    check_clocks,
    check_devices,
    check_disk,
    check_memory,
    check_versions,
    merged,
    name_ranks,
    needs_of,
)

STAGES = (StageConfig(name="short", tokens=128, tokens_per_step=64, seq_len=64, mix={"text": 1.0}),)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the table are as wide as the terminal."""
    monkeypatch.setenv("COLUMNS", "160")


def facts(rank: int, **changes: Any) -> RankFacts:
    """A rank like all others, but for `changes`; two ranks a machine."""
    usual = RankFacts(
        rank=rank,
        host=f"node{rank // 2}",
        machine=f"node{rank // 2} boot",
        versions={"torch": "2.6.0", "code": "abc", "configuration": "def"},
        device_kind="cpu",
        device_name="CPU",
        num_devices=1,
        free_device=None,
        free_host=8 * GIB,
        clock_s=1000.0,
    )
    return replace(usual, **changes)


def need(**changes: float) -> Need:
    usual = {"device": 0.0, "host": 3.0 * GIB, "save": 1.0 * GIB, "checkpoint": 10.0 * GIB}
    return Need(**(usual | changes))


def config_at(run_dir: Path, **changes: Any) -> RunConfig:
    return replace(
        RunConfig(stages=STAGES, engine=EngineConfig(device="cpu")), run=RunSection(dir=str(run_dir)), **changes
    )


@pytest.mark.parametrize("name", ["torch", "code", "configuration", "new-package"])
def test_a_rank_with_another_version_is_named_against_the_many(name: str) -> None:
    everyone = [facts(rank) for rank in range(5)]
    everyone[3] = facts(3, versions={**everyone[3].versions, name: "other"})
    (failure,) = check_versions(everyone).failures
    assert failure.what == f"{name} differs between ranks" and failure.ranks == (3,)
    assert failure.found == "other" and failure.needed.endswith("as ranks 0-2, 4") and failure.fix
    assert not check_versions(everyone[:3]).failures


def test_of_two_ranks_that_disagree_the_first_counts() -> None:
    (failure,) = check_versions([facts(0), facts(1, versions={**facts(1).versions, "torch": "2.5"})]).failures
    assert (failure.ranks, failure.needed) == ((1,), "2.6.0, as rank 0")


def test_unlike_kinds_of_device_fail_and_unlike_devices_are_a_note() -> None:
    everyone = [facts(rank, device_kind="cuda", device_name="H100", num_devices=8) for rank in range(3)]
    assert check_devices(everyone) == Result("devices", "3 rank(s) on 2 machine(s): H100")
    unlike = check_devices([*everyone, facts(3, device_kind="cuda", device_name="A100", num_devices=4)])
    assert not unlike.failures
    assert unlike.notes[0] == "unlike devices: H100 on ranks 0-2; A100 on rank 3"
    assert unlike.notes[1] == "unlike numbers of devices on a machine: 8 on ranks 0-2; 4 on rank 3"
    (failure,) = check_devices([*everyone, facts(3)]).failures
    assert (failure.ranks, failure.found, failure.needed) == ((3,), "cpu", "cuda, as ranks 0-2")


def test_the_memory_of_a_machine_is_shared_by_its_ranks() -> None:
    everyone = [facts(rank) for rank in range(4)]
    fits = check_memory(everyone, need(), frozenset({0}))
    assert not fits.failures and "8.00 GiB free, 7.00 GiB planned on machine node0" in fits.seen
    everyone[3] = facts(3, free_host=5 * GIB)
    (failure,) = check_memory(everyone, need(), frozenset({0})).failures
    assert (failure.ranks, failure.place, failure.found) == ((2, 3), "machine node1", "5.00 GiB free")
    assert failure.needed == "6.00 GiB: 2 x 3.00 GiB, 0.0 MiB for a save"
    (failure,) = check_memory(everyone[:2], need(save=3.0 * GIB), frozenset({0})).failures
    assert failure.needed == "9.00 GiB: 2 x 3.00 GiB, 3.00 GiB for a save"


def test_ranks_on_a_cpu_are_warned_where_their_growth_beyond_the_plan_would_not_fit() -> None:
    tight = check_memory([facts(0), facts(1)], need(), frozenset())
    assert not tight.failures and "memory may run short on machine node0: 8.00 GiB free" in tight.notes[0]
    assert not check_memory([facts(0), facts(1)], need(host=2.0 * GIB), frozenset()).notes
    on_gpu = [facts(rank, device_kind="cuda", free_device=80 * GIB) for rank in (0, 1)]
    assert not check_memory(on_gpu, need(device=40.0 * GIB), frozenset()).notes


def test_the_memory_of_each_device_is_its_rank_s_own() -> None:
    everyone = [facts(rank, device_kind="cuda", free_device=80 * GIB) for rank in range(3)]
    everyone[1] = replace(everyone[1], free_device=30 * GIB)
    (failure,) = check_memory(everyone, need(device=40.0 * GIB, host=0.0, save=0.0), frozenset()).failures
    assert (failure.ranks, failure.found, failure.needed) == ((1,), "30.0 GiB free", "40.0 GiB")
    seen = check_memory([everyone[0]], need(device=40.0 * GIB, host=0.0, save=0.0), frozenset()).seen
    assert seen.startswith("80.0 GiB free, 40.0 GiB planned on each device")


def test_memory_that_the_system_does_not_tell_is_not_checked() -> None:
    result = check_memory([facts(0, free_host=None)], need(), frozenset())
    assert not result.failures and result.not_checked


@pytest.mark.parametrize(
    ("free", "reclaimed", "is_enough"), [(20, 0, True), (19, 0, False), (12, 8, True), (12, 7, False), (9, 99, False)]
)
def test_the_disk_has_room_for_two_checkpoints_and_for_the_next_before_any_is_pruned(
    free: int, reclaimed: int, is_enough: bool
) -> None:
    result = check_disk(free * GIB, reclaimed * GIB, need(), "/runs")
    assert bool(result.failures) is not is_enough
    assert is_enough or result.failures[0].needed == "20.0 GiB: 2 checkpoints of 10.0 GiB"


def test_clocks_that_differ_are_a_note() -> None:
    assert not check_clocks([facts(0), facts(1, clock_s=1001.0)]).notes
    result = check_clocks([facts(0), facts(1, clock_s=1007.5), facts(2)])
    assert not result.failures and "rank 1 is 7.5 s ahead of that of rank 0" in result.notes[0]


def test_ranks_are_named_shortly() -> None:
    assert name_ranks([4]) == "rank 4"
    assert name_ranks([3, 1, 2, 7]) == "ranks 1-3, 7"
    assert name_ranks(range(8), 8) == "all ranks" and name_ranks([0], 1) == "rank 0"
    assert name_ranks(range(0, 40, 2)).endswith("14 and more")


def test_what_ranks_find_alike_is_one_row() -> None:
    rows = merged(Failure("gone", (rank,), f"/data{rank // 3}", "", "", "") for rank in range(5))
    assert [(row.ranks, row.place) for row in rows] == [((0, 1, 2), "/data0"), ((3, 4), "/data1")]


def test_the_plan_counts_the_stages_that_run_on_this_mesh(tmp_path: Path) -> None:
    long = replace(STAGES[0], name="long", seq_len=64 * 1024, tokens=1 << 17, tokens_per_step=1 << 16)
    config = config_at(tmp_path, stages=(*STAGES, replace(long, mesh=StageMesh(cp=8))))
    short = needs_of(config, ParallelConfig(dp=1), "cpu")
    assert short.stages == ("short",)
    assert needs_of(config, ParallelConfig(cp=8, dp=1), "cpu").stages == ("long",)
    plan = estimate_memory(replace(config, stages=STAGES))
    assert short.host == plan.total - plan.libraries and short.device == 0.0
    assert needs_of(replace(config, stages=STAGES), ParallelConfig(dp=1), "cuda").device == plan.total - plan.libraries


def test_activations_that_wait_on_the_host_are_part_of_its_plan(tmp_path: Path) -> None:
    engine = EngineConfig(recompute="full", offload="host")
    config = config_at(tmp_path, engine=engine, model=ModelConfig(num_layers=4))
    kept = needs_of(config, ParallelConfig(dp=1), "cuda").host
    assert kept == 4 * 64 * 64 * 4  # layers, tokens, hidden size, bytes
    assert needs_of(replace(config, engine=EngineConfig()), ParallelConfig(dp=1), "cuda").host == 0.0


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_free_memory_is_the_least_of_machine_and_control_groups(tmp_path: Path) -> None:
    assert free_host_memory(tmp_path) is None  # no /proc
    root = write_tree(tmp_path, {"proc/meminfo": "MemTotal: 900 kB\nMemAvailable:     600 kB\n"})
    assert free_host_memory(root) == 600 * 1024
    write_tree(root, {"proc/self/cgroup": "0::/job/step\n"})
    job, step = root / "sys/fs/cgroup/job", root / "sys/fs/cgroup/job/step"
    write_tree(step, {"memory.max": "max\n", "memory.current": "70\n", "memory.stat": "inactive_file 20\n"})
    assert free_host_memory(root) == 600 * 1024
    write_tree(job, {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 1\ninactive_file 50\n"})
    assert free_host_memory(root) == 350
    write_tree(job, {"memory.stat": "anon 1\ninactive_file 20\nactive_file 30\nshmem 9\n"})
    assert free_host_memory(root) == 350, "the limit of a group above counts, and file cache can be dropped"


def test_free_memory_knows_control_groups_of_version_1(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path, {"proc/meminfo": "MemAvailable: 600 kB\n", "proc/self/cgroup": "4:cpu,memory:/job\n3:cpu:/\n"}
    )
    group = {"memory.limit_in_bytes": "5000", "memory.usage_in_bytes": "4000"}
    cache = {"memory.stat": "total_inactive_file 9\ntotal_active_file 80"}
    write_tree(root / "sys/fs/cgroup/memory/job", {**group, **cache})
    assert free_host_memory(root) == 1089


def test_checkpoints_that_go_with_the_next_save_count_as_free(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        write_tree(tmp_path / f"checkpoints/step_{step:08d}", {"part": "x" * step})
    write_tree(tmp_path / "checkpoints/step_00000050.tmp", {"part": "x" * 7})
    assert reclaimed_disk(tmp_path, CheckpointConfig(keep_last=2)) == 10 + 20 + 30
    assert reclaimed_disk(tmp_path, CheckpointConfig(keep_last=2, keep_every=20)) == 10 + 30
    assert reclaimed_disk(tmp_path / "none", CheckpointConfig()) == 0


def test_what_an_interrupted_save_left_counts_as_free_since_it_goes_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that was killed in a save, on a disk with room for two checkpoints, must be able to start again."""
    write_tree(tmp_path / "checkpoints/step_00000010", {"part": "x" * 50})
    write_tree(tmp_path / "checkpoints/step_00000020.tmp", {"part": "x" * 7})
    monkeypatch.setattr(facts_of.os, "statvfs", lambda _: SimpleNamespace(f_bavail=2, f_frsize=4))
    assert free_disk(tmp_path, tmp_path) == 8 + 7


def test_folders_that_another_job_deletes_meanwhile_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = write_tree(tmp_path / "checkpoints/step_00000010", {"part": "x"})
    shutil.rmtree(gone)
    monkeypatch.setattr(facts_of, "list_leftovers", lambda _: [gone])
    monkeypatch.setattr(facts_of, "list_checkpoints", lambda _: [gone, gone])
    assert free_disk(tmp_path, tmp_path) > 0 and reclaimed_disk(tmp_path, CheckpointConfig(keep_last=1)) == 0


def test_a_probe_leaves_one_file_and_a_failing_one_none(tmp_path: Path) -> None:
    probe = leave_probe(tmp_path, 3)
    assert probe.is_there() and list(tmp_path.iterdir()) == [probe.path]
    facts_of.remove(probe.path)
    assert not probe.is_there()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # as on a full disk, the first byte is refused
    try:
        with pytest.raises(OSError, match="write: File too large"):
            leave_probe(tmp_path, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("call", "told"), [("fsync", "fsync: "), ("replace", "rename: ")])
def test_what_a_disk_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, told: str) -> None:
    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(facts_of.os, call, refuse)
    with pytest.raises(OSError, match=f"{told}Read-only file system"):
        leave_probe(tmp_path, 0)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_sound_checks_are_one_line_and_leave_nothing_behind(tmp_path: Path, topology: Topology) -> None:
    begin_s = time.process_time()  # not the clock: the machine may be busy
    report = run_preflight(config_at(tmp_path / "runs" / "a"), topology, find_data_errors=list)
    assert time.process_time() - begin_s < 1.0
    report.raise_if_failed()
    (line,) = report.lines()
    assert line.startswith("preflight: 9 checks passed in ")
    assert list(tmp_path.iterdir()) == []
    assert "save, start; the slowest took" in report.text()


def broken_report(tmp_path: Path, topology: Topology, monkeypatch: pytest.MonkeyPatch) -> Report:
    """One rank on which everything is wrong that can be on one rank."""
    (tmp_path / "runs").write_text("a file stands here")
    config = config_at(tmp_path / "runs" / "a", model=ModelConfig(hidden_size=1 << 14, ffn_hidden_size=1 << 15))
    free = os.statvfs_result([4096, 4096, 1000, 10, 10, 0, 0, 0, 0, 255])
    monkeypatch.setattr(facts_of.os, "statvfs", lambda _: free)
    monkeypatch.setattr(facts_of, "free_host_memory", lambda: GIB)
    errors = [DataError("tokenizer not found", where="data.tokenizer: [x].model", got="nothing", fix="run prep")]
    return run_preflight(config, replace(topology, tp=2), find_data_errors=lambda: errors)


def test_all_that_is_wrong_stands_in_one_table(
    tmp_path: Path, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PreflightFailed) as caught:
        broken_report(tmp_path, topology, monkeypatch).raise_if_failed()
    text = caught.value.message()
    assert text.startswith("5 of 9 preflight checks failed\nwhat  ")
    rows = ("memory: not enough", "disk: not enough", "run folder: cannot write", "data: tokenizer not found")
    assert all(f"\n{row}" in text for row in (*rows, "collectives: the tp group gives"))
    assert "data.tokenizer: [x].model" in text and "Not a directory" in text
    assert "passed: versions, devices, clocks\n" in text
    assert text.endswith("not checked: shared storage (nothing could be written)")


def test_a_process_that_stands_for_a_mesh_says_what_it_did_not_check(tmp_path: Path, topology: Topology) -> None:
    report = run_preflight(config_at(tmp_path), topology, find_data_errors=list, simulated=ParallelConfig(cp=2, dp=2))
    report.raise_if_failed()
    assert report.lines()[0].endswith("not checked: shared storage (a single process), collectives (a single process)")
    assert (
        "stood for 4 ranks" in report.text() and "torchrun --nproc-per-node 4 -m moba_train preflight" in report.text()
    )


def test_a_data_file_that_may_not_be_read_is_a_failure_and_no_traceback(tmp_path: Path, topology: Topology) -> None:
    def refuse() -> list[Any]:
        raise PermissionError(13, "Permission denied", "/data/train.bin")

    report = run_preflight(config_at(tmp_path), topology, find_data_errors=refuse)
    (failure,) = next(result for result in report.results if result.check == "data").failures
    assert (failure.place, failure.found) == ("/data/train.bin", "Permission denied")


@pytest.mark.parametrize("name", group_names(Topology))
def test_a_collective_of_every_group_is_tried(topology: Topology, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A group gives a wrong sum, and is named; the others are sound."""
    real: Callable[..., Any] = dist.all_reduce

    def wrong(tensor: Any, **options: Any) -> Any:
        if options["group"] is groups[name]:
            tensor += 1
        return real(tensor, **options)

    groups = {of: dist.new_group() for of in group_names(topology)}
    monkeypatch.setattr(dist, "all_reduce", wrong)
    failures, _ = check_groups(replace(topology, **groups))
    assert [failure.what for failure in failures] == [f"the {name.removesuffix('_group')} group gives a wrong result"]


class Stuck:
    """A collective that never ends."""

    def is_completed(self) -> bool:
        return False


def test_a_collective_that_hangs_ends_the_preflight_with_the_name_of_its_group(
    topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Any] = dist.all_reduce

    def stuck(tensor: Any, **options: Any) -> Any:
        return Stuck() if options["group"] is topology.replica_group else real(tensor, **options)

    monkeypatch.setattr(dist, "all_reduce", stuck)
    with pytest.raises(ExchangeError, match=r"a collective of the .* group has not come to an end in 0 s"):
        check_groups(topology, limit_s=0.05)
