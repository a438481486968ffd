"""In which order the streams of an offload wait for each other; the copies themselves are tested on a GPU."""

from __future__ import annotations

import weakref
from contextlib import nullcontext

import pytest
import torch

from moba_train.model.offload import CudaLink


class Stream:
    """Stands in for a CUDA stream: copies happen at once, waits are written down."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.copies = name, log, 0

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.copies += 1
        return f"copy {self.copies}"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    layers, empty = Stream("layers", found), torch.empty
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("link", found))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: layers)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    return found


def said(log: list[str]) -> list[str]:
    """What was said since the last time."""
    lines = list(log)
    log.clear()
    return lines


def test_memory_follows_the_device_however_far_the_host_is_ahead(log: list[str]) -> None:
    link = CudaLink(torch.device("cpu"))
    parked = [link.put(torch.arange(3.0))]
    assert said(log) == ["link waits for layers"]
    assert link._leaving is not None
    leaving = weakref.ref(link._leaving[0])
    assert leaving() is not None  # nothing else may use its memory while it is copied
    parked.append(link.put(torch.arange(3.0, 6.0)))
    assert leaving() is None
    assert said(log) == ["layers waits for copy 1", "link waits for layers"]
    last = link.fetch(parked[1])
    before = link.fetch(parked[0])
    assert said(log) == ["layers waits for copy 2", "link waits for layers", "link waits for layers"]
    assert last().tolist() == [3.0, 4.0, 5.0] and before().tolist() == [0.0, 1.0, 2.0]
    assert said(log) == ["layers waits for copy 3", "layers waits for copy 4"]
