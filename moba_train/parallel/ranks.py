"""Small agreements between all ranks: who saw an error, what rank 0 decided, who does which share of the work.

Every function is collective over the default process group; without one it is the identity of a single rank. Those that
take a `group` are collective over it instead: a group of all ranks, for a thread beside the one that trains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from moba_train.errors import UserError

if TYPE_CHECKING:
    from moba_train.parallel.topology import Topology  # brings Megatron, which takes a second to import

T = TypeVar("T")
R = TypeVar("R")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_all(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The value of every rank, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def from_rank_0(compute: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `compute` on rank 0 alone and hand its result, or its exception, to every rank."""
    box: list[tuple[T | None, Exception | None]] = [(None, None)]
    if rank() == 0:
        try:
            box[0] = (compute(), None)
        except Exception as error:  # re-raised below, on every rank: a lone failure would leave the others waiting
            box[0] = (None, _portable(error))
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0, group=group)
    value, failure = box[0]
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]


def on_all_ranks(compute: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `compute` on every rank; if it fails anywhere, raise the lowest failing rank's exception everywhere."""
    value: T | None = None
    failure: Exception | None = None
    try:
        value = compute()
    except Exception as error:  # re-raised below, on every rank: a lone failure would leave the others waiting
        failure = _portable(error)
    for error_of_rank in gather_all(failure, group):
        if error_of_rank is not None:
            raise error_of_rank
    return value  # type: ignore[return-value]


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Sum each value over all ranks, in fp64 (integers up to 2**53 stay exact)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return [float(value) for value in total.tolist()]


def map_over_ranks(work: Callable[[T], R], items: Sequence[T], topology: Topology) -> list[R]:
    """`[work(item) for item in items]`, each data-parallel rank taking every dp-th item; the same list on every rank.

    `work` may be collective over all ranks (an evaluation is, where weights are sharded over them), each with its own
    item: in the last round, ranks for which no item is left repeat the last one.
    """
    rounded_up = -(-len(items) // topology.dp) * topology.dp
    mine = [(i, work(items[min(i, len(items) - 1)])) for i in range(topology.dp_rank, rounded_up, topology.dp)]
    results = {i: result for part in reversed(gather_all(mine)) for i, result in part}  # the lowest rank's counts
    return [results[i] for i in range(len(items))]


def _portable(error: Exception) -> Exception:
    """The error itself if it certainly survives pickling, else its text."""
    if dist.is_initialized() and dist.get_world_size() > 1 and not isinstance(error, (UserError, OSError)):
        return RuntimeError(f"{type(error).__name__} on rank {dist.get_rank()}: {error}")
    return error
