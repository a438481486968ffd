"""Do all ranks mean the same step? Asked once a step, before its first exchange.

Ranks that disagree on a shape abort inside gloo or hang inside NCCL, and ranks that disagree on the data or the plan
train on nonsense without any error. So each rank turns what it is about to do into a few 64-bit digests; one small
all-gather over gloo and the host brings them together, and where they differ every rank raises the same error.

Shape letters: N ranks of the group, F facts.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from moba_train.errors import ConfigError

from . import collectives
from .differing import tell

Facts = Mapping[str, str]
"""Name -> value as a person would read it. The names, and so the number of digests, are the same on all ranks."""


def check_agreement(
    everywhere: Facts,
    in_replica: Facts,
    *,
    group: dist.ProcessGroup | None,
    replicas: Sequence[Sequence[int]],
    where: str = "the start of a step, before its first exchange",
) -> None:
    """ConfigError on every rank where ranks disagree; it names the ranks and the facts. Collective over `group`.

    Args:
        everywhere: what all ranks of the group must agree on.
        in_replica: what the ranks of each replica must agree on (their rows).
        group: over gloo; None or one rank agrees with itself.
        replicas: indices into the group, replica by replica.
        where: is checked.
    """
    if group is None or group.size() == 1:
        return
    facts = {**everywhere, **in_replica}
    mine = torch.tensor([digest(value) for value in facts.values()])
    table_NF = torch.empty(group.size() * len(facts), dtype=torch.int64)
    collectives.all_gather(table_NF, mine, group=group).wait()
    differing = differences(table_NF.view(group.size(), -1).numpy(), len(everywhere), replicas)
    if not differing:
        return
    values: list[dict[str, str]] = [{} for _ in range(group.size())]
    names = list(facts)
    dist.all_gather_object(values, {names[i]: facts[names[i]] for i, _ in differing}, group=group)
    raise ConfigError(
        "ranks disagree on what they are about to compute",
        where=where,
        got="; ".join(tell(names[i], ranks, values) for i, ranks in differing),
        allowed="the same on all ranks; rows, the same on all ranks that share them",
        fix="start all ranks with the same configuration, code and data files",
    )


def digest(value: str) -> int:
    """64 bits of the value, as a signed integer."""
    return int.from_bytes(hashlib.sha256(value.encode()).digest()[:8], "little", signed=True)


def checksum(array: NDArray[np.int64]) -> str:
    """Of a row's tokens: 8 hexadecimal digits, at a GB or so a second."""
    return f"{zlib.crc32(np.ascontiguousarray(array).tobytes()):08x}"


def differences(
    table_NF: NDArray[np.int64], num_everywhere: int, replicas: Sequence[Sequence[int]]
) -> list[tuple[int, tuple[int, ...]]]:
    """(fact, ranks among which it differs) for every fact that differs where it must not; the first
    `num_everywhere` facts concern all ranks, the others each replica."""
    found: list[tuple[int, tuple[int, ...]]] = []
    everyone = tuple(range(table_NF.shape[0]))
    for fact in range(table_NF.shape[1]):
        for ranks in (everyone,) if fact < num_everywhere else tuple(tuple(ranks) for ranks in replicas):
            if len(set(table_NF[list(ranks), fact].tolist())) > 1:
                found.append((fact, ranks))
    return found


__all__ = ["Facts", "check_agreement", "checksum", "differences", "digest"]
