"""Training over TP x CP x PP x DP equals training on one rank: losses, gradients, weights, scores, checkpoints.

One rank trains first, and its picks are written down. The meshes then replay them: tensor parallelism changes low bits,
and a query between two chunks of nearly equal score could pick the other one. Rows have odd lengths, empty and
one-token documents, different numbers of counted tokens (a mean of means would show), and one has fewer tokens than
ranks. Tensor-parallel ranks share tokens, so most shards end in padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from moba_kernels import MoBA, Routing
from moba_train.config.schema import EngineConfig, FullLayers, OptimizerConfig
from moba_train.data.row import Row
from moba_train.engine.base import RowScores, StepResult
from moba_train.engine.local_row import LocalRow, RowPlan, padded_length
from moba_train.engine.megatron import MegatronEngine
from moba_train.model.plan import layers_of_pipeline_rank
from moba_train.parallel.topology import Topology
from moba_train.train.megatron_io import load_sharded, save_sharded
from tests.distributed import run_ranks
from tests.integration.engine_case import (
    BASE_MODEL,
    MOBA_STAGE,
    Case,
    engine_of,
    packed_row,
    relative_l2,
    weights,
)

# Narrower than the other tests' 0.2, where attention is so sharp that weights 1e-5 apart (Adam makes that much of the
# rounding of small gradients) give gradients 2e-5 apart.
MODEL = replace(BASE_MODEL, init_std=0.1)
LR = 1e-3
STEPS = 5
SAVED_AFTER = 3  # steps
SHAPES = ((0, 1, 24, 24, 53, 61), (0, 40, 43), (0, 3, 20, 21), (0, 0, 30, 31), (0, 1, 3))
STEP_ROWS = tuple(
    tuple(replace(packed_row(10 * step + i, SHAPES[(step + i) % 5]), sample_id=2 * step + i) for i in range(2))
    for step in range(STEPS)
)
SCORED = (STEP_ROWS[0][0], STEP_ROWS[4][0])  # the longest, and the one with fewer tokens than ranks

MIXED_STAGE = replace(MOBA_STAGE, full_layers=FullLayers(last=1))
ENGINE = EngineConfig(device="cpu")  # with the distributed optimizer
CLIPPED = OptimizerConfig(clip_grad=0.5)
CASES = {
    "tied, key conv": Case(replace(MODEL, key_conv=3), (MIXED_STAGE,), engine=ENGINE, optimizer=CLIPPED),
    "untied, q and k norm, recomputed": Case(
        replace(MODEL, key_conv=3, qk_norm=True, tied_head=False),
        (replace(MIXED_STAGE, select="group"),),
        engine=replace(ENGINE, recompute="full"),
        optimizer=CLIPPED,
    ),
}
IN_BF16 = "in bf16"
CASES[IN_BF16] = replace(CASES["tied, key conv"], engine=replace(ENGINE, precision="bf16"))
IN_FP32 = tuple(name for name in CASES if name != IN_BF16)


class Mesh(NamedTuple):
    tp: int
    cp: int
    pp: int
    dp: int


ONE = Mesh(1, 1, 1, 1)
MESHES_OF_2 = (Mesh(1, 2, 1, 1), Mesh(2, 1, 1, 1))
SAVED = Mesh(2, 1, 2, 1)
MESHES_OF_4 = (Mesh(1, 4, 1, 1), Mesh(2, 2, 1, 1), Mesh(1, 2, 2, 1), Mesh(1, 2, 1, 2), Mesh(2, 1, 1, 2), SAVED)
Picks = Mapping[int, dict[int, np.ndarray]]
"""sample_id -> global layer -> chunk ids int32 [T,H,topk] ([T,K,topk] under "group") of the whole row."""


@dataclass
class Outcome:
    """What one rank of a mesh computed."""

    place: Mesh  # its rank in each group
    steps: list[StepResult]
    gradients: list[dict[str, np.ndarray]]
    weights: dict[str, np.ndarray]
    scores: list[RowScores]


@dataclass
class Reference(Outcome):
    picks: dict[int, dict[int, np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class ReplayedPlan(RowPlan):
    """Rows whose queries attend to the chunks that they are told."""

    picks: Picks

    def local_row(self, row: Row, topology: Topology, **options: Any) -> LocalRow:
        local = super().local_row(row, topology, **options)
        context = local.context
        for layer in layers_of_pipeline_rank(len(self.specs), topology.pp, topology.pp_rank):
            spec = self.specs[layer]
            if isinstance(spec, MoBA):
                ids = torch.from_numpy(self.picks[row.sample_id][layer][context.held])
                ids = ids.chunk(topology.tp, dim=1)[topology.tp_rank]
                context.routings[layer] = Routing.from_chunk_ids(ids, spec, context.pack, context.positions_S)
        return local


@dataclass(frozen=True)
class OverpaddedPlan(RowPlan):
    """Rows with more padding behind them than the mesh asks for, of a token that occurs."""

    def local_row(self, row: Row, topology: Topology, **options: Any) -> LocalRow:
        local = super().local_row(row, topology, **options)
        tokens = functional.pad(local.tokens, (0, 7), value=int(row.tokens_S[0]))
        labels = functional.pad(local.labels, (0, 7), value=3)
        return LocalRow(tokens, labels, functional.pad(local.loss_mask, (0, 7)), local.context)


def replay(engine: MegatronEngine, picks: Picks) -> None:
    plain = engine._row_plan
    engine._row_plan = lambda attention: ReplayedPlan(**vars(plain(attention)), picks=picks)  # type: ignore[method-assign]


def whole_gradients(engine: MegatronEngine) -> dict[str, np.ndarray]:
    """By name; the distributed optimizer leaves each data- and context-parallel rank one part of the sum over ranks."""
    group = engine.topology.dp_cp_group
    for buffer in engine._ddp.buffers:
        for bucket in buffer.buckets:
            parts = list(bucket.grad_data.chunk(group.size()))
            dist.all_gather(parts, parts[group.rank()].clone(), group=group)
    return {name: parameter.main_grad.numpy().copy() for name, parameter in engine._gpt.named_parameters()}


def trained_on_one_rank(rank: int, n: int) -> dict[str, Reference]:
    found = {}
    for name, case in CASES.items():
        engine = engine_of(case)
        scores = [engine.score(row, query_positions=range(len(row.tokens_S))) for row in SCORED]
        reference = Reference(ONE, [], [], {}, scores)
        for rows in STEP_ROWS:
            for row in rows:  # with the weights that the step will see
                reference.picks[row.sample_id] = engine.score(row, query_positions=range(len(row.tokens_S))).picks
            reference.steps.append(engine.train_step(rows, lr=LR))
            reference.gradients.append(whole_gradients(engine))
        reference.weights = weights(engine)
        found[name] = reference
    return found


def trained_on_meshes(
    rank: int, n: int, runs: tuple[tuple[str, Mesh], ...], picks: dict[str, Picks], folder: Path
) -> list[Outcome]:
    """One outcome for each (case, mesh) of n ranks; where the mesh is SAVED, a checkpoint is left in `folder`."""
    found = []
    for name, mesh in runs:
        engine = engine_of(CASES[name], tp=mesh.tp, cp=mesh.cp, pp=mesh.pp)
        at = engine.topology
        assert at.dp == mesh.dp and engine._gpt.config.sequence_parallel == (mesh.tp > 1)
        scores = [engine.score(row, query_positions=range(len(row.tokens_S))) for row in SCORED]
        outcome = Outcome(Mesh(at.tp_rank, at.cp_rank, at.pp_rank, at.dp_rank), [], [], {}, scores)
        replay(engine, picks[name])
        for step, rows in enumerate(STEP_ROWS):
            if mesh == SAVED and step == SAVED_AFTER:
                save_sharded(engine.sharded_state_dict(is_loading=False), folder / name)
            outcome.steps.append(engine.train_step(rows[at.dp_rank :: at.dp], lr=LR))
            outcome.gradients.append(whole_gradients(engine))
        outcome.weights = weights(engine)
        found.append(outcome)
    return found


def continued_on_one_rank(
    rank: int, n: int, names: tuple[str, ...], picks: dict[str, Picks], folder: Path
) -> dict[str, Outcome]:
    found = {}
    for name in names:
        engine = engine_of(CASES[name], seed=8)  # other initial weights: loading must replace all
        engine.load_state_dict(load_sharded(engine.sharded_state_dict(is_loading=True), folder / name))
        replay(engine, picks[name])
        steps = [engine.train_step(rows, lr=LR) for rows in STEP_ROWS[SAVED_AFTER:]]
        found[name] = Outcome(ONE, steps, [], weights(engine), [])
    return found


def assembled(parts: list[tuple[Mesh, dict[str, np.ndarray]]], layers_per_stage: int) -> dict[str, np.ndarray]:
    """Whole tensors of the whole model from what the tensor- and pipeline-parallel ranks of one replica hold."""
    whole: dict[str, np.ndarray] = {}
    for stage in sorted({place.pp for place, _ in parts}):
        of_stage = [tensors for place, tensors in sorted(parts, key=lambda part: part[0].tp) if place.pp == stage]
        for name in of_stage[0]:
            pieces = [tensors[name] for tensors in of_stage]
            words = name.split(".")
            if words[:2] == ["decoder", "layers"]:
                words[2] = str(int(words[2]) + stage * layers_per_stage)
            whole[".".join(words)] = joined(name, pieces)
    return whole


def joined(name: str, pieces: list[np.ndarray]) -> np.ndarray:
    """One tensor from its tensor-parallel pieces."""
    if "norm" in name:
        for piece in pieces:
            np.testing.assert_array_equal(piece, pieces[0], err_msg=f"{name} differs between tensor-parallel ranks")
        return pieces[0]
    if "linear_fc1" in name:  # gate and up are cut each for itself
        halves = [np.split(piece, 2) for piece in pieces]
        return np.concatenate([half[i] for i in range(2) for half in halves])
    return np.concatenate(pieces, axis=1 if "linear_proj" in name or "linear_fc2" in name else 0)


def replicas(outcomes: list[Outcome]) -> Iterator[list[Outcome]]:
    """The ranks of a mesh that hold one copy of the model together."""
    for cp_rank, dp_rank in sorted({(outcome.place.cp, outcome.place.dp) for outcome in outcomes}):
        yield [outcome for outcome in outcomes if (outcome.place.cp, outcome.place.dp) == (cp_rank, dp_rank)]


def pairs_of_tensors(
    found: dict[str, np.ndarray], expected: dict[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, found, expected). The last pipeline rank holds a tied head as a copy of the embedding."""
    assert found.keys() - expected.keys() <= {"output_layer.weight"} and expected.keys() <= found.keys()
    for name, tensor in found.items():
        yield name, tensor, expected.get(name, expected["embedding.word_embeddings.weight"])


