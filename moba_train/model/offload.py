"""Checkpoints of activation recompute wait in host memory: 32 layers at a million tokens would fill a GPU.

Under full recompute a layer keeps one tensor for its backward pass, the hidden states that went in. Each travels to
pinned host memory on a stream of its own while the next layer computes. On the way back the first layer to come waits
for its tensor, and every layer fetches that of the layer before it ahead of time, so that one tensor is under way while
one is in use.

Shape letters: S tokens that this rank holds, B rows (1), M hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Wait = Callable[[], Tensor]
"""Wait for a tensor that is under way, then return it."""


class Link(Protocol):
    """Where checkpoints wait, and how they get there and back."""

    def put(self, x: Tensor) -> Tensor:
        """Start to copy `x` away; returns the copy."""
        ...

    def fetch(self, parked: Tensor) -> Wait:
        """Start to bring a copy back."""
        ...


class CudaLink:
    """Pinned host memory, over one stream in both directions: a copy is complete before it is fetched.

    The host runs ahead of the device by many layers. So that memory follows the device all the same, the link's stream
    and that of the layers wait for each other: a copy back does not start before the layer that asks for it, and what
    was copied away is let go where the layers' stream has waited for the copy. All device memory then belongs to the
    layers' stream, which uses it again at once.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._leaving: tuple[Tensor, torch.cuda.Event] | None = None
        """What is being copied away, and the end of its copy."""

    def put(self, x: Tensor) -> Tensor:
        """Start to copy `x` to the host, once the work that makes it is done and the one before is there."""
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._let_go()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.copy_(x, non_blocking=True)
        self._leaving = x.detach(), self._stream.record_event()
        return host

    def fetch(self, parked: Tensor) -> Wait:
        """Start to copy back."""
        self._let_go()
        x = torch.empty(parked.shape, dtype=parked.dtype, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            x.copy_(parked, non_blocking=True)
        arrived = self._stream.record_event()

        def wait() -> Tensor:
            torch.cuda.current_stream(self._device).wait_event(arrived)
            return x

        return wait

    def _let_go(self) -> None:
        """Free what was copied away, as soon as its copy has ended."""
        if self._leaving is not None:
            torch.cuda.current_stream(self._device).wait_event(self._leaving[1])
            self._leaving = None


@dataclass
class _Slot:
    """One checkpoint: its place in the order of the layers, its copy, and the way back once that has begun."""

    index: int
    parked: Tensor
    coming: Wait | None = None


class _Shelf:
    """The checkpoints of one forward pass."""

    def __init__(self, link: Link, shape: tuple[int, ...]) -> None:
        self._link = link
        self._shape = shape
        self._slots: list[_Slot | None] = []

    def pack(self, x: Tensor) -> Any:
        if tuple(x.shape) != self._shape or isinstance(x, torch.nn.Parameter):
            return x
        slot = _Slot(len(self._slots), self._link.put(x))
        self._slots.append(slot)
        return slot

    def unpack(self, saved: Any) -> Tensor:
        if not isinstance(saved, _Slot):
            whole: Tensor = saved
            return whole
        coming = saved.coming or self._link.fetch(saved.parked)
        saved.coming = self._slots[saved.index] = None
        before = self._slots[saved.index - 1] if saved.index else None
        if before is not None and before.coming is None:
            before.coming = self._link.fetch(before.parked)
        return coming()


def checkpoints_through(link: Link, shape_SBM: tuple[int, int, int]) -> AbstractContextManager[Any]:
    """While open, tensors of this shape that autograd keeps for the backward pass wait at the other end of `link`."""
    shelf = _Shelf(link, shape_SBM)
    return saved_tensors_hooks(shelf.pack, shelf.unpack)


__all__ = ["CudaLink", "Link", "checkpoints_through"]
