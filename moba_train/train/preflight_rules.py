"""What must hold before a run begins: pure functions from the facts of all ranks to what is wrong, and a text for what
is right. No torch, no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from moba_train.config.mesh import parallel_of_stage
from moba_train.config.schema import ParallelConfig, RunConfig
from moba_train.model.plan import count_parameters
from moba_train.train.memory_plan import estimate_memory

GIB = 2**30
CPU_GROWTH = 1.4
"""Resident memory on a CPU, times the plan's total (measured: 1.3 to 1.4; freed memory stays with the process)."""
CLOCK_SKEW_S = 2.0
"""Clocks further apart than this make logs of several machines hard to read, and deadlines differ."""
CHECKPOINTS = 2
"""Checkpoints that the disk must have room for: the one before is deleted once the next is published."""


@dataclass(frozen=True)
class Failure:
    """One row of the table.

    Attributes:
        what: what is wrong, one short sentence.
        ranks: those that it was found on.
        place: machine, path or configuration key; may be "".
    """

    what: str
    ranks: tuple[int, ...]
    place: str
    found: str
    needed: str
    fix: str


@dataclass(frozen=True)
class Result:
    """One check.

    Attributes:
        seen: what was found, when all is well.
        not_checked: why it could not be looked at; "" = it was.
        notes: what is allowed, and worth knowing.
    """

    check: str
    seen: str
    failures: tuple[Failure, ...] = ()
    not_checked: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RankFacts:
    """One rank. Sizes are in bytes; None = the system does not say.

    Attributes:
        host: name of its machine.
        machine: tells machines apart also where names do not.
        versions: what must be the same on all ranks: packages, code, configuration.
        device_kind, device_name: "cpu", "cuda"; for people.
        num_devices: devices of this kind on the machine (CPU: 1).
        free_device: of the device's own memory; None on CPU.
        free_host: of the machine, or of the job's share of it.
        clock_s: seconds of the epoch, read when all ranks had met.
    """

    rank: int
    host: str
    machine: str
    versions: Mapping[str, str]
    device_kind: str
    device_name: str
    num_devices: int
    free_device: int | None
    free_host: int | None
    clock_s: float


@dataclass(frozen=True)
class Need:
    """Bytes that a run needs.

    Attributes:
        device: of each rank, in its device's memory; 0 on CPU.
        host: of each rank, in its machine's memory, on top of what the libraries have taken already.
        save: of each rank that writes the state of its replica, in host memory while it does.
        checkpoint: of one checkpoint on disk.
        stages: what the plan was made for.
    """

    device: float
    host: float
    save: float
    checkpoint: float
    stages: tuple[str, ...] = field(default=())


def needs_of(config: RunConfig, mesh: ParallelConfig, device_kind: str) -> Need:
    """What the stages that run on `mesh` (dp a number) need of a rank of device "cpu" or "cuda"."""
    degrees = (mesh.tp, mesh.cp, mesh.pp)
    asked = [(stage, parallel_of_stage(config.parallel, stage)) for stage in config.stages]
    stages = tuple(stage for stage, its in asked if (its.tp, its.cp, its.pp) == degrees) or config.stages
    engine = replace(config.engine, device="cpu" if device_kind == "cpu" else "cuda")
    here = replace(config, parallel=mesh, engine=engine, stages=stages)
    plan = estimate_memory(here)
    # Measured on checkpoints of both precisions: the weights, and fp32 weights and two moments of the optimizer.
    checkpoint = count_parameters(config.model) * ((2 if engine.precision == "bf16" else 4) + 12)
    on_cpu = device_kind == "cpu"
    return Need(
        device=0.0 if on_cpu else plan.total,
        host=plan.total - plan.libraries if on_cpu else plan.parked,
        save=checkpoint / (mesh.tp * mesh.pp),
        checkpoint=checkpoint,
        stages=tuple(stage.name for stage in stages),
    )


