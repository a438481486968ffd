"""Peak memory by component: what is held all the time, counted, and what each phase of a step needs on top, measured.

Measured is the resident memory of the process (on a GPU: what PyTorch has allocated): its value where a phase begins,
and the largest value before the next one begins. Linux keeps that value (VmHWM) and sets it back on demand, so that
nothing is missed that lives for an instant. All of it is per rank, in bytes:

    libraries    before the model is built: Python, PyTorch, Megatron                  measured (GPU: 0)
    weights, gradients, optimizer   their tensors                                      counted
    data         from the begin of the step to the first layer: tokens, rotations      measured, growth
    kept         from the first layer to the loss: what forward keeps for backward     measured, growth
    attention    a layer without its MLP, in its pass that needs most                  measured, peak less begin
    mlp          an MLP, likewise                                                      measured, peak less begin
    loss         the tiles of the loss                                                 measured, peak less begin
    reduce, step adding up gradients over ranks; the optimizer's step                  measured, peak less begin
    peak         the largest value of the run so far                                   measured

Under recompute a layer's backward counts from the begin of its second forward pass, in which its activations are made.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moba_train.engine.phases import Phase

GIB = 2.0**30
STATUS = "/proc/self/status"
COMPONENTS = (
    *("libraries", "weights", "gradients", "optimizer", "data", "kept"),
    *("attention", "mlp", "loss", "reduce", "step", "peak"),
)
_NAMES = {"gradients": "reduce", "optimizer": "step"}  # of phases that are not named like their part


@dataclass(frozen=True)
class Span:
    """One phase of a step: resident bytes where it began, and the most until the next one began."""

    phase: Phase
    begin: int
    peak: int


class MemoryMeter:
    """The memory of this rank. Between `begin_step` and `end_step` it is a listener of phases.

    Args:
        device: whose memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counted: set[int] = set()
        self._held: dict[str, int] = {}
        self._spans: list[Span] = []
        self._current: tuple[Phase, int] | None = None
        self._peak = 0
        self._sees_phases = _set_peak_back(device)
        self.hold_resident("libraries")

    def hold_resident(self, name: str) -> None:
        """Take what is resident now for a component that lives as long as the run."""
        self._held[name] = _resident(self._device)

    def hold(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Count tensors that live as long as the run; memory that is counted already does not count again."""
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        self._held[name] = sum(size for key, size in storages.items() if key not in self._counted)
        self._counted |= storages.keys()

    @property
    def peak(self) -> int:
        """The most bytes that were resident at once so far."""
        self._peak = max(self._peak, _peak(self._device))
        return self._peak

    def begin_step(self) -> None:
        """Begin to measure a step."""
        self._spans, self._current = [], None

    def __call__(self, phase: Phase) -> None:
        """A phase begins."""
        if self._current is not None:
            last = self._current[0]
            if (phase.part, phase.direction, phase.layer) == (last.part, last.direction, last.layer):
                return  # another tile
        self._close()
        self._current = phase, _resident(self._device)

    def end_step(self) -> dict[str, int]:
        """Bytes by component. Where the kernel does not set its largest value back, phases cannot be told apart."""
        self._close()
        of_phases = needs(self._spans) if self._sees_phases else {}
        return {**self._held, **of_phases, "peak": self.peak}

    def _close(self) -> None:
        """The current phase ends; the kernel's largest value begins anew."""
        peak = _peak(self._device)
        self._peak = max(self._peak, peak)
        if self._current is not None:
            phase, begin = self._current
            self._spans.append(Span(phase, begin, max(begin, peak)))
            self._current = None
        _set_peak_back(self._device)


def needs(spans: Sequence[Span]) -> dict[str, int]:
    """Bytes that the phases of one step needed, by component; see the module."""
    found: dict[str, int] = {}
    recompute_begin: dict[int, int] = {}
    for span in spans:
        phase, begin = span.phase, span.begin
        if phase.part == "data":
            continue
        if phase.part == "attention" and phase.direction == "recompute":
            recompute_begin[phase.layer] = begin
        if phase.part == "attention" and phase.direction == "backward":
            begin = recompute_begin.get(phase.layer, begin)
        name = _NAMES.get(phase.part, phase.part)
        found[name] = max(found.get(name, 0), span.peak - begin)
    forward = [i for i, span in enumerate(spans) if span.phase.direction == "forward" and span.phase.part != "loss"]
    if forward and spans[0].phase.part == "data":
        found["data"] = max(0, spans[forward[0]].begin - spans[0].begin)
        after = next((span for span in spans[forward[0] :] if _ends_forward(span.phase)), spans[-1])
        found["kept"] = max(0, after.begin - spans[forward[0]].begin)
    return found


def largest_gib(components: dict[str, int], device: torch.device) -> dict[str, float]:
    """This rank's bytes -> GiB of the rank that has most, and "peak_all_ranks", the sum of all peaks. Collective."""
    largest = torch.tensor([components.get(name, -1) / GIB for name in COMPONENTS], dtype=torch.float64, device=device)
    total = torch.tensor(components["peak"] / GIB, dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    dist.all_reduce(total)
    found = zip(COMPONENTS, largest.tolist(), strict=True)  # a pipeline rank may have no loss
    return {**{name: size for name, size in found if size >= 0}, "peak_all_ranks": float(total)}


def _ends_forward(phase: Phase) -> bool:
    return phase.part not in ("attention", "mlp") or phase.direction != "forward"


def release_unused(device: torch.device) -> None:
    """Give freed memory back: that of rows of one length lies in pieces which rows of another length cannot use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _resident(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status_bytes("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")


def _set_peak_back(device: torch.device) -> bool:
    """Begin a new largest value; False where that is not possible (not on Linux, or not allowed)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        with open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")
    except OSError:
        return False
    return True


def _status_bytes(key: str) -> int:
    """A line of /proc/self/status. A system without it tells the largest value so far, which stands in for both."""
    if os.path.exists(STATUS):
        with open(STATUS) as stream:
            found = [int(line.split()[1]) * 1024 for line in stream if line.startswith(key)]
        if found:
            return found[0]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


__all__ = ["COMPONENTS", "GIB", "MemoryMeter", "Span", "largest_gib", "needs", "release_unused"]