@dataclass
class Trained:
    """References by case, and the outcomes of every rank by (case, mesh)."""

    references: dict[str, Reference]
    outcomes: dict[tuple[str, Mesh], list[Outcome]]
    folder: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("meshes")
    for name in IN_FP32:
        (folder / name).mkdir()
    references = run_ranks(trained_on_one_rank, 1)[0]
    picks = {name: reference.picks for name, reference in references.items()}
    outcomes: dict[tuple[str, Mesh], list[Outcome]] = {}
    for n, meshes in ((2, MESHES_OF_2), (4, MESHES_OF_4)):
        runs = tuple((name, mesh) for name in IN_FP32 for mesh in meshes)
        if n == 4:
            runs += ((IN_BF16, Mesh(2, 2, 1, 1)),)
        of_ranks = run_ranks(trained_on_meshes, n, runs, picks, folder)
        outcomes |= {run: [of_rank[i] for of_rank in of_ranks] for i, run in enumerate(runs)}
    return Trained(references, outcomes, folder)


MATRIX = [(name, mesh) for name in IN_FP32 for mesh in MESHES_OF_2 + MESHES_OF_4]
every_mesh = pytest.mark.parametrize(
    ("name", "mesh"), MATRIX, ids=[f"{name}, tp{m.tp} cp{m.cp} pp{m.pp} dp{m.dp}" for name, m in MATRIX]
)


