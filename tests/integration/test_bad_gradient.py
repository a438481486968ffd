"""A gradient that is not finite on one rank alone: all ranks skip the step; no bit of weights or moments changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moba_train.config.schema import OptimizerConfig
from tests.distributed import run_ranks
from tests.integration.engine_case import MIXED, engine_of, moments, one_thread, packed_row, same, weights

MESHES = {"data parallel": {}, "context parallel": {"cp": 2}, "tensor parallel": {"tp": 2}, "pipeline": {"pp": 2}}
CASES = [*((mesh, True) for mesh in MESHES), ("data parallel", False)]


def poisoned_steps(rank: int, n: int) -> list[tuple[bool, bool, bool, bool]]:
    """For each case: is the loss finite, was the step skipped, was nothing touched, was the step after it taken?"""
    one_thread()
    outcomes = []
    for mesh, distributed in CASES:
        case = replace(
            MIXED, engine=replace(MIXED.engine, distributed_optimizer=distributed), optimizer=OptimizerConfig()
        )
        engine = engine_of(case, **MESHES[mesh])
        row = packed_row(rank if mesh == "data parallel" else 0)
        assert not engine.train_step([row], lr=1e-2, step=1).skipped
        before, state = weights(engine), moments(engine)
        poison = None
        if rank == 1:
            parameter = next(p for name, p in engine._gpt.named_parameters() if name.endswith("linear_proj.weight"))
            poison = parameter.register_hook(lambda gradient: gradient * np.nan)
        bad = engine.train_step([row], lr=1e-2, step=2)
        untouched = same(weights(engine), before) and all(
            np.array_equal(a, b) for a, b in zip(moments(engine), state, strict=True)
        )
        if poison is not None:
            poison.remove()
        taken = not engine.train_step([row], lr=1e-2, step=3).skipped and not same(weights(engine), before)
        outcomes.append((bool(np.isfinite(bad.loss)), bad.skipped, untouched, taken))
    return outcomes


@pytest.fixture(scope="module")
def outcomes() -> list[list[tuple[bool, bool, bool, bool]]]:
    return run_ranks(poisoned_steps, 2)


@pytest.mark.parametrize("case", CASES)
def test_a_gradient_that_breaks_on_one_rank_is_skipped_on_all(
    outcomes: list[list[tuple[bool, bool, bool, bool]]], case: tuple[str, bool]
) -> None:
    for of_rank in outcomes:
        is_loss_finite, skipped, untouched, taken_after = of_rank[CASES.index(case)]
        assert is_loss_finite, "the gradient alone is broken"
        assert skipped and untouched and taken_after
