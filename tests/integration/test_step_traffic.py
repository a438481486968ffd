"""The bytes of a training step are those that the plan of the stage predicted, and the log says what was chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moba_train.config.schema import HardwareConfig, ParallelConfig
from moba_train.engine.megatron import build_engine
from moba_train.parallel.hardware import Hardware
from moba_train.parallel.topology import close_topology
from tests.distributed import run_ranks
from tests.integration.engine_case import MIXED, RECOMPUTED, Case, one_thread, packed_row

EXACT: tuple[tuple[str, Case, dict[str, Any]], ...] = (
    ("all_gather", MIXED, {"cp": 4}),
    ("a2a, recompute", RECOMPUTED, {"cp": 4, "transport": "a2a"}),
    (
        "a2a+all_gather, nodes of two",
        MIXED,
        {"cp": 4, "transport": "a2a+all_gather", "hardware": HardwareConfig("cpu", 2)},
    ),
    ("pipeline", MIXED, {"cp": 2, "pp": 2, "transport": "all_gather"}),
    ("tensor parallel, full layers apart", MIXED, {"cp": 2, "tp": 2, "transport": "a2a", "transport_full": "pull"}),
)
EXPECTED: tuple[tuple[str, Case, dict[str, Any]], ...] = (
    ("pull", MIXED, {"cp": 4, "transport": "pull"}),
    ("route_queries", RECOMPUTED, {"cp": 4, "transport": "route_queries", "transport_full": "auto"}),
)


def steps(rank: int, n: int) -> dict[str, tuple[tuple[str, ...], dict[str, float | str]]]:
    """Name -> (what the log says, the comm numbers of a step of two rows)."""
    one_thread()
    found = {}
    for name, case, parallel in (*EXACT, *EXPECTED):
        close_topology(keep_process_group=True)
        rows = [packed_row(1), packed_row(2)]
        stages = tuple(replace(s, seq_len=61, tokens=610, tokens_per_step=122) for s in case.stages)
        engine = build_engine(case.model, stages, case.engine, case.optimizer, ParallelConfig(**parallel), seed=7)
        notes = engine.set_stage(0, documents=[row.cu_seqlens for row in rows])
        found[name] = (notes, engine.train_step(rows, lr=0.0).comm)
    return found


def test_a_step_moves_the_bytes_that_its_plan_predicted() -> None:
    of_ranks = run_ranks(steps, 4)
    assert all(of_rank == of_ranks[0] for of_rank in of_ranks)
    for name, _, parallel in EXACT:
        notes, comm = of_ranks[0][name]
        assert comm["received_bytes"] == comm["predicted_bytes"] > 0, name
        phases = sum(size for key, size in comm.items() if key.startswith("received_bytes/"))  # type: ignore[misc]
        assert phases >= comm["received_bytes"], name  # phases may have different busiest ranks
        assert f"MoBA layers {parallel.get('transport', 'all_gather')} (predicted" in notes[0], name
    assert "full layers pull (predicted" in of_ranks[0]["tensor parallel, full layers apart"][0][0]
    for name, _, _ in EXPECTED:  # a real gate's picks on a short row, against uniform ones
        _, comm = of_ranks[0][name]
        assert comm["received_bytes"] == pytest.approx(comm["predicted_bytes"], rel=0.05), name
        assert comm["transport_moba"] == name


def hardware(rank: int, n: int) -> Hardware:
    one_thread()
    close_topology(keep_process_group=True)
    parallel = ParallelConfig(cp=n, hardware=HardwareConfig("measured", cross_gb_s=3.0))
    engine = build_engine(MIXED.model, MIXED.stages, MIXED.engine, MIXED.optimizer, parallel, seed=7)
    return engine._hardware


def test_measured_numbers_are_the_same_on_every_rank() -> None:
    first, second = run_ranks(hardware, 2)
    assert first == second
    assert first.name == "measured (cpu) (adjusted)" and first.cross_bytes_s == 3e9
    assert min(first.node_bytes_s, first.latency_s, first.fp32_flops) > 0
