"""Does a collective of every process group work: among the ranks that it should join, rightly, in time?"""

from __future__ import annotations

import time
from dataclasses import fields
from itertools import product

import torch
import torch.distributed as dist

from moba_train.errors import ExchangeError
from moba_train.parallel.topology import Topology
from moba_train.train.preflight_rules import Failure, name_ranks

LIMIT_S = 120.0
"""What a collective may take: the first of NCCL builds its connections, which takes a minute on thousands of ranks."""
_FIX = "look at the network between these ranks' machines (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO)"
_AXES = {
    "tp_group": ("tp",),
    "cp_group": ("cp",),
    "pp_group": ("pp",),
    "dp_group": ("dp",),
    "dp_cp_group": ("dp", "cp"),
    "control_group": ("tp", "cp", "dp", "pp"),
    "replica_group": ("tp", "cp", "pp"),
    "save_group": ("tp", "cp", "dp", "pp"),
    "start_group": ("tp", "cp", "dp", "pp"),
}
"""Field of `Topology` -> the axes of the mesh along which its ranks differ."""
_ON_HOST = ("control_group", "replica_group", "save_group", "start_group")


def group_names(topology: Topology) -> tuple[str, ...]:
    """The fields of `topology` that are process groups."""
    return tuple(field.name for field in fields(topology) if field.name.endswith("_group"))


def check_groups(topology: Topology, *, limit_s: float = LIMIT_S) -> tuple[tuple[Failure, ...], float]:
    """Add up numbers over every group of this rank: (wrong results, seconds of the slowest). Collective.

    Raises:
        ExchangeError: a group has not come together within `limit_s`, or broke off.
    """
    failures, slowest_s = [], 0.0
    for field in group_names(topology):
        name = field.removesuffix("_group")
        members = ranks_along(topology, _AXES[field])
        with topology.watch.during(f"preflight, a collective of the {name} group ({name_ranks(members)})"):
            started_s = time.perf_counter()
            found = _sum_over(topology, field, limit_s)
            slowest_s = max(slowest_s, time.perf_counter() - started_s)
        expected = [sum(values) for values in zip(*(_numbers(rank) for rank in members), strict=True)]
        if found != expected:
            failures.append(
                Failure(
                    f"the {name} group gives a wrong result",
                    (topology.rank,),
                    "",
                    f"{found[0]:.0f} ranks with the sum {found[1]:.0f}",
                    f"{len(members)}, {name_ranks(members)}, with the sum {expected[1]:.0f}",
                    _FIX,
                )
            )
    return tuple(failures), slowest_s


def ranks_along(topology: Topology, axes: tuple[str, ...]) -> tuple[int, ...]:
    """The ranks that differ from this one only along `axes`, by the numbering of the mesh (tp fastest, pp slowest)."""
    order = ("pp", "dp", "cp", "tp")
    mine = {name: getattr(topology, f"{name}_rank") for name in order}
    everyone = product(*(range(getattr(topology, name)) for name in order))
    return tuple(
        rank
        for rank, place in enumerate(everyone)
        if all(name in axes or mine[name] == at for name, at in zip(order, place, strict=True))
    )


def _numbers(rank: int) -> tuple[float, float, float]:
    """Sums of these tell groups apart: how many ranks, which, and which in another way. Exact in fp64."""
    return 1.0, float(rank), float(rank * rank)


def _sum_over(topology: Topology, field: str, limit_s: float) -> list[float]:
    device = torch.device("cpu") if field in _ON_HOST else topology.device
    numbers = torch.tensor(_numbers(topology.rank), dtype=torch.float64, device=device)
    work = dist.all_reduce(numbers, group=getattr(topology, field), async_op=True)
    deadline_s = time.monotonic() + limit_s
    while not work.is_completed():
        if time.monotonic() > deadline_s:
            name = field.removesuffix("_group")
            raise ExchangeError(
                f"preflight: a collective of the {name} group has not come to an end in {limit_s:.0f} s"
            )
        time.sleep(0.0005)
    work.wait()
    return [float(value) for value in numbers.tolist()]
