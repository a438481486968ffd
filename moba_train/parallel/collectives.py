"""The collectives of context parallelism, by one name each over the versions of torch that we support.

torch 2.13 calls two of them `all_gather_single` and `reduce_scatter_single` and warns at the older names. All are
started and return at once; tensors are contiguous. A `ThreadGroup` has its own.

    NCCL    a collective waits for the current stream, then runs on a stream of its own; `wait` makes the current stream
            wait for it, the host goes on
    gloo    on CPU the host waits. gloo has no all-to-all and no reduce-scatter of CUDA tensors: what ranks that share a
            GPU exchange (in tests) travels through pinned host memory, `stage`; that start waits for the device

Shape letters: N ranks, n elements or rows of a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .emulation import ThreadGroup
from .process_groups import forget_groups_among, group_among


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> Any: ...


class _Done:
    """A collective of threads has ended when it returns."""

    def wait(self) -> None:
        return None


@dataclass(frozen=True)
class Staged:
    """A collective over host copies; `wait` also copies what has arrived to the device, in the current stream."""

    work: Work
    leaving: Tensor
    arriving: Tensor
    received: Tensor

    def wait(self) -> None:
        self.work.wait()
        self.received.copy_(self.arriving, non_blocking=True)  # the allocator keeps pinned memory until it is copied


def among(group: Any, ranks: tuple[int, ...]) -> Any:
    """The ranks `ranks` of `group` as a group of their own. Collective over them, the first time."""
    return group.among(ranks) if isinstance(group, ThreadGroup) else group_among(group, ranks)


def forget_among(group: Any) -> None:
    """`among` makes groups of `group` anew. All ranks must call, or none."""
    if not isinstance(group, ThreadGroup):
        forget_groups_among(group)


def all_gather(received: Tensor, sent: Tensor, *, group: Any, stage: bool = False) -> Work:
    """Start to fill `received` [N * n, ...] with every rank's `sent` [n, ...], in rank order. Wait before reading."""
    if isinstance(group, ThreadGroup):
        group.all_gather(received, sent)
        return _Done()
    start = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return _started(lambda to, of: start(to, of, group=group, async_op=True), received, sent, group, stage)


def reduce_scatter(received: Tensor, sent: Tensor, *, group: Any, stage: bool = False) -> Work:
    """Start to fill `received` [n, ...] with part `rank` of the sum over ranks of `sent` [N * n, ...]."""
    if isinstance(group, ThreadGroup):
        group.reduce_scatter(received, sent)
        return _Done()
    start = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return _started(lambda to, of: start(to, of, group=group, async_op=True), received, sent, group, stage)


def all_reduce(x: Tensor, *, group: Any, stage: bool = False) -> Work:
    """Start to sum `x` over ranks, in place."""
    if isinstance(group, ThreadGroup):
        group.all_reduce(x)
        return _Done()

    def start(to: Tensor, of: Tensor) -> Any:
        if to is not of:
            to.copy_(of)
        return dist.all_reduce(to, group=group, async_op=True)

    return _started(start, x, x, group, stage)


def all_to_all(
    received: Tensor,
    sent: Tensor,
    received_rows: Sequence[int],
    sent_rows: Sequence[int],
    *,
    group: Any,
    stage: bool = False,
) -> Work:
    """Start to send `sent_rows[r]` rows of `sent` to each rank r and to fill `received` with what the ranks send."""
    if isinstance(group, ThreadGroup):
        group.all_to_all(received, sent, received_rows, sent_rows)
        return _Done()

    def start(to: Tensor, of: Tensor) -> Any:
        return dist.all_to_all_single(to, of, list(received_rows), list(sent_rows), group=group, async_op=True)

    return _started(start, received, sent, group, stage)


def _started(start: Callable[[Tensor, Tensor], Any], received: Tensor, sent: Tensor, group: Any, stage: bool) -> Work:
    """start(received, sent), over host copies where gloo would meet CUDA tensors, or where `stage` asks for it."""
    if not stage and not (sent.is_cuda and dist.get_backend(group) == "gloo"):
        return start(received, sent)  # type: ignore[no-any-return]
    leaving = _host_tensor(sent)
    leaving.copy_(sent)
    arriving = _host_tensor(received)
    return Staged(start(arriving, leaving), leaving, arriving, received)


def _host_tensor(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)


__all__ = ["Staged", "Work", "all_gather", "all_reduce", "all_to_all", "among", "reduce_scatter"]