@every_mesh
def test_losses_and_gradient_norms_of_five_steps_are_those_of_one_rank(trained: Trained, name: str, mesh: Mesh) -> None:
    expected = trained.references[name].steps
    assert all(step.grad_norm > CLIPPED.clip_grad for step in expected)
    for outcome in trained.outcomes[name, mesh]:
        for found, of_one in zip(outcome.steps, expected, strict=True):
            assert found.loss == pytest.approx(of_one.loss, rel=1e-5)
            assert found.num_loss_tokens == of_one.num_loss_tokens
            assert found.grad_norm == pytest.approx(of_one.grad_norm, rel=1e-5)
            assert not found.skipped


@every_mesh
def test_gradients_of_every_parameter_are_those_of_one_rank(trained: Trained, name: str, mesh: Mesh) -> None:
    layers_per_stage = MODEL.num_layers // mesh.pp
    for replica in replicas(trained.outcomes[name, mesh]):
        for step, expected in enumerate(trained.references[name].gradients):
            found = assembled([(outcome.place, outcome.gradients[step]) for outcome in replica], layers_per_stage)
            for parameter, gradient, of_one in pairs_of_tensors(found, expected):
                assert relative_l2(gradient, of_one) < 1e-5, (step, parameter)


@every_mesh
def test_weights_after_five_steps_are_those_of_one_rank(trained: Trained, name: str, mesh: Mesh) -> None:
    layers_per_stage = MODEL.num_layers // mesh.pp
    for replica in replicas(trained.outcomes[name, mesh]):
        found = assembled([(outcome.place, outcome.weights) for outcome in replica], layers_per_stage)
        for parameter, weight, of_one in pairs_of_tensors(found, trained.references[name].weights):
            assert np.abs(weight - of_one).max() <= 0.1 * LR * STEPS, parameter


