"""A run saved on one mesh goes on on another: the matrix of TP x CP x PP x DP, with the distributed optimizer.

One rank trains first, and its picks are written down; all meshes replay them (see test_mesh_equality). Each mesh that
saves trains two steps, saves with the real store, and goes on for five. Every mesh that resumes must find the losses of
those five steps: to 1e-5 on another mesh, and bit for bit on the same.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from moba_train.config.schema import FullLayers
from moba_train.engine.megatron import MegatronEngine
from moba_train.train.checkpoint import CheckpointStore, load_checkpoint
from moba_train.train.progress import Identity, Progress, model_fingerprint
from moba_train.train.run_folder import list_checkpoints
from tests.distributed import run_ranks
from tests.integration.engine_case import MOBA_STAGE, Case, engine_of, moments, packed_row, weights
from tests.integration.test_mesh_equality import CLIPPED, ENGINE, MODEL, Mesh, replay

STAGE = replace(MOBA_STAGE, full_layers=FullLayers(last=1), tokens=7, tokens_per_step=1, seq_len=1)
CASE = Case(replace(MODEL, key_conv=3), (STAGE,), engine=ENGINE, optimizer=CLIPPED)
LR = 1e-3
SAVED_AFTER, STEPS = 2, 7
SHAPES = ((0, 1, 24, 24, 53, 61), (0, 40, 43), (0, 3, 20, 21), (0, 0, 30, 31))
STEP_ROWS = tuple(
    tuple(replace(packed_row(10 * step + i, SHAPES[(step + i) % 4]), sample_id=4 * step + i) for i in range(4))
    for step in range(STEPS)
)
ON_4 = {  # saved on -> resumed on, besides itself
    Mesh(1, 2, 1, 2): (Mesh(2, 2, 1, 1), Mesh(1, 4, 1, 1)),
    Mesh(2, 1, 2, 1): (Mesh(1, 2, 1, 2), Mesh(1, 1, 2, 2)),
    Mesh(1, 1, 1, 4): (Mesh(2, 1, 1, 2), Mesh(1, 2, 2, 1)),
    Mesh(2, 2, 1, 1): (Mesh(1, 1, 1, 4), Mesh(2, 1, 2, 1)),
}
ON_2 = {Mesh(2, 1, 2, 1): (Mesh(1, 2, 1, 1), Mesh(1, 1, 1, 2)), Mesh(1, 1, 1, 4): (Mesh(2, 1, 1, 1),)}
PAIRS = [(saved, resumed) for part in (ON_4, ON_2) for saved, others in part.items() for resumed in others]
SAME = [(saved, saved) for saved in ON_4]
LATER = {(saved, others[-1]) for saved, others in ON_4.items()}
"""Each mesh is saved on and resumed on in the other pairs too: these take minutes more."""
Picks = Mapping[int, dict[int, np.ndarray]]


@dataclass
class Outcome:
    """One rank's losses of the five steps, and its weights and optimizer state behind them."""

    losses: list[float]
    weights: dict[str, np.ndarray]
    moments: list[np.ndarray]


def identity(mesh: Mesh) -> Identity:
    return Identity(model_fingerprint(CASE.model), "ab" * 32, 7, mesh._asdict(), {})


def trained(engine: MegatronEngine, steps: range) -> Outcome:
    at = engine.topology
    losses = [engine.train_step(STEP_ROWS[step][at.dp_rank :: at.dp], lr=LR, step=step + 1).loss for step in steps]
    return Outcome(losses, weights(engine), moments(engine))


def on_one_rank(rank: int, n: int) -> tuple[Picks, list[float]]:
    engine, picks, losses = engine_of(CASE), {}, []
    for rows in STEP_ROWS:
        for row in rows:  # with the weights that the step will see
            picks[row.sample_id] = engine.score(row, query_positions=range(len(row.tokens_S))).picks
        losses.append(engine.train_step(rows, lr=LR).loss)
    return picks, losses[SAVED_AFTER:]


def engine_on(mesh: Mesh, picks: Picks, seed: int) -> MegatronEngine:
    engine = engine_of(CASE, tp=mesh.tp, cp=mesh.cp, pp=mesh.pp, seed=seed)
    assert engine.topology.dp == mesh.dp
    replay(engine, picks)
    return engine


