"""The collectives of context parallelism, by one name each over the versions of torch that we support.

torch 2.13 calls two of them `all_gather_single` and `reduce_scatter_single` and warns at the older names. All are
started and return at once; tensors are contiguous. A `ThreadGroup` has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from .emulation import ThreadGroup


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> Any: ...


class _Done:
    """A collective of threads has ended when it returns."""

    def wait(self) -> None:
        return None


def all_gather(received: Tensor, sent: Tensor, *, group: Any) -> Work:
    """Start to fill `received` [N * n, ...] with every rank's `sent` [n, ...], in rank order. Wait before reading."""
    if isinstance(group, ThreadGroup):
        group.all_gather(received, sent)
        return _Done()
    if hasattr(dist, "all_gather_single"):
        return dist.all_gather_single(received, sent, group=group, async_op=True)  # type: ignore[no-any-return]
    return dist.all_gather_into_tensor(received, sent, group=group, async_op=True)  # type: ignore[no-any-return]


def reduce_scatter(received: Tensor, sent: Tensor, *, group: Any) -> Work:
    """Start to fill `received` [n, ...] with part `rank` of the sum over ranks of `sent` [N * n, ...]."""
    if isinstance(group, ThreadGroup):
        group.reduce_scatter(received, sent)
        return _Done()
    if hasattr(dist, "reduce_scatter_single"):
        return dist.reduce_scatter_single(received, sent, group=group, async_op=True)  # type: ignore[no-any-return]
    return dist.reduce_scatter_tensor(received, sent, group=group, async_op=True)  # type: ignore[no-any-return]


def all_reduce(x: Tensor, *, group: Any) -> Work:
    """Start to sum `x` over ranks, in place."""
    if isinstance(group, ThreadGroup):
        group.all_reduce(x)
        return _Done()
    return dist.all_reduce(x, group=group, async_op=True)  # type: ignore[no-any-return]


def all_to_all(
    received: Tensor, sent: Tensor, received_rows: Sequence[int], sent_rows: Sequence[int], *, group: Any
) -> Work:
    """Start to send `sent_rows[r]` rows of `sent` to each rank r and to fill `received` with what the ranks send."""
    if isinstance(group, ThreadGroup):
        group.all_to_all(received, sent, received_rows, sent_rows)
        return _Done()
    return dist.all_to_all_single(  # type: ignore[no-any-return]
        received, sent, list(received_rows), list(sent_rows), group=group, async_op=True
    )
