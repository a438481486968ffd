"""Stages that decide where they end: what the configuration must say for that, all mistakes at once."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moba_train.config.load import load_config, to_toml
from moba_train.config.schema import EvalConfig, OptimizerConfig, RunConfig, StageConfig, UntilConfig
from moba_train.config.validate import find_errors, validate

SMOKE = Path(__file__).parents[3] / "configs" / "smoke.toml"
GAP = UntilConfig(trailing_gap=0.01, evaluations=2)


@pytest.fixture(scope="module")
def good() -> RunConfig:
    """20 steps of MoBA, evaluated every 4, which may end after 9; then 10 of full attention, over which lr decays."""
    smoke = load_config(SMOKE)
    moba, full = smoke.stages
    assert (moba.tokens, full.tokens, moba.tokens_per_step) == (20480, 10240, 1024)
    optimizer = replace(smoke.optimizer, schedule="wsd", warmup_tokens=1024, decay_tokens=10240)
    return replace(
        smoke, stages=(replace(moba, until=GAP), full), optimizer=optimizer, eval=EvalConfig(every_steps=4, rows=2)
    )


def with_until(config: RunConfig, stage: int = 0, **changes: Any) -> RunConfig:
    stages = list(config.stages)
    stages[stage] = replace(stages[stage], until=replace(stages[stage].until, **changes))
    return replace(config, stages=tuple(stages))


def with_stage(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, stages=(replace(config.stages[0], **changes), *config.stages[1:]))


def with_optimizer(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, optimizer=replace(config.optimizer, **changes))


def test_a_stage_may_decide_and_the_decay_lies_behind_it(good: RunConfig, tmp_path: Path) -> None:
    validate(good)
    validate(with_until(good, trailing_gap=1e-12))
    validate(with_until(good, trailing_gap=0.0, loss_plateau=1e-12))
    (tmp_path / "c.toml").write_text(to_toml(good))
    assert load_config(tmp_path / "c.toml") == good


def test_a_last_stage_that_decides_has_no_decay(good: RunConfig) -> None:
    last = with_optimizer(with_until(good, 1, loss_plateau=0.01, evaluations=1), decay_tokens=0)
    validate(last)
    (error,) = find_errors(with_optimizer(last, decay_tokens=1))
    assert (error.where, error.allowed.split(",")[0]) == ("optimizer.decay_tokens", "at most 0")


@pytest.mark.parametrize(
    ("change", "where", "fragment"),
    [
        (lambda c: with_until(c, loss_plateau=0.1), "stages.0.until", "one of them above 0"),
        (lambda c: with_until(c, trailing_gap=-0.1), "stages.0.until.trailing_gap", ">= 0"),
        (lambda c: with_until(c, loss_plateau=math.nan), "stages.0.until.loss_plateau", "finite"),
        (lambda c: with_until(c, evaluations=0), "stages.0.until.evaluations", "1 to 1000"),
        (lambda c: with_until(c, 1, evaluations=1001), "stages.1.until.evaluations", "1 to 1000"),
        (lambda c: replace(c, eval=replace(c.eval, every_steps=0)), "eval.every_steps", ">= 1"),
        (lambda c: replace(c, eval=replace(c.eval, rows=0)), "eval.rows", ">= 1"),
        (lambda c: with_stage(c, attention="full"), "stages.0.until.trailing_gap", 'attention = "moba"'),
        (lambda c: with_until(c, evaluations=4), "stages.0.tokens", "more than 20 steps"),
        (lambda c: with_optimizer(c, schedule="cosine", decay_tokens=0), "optimizer.schedule", '"wsd"'),
        (lambda c: with_optimizer(c, decay_tokens=10241), "optimizer.decay_tokens", "at most 10240"),
        (lambda c: with_optimizer(c, warmup_tokens=9217), "optimizer.warmup_tokens", "together at most 19456"),
    ],
)
def test_each_mistake_has_a_message_of_its_own(good: RunConfig, change: Any, where: str, fragment: str) -> None:
    found = list(find_errors(change(good)))
    assert [error.where for error in found] == [where]
    assert fragment in found[0].message()


def test_warm_up_may_be_as_long_as_what_is_trained_in_any_case(good: RunConfig) -> None:
    """The first evaluation may come after one step, the second and third 4 steps apart: 9 steps."""
    validate(with_optimizer(good, warmup_tokens=9 * 1024))


def test_all_mistakes_are_told_at_once(good: RunConfig) -> None:
    bad = with_optimizer(with_until(good, loss_plateau=0.1, evaluations=0), schedule="cosine", decay_tokens=0)
    found = [error.where for error in find_errors(replace(bad, eval=EvalConfig(rows=0)))]
    assert found == [
        "stages.0.until",
        "stages.0.until.evaluations",
        "eval.every_steps",
        "eval.rows",
        "optimizer.schedule",
    ]


def test_a_configuration_without_until_is_what_it_was() -> None:
    assert StageConfig().until == UntilConfig() and OptimizerConfig().schedule == "cosine"
    validate(load_config(SMOKE))