def folder_of(folder: Path, mesh: Mesh) -> Path:
    return folder / "-".join(str(degree) for degree in mesh)


def saved_and_resumed(
    rank: int, n: int, picks: Picks, folder: Path, savers: list[Mesh], pairs: list[tuple[Mesh, Mesh]]
) -> tuple[dict[Mesh, Outcome], list[Outcome]]:
    """What the savers found without a stop, and what each pair found after it."""
    gc.freeze()  # Megatron collects garbage at every save
    straight = {}
    for mesh in savers:
        engine = engine_on(mesh, picks, seed=7)
        trained(engine, range(SAVED_AFTER))
        store = CheckpointStore(folder_of(folder, mesh), identity(mesh), "", CASE.stages, keep_last=1)
        store.save(engine, Progress(SAVED_AFTER, 0, SAVED_AFTER, SAVED_AFTER), stage_end=False)
        store.finish()
        straight[mesh] = trained(engine, range(SAVED_AFTER, STEPS))
    resumed = []
    for saved, mesh in pairs:
        engine = engine_on(mesh, picks, seed=8)  # other initial weights: loading must replace all
        (path,) = list_checkpoints(folder_of(folder, saved))
        assert load_checkpoint(path, engine, identity(mesh)).step == SAVED_AFTER
        resumed.append(trained(engine, range(SAVED_AFTER, STEPS)))
    return straight, resumed


@dataclass
class Matrix:
    """Losses of one rank; outcomes of every rank, without a stop by mesh, and resumed by pair."""

    losses: list[float]
    straight: dict[Mesh, list[Outcome]]
    resumed: dict[tuple[Mesh, Mesh], list[Outcome]]


@pytest.fixture(scope="module")
def matrix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """Of the pairs that are asked for."""
    asked = {item.callspec.params["pair"] for item in request.session.items if item.path == request.path}
    folder = tmp_path_factory.mktemp("reshard")
    picks, losses = run_ranks(on_one_rank, 1)[0]
    matrix = Matrix(losses, {}, {})
    on_4 = [(saved, mesh) for saved, others in ON_4.items() for mesh in (saved, *others) if (saved, mesh) in asked]
    on_2 = [(saved, mesh) for saved, others in ON_2.items() for mesh in others if (saved, mesh) in asked]
    for n, savers, pairs in ((4, list(ON_4), on_4), (2, [], on_2)):
        of_ranks = run_ranks(saved_and_resumed, n, picks, folder, savers, pairs)
        matrix.straight |= {mesh: [straight[mesh] for straight, _ in of_ranks] for mesh in savers}
        matrix.resumed |= {pair: [resumed[i] for _, resumed in of_ranks] for i, pair in enumerate(pairs)}
    return matrix


def name(pair: tuple[Mesh, Mesh]) -> str:
    return " to ".join("tp{} cp{} pp{} dp{}".format(*mesh) for mesh in pair)


@pytest.mark.parametrize(
    "pair", [pytest.param(pair, marks=pytest.mark.slow if pair in LATER else ()) for pair in PAIRS], ids=name
)
def test_a_run_goes_on_on_another_mesh_with_the_same_losses(matrix: Matrix, pair: tuple[Mesh, Mesh]) -> None:
    for outcome in matrix.resumed[pair]:
        assert outcome.losses == pytest.approx(matrix.straight[pair[0]][0].losses, rel=1e-5)
        assert outcome.losses == pytest.approx(matrix.losses, rel=1e-5)


@pytest.mark.parametrize("pair", SAME, ids=name)
def test_a_run_goes_on_on_the_same_mesh_bit_for_bit(matrix: Matrix, pair: tuple[Mesh, Mesh]) -> None:
    for resumed, straight in zip(matrix.resumed[pair], matrix.straight[pair[0]], strict=True):
        assert resumed.losses == straight.losses
        assert resumed.weights.keys() == straight.weights.keys()
        for parameter, value in straight.weights.items():
            np.testing.assert_array_equal(resumed.weights[parameter], value, err_msg=parameter)
        for a, b in zip(resumed.moments, straight.moments, strict=True):
            np.testing.assert_array_equal(a, b)
