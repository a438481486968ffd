"""N ranks equal one rank: context, data, tensor and pipeline parallel, in every combination that is built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from moba_train.config.schema import OptimizerConfig
from moba_train.engine.base import RowScores, StepResult
from moba_train.engine.megatron import MegatronEngine
from moba_train.quiet import quiet_imports
from tests.distributed import run_ranks
from tests.integration.engine_case import (
    CASES,
    FULL,
    MIXED,
    engine_of,
    gradients,
    moments,
    one_thread,
    packed_row,
    relative_l2,
    same,
    weights,
)

with quiet_imports():
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

ROWS = (packed_row(1), packed_row(2, (0, 40, 43)), packed_row(3, (0, 3, 20)), packed_row(4, (0, 2, 5)))
CP_2 = tuple((name, 2, 1, 1) for name in CASES)  # (case, cp, tp, pp)
OTHERS_OF_2 = (("mixed", 1, 1, 1), ("grouped", 1, 2, 1), ("full", 1, 1, 2))  # the first is data parallel
CP_4 = tuple((name, 4, 1, 1) for name in CASES)
OTHERS_OF_4 = (("mixed", 2, 1, 1), ("grouped", 2, 2, 1))


@dataclass
class Outcome:
    """What one mesh computed; gradients only where a rank holds whole parameters of the whole model."""

    step: StepResult
    gradients: dict[str, np.ndarray]
    scores: dict[str, RowScores]
    initial_weights: dict[str, np.ndarray]


def my_rows(engine: MegatronEngine) -> list[Any]:
    return list(ROWS[engine.topology.dp_rank :: engine.topology.dp])


def outcomes(rank: int, n: int, meshes: tuple[tuple[str, int, int, int], ...]) -> dict[Any, Outcome]:
    found = {}
    for mesh in meshes:
        name, cp, tp, pp = mesh
        engine = engine_of(CASES[name], cp=cp, tp=tp, pp=pp)
        start = weights(engine)
        step = engine.train_step(my_rows(engine), lr=0.0, collect_routing=True)
        queries = list(range(61))
        scores = {mode: engine.score(ROWS[0], attention=mode, query_positions=queries) for mode in ("stage", "random")}
        found[mesh] = Outcome(step, gradients(engine), scores, start)
    return found


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Outcome]:
    return {key[0]: value for key, value in run_ranks(outcomes, 1, tuple((name, 1, 1, 1) for name in CASES))[0].items()}


@pytest.fixture(scope="module", params=[(2, CP_2 + OTHERS_OF_2), (4, CP_4 + OTHERS_OF_4)], ids=["2 ranks", "4 ranks"])
def parallel(request: pytest.FixtureRequest) -> Iterator[list[dict[Any, Outcome]]]:
    n, meshes = request.param
    yield run_ranks(outcomes, n, meshes)


def test_the_loss_and_the_gradient_norm_are_those_of_one_rank(one_rank, parallel) -> None:
    for of_rank in parallel:
        for mesh, outcome in of_rank.items():
            expected = one_rank[mesh[0]].step
            assert outcome.step.loss == pytest.approx(expected.loss, rel=1e-6), mesh
            assert outcome.step.num_loss_tokens == expected.num_loss_tokens, mesh
            assert outcome.step.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5), mesh


def test_gradients_are_those_of_one_rank(one_rank, parallel) -> None:
    compared = 0
    for of_rank in parallel:
        for mesh, outcome in of_rank.items():
            if mesh[2:] == (1, 1):
                for name, expected in one_rank[mesh[0]].gradients.items():
                    assert relative_l2(outcome.gradients[name], expected) < 1e-5, (mesh, name)
                    compared += 1
    assert compared > 50


def test_initial_weights_do_not_depend_on_the_mesh(one_rank, parallel) -> None:
    for of_rank in parallel:
        for mesh, outcome in of_rank.items():
            if mesh[2:] == (1, 1):
                assert same(outcome.initial_weights, one_rank[mesh[0]].initial_weights), mesh


def test_scores_and_picks_are_those_of_one_rank_on_every_rank(one_rank, parallel) -> None:
    for of_rank in parallel:
        for mesh, outcome in of_rank.items():
            for mode, scores in outcome.scores.items():
                if mode == "random" and mesh[2] > 1:
                    continue  # each tensor-parallel rank draws for its own heads
                expected = one_rank[mesh[0]].scores[mode]
                np.testing.assert_allclose(scores.log_prob_S, expected.log_prob_S, atol=2e-5, err_msg=str(mesh))
                np.testing.assert_array_equal(scores.argmax_S, expected.argmax_S, err_msg=str(mesh))
                assert scores.picks.keys() == expected.picks.keys(), mesh
                for layer, picks in expected.picks.items():
                    np.testing.assert_array_equal(scores.picks[layer], picks, err_msg=str((mesh, mode, layer)))


def test_routing_numbers_are_alike_on_all_ranks_and_those_of_one_rank(one_rank, parallel) -> None:
    for of_rank in parallel:
        for mesh, outcome in of_rank.items():
            assert outcome.step.routing == parallel[0][mesh].step.routing
            if outcome.step.routing and mesh[1] * mesh[2] * mesh[3] == len(parallel):  # one data-parallel rank
                assert outcome.step.routing == pytest.approx(one_rank[mesh[0]].step.routing)


def train_after_poison(rank: int, n: int) -> tuple[bool, bool, list[float]]:
    """A NaN that only one context-parallel rank's shard sees, then good steps with the distributed optimizer."""
    one_thread()
    case = replace(MIXED, engine=replace(MIXED.engine, distributed_optimizer=True), optimizer=OptimizerConfig())
    engine = engine_of(case, cp=n)
    before, state = weights(engine), moments(engine)
    mask = ROWS[0].loss_mask_S.copy()
    mask[0] = np.nan  # rank 0 holds the first piece
    skipped = engine.train_step([replace(ROWS[0], loss_mask_S=mask)], lr=1e-2).skipped
    untouched = same(weights(engine), before) and all(
        np.array_equal(a, b) for a, b in zip(moments(engine), state, strict=True)
    )
    return skipped, untouched, [engine.train_step(list(ROWS), lr=1e-2).loss for _ in range(4)]


def test_ranks_agree_to_skip_a_step_and_train_alike_afterwards() -> None:
    (reference,) = run_ranks(train_after_poison, 1)
    for skipped, untouched, losses in run_ranks(train_after_poison, 2):
        assert skipped and untouched
        assert losses == pytest.approx(reference[2], rel=1e-5)


def shapes_told(rank: int, n: int, pp: int) -> tuple[list[float], int]:
    """Losses of a step with rows of one length, then of one with rows of several; how often stages told shapes."""
    one_thread()
    engine = engine_of(FULL, cp=n // pp, pp=pp)
    told, tell = [], P2PCommunicator._communicate_shapes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(P2PCommunicator, "_communicate_shapes", lambda *x, **y: told.append(1) or tell(*x, **y))
        losses = [engine.train_step([packed_row(1), packed_row(2)], lr=0.0).loss]
        assert not told, "the host waits for the device there"
        losses.append(engine.train_step(list(ROWS), lr=0.0).loss)
    return losses, len(told)


def test_stages_tell_shapes_only_where_rows_differ_in_length() -> None:
    """Four ranks hold shards that differ by a token: 61 tokens over two context-parallel ranks."""
    ((expected, _),) = run_ranks(shapes_told, 1, 1)
    for losses, told in run_ranks(shapes_told, 4, 2):
        assert losses == pytest.approx(expected, rel=1e-6) and told