def num_ranks(mesh: ParallelConfig) -> int:
    """Of one data-parallel rank where dp = "auto"."""
    return mesh.tp * mesh.cp * mesh.pp * (1 if mesh.dp == "auto" else mesh.dp)


def check_versions(everyone: Sequence[RankFacts]) -> Result:
    """Packages, code and configuration are the same on all ranks."""
    failures = []
    for name in dict.fromkeys(name for facts in everyone for name in facts.versions):
        values = _by_value(everyone, lambda facts, name=name: facts.versions.get(name, "none"))  # type: ignore[misc]
        usual, having = max(values.items(), key=lambda item: len(item[1]))  # of several, the lowest rank's
        fix = {
            "configuration": "start every rank with the same CONFIG and the same options",
            "code": "install one and the same moba-train on every machine, or on a disk that they share",
        }.get(name, f"install {name} {usual} on every machine, or one environment on a disk that they share")
        failures += [
            Failure(f"{name} differs between ranks", ranks, "", value, f"{usual}, as {name_ranks(having)}", fix)
            for value, ranks in values.items()
            if value != usual
        ]
    versions = everyone[0].versions
    return Result("versions", ", ".join(f"{name} {value}" for name, value in versions.items()), tuple(failures))


def check_devices(everyone: Sequence[RankFacts]) -> Result:
    """All ranks compute on the same kind of device; unlike ones of a kind are worth a note."""
    kinds = _by_value(everyone, lambda facts: facts.device_kind)
    usual, having = max(kinds.items(), key=lambda item: len(item[1]))
    fix = 'set engine.device, and find out why the other machines have no CUDA ("nvidia-smi")'
    failures = tuple(
        Failure("the kind of device differs between ranks", ranks, "", kind, f"{usual}, as {name_ranks(having)}", fix)
        for kind, ranks in kinds.items()
        if kind != usual
    )
    notes = []
    for what, of_rank in (
        ("devices", lambda facts: facts.device_name),
        ("numbers of devices on a machine", lambda facts: str(facts.num_devices)),
    ):
        values = _by_value(everyone, of_rank)
        if len(values) > 1:
            told = "; ".join(f"{value} on {name_ranks(ranks)}" for value, ranks in values.items())
            notes.append(f"unlike {what}: {told}")
    machines = len({facts.machine for facts in everyone})
    names = ", ".join(_by_value(everyone, lambda facts: facts.device_name))
    return Result("devices", f"{len(everyone)} rank(s) on {machines} machine(s): {names}", failures, notes=tuple(notes))


def check_memory(everyone: Sequence[RankFacts], need: Need, savers: frozenset[int]) -> Result:
    """The plan fits into each device and, added up over the ranks of a machine, into each machine.

    Args:
        savers: ranks that write the state of their replica.
    """
    failures = _device_failures(everyone, need)
    notes, seen, unknown = [], [], False
    for _, of_machine in groupby(sorted(everyone, key=lambda facts: facts.machine), key=lambda facts: facts.machine):
        there = list(of_machine)
        ranks = tuple(facts.rank for facts in there)
        known = [facts.free_host for facts in there if facts.free_host is not None]
        if not known:
            unknown = True
            continue
        saved = need.save * len(savers.intersection(ranks))
        needed, free, host = need.host * len(ranks) + saved, min(known), f"machine {there[0].host}"
        told = f"{gib(needed)}: {len(ranks)} x {gib(need.host)}, {gib(saved)} for a save"
        seen.append(f"{gib(free)} free, {gib(needed)} planned on {host}")
        if needed > free:
            fix = "start fewer ranks on a machine, raise parallel.cp or parallel.tp, or close what else takes memory"
            failures.append(Failure("not enough memory for the plan", ranks, host, f"{gib(free)} free", told, fix))
        elif everyone[0].device_kind == "cpu" and CPU_GROWTH * need.host * len(ranks) + saved > free:
            notes.append(
                f"memory may run short on {host}: {gib(free)} free, {gib(needed)} planned, and ranks on a CPU take up "
                f"to {CPU_GROWTH} times their plan"
            )
    if need.device and not failures:
        least = min(facts.free_device or 0 for facts in everyone)
        seen.insert(0, f"{gib(least)} free, {gib(need.device)} planned on each device")
    return Result(
        "memory",
        "; ".join(seen[:3]) + (f"; and {len(seen) - 3} more" if len(seen) > 3 else ""),
        tuple(failures),
        not_checked="this system does not say how much is free" if unknown else "",
        notes=tuple(notes),
    )


