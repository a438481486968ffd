"""Transports that no call could serve are refused before anything starts, with the same rules as at the call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moba_kernels.spec import Full, MoBA
from moba_train.config.load import decode_toml
from moba_train.config.schema import HardwareConfig, ModelConfig, ParallelConfig
from moba_train.config.transports import transport_errors
from moba_train.errors import ConfigError, ConfigErrors
from moba_train.parallel.rules import TRANSPORT_NAMES, refusals

MODEL = ModelConfig(num_heads=8, num_kv_heads=2)


def wheres(model: ModelConfig, **parallel: Any) -> list[str]:
    return [error.where for error in transport_errors(model, ParallelConfig(**parallel))]


def test_every_transport_may_be_named() -> None:
    for name in ("auto", *TRANSPORT_NAMES):
        assert wheres(MODEL, cp=4, transport=name, transport_full="auto") == []


def test_a_hybrid_that_routes_queries_must_say_what_its_full_layers_do() -> None:
    (error,) = transport_errors(MODEL, ParallelConfig(cp=4, transport="route_queries"))
    assert error.where == "parallel.transport_full"
    assert "full attention, which picks no chunk" in str(error) and 'transport_full = "auto"' in error.fix
    assert wheres(MODEL, cp=4, transport="route_queries", transport_full="pull") == []
    assert wheres(MODEL, cp=1, transport="route_queries") == []  # nothing is moved


@pytest.mark.parametrize("tp", [1, 2])
def test_a2a_is_refused_for_the_same_heads_as_at_the_call(tp: int) -> None:
    for num_heads, num_kv_heads in ((8, 2), (12, 6), (24, 4), (6, 2), (4, 4)):
        model = replace(MODEL, num_heads=num_heads, num_kv_heads=num_kv_heads)
        heads = {"num_heads": num_heads // tp, "num_kv_heads": num_kv_heads // tp}
        for cp in (2, 3, 4, 6, 8):
            at_call = bool(refusals("a2a", MoBA(4, 2), num_ranks=cp, **heads))
            assert at_call == bool(refusals("a2a", Full(), num_ranks=cp, **heads))
            assert bool(wheres(model, tp=tp, cp=cp, transport="a2a")) == at_call, (num_heads, num_kv_heads, cp)
    assert wheres(MODEL, cp=3, transport="auto", transport_full="a2a") == ["parallel.transport_full"]


def test_numbers_of_the_hardware_must_be_possible() -> None:
    bad = HardwareConfig(node_ranks=0, node_gb_s=0.0, latency_us=-1.0, attention_tflops=-2.0)
    names = [f"parallel.hardware.{name}" for name in ("node_ranks", "node_gb_s", "latency_us", "attention_tflops")]
    assert wheres(MODEL, hardware=bad) == names
    assert wheres(MODEL, hardware=HardwareConfig(latency_us=0.0, host_read_us=0.0, cross_gb_s=12)) == []


def test_the_table_of_the_hardware_is_read_and_mistakes_in_it_are_named() -> None:
    text = '[parallel]\ncp = 2\n[parallel.hardware]\npreset = "h200"\ncross_gb_s = 25\nnode_gb_s = "preset"\n'
    try:
        decode_toml(text)
    except (ConfigError, ConfigErrors) as error:  # other parts of the file are missing, this one is fine
        assert "parallel" not in str(error)
    with pytest.raises((ConfigError, ConfigErrors), match="did you mean"):
        decode_toml('[parallel.hardware]\npreset = "h300"\n')
