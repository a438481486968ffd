"""Clocks. Contestants take turns, so that a slow moment of the machine falls on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from .contestants import OURS

CPU_REPEATS = 3
GPU_REPEATS = 10
GPU_SECONDS = 0.6
"""A GPU's clock hardly wavers: repeat while a contestant's runs stay below this, at most GPU_REPEATS times."""
LONG_S = 2.0
"""Beside a run of this length, what PyTorch's kernels need for setting up does not count."""


def seconds(action: Callable[[], object], device: str) -> float:
    """Of one run, the device's own time on a GPU."""
    if device != "cuda":
        begin = time.perf_counter()
        action()
        return time.perf_counter() - begin
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    action()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def take_turns(
    actions: Mapping[str, Callable[[], object]], device: str, repeats: int | None
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """(seconds of every run by name, reasons of those that failed). repeats None: see above.

    On a GPU, and wherever a run is short, the first one compiles and warms caches, and does not count.
    """
    timed: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    wanted: dict[str, int] = {}
    for name, action in actions.items():
        try:
            first = seconds(action, device)
            if device == "cuda" and (name == OURS or first < LONG_S):  # the first run compiled
                first = seconds(action, device)
        except (RuntimeError, MemoryError) as error:
            failed[name] = reason_of(error)
            continue
        timed[name] = [first] if device == "cuda" or first > 0.5 else []
        default = max(1, min(GPU_REPEATS, int(GPU_SECONDS / max(first, 1e-9)))) if device == "cuda" else CPU_REPEATS
        wanted[name] = repeats or default
    for _ in range(max(wanted.values(), default=0)):
        for name in timed:
            if len(timed[name]) < wanted[name]:
                timed[name].append(seconds(actions[name], device))
    return timed, failed


def reason_of(error: BaseException) -> str:
    """One line for the table."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        torch.cuda.empty_cache()
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