def _device_failures(everyone: Sequence[RankFacts], need: Need) -> list[Failure]:
    fix = 'raise parallel.cp or parallel.tp, set engine.recompute = "full", or end what else uses the device'
    what = "not enough memory on the device for the plan"
    return [
        Failure(what, (f.rank,), f"machine {f.host}", f"{gib(f.free_device)} free", gib(need.device), fix)
        for f in everyone
        if f.free_device is not None and f.free_device < need.device
    ]


def check_disk(free: int, reclaimed: int, need: Need, folder: str) -> Result:
    """There is room for the next checkpoint, and, with what pruning gives back, for the one after it.

    Args:
        free: what interrupted saves have left there included.
        reclaimed: bytes of checkpoints that go once the next one is published.
    """
    needed = CHECKPOINTS * need.checkpoint
    failures = []
    if free < need.checkpoint or free + reclaimed < needed:
        back = f", {gib(reclaimed)} more after the next save" if reclaimed else ""
        failures.append(
            Failure(
                "not enough disk for checkpoints",
                (0,),
                folder,
                f"{gib(free)} free{back}",
                f"{gib(needed)}: {CHECKPOINTS} checkpoints of {gib(need.checkpoint)}",
                "make room (moba-train checkpoint prune), or choose a run.dir on another disk",
            )
        )
    return Result("disk", f"{gib(free)} free, a checkpoint takes {gib(need.checkpoint)}", tuple(failures))


def check_clocks(everyone: Sequence[RankFacts]) -> Result:
    """How far apart the clocks are, as read when all ranks had met; a note where that is much."""
    times = {facts.rank: facts.clock_s for facts in everyone}
    early, late = min(times, key=lambda rank: times[rank]), max(times, key=lambda rank: times[rank])
    apart_s = times[late] - times[early]
    notes: tuple[str, ...] = ()
    if apart_s > CLOCK_SKEW_S:
        notes = (f"the clock of rank {late} is {apart_s:.1f} s ahead of that of rank {early}: set the time (NTP)",)
    return Result("clocks", f"{apart_s:.2f} s apart", notes=notes)


def merged(failures: Iterable[Failure]) -> tuple[Failure, ...]:
    """What several ranks found alike, as one row."""
    ranks: dict[Failure, set[int]] = {}
    for failure in failures:
        ranks.setdefault(replace(failure, ranks=()), set()).update(failure.ranks)
    return tuple(replace(failure, ranks=tuple(sorted(found))) for failure, found in ranks.items())


def name_ranks(ranks: Sequence[int], world_size: int = 0) -> str:
    """ "rank 3", "ranks 0-3, 7"; "all ranks" where it is all `world_size` of several."""
    if 1 < world_size == len(ranks):
        return "all ranks"
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    told = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(told[:8])}{' and more' if len(told) > 8 else ''}"


def gib(size: float | None) -> str:
    """Bytes for people."""
    value = (size or 0) / GIB
    return f"{value:,.1f} GiB" if value >= 10 else f"{value:.2f} GiB" if value >= 0.1 else f"{1024 * value:.1f} MiB"


def _by_value(everyone: Sequence[RankFacts], of_rank: Callable[[RankFacts], str]) -> dict[str, tuple[int, ...]]:
    """Value -> the ranks that have it, the lowest rank's first."""
    found: dict[str, tuple[int, ...]] = {}
    for facts in everyone:
        value = of_rank(facts)
        found[value] = (*found.get(value, ()), facts.rank)
    return found
