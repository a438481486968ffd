"""The bytes of a training step are those that the plan of the stage predicted, and the log says what was chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from moba_train.config.schema import HardwareConfig, ParallelConfig
from moba_train.engine import gpt_engine
from moba_train.engine.base import StepResult
from moba_train.engine.measured import KEY
from moba_train.engine.megatron import MegatronEngine, build_engine
from moba_train.parallel.hardware import PRESETS, Hardware
from moba_train.parallel.topology import close_topology
from moba_train.train.megatron_io import load_sharded, save_sharded
from tests.distributed import run_ranks
from tests.integration.engine_case import (
    MIXED,
    RECOMPUTED,
    Case,
    gradients,
    one_thread,
    packed_row,
    relative_l2,
)

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


class Step(NamedTuple):
    """What a step of two rows did, and what the log said of its stage."""

    notes: tuple[str, ...]
    result: StepResult
    gradients: dict[str, np.ndarray]


def step_of(case: Case, parallel: dict[str, Any]) -> Step:
    one_thread()
    close_topology(keep_process_group=True)
    rows = [packed_row(1), packed_row(2)]
    stages = tuple(replace(s, seq_len=61, tokens=610, tokens_per_step=122) for s in case.stages)
    engine = build_engine(case.model, stages, case.engine, case.optimizer, ParallelConfig(**parallel), seed=7)
    notes = engine.set_stage(0, documents=[row.cu_seqlens for row in rows])
    result = engine.train_step(rows, lr=0.0)
    return Step(notes, result, gradients(engine))


def steps(rank: int, n: int) -> dict[str, Step]:
    return {name: step_of(case, parallel) for name, case, parallel in (*EXACT, *EXPECTED)}


@pytest.fixture(scope="module")
def of_ranks() -> list[dict[str, Step]]:
    return run_ranks(steps, 4)


def test_a_step_moves_the_bytes_that_its_plan_predicted(of_ranks: list[dict[str, Step]]) -> None:
    for name, _, parallel in EXACT:
        notes, comm = of_ranks[0][name].notes, of_ranks[0][name].result.comm
        assert all((of_rank[name].notes, of_rank[name].result.comm) == (notes, comm) for of_rank in of_ranks), name
        (waited_s,) = {of_rank[name].result.waited_s for of_rank in of_ranks}  # of the one that waited longest
        assert waited_s is not None and 0 < waited_s < 60, name
        assert comm["received_bytes"] == comm["predicted_bytes"] > 0, name
        phases = sum(size for key, size in comm.items() if key.startswith("received_bytes/"))  # type: ignore[misc]
        assert phases >= comm["received_bytes"], name  # phases may have different busiest ranks
        assert f"MoBA layers {parallel.get('transport', 'all_gather')} (predicted" in notes[0], name
    assert "full layers pull (predicted" in of_ranks[0]["tensor parallel, full layers apart"].notes[0]
    for name, _, _ in EXPECTED:  # a real gate's picks on a short row, against uniform ones
        comm = of_ranks[0][name].result.comm
        assert comm["received_bytes"] == pytest.approx(comm["predicted_bytes"], rel=0.05), name
        assert comm["transport_moba"] == name


def test_under_every_transport_the_model_takes_the_step_of_one_rank(of_ranks: list[dict[str, Step]]) -> None:
    compared = 0
    for case in (MIXED, RECOMPUTED):
        expected = step_of(case, {})
        for name in (name for name, other, _ in (*EXACT, *EXPECTED) if other is case):
            for of_rank in of_ranks:
                found = of_rank[name]
                assert found.result.loss == pytest.approx(expected.result.loss, rel=1e-6), name
                assert found.result.grad_norm == pytest.approx(expected.result.grad_norm, rel=1e-5), name
                if found.gradients.keys() != expected.gradients.keys() or "tensor" in name:
                    continue  # a rank that holds a part of the model
                for parameter, gradient in expected.gradients.items():
                    assert relative_l2(found.gradients[parameter], gradient) < 1e-5, (name, parameter)
                    compared += 1
    assert compared > 4 * 5 * 10  # ranks, transports, parameters


PARALLEL = ParallelConfig(cp=2, hardware=HardwareConfig("measured", cross_gb_s=3.0))
SHORT = (tuple(range(0, 65, 8)),)  # documents of a row, of which pull moves next to nothing
SLOW_LINKS = replace(PRESETS["cpu"], node_bytes_s=1e6)
SLOW_RANKS = replace(PRESETS["cpu"], fp32_flops=1.0)  # then no exchange counts, and the simplest transport is taken


def measuring(found: Hardware | None, parallel: ParallelConfig = PARALLEL) -> MegatronEngine:
    """An engine whose measurement gives `found`; None = what it really gives."""
    close_topology(keep_process_group=True)
    with pytest.MonkeyPatch.context() as patch:
        if found is not None:
            patch.setattr(gpt_engine, "hardware_of_run", lambda *_: found)
        return build_engine(MIXED.model, MIXED.stages, MIXED.engine, MIXED.optimizer, parallel, seed=7)


def measured(rank: int, n: int, folder: Path) -> tuple[Hardware, dict[str, tuple[str, ...]]]:
    """What is measured, and what the log says of the transports: at first, after a resume, with other settings."""
    one_thread()
    really = measuring(None)._hardware
    first = measuring(SLOW_LINKS)
    said = {"first": first.set_stage(0, documents=SHORT)}
    save_sharded(first.sharded_state_dict(is_loading=False), folder)
    other_settings = replace(PARALLEL, hardware=HardwareConfig("measured", cross_gb_s=4.0))
    for name, parallel in (("resumed", PARALLEL), ("other settings", other_settings)):
        engine = measuring(SLOW_RANKS, parallel)
        engine.load_state_dict(load_sharded(engine.sharded_state_dict(is_loading=True), folder))
        said[name] = engine.set_stage(0, documents=SHORT)
        if name == "resumed":
            assert engine.sharded_state_dict(is_loading=False)[KEY] == first.sharded_state_dict(is_loading=False)[KEY]
    return really, said


def test_measured_numbers_are_the_same_on_every_rank_and_a_resumed_run_keeps_them(tmp_path: Path) -> None:
    (first, said), second = run_ranks(measured, 2, tmp_path)
    assert second == (first, said)
    assert first.name == "measured (cpu) (adjusted)" and first.cross_bytes_s == 3e9
    assert min(first.node_bytes_s, first.latency_s, first.fp32_flops) > 0
    lines = {name: notes[0] for name, notes in said.items()}
    assert "MoBA layers pull" in lines["first"] and "MoBA layers all_gather" in lines["other settings"]
    assert lines["resumed"] == lines["first"].replace("hardware cpu", "hardware cpu, as the checkpoint has it")
