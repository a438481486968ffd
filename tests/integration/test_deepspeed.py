"""ZeRO 1, 2 and 3 train like the Megatron engine, on CP and DP ranks, and their checkpoints fit each other.

The Megatron engine trains first, on one rank, and its picks are written down and replayed: see `test_mesh_equality`.
Rows have odd lengths, empty and one-token documents and different numbers of counted tokens; a step has two of them, so
that one data-parallel rank accumulates and two do not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moba_train.config.schema import EngineConfig, OptimizerConfig, ParallelConfig
from moba_train.data.row import Row
from moba_train.engine.base import RowScores, StepResult
from moba_train.engine.deepspeed import DeepSpeedEngine
from moba_train.engine.deepspeed_state import KINDS
from moba_train.engine.gpt_engine import GptEngine
from moba_train.engine.megatron import MegatronEngine
from moba_train.parallel.ranks import map_over_ranks
from moba_train.parallel.topology import close_topology, init_topology
from moba_train.train.checkpoint import CheckpointStore, load_checkpoint
from moba_train.train.progress import Identity, Progress, model_fingerprint
from moba_train.train.run_folder import list_checkpoints
from tests.distributed import run_ranks
from tests.integration.engine_case import Case, packed_row
from tests.integration.test_mesh_equality import MIXED_STAGE, MODEL, SHAPES, Picks, replay

LR = 1e-3
STEPS = 10
SAVED_AFTER = 2  # steps
STEP_ROWS = tuple(
    tuple(replace(packed_row(10 * step + i, SHAPES[(step + i) % 5]), sample_id=2 * step + i) for i in range(2))
    for step in range(STEPS)
)
SCORED = (STEP_ROWS[0][0], STEP_ROWS[4][0], STEP_ROWS[2][1])
MEGATRON = EngineConfig(device="cpu")
CASES = {
    "tied": Case(replace(MODEL, key_conv=3), (MIXED_STAGE,), engine=MEGATRON, optimizer=OptimizerConfig(clip_grad=0.5)),
    "untied, recomputed": Case(
        replace(MODEL, key_conv=3, qk_norm=True, tied_head=False),
        (replace(MIXED_STAGE, select="group"),),
        engine=replace(MEGATRON, recompute="full"),
        optimizer=OptimizerConfig(clip_grad=0.5),
    ),
}
STEPS_OF = {"tied": STEPS, "untied, recomputed": 4}


class Kind(NamedTuple):
    """An engine: ZeRO stage (0 = Megatron), context-parallel ranks, precision."""

    zero: int
    cp: int = 1
    precision: str = "fp32"


ALONE = tuple(("tied", Kind(zero)) for zero in (1, 2, 3))
ON_2_RANKS = (
    ("tied", Kind(0, 2)),
    *(("tied", Kind(zero, cp)) for zero in (1, 2, 3) for cp in (1, 2)),
    *(("untied, recomputed", Kind(zero, 2)) for zero in (1, 3)),
)


def engine_of(case: Case, kind: Kind, *, seed: int = 7) -> GptEngine:
    close_topology(keep_process_group=True)
    parallel = ParallelConfig(cp=kind.cp, layout=case.layout)  # type: ignore[arg-type]
    topology = init_topology(parallel, device=torch.device("cpu"), timeout_s=60.0)
    engine = replace(case.engine, precision=kind.precision)  # type: ignore[arg-type]
    arguments = (case.optimizer, topology, parallel)
    if kind.zero == 0:
        return MegatronEngine(case.model, case.stages, engine, *arguments, seed=seed)
    zero = replace(engine, kind="deepspeed", zero_stage=kind.zero)  # type: ignore[arg-type]
    return DeepSpeedEngine(case.model, case.stages, zero, *arguments, seed=seed)


def own_rows(engine: GptEngine, rows: tuple[Row, ...]) -> tuple[Row, ...]:
    return rows[engine.topology.dp_rank :: engine.topology.dp]


def scores_of(engine: GptEngine) -> list[RowScores]:
    """Of three rows, which two data-parallel ranks cannot share evenly."""
    return map_over_ranks(
        lambda row: engine.score(row, query_positions=range(len(row.tokens_S))), SCORED, engine.topology
    )


@dataclass
class Outcome:
    """What one rank of a mesh computed."""

    steps: list[StepResult] = field(default_factory=list)
    scores: list[RowScores] = field(default_factory=list)
    picks: dict[int, dict[int, np.ndarray]] = field(default_factory=dict)


def trained_by_megatron(rank: int, n: int) -> dict[str, Outcome]:
    found = {}
    for name, case in CASES.items():
        engine, outcome = engine_of(case, Kind(0)), Outcome()
        for rows in STEP_ROWS[: STEPS_OF[name]]:
            for row in rows:  # with the weights that the step will see
                outcome.picks[row.sample_id] = engine.score(row, query_positions=range(len(row.tokens_S))).picks
            outcome.steps.append(engine.train_step(rows, lr=LR, collect_routing=True, measure_memory=True))
        outcome.scores = scores_of(engine)
        found[name] = outcome
    return found


def trained_by_zero(rank: int, n: int, runs: tuple[tuple[str, Kind], ...], picks: Mapping[str, Picks]) -> list[Outcome]:
    found = []
    for name, kind in runs:
        engine, outcome = engine_of(CASES[name], kind), Outcome()
        plan = engine._row_plan
        replay(engine, picks[name])  # type: ignore[arg-type]
        for step, rows in enumerate(STEP_ROWS[: STEPS_OF[name]]):
            mine = own_rows(engine, rows)
            outcome.steps.append(engine.train_step(mine, lr=LR, collect_routing=True, measure_memory=True))
            if step == 1:  # an evaluation in between changes nothing
                engine._row_plan = plan  # type: ignore[method-assign]
                scores_of(engine)
                replay(engine, picks[name])  # type: ignore[arg-type]
        engine._row_plan = plan  # type: ignore[method-assign]
        outcome.scores = scores_of(engine)
        found.append(outcome)
    return found


@dataclass
class Trained:
    reference: dict[str, Outcome]
    outcomes: dict[tuple[str, Kind, int], list[Outcome]]  # case, kind, ranks -> of every rank


@pytest.fixture(scope="module")
def trained() -> Trained:
    reference = run_ranks(trained_by_megatron, 1)[0]
    picks = {name: outcome.picks for name, outcome in reference.items()}
    outcomes = {}
    for n, runs in ((1, ALONE), (2, ON_2_RANKS)):
        of_ranks = run_ranks(trained_by_zero, n, runs, picks)
        for index, (name, kind) in enumerate(runs):
            outcomes[name, kind, n] = [of_rank[index] for of_rank in of_ranks]
    return Trained(reference, outcomes)


def pairs(trained: Trained) -> Iterator[tuple[Any, Outcome, Outcome]]:
    """(key, an outcome of ZeRO, the reference)."""
    for (name, kind, n), of_ranks in trained.outcomes.items():
        for outcome in of_ranks:
            yield (name, kind, n), outcome, trained.reference[name]


def test_losses_and_gradient_norms_are_those_of_the_megatron_engine(trained: Trained) -> None:
    for key, outcome, reference in pairs(trained):
        assert len(outcome.steps) == len(reference.steps)
        for found, expected in zip(outcome.steps, reference.steps, strict=True):
            assert found.loss == pytest.approx(expected.loss, rel=1e-5), key
            assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5), key
            assert found.num_loss_tokens == expected.num_loss_tokens
            assert not found.skipped


def test_scores_and_picks_are_those_of_the_megatron_engine(trained: Trained) -> None:
    for key, outcome, reference in pairs(trained):
        for found, expected in zip(outcome.scores, reference.scores, strict=True):
            np.testing.assert_allclose(found.log_prob_S, expected.log_prob_S, atol=1e-4, err_msg=str(key))
            assert found.picks.keys() == expected.picks.keys() == {0}


def test_metrics_are_those_of_the_megatron_engine(trained: Trained) -> None:
    for (name, kind, n), outcome, reference in pairs(trained):
        for found, expected in zip(outcome.steps, reference.steps, strict=True):
            if n == kind.cp:  # two data-parallel ranks look at two rows
                assert found.routing == pytest.approx(expected.routing, abs=1e-6)
            reduced_meanwhile = {"reduce"} if kind.zero else set()  # by DeepSpeed, while the backward pass runs
            assert expected.memory.keys() - found.memory.keys() == reduced_meanwhile, name
        if name == "tied" and kind.cp == n:
            megatron = trained.outcomes[name, Kind(0, 2), 2][0] if n == 2 else reference
            assert [step.comm for step in outcome.steps] == [step.comm for step in megatron.steps]
            assert (n == 2) == bool(outcome.steps[0].comm)


# Checkpoints


def whole_state(engine: GptEngine) -> dict[str, np.ndarray]:
    """fp32 weights and moments of a DeepSpeed engine, and the weights that the model computes with."""
    assert isinstance(engine, DeepSpeedEngine)
    state = {f"{kind} {name}": engine._whole_fp32(name, kind) for name in engine._parameters for kind in KINDS}
    for name, parameter in engine._parameters.items():
        with engine._whole(parameter):
            state[f"model {name}"] = parameter.detach().float().clone()
    state["step"] = torch.stack([held["step"] for held in engine._adamw.state.values()])
    return {name: tensor.numpy().copy() for name, tensor in state.items()}


def assert_same_state(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def trained_over(engine: GptEngine, steps: range) -> list[float]:
    return [engine.train_step(own_rows(engine, STEP_ROWS[step]), lr=LR).loss for step in steps]


IDENTITY = Identity(model_fingerprint(CASES["tied"].model), "ab" * 32, 7, {}, {})
STAGES = (replace(MIXED_STAGE, tokens=STEPS, tokens_per_step=1, seq_len=1),)


def store_of(folder: Path) -> CheckpointStore:
    """As a run has it: a thread writes while training goes on."""
    return CheckpointStore(folder, IDENTITY, "", STAGES, keep_last=1, asynchronous=True)


def saved(engine: GptEngine, folder: Path, steps: int = SAVED_AFTER) -> CheckpointStore:
    store = store_of(folder)
    store.save(engine, Progress(steps, 0, steps, steps), stage_end=False)
    return store


def loaded(case: Case, kind: Kind, folder: Path) -> GptEngine:
    engine = engine_of(case, kind, seed=8)  # other initial weights: loading must replace all
    (path,) = list_checkpoints(folder)
    load_checkpoint(path, engine, IDENTITY)
    return engine


RESUMED = (Kind(1, 2), Kind(2, 2), Kind(3, 2), Kind(3, 1), Kind(1, 2, "bf16"), Kind(2, 1, "bf16"), Kind(3, 2, "bf16"))
UNTRAINED = (Kind(2, 2), Kind(3, 2), Kind(1, 2, "bf16"))  # saved before the first step, too
LATER = range(SAVED_AFTER, SAVED_AFTER + 2)


def resumed_on_2_ranks(rank: int, n: int, folder: Path) -> dict[Kind, tuple[list[float], dict[str, np.ndarray]]]:
    """Losses after the save, and the state at the save; checks that the run that resumes is the run that goes on."""
    case, found = CASES["tied"], {}
    for kind in RESUMED:
        straight = engine_of(case, kind)
        if kind in UNTRAINED:
            saved(straight, folder / f"{kind} untrained", 0).finish()
        trained_over(straight, range(SAVED_AFTER))
        at_save = whole_state(straight)
        store = saved(straight, folder / str(kind))
        losses = trained_over(straight, LATER)
        store.finish()
        end = whole_state(straight)
        again = loaded(case, kind, folder / str(kind))
        assert_same_state(whole_state(again), at_save)
        assert trained_over(again, LATER) == losses
        assert_same_state(whole_state(again), end)
        if kind in UNTRAINED:
            untrained = loaded(case, kind, folder / f"{kind} untrained")
            trained_over(untrained, range(SAVED_AFTER))
            assert_same_state(whole_state(untrained), at_save)
        found[kind] = losses, at_save
    megatron = engine_of(case, Kind(0, 2))
    trained_over(megatron, range(SAVED_AFTER))
    saved(megatron, folder / "megatron").finish()
    found[Kind(0, 2)] = trained_over(megatron, LATER), {}
    return found


def resumed_on_1_rank(rank: int, n: int, folder: Path, at_save: dict[Kind, dict[str, np.ndarray]]) -> dict[str, Any]:
    """Losses of the steps after the save, by (what was saved, what resumed)."""
    case, found = CASES["tied"], {}
    for kind, other in ((Kind(1, 2), Kind(3)), (Kind(2, 2), Kind(1)), (Kind(3, 2), Kind(2)), (Kind(3, 1), Kind(3))):
        engine = loaded(case, other, folder / str(kind))
        assert_same_state({**whole_state(engine), "step": at_save[kind]["step"]}, at_save[kind])
        assert set(whole_state(engine)["step"]) == {SAVED_AFTER}
        found[f"{kind} by {other}"] = trained_over(engine, LATER)
    for kind, other in ((Kind(3, 2), Kind(0)), (Kind(0, 2), Kind(2))):
        name = "megatron" if kind.zero == 0 else str(kind)
        found[f"{name} by {other}"] = trained_over(loaded(case, other, folder / name), LATER)
    found["bf16"] = trained_over(loaded(case, Kind(0, 1, "bf16"), folder / str(Kind(2, 1, "bf16"))), LATER)
    return found


def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit_and_fits_other_meshes_stages_and_engines(
    tmp_path: Path,
) -> None:
    of_ranks = run_ranks(resumed_on_2_ranks, 2, tmp_path)
    expected = of_ranks[0][Kind(0, 2)][0]
    at_save = {kind: state for kind, (_, state) in of_ranks[0].items()}
    for of_rank in of_ranks:
        for kind, (losses, _) in of_rank.items():
            assert losses == pytest.approx(expected, rel=1e-5 if kind.precision == "fp32" else 0.02), kind
    for how, losses in run_ranks(resumed_on_1_rank, 1, tmp_path, at_save)[0].items():
        assert losses == pytest.approx(expected, rel=0.02 if how == "bf16" else 1e-5), how


# Steps that are not taken, and what DeepSpeed must not do


def poisoned_on_one_rank(rank: int, n: int) -> None:
    bad = replace(STEP_ROWS[0][1], loss_mask_S=np.full(len(STEP_ROWS[0][1].tokens_S), np.nan, np.float32))
    silent = tuple(replace(row, loss_mask_S=np.zeros(len(row.tokens_S), np.float32)) for row in STEP_ROWS[0])
    for kind in (Kind(1), Kind(3), Kind(1, 1, "bf16"), Kind(2, 1, "bf16")):
        engine = engine_of(CASES["tied"], kind)
        trained_over(engine, range(1))
        before = whole_state(engine)
        for rows in ((STEP_ROWS[0][0], bad), silent):  # a NaN on data-parallel rank 1, and nothing that counts
            result = engine.train_step(own_rows(engine, rows), lr=LR)
            assert result.skipped
            assert not np.isfinite(result.loss)
            assert_same_state(whole_state(engine), before)
        hook = engine._gpt.decoder.final_layernorm.weight.register_hook(lambda gradient: gradient * np.inf)
        result = engine.train_step(own_rows(engine, STEP_ROWS[1]), lr=LR)
        hook.remove()
        assert result.skipped and np.isfinite(result.loss) and not np.isfinite(result.grad_norm)
        assert_same_state(whole_state(engine), before)
        untouched = engine_of(CASES["tied"], kind)
        trained_over(untouched, range(1))
        assert trained_over(engine, range(1, 3)) == trained_over(untouched, range(1, 3))


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all_and_leaves_no_trace() -> None:
    run_ranks(poisoned_on_one_rank, 2)


def what_deepspeed_did(rank: int, n: int, extensions: Path) -> dict[str, Any]:
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions)
    engine = engine_of(CASES["tied"], Kind(2, 2))
    groups = set(dist.distributed_c10d._world.pg_names.values())
    engine.train_step(STEP_ROWS[0], lr=LR)
    import deepspeed

    return {
        "environment": not {"DS_ACCELERATOR", "LOCAL_SIZE"} & os.environ.keys()
        and os.environ["LOCAL_RANK"] == str(rank),
        "groups": set(dist.distributed_c10d._world.pg_names.values()) == groups,
        "shared memory": deepspeed.comm.comm.cdb.shm_comm_op is None,
        "uses": deepspeed.utils.groups._get_sequence_data_parallel_group() is engine.topology.dp_cp_group,
    }


def test_deepspeed_compiles_nothing_and_makes_no_groups(tmp_path: Path) -> None:
    for found in run_ranks(what_deepspeed_did, 2, tmp_path):
        assert all(found.values()), found
    assert not list(tmp_path.iterdir())


def test_a_process_by_itself_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")  # so that it is as before in the end
    monkeypatch.delenv("LOCAL_RANK")
    engine = engine_of(CASES["tied"], Kind(3))
    first, *_ = trained_over(engine, range(2))
    scores_of(engine)
    assert engine.train_step(STEP_ROWS[0], lr=LR).loss < first
