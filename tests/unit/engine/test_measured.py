"""What a checkpoint says of the machine that was measured counts where it says all of it, for the same settings."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from moba_train.config.schema import HardwareConfig
from moba_train.engine.measured import KEY, hardware_of_state, measured_state
from moba_train.parallel.hardware import PRESETS

MESH: Any = SimpleNamespace(tp=1, cp=2, pp=1, dp=1)
CONFIG = HardwareConfig("measured")
THEN, NOW = replace(PRESETS["cpu"], latency_s=0.5), PRESETS["cpu"]


def test_what_was_measured_then_counts_now() -> None:
    found = hardware_of_state(measured_state(THEN, CONFIG, MESH), NOW, CONFIG, MESH)
    assert found == replace(THEN, name="cpu, as the checkpoint has it")


@pytest.mark.parametrize("number", ["pick_pairs", "latency_s"])
def test_a_checkpoint_that_does_not_know_a_number_does_not_count(number: str) -> None:
    """As one does that an older release wrote."""
    state = measured_state(THEN, CONFIG, MESH)
    del state[KEY]["numbers"][number]
    assert hardware_of_state(state, NOW, CONFIG, MESH) is NOW
    assert hardware_of_state({}, NOW, CONFIG, MESH) is NOW


def test_other_settings_and_another_mesh_measure_anew() -> None:
    state = measured_state(THEN, CONFIG, MESH)
    assert hardware_of_state(state, NOW, replace(CONFIG, cross_gb_s=3.0), MESH) is NOW
    assert hardware_of_state(state, NOW, CONFIG, SimpleNamespace(tp=1, cp=4, pp=1, dp=1)) is NOW  # type: ignore[arg-type]
