"""How the ranks of an evaluation agree: rank 0 decides and writes, data-parallel ranks share the rows.

Every rank of a context-parallel (and tensor-parallel) group scores the same row and holds the same result;
data-parallel ranks score different rows. With one rank nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from moba_train.errors import UserError

if TYPE_CHECKING:
    from moba_train.parallel.topology import Topology

T = TypeVar("T")
R = TypeVar("R")


def from_rank0(decide: Callable[[], T], topology: Topology) -> T:
    """Call `decide` on rank 0 and return its value on every rank; a UserError of rank 0 is raised on every rank."""
    if topology.world_size == 1:
        return decide()
    import torch.distributed as dist

    answer: list[Any] = [None, None]
    if topology.rank == 0:
        try:
            answer[0] = decide()
        except UserError as error:
            answer[1] = error.message()
            dist.broadcast_object_list(answer, src=0, device=topology.device)
            raise
    dist.broadcast_object_list(answer, src=0, device=topology.device)
    if answer[1] is not None:
        raise UserError(answer[1])
    value: T = answer[0]
    return value


def map_over_ranks(work: Callable[[T], R], items: Sequence[T], topology: Topology) -> list[R]:
    """`[work(item) for item in items]`, each data-parallel rank taking every dp-th item; the same list on every rank.

    `work` may be collective over the context- and tensor-parallel group, whose ranks take the same items.
    """
    if topology.world_size == 1:
        return [work(item) for item in items]
    import torch.distributed as dist

    mine = [(i, work(items[i])) for i in range(topology.dp_rank, len(items), topology.dp)]
    everyone: list[Any] = [None] * topology.world_size
    dist.all_gather_object(everyone, mine)
    results: dict[int, R] = {}
    for part in everyone:
        for i, result in part:
            results.setdefault(i, result)
    return [results[i] for i in range(len(items))]
