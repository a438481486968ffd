"""Memory by component: arithmetic on spans, and a meter that sees what lives for an instant."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from moba_train.engine import memory
from moba_train.engine.memory import MemoryMeter, Span, needs, release_unused
from moba_train.engine.phases import Phase

MIB = 2**20


def layer(part: str, direction: str, number: int = 0) -> Phase:
    return Phase(part, direction, layer=number, of=2)  # type: ignore[arg-type]


def test_each_component_is_the_phase_that_needed_most() -> None:
    spans = [
        Span(Phase("data"), 100, 130),
        Span(layer("attention", "forward", 0), 120, 150),
        Span(layer("mlp", "forward", 0), 125, 127),
        Span(layer("attention", "forward", 1), 130, 140),
        Span(layer("mlp", "forward", 1), 135, 142),
        Span(Phase("loss", "forward", of=4), 141, 143),
        Span(Phase("loss", "backward", of=4), 141, 150),
        Span(layer("attention", "recompute", 1), 141, 161),
        Span(layer("mlp", "backward", 1), 160, 164),
        Span(layer("attention", "backward", 1), 158, 190),
        Span(Phase("gradients"), 120, 120),
        Span(Phase("optimizer"), 120, 121),
    ]
    assert needs(spans) == {
        "data": 20,
        "kept": 21,
        "attention": 49,  # 190 less the 141 before the layer's second forward pass
        "mlp": 7,
        "loss": 9,
        "reduce": 0,
        "step": 1,
    }


def test_without_recompute_a_backward_phase_counts_from_its_own_begin() -> None:
    spans = [
        Span(Phase("data"), 0, 0),
        Span(layer("attention", "forward"), 0, 50),
        Span(Phase("loss", "forward"), 50, 60),
        Span(layer("attention", "backward"), 50, 90),
    ]
    assert needs(spans)["attention"] == 50 and needs(spans)["kept"] == 50


def test_a_pipeline_rank_without_the_loss_keeps_until_its_backward_begins() -> None:
    spans = [
        Span(Phase("data"), 0, 0),
        Span(layer("attention", "forward"), 10, 50),
        Span(layer("attention", "backward"), 40, 90),
    ]
    assert needs(spans)["kept"] == 30 and "loss" not in needs(spans)


def use_for_an_instant(size: int) -> None:
    """Memory from the kernel and back to it: an allocator may have some of earlier tests, and may keep this."""
    with mmap.mmap(-1, size) as memory:
        for page in range(0, size, mmap.PAGESIZE):
            memory[page] = 1


def test_memory_that_lived_for_an_instant_is_seen_in_its_phase_and_in_no_other() -> None:
    meter = MemoryMeter(torch.device("cpu"))
    meter.hold("weights", [torch.zeros(MIB)])
    meter.begin_step()
    meter(Phase("data"))
    meter(layer("attention", "forward"))
    use_for_an_instant(256 * MIB)
    meter(layer("mlp", "forward"))
    use_for_an_instant(64 * MIB)
    meter(Phase("loss", "forward"))
    meter(Phase("loss", "forward", tile=1))
    found = meter.end_step()
    assert 255 * MIB <= found["attention"] < 280 * MIB
    assert 63 * MIB <= found["mlp"] < 80 * MIB
    assert found["loss"] < 16 * MIB and found["kept"] < 16 * MIB
    assert found["peak"] >= found["libraries"] + 255 * MIB
    assert meter.peak == found["peak"]


@pytest.mark.parametrize("status", [None, "VmSize: 10 kB\n"], ids=["no status file", "a status file without it"])
def test_a_system_that_does_not_tell_the_memory_in_use_tells_its_peak(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: str | None
) -> None:
    if status is not None:
        (tmp_path / "status").write_text(status)
    monkeypatch.setattr(memory, "STATUS", str(tmp_path / "status"))
    meter = MemoryMeter(torch.device("cpu"))
    assert meter.end_step()["libraries"] == meter.peak > 100 * MIB


def test_tensors_that_share_memory_count_once() -> None:
    meter = MemoryMeter(torch.device("cpu"))
    buffer = torch.zeros(1000)
    meter.hold("weights", [buffer[:500], buffer[500:]])
    meter.hold("optimizer", [buffer[:10], torch.zeros(7)])
    found = meter.end_step()
    assert (found["weights"], found["optimizer"]) == (4000, 28)


def test_memory_that_was_freed_in_pieces_goes_back() -> None:
    device = torch.device("cpu")
    pieces = [torch.ones(16 * 1024) for _ in range(4096)]  # 64 KiB each, 256 MiB: too small to be mapped one by one
    del pieces[::2], pieces[-1]
    before = MemoryMeter(device)
    release_unused(device)
    after = MemoryMeter(device)
    assert before.end_step()["libraries"] - after.end_step()["libraries"] > 64 * MIB
    assert len(pieces) == 2047
