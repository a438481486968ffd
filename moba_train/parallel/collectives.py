"""The two collectives of context parallelism, by one name each over the versions of torch that we support.

torch 2.13 calls them `all_gather_single` and `reduce_scatter_single` and warns at the older names.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def all_gather(received: Tensor, sent: Tensor, *, group: dist.ProcessGroup) -> dist.Work:
    """Start to fill `received` [N * n, ...] with every rank's `sent` [n, ...], in rank order. Wait before reading."""
    if hasattr(dist, "all_gather_single"):
        return dist.all_gather_single(received, sent, group=group, async_op=True)  # type: ignore[no-any-return]
    return dist.all_gather_into_tensor(received, sent, group=group, async_op=True)  # type: ignore[no-any-return]


def reduce_scatter(received: Tensor, sent: Tensor, *, group: dist.ProcessGroup) -> dist.Work:
    """Start to fill `received` [n, ...] with part `rank` of the sum over ranks of `sent` [N * n, ...]."""
    if hasattr(dist, "reduce_scatter_single"):
        return dist.reduce_scatter_single(received, sent, group=group, async_op=True)  # type: ignore[no-any-return]
    return dist.reduce_scatter_tensor(received, sent, group=group, async_op=True)  # type: ignore[no-any-return]