@every_mesh
def test_scores_and_picks_are_those_of_one_rank(trained: Trained, name: str, mesh: Mesh) -> None:
    for outcome in trained.outcomes[name, mesh]:
        for found, expected in zip(outcome.scores, trained.references[name].scores, strict=True):
            np.testing.assert_allclose(found.log_prob_S, expected.log_prob_S, atol=2e-5)
            np.testing.assert_array_equal(found.argmax_S, expected.argmax_S)
            assert found.picks.keys() == expected.picks.keys() == {0}
            np.testing.assert_array_equal(found.picks[0], expected.picks[0])


def test_a_checkpoint_of_a_mesh_continues_on_one_rank(trained: Trained) -> None:
    picks = {name: reference.picks for name, reference in trained.references.items()}
    for name, found in run_ranks(continued_on_one_rank, 1, IN_FP32, picks, trained.folder)[0].items():
        expected = trained.references[name]
        for step, step_of_one in zip(found.steps, expected.steps[SAVED_AFTER:], strict=True):
            assert step.loss == pytest.approx(step_of_one.loss, rel=1e-5)
            assert step.grad_norm == pytest.approx(step_of_one.grad_norm, rel=1e-5)
        for parameter, weight, of_one in pairs_of_tensors(found.weights, expected.weights):
            assert np.abs(weight - of_one).max() <= 0.1 * LR * STEPS, (name, parameter)


def step_and_scores(engine: MegatronEngine) -> tuple[StepResult, dict[str, np.ndarray], list[RowScores]]:
    scores = [engine.score(row, query_positions=range(len(row.tokens_S))) for row in SCORED]
    step = engine.train_step(STEP_ROWS[0], lr=0.0, collect_routing=True)
    return step, whole_gradients(engine), scores


@pytest.mark.parametrize("name", IN_FP32)
def test_padding_changes_no_loss_gradient_statistic_or_score(name: str) -> None:
    engine = engine_of(CASES[name])
    step, gradients, scores = step_and_scores(engine)
    plain = engine._row_plan
    engine._row_plan = lambda attention: OverpaddedPlan(**vars(plain(attention)))  # type: ignore[method-assign]
    padded_step, padded_gradients, padded_scores = step_and_scores(engine)
    assert padded_step.loss == pytest.approx(step.loss, rel=1e-6)
    assert padded_step.num_loss_tokens == step.num_loss_tokens
    assert padded_step.routing == step.routing
    for parameter, gradient in gradients.items():
        assert relative_l2(padded_gradients[parameter], gradient) < 1e-5, parameter
    for a, b in zip(padded_scores, scores, strict=True):
        np.testing.assert_allclose(a.log_prob_S, b.log_prob_S, atol=1e-5)
        np.testing.assert_array_equal(a.argmax_S, b.argmax_S)
        np.testing.assert_array_equal(a.picks[0], b.picks[0])


def test_a_shard_is_padded_to_a_positive_multiple_of_the_ranks_that_share_it() -> None:
    assert [padded_length(tokens, 1) for tokens in (0, 1, 2)] == [1, 1, 2]
    assert [padded_length(tokens, 4) for tokens in (0, 1, 4, 5)] == [4, 4, 4, 8]


def test_a_mesh_in_bf16_trains_close_to_one_rank(trained: Trained) -> None:
    expected = [step.loss for step in trained.references[IN_BF16].steps]
    for outcome in trained.outcomes[IN_BF16, Mesh(2, 2, 1, 1)]:
        np.testing.assert_allclose([step.loss for step in outcome.steps], expected, rtol=0.02)
