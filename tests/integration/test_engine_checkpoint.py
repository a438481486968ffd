"""Sharded state: what continues is bit-equal on the same mesh, and fits any other mesh."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moba_train.config.schema import EngineConfig, OptimizerConfig
from moba_train.errors import ConfigError
from moba_train.train.megatron_io import load_sharded, save_sharded
from tests.distributed import run_ranks
from tests.integration.engine_case import CASES, Case, engine_of, moments, packed_row, weights

ROWS = tuple(packed_row(seed) for seed in range(6))


def case_of(precision: str, distributed: bool) -> Case:
    engine = EngineConfig(device="cpu", precision=precision, distributed_optimizer=distributed)  # type: ignore[arg-type]
    return replace(CASES["mixed"], engine=engine, optimizer=OptimizerConfig())


def trained(
    rank: int, n: int, case: Case, mesh: dict[str, int], load: Path | None, save: Path | None, steps: range
) -> dict[str, Any]:
    """Build, load if asked to, train over some rows, save if asked to; returns what the ranks hold then."""
    engine = engine_of(case, seed=7 if load is None else 8, **mesh)  # other initial weights: loading must replace all
    if load is not None:
        engine.load_state_dict(load_sharded(engine.sharded_state_dict(is_loading=True), load))
    losses = [engine.train_step([ROWS[i]], lr=1e-2).loss for i in steps]
    if save is not None:
        save_sharded(engine.sharded_state_dict(is_loading=False), save)
    return {"losses": losses, "weights": weights(engine), "moments": moments(engine)}


def folder(tmp_path: Path, name: str) -> Path:
    path = tmp_path / name
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("precision", "distributed"),
    [("fp32", True), ("bf16", True), ("fp32", False)],
    ids=["distributed optimizer", "distributed optimizer in bf16", "plain optimizer"],
)
def test_a_loaded_run_continues_bit_for_bit(tmp_path: Path, precision: str, distributed: bool) -> None:
    case, mesh = case_of(precision, distributed), {"cp": 2}
    straight = run_ranks(trained, 2, case, mesh, None, None, range(4))
    at_2 = folder(tmp_path, "at_2")
    run_ranks(trained, 2, case, mesh, None, at_2, range(2))
    resumed = run_ranks(trained, 2, case, mesh, at_2, None, range(2, 4))
    for whole, rest in zip(straight, resumed, strict=True):
        assert rest["losses"] == whole["losses"][2:]
        for name, value in whole["weights"].items():
            np.testing.assert_array_equal(rest["weights"][name], value, err_msg=name)
        for a, b in zip(rest["moments"], whole["moments"], strict=True):
            np.testing.assert_array_equal(a, b)


def loaded(rank: int, n: int, case: Case, saved: Path) -> tuple[dict[str, np.ndarray], list[tuple[Any, ...]]]:
    """Weights and the settings of the parameter groups after loading on two context-parallel ranks."""
    engine = engine_of(case, seed=8, cp=n)
    engine.load_state_dict(load_sharded(engine.sharded_state_dict(is_loading=True), saved))
    groups = engine._optimizer.param_groups
    return weights(engine), [(group["weight_decay"], tuple(group["betas"]), group["eps"]) for group in groups]


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed optimizer", "plain optimizer"])
def test_weight_decay_betas_and_eps_are_those_of_the_configuration(tmp_path: Path, distributed: bool) -> None:
    case, saved = case_of("fp32", distributed), folder(tmp_path, "saved")
    run_ranks(trained, 2, case, {"cp": 2}, None, saved, range(1))
    other = OptimizerConfig(weight_decay=30.0, beta1=0.1, beta2=0.2, eps=1e-4)
    for _, groups in run_ranks(loaded, 2, replace(case, optimizer=other), saved):
        assert sorted(groups) == [(0.0, (0.1, 0.2), 1e-4), (30.0, (0.1, 0.2), 1e-4)]


def test_ranks_hold_the_same_weights_where_a_run_in_bf16_goes_on_in_fp32(tmp_path: Path) -> None:
    saved = folder(tmp_path, "saved")
    rounded = run_ranks(trained, 2, case_of("bf16", True), {"cp": 2}, None, saved, range(2))[0]["weights"]
    (first, _), (second, _) = run_ranks(loaded, 2, case_of("fp32", True), saved)
    assert any((first[name] != value).any() for name, value in rounded.items())  # the master weights are finer
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value, err_msg=name)
        np.testing.assert_allclose(value, rounded[name], rtol=2**-8, err_msg=name)


def holds_state(rank: int, n: int) -> bool:
    state = engine_of(case_of("fp32", True)).sharded_state_dict(is_loading=False)
    return "param_state" in state["optimizer"]


def test_the_first_data_parallel_rank_alone_collects_the_optimizer_state_to_be_saved() -> None:
    """All ranks at once would hold three times the model each, on GPUs by way of their memory."""
    assert run_ranks(holds_state, 2) == [True, False]


def test_state_moves_between_meshes_without_a_change(tmp_path: Path) -> None:
    """CP=2 -> CP=1 -> TP=2 -> PP=2 -> CP=2, saving without training: the last reads what the first wrote.

    The head is tied, so that both pipeline ranks hold it.
    """
    case, previous = case_of("fp32", True), folder(tmp_path, "first")
    first = run_ranks(trained, 2, case, {"cp": 2}, None, previous, range(2))
    for n, mesh in ((1, {"cp": 1}), (2, {"tp": 2}), (2, {"pp": 2})):
        here = folder(tmp_path, f"{mesh} after {previous.name}")
        found = run_ranks(trained, n, case, mesh, previous, here, range(0))
        if "cp" in mesh:
            for name, value in first[0]["weights"].items():
                np.testing.assert_array_equal(found[0]["weights"][name], value, err_msg=f"{mesh} {name}")
        previous = here
    again = run_ranks(trained, 2, case, {"cp": 2}, previous, None, range(0))
    for name, value in first[0]["weights"].items():
        np.testing.assert_array_equal(again[0]["weights"][name], value, err_msg=name)
    for of_first, of_again in zip(first, again, strict=True):
        for a, b in zip(of_first["moments"], of_again["moments"], strict=True):
            np.testing.assert_array_equal(a, b)


def saved_and_loaded_untrained(rank: int, n: int, cases: list[Case], folders: list[Path]) -> None:
    for case, at_0 in zip(cases, folders, strict=True):
        fresh = trained(rank, n, case, {}, None, at_0, range(0))
        loaded = trained(rank, n, case, {}, at_0, None, range(0))
        for name, value in fresh["weights"].items():
            np.testing.assert_array_equal(loaded["weights"][name], value)
        for a, b in zip(fresh["moments"], loaded["moments"], strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_model_that_was_never_trained_can_be_saved_and_loaded(tmp_path: Path) -> None:
    cases = [case_of("fp32", True), case_of("fp32", False), case_of("bf16", False)]
    run_ranks(saved_and_loaded_untrained, 1, cases, [folder(tmp_path, str(i)) for i in range(len(cases))])


def refused(rank: int, n: int, case: Case, mesh: dict[str, int]) -> str:
    with pytest.raises(ConfigError) as caught:
        engine_of(case, **mesh)
    return str(caught.value)


def test_meshes_that_do_not_divide_the_model_are_refused_by_name() -> None:
    odd = replace(CASES["full"], model=replace(CASES["full"].model, num_layers=3))
    assert "parallel.pp" in run_ranks(refused, 2, odd, {"pp": 2})[0]
