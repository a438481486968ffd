"""What a run measured of its machine, kept in its checkpoints.

A second measurement gives other numbers, and with them perhaps other transports, whose sums round otherwise: a resumed
run would no longer be bit-equal. So a run goes on with the numbers that it began with, as long as mesh and settings are
the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from moba_train.config.schema import HardwareConfig
from moba_train.parallel.hardware import Hardware
from moba_train.parallel.topology import Topology

KEY = "measured_hardware"


def measured_state(hardware: Hardware, config: HardwareConfig, mesh: Topology) -> dict[str, Any]:
    """The entry of a state dict, plain values under `KEY`; {} where nothing was measured."""
    if config.preset != "measured" or mesh.cp == 1:
        return {}
    numbers = {name: value for name, value in asdict(hardware).items() if name != "name"}
    return {KEY: {"of": _measured_for(config, mesh), "numbers": numbers}}


def hardware_of_state(state: Mapping[str, Any], hardware: Hardware, config: HardwareConfig, mesh: Topology) -> Hardware:
    """The hardware that a loaded state was measured on; `hardware`, what was found now, where it says nothing about
    this mesh and these settings."""
    saved = state.get(KEY)
    now = measured_state(hardware, config, mesh).get(KEY)
    if saved is None or now is None or saved["of"] != now["of"] or saved["numbers"].keys() != now["numbers"].keys():
        return hardware
    return Hardware(name=f"{hardware.name}, as the checkpoint has it", **saved["numbers"])


def _measured_for(config: HardwareConfig, mesh: Topology) -> dict[str, Any]:
    return {"mesh": [mesh.tp, mesh.cp, mesh.pp, mesh.dp], "settings": asdict(config)}


__all__ = ["KEY", "hardware_of_state", "measured_state"]
