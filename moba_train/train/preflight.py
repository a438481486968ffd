"""Before a run begins: is everything there that it needs? All that is wrong, of all ranks, in one table.

Every rank looks at itself, ranks tell one another what they saw, then they try what takes several: a file that another
machine has written, a collective of every group. A rank on which something is wrong takes part in all that follows.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from moba_train.config.schema import ParallelConfig, RunConfig
from moba_train.errors import ExchangeError, UserError
from moba_train.parallel import ranks
from moba_train.parallel.topology import Topology
from moba_train.train import preflight_facts as facts_of
from moba_train.train.preflight_facts import Probe
from moba_train.train.preflight_groups import check_groups, group_names
from moba_train.train.preflight_rules import (
    Failure,
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
    num_ranks,
)

FindDataErrors = Callable[[], Sequence[UserError]]
SEEN_WITHIN_S = 5.0
"""Within this time rank 0 must see a file that another machine has written; network disks take a moment."""
_OTHER_CODE = "ranks do not run the same code, so that their exchanges may not fit"


class PreflightFailed(UserError):
    """Some check failed; the message is the table."""

    def __init__(self, what: str, table: str) -> None:
        self._table = table
        super().__init__(what)

    def message(self) -> str:
        return f"{self.what}\n{self._table}"


@dataclass(frozen=True)
class Report:
    """What came of it, the same on every rank.

    Attributes:
        simulated: ranks of the planned mesh, where one process stood for all of them; else 0.
    """

    results: tuple[Result, ...]
    world_size: int
    duration_s: float
    simulated: int = 0

    def lines(self) -> tuple[str, ...]:
        """For the log of a run whose checks have passed."""
        passed = sum(not result.not_checked for result in self.results)
        left = [f"{result.check} ({result.not_checked})" for result in self.results if result.not_checked]
        without = f"; not checked: {', '.join(left)}" if left else ""
        notes = [f"preflight: note: {note}" for result in self.results for note in result.notes]
        return f"preflight: {passed} checks passed in {self.duration_s:.2f} s{without}", *notes

    def text(self) -> str:
        """A table of what was seen, for the one who asked."""
        rows = [
            (result.check, "not checked" if result.not_checked else "ok", result.not_checked or result.seen)
            for result in self.results
        ]
        lines = [*_table(("check", "", "seen"), rows), *self.lines()]
        if self.simulated:
            lines += [
                f"one process stood for {self.simulated} ranks. Not checked: what ranks must agree on, the memory of",
                "all ranks of a machine together, storage that they share, collectives. To check these too:",
                f"  torchrun --nproc-per-node {self.simulated} -m moba_train preflight CONFIG",
            ]
        return "\n".join(lines)

    def raise_if_failed(self) -> None:
        """PreflightFailed with all failures in one table, on every rank."""
        failed = [result for result in self.results if result.failures]
        if not failed:
            return
        rows = [
            (f"{result.check}: {failure.what}", self._where(failure), failure.found, failure.needed, failure.fix)
            for result in failed
            for failure in result.failures
        ]
        lines = _table(("what", "where", "found", "needed", "fix"), rows)
        passed = [result.check for result in self.results if not result.failures and not result.not_checked]
        lines.append(f"passed: {', '.join(passed) or 'none'}")
        lines += [f"not checked: {r.check} ({r.not_checked})" for r in self.results if r.not_checked]
        lines += [f"note: {note}" for result in self.results for note in result.notes]
        raise PreflightFailed(f"{len(failed)} of {len(self.results)} preflight checks failed", "\n".join(lines))

    def _where(self, failure: Failure) -> str:
        whose = name_ranks(failure.ranks, self.world_size) if self.world_size > 1 else ""
        return ", ".join(part for part in (whose, failure.place) if part)


@dataclass(frozen=True)
class _Told:
    """What a rank tells the others first. Only rank 0 looks at the disk: (free, what the next pruning gives back)."""

    facts: RankFacts
    probe: Probe | None
    folder_failures: tuple[Failure, ...]
    data_failures: tuple[Failure, ...]
    disk: tuple[int, int]
    is_saver: bool


def run_preflight(
    config: RunConfig,
    topology: Topology,
    *,
    find_data_errors: FindDataErrors | None,
    simulated: ParallelConfig | None = None,
) -> Report:
    """Check everything; collective over all ranks. Nothing is left behind, and nothing is raised for what is wrong.

    Args:
        find_data_errors: what is wrong with tokenizer and data files; None = they have been looked at already.
        simulated: the mesh that a single process stands for; None = the ranks are those of the run.

    Raises:
        ExchangeError: ranks lost each other.
    """
    started_s = time.perf_counter()
    mesh = simulated or replace(config.parallel, tp=topology.tp, cp=topology.cp, pp=topology.pp, dp=topology.dp)
    folder = facts_of.nearest_existing(Path(config.run.dir))
    with topology.watch.during("preflight"):
        topology.watch.begin(f"preflight, writing to {folder}")
        probe, folder_failures = _leave_probe(folder, topology.rank)
        topology.watch.begin("preflight, opening data files")
        data_failures = () if find_data_errors is None else _data_failures(find_data_errors, topology.rank)
        topology.watch.begin("preflight, versions, memory and disk")
        try:
            told = _Told(
                _look(config, topology),
                probe,
                folder_failures,
                data_failures,
                ranks.from_rank_0(lambda: _disk(config, folder)),
                is_saver=topology.dp_rank == topology.cp_rank == 0,
            )
            everyone = ranks.gather_all(told)
            results = _of_each(config, mesh, everyone, folder, data_checked=find_data_errors is not None)
            results += _of_all(topology, everyone, results, is_simulated=simulated is not None)
        finally:
            if probe is not None:
                facts_of.remove(probe.path)
    planned = 0 if simulated is None else num_ranks(simulated)
    return Report(results, topology.world_size, time.perf_counter() - started_s, planned)


def _disk(config: RunConfig, folder: Path) -> tuple[int, int]:
    run_dir = Path(config.run.dir)
    return facts_of.free_disk(folder, run_dir), facts_of.reclaimed_disk(run_dir, config.checkpoint)


def _look(config: RunConfig, topology: Topology) -> RankFacts:
    device, machine = topology.device, facts_of.machine_id()
    free_device, versions = facts_of.free_device_memory(device), facts_of.versions_of(config)
    dist.barrier(group=topology.control_group)
    clock_s = time.time()  # of all ranks at one moment
    return RankFacts(
        rank=topology.rank,
        host=machine.split()[0],
        machine=machine,
        versions=versions,
        device_kind=device.type,
        device_name=facts_of.device_name(device),
        num_devices=torch.cuda.device_count() if device.type == "cuda" else 1,
        free_device=free_device,
        free_host=facts_of.free_host_memory(),
        clock_s=clock_s,
    )


def _leave_probe(folder: Path, rank: int) -> tuple[Probe | None, tuple[Failure, ...]]:
    try:
        return facts_of.leave_probe(folder, rank), ()
    except OSError as error:
        fix = "mend permissions or mount options, make room, or choose another --run-dir"
        found = error.strerror or str(error)
        return None, (Failure("cannot write there", (rank,), str(folder), found, "write, fsync and rename", fix),)


def _data_failures(find_data_errors: FindDataErrors, rank: int) -> tuple[Failure, ...]:
    try:
        errors = find_data_errors()
    except OSError as error:
        fix = "mend the permissions, or mount the disk on this machine"
        return (Failure("cannot be read", (rank,), str(error.filename), error.strerror or "", "readable", fix),)
    return tuple(
        Failure(error.what, (rank,), error.where, "" if error.got is None else str(error.got), error.allowed, error.fix)
        for error in errors
    )


def _of_each(
    config: RunConfig, mesh: ParallelConfig, everyone: Sequence[_Told], folder: Path, *, data_checked: bool
) -> tuple[Result, ...]:
    """What follows from what ranks saw by themselves."""
    facts = [told.facts for told in everyone]
    need = needs_of(config, mesh, facts[0].device_kind)
    savers = frozenset(told.facts.rank for told in everyone if told.is_saver)
    data = f"tokenizer, {len(config.data.sources)} source(s) and held-out text, of one vocabulary"
    return (
        check_versions(facts),
        check_devices(facts),
        check_memory(facts, need, savers),
        check_disk(*everyone[0].disk, need, str(folder)),
        Result(
            "run folder",
            f"write, fsync and rename work in {folder}",
            merged(failure for told in everyone for failure in told.folder_failures),
        ),
        Result(
            "data",
            data if data_checked else f"{data} (looked at before ranks met)",
            merged(failure for told in everyone for failure in told.data_failures),
        ),
        check_clocks(facts),
    )


def _of_all(
    topology: Topology, everyone: Sequence[_Told], before: Sequence[Result], *, is_simulated: bool
) -> tuple[Result, ...]:
    """What takes several ranks: storage that they share, collectives of every group."""
    differing = {name for told in everyone for name in _differing(told.facts, everyone[0].facts)}
    why_not = _OTHER_CODE if "code" in differing else "a single process" if is_simulated else ""
    if why_not:
        return Result("shared storage", "", not_checked=why_not), Result("collectives", "", not_checked=why_not)
    unseen = _unseen(everyone) if topology.rank == 0 else ()
    try:
        mine = check_groups(topology)
    except ExchangeError as error:
        known = "; ".join(f"{result.check}: {f.what}" for result in before for f in result.failures)
        raise ExchangeError(f"{error}; preflight had found: {known}" if known else str(error)) from error
    later = ranks.gather_all((unseen, *mine))
    names = ", ".join(name.removesuffix("_group") for name in group_names(topology))
    return (
        Result(
            "shared storage",
            "rank 0 sees what every rank writes",
            merged(f for part in later for f in part[0]),
            not_checked="" if any(told.probe for told in everyone) else "nothing could be written",
        ),
        Result(
            "collectives",
            f"right in groups {names}; the slowest took {max(part[2] for part in later):.2f} s",
            merged(f for part in later for f in part[1]),
        ),
    )


def _differing(mine: RankFacts, theirs: RankFacts) -> set[str]:
    return {name for name, value in mine.versions.items() if theirs.versions.get(name) != value}


def _unseen(everyone: Sequence[_Told]) -> tuple[Failure, ...]:
    """Files of other ranks that rank 0 does not find. Those that were never written are another check's."""
    left = {told.facts.rank: told.probe for told in everyone if told.probe is not None}
    deadline_s = time.monotonic() + SEEN_WITHIN_S
    while True:
        left = {rank: probe for rank, probe in left.items() if not probe.is_there()}
        if not left or time.monotonic() > deadline_s:
            break
        time.sleep(0.1)
    return tuple(
        Failure(
            "rank 0 does not see what other ranks write",
            (rank,),
            str(probe.path.parent),
            f"not there after {SEEN_WITHIN_S:.0f} s",
            "a folder that all machines share",
            "point run.dir at shared storage, mounted at the same place on every machine",
        )
        for rank, probe in left.items()
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns, as wide as the terminal; the same in a log."""
    width = max(80, shutil.get_terminal_size((160, 24)).columns)
    console = Console(width=width, no_color=True, highlight=False, force_terminal=False)
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0))
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]
