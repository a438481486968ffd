from __future__ import annotations

import math

import pytest

from moba_train.config.schema import OptimizerConfig, StageConfig, UntilConfig
from moba_train.errors import ConfigError
from moba_train.train.progress import Progress
from moba_train.train.schedule import Place, build_schedule, lr_at

STAGES = (
    StageConfig(name="a", tokens=400, tokens_per_step=100, seq_len=50),
    StageConfig(name="b", tokens=600, tokens_per_step=200, seq_len=200, lr=0.5),
)


def test_stages_follow_one_another_in_steps_and_tokens() -> None:
    schedule = build_schedule(STAGES, OptimizerConfig(lr=1.0))
    assert schedule.total_steps == 4 + 3
    assert schedule.total_tokens == 1000
    assert [schedule.tokens_after(step) for step in range(8)] == [0, 100, 200, 300, 400, 600, 800, 1000]
    assert schedule.place(0) == Place(0, 0, rows=2, is_stage_end=False)
    assert schedule.place(3) == Place(0, 3, rows=2, is_stage_end=True)
    assert schedule.place(4) == Place(1, 0, rows=1, is_stage_end=False)
    assert schedule.place(6) == Place(1, 2, rows=1, is_stage_end=True)


def test_every_row_of_a_stage_belongs_to_exactly_one_step() -> None:
    schedule = build_schedule(STAGES, OptimizerConfig())
    assert [list(schedule.sample_ids(step)) for step in range(7)] == [[0, 1], [2, 3], [4, 5], [6, 7], [0], [1], [2]]


@pytest.mark.parametrize("step", [-1, 7])
def test_a_step_outside_the_run_has_no_place(step: int) -> None:
    with pytest.raises(IndexError, match="outside the run of 7 steps"):
        build_schedule(STAGES, OptimizerConfig()).place(step)


def test_warm_up_rises_linearly_and_the_first_step_already_moves() -> None:
    optimizer = OptimizerConfig(warmup_tokens=200, min_lr_ratio=0.0)
    rates = [lr_at(tokens, peak=2.0, optimizer=optimizer, total_tokens=1000) for tokens in (50, 100, 200)]
    assert rates == [0.5, 1.0, 2.0]


def test_cosine_is_half_way_down_in_the_middle_and_at_the_minimum_at_the_end() -> None:
    optimizer = OptimizerConfig(warmup_tokens=200, min_lr_ratio=0.1)
    rates = [lr_at(tokens, peak=1.0, optimizer=optimizer, total_tokens=1000) for tokens in (200, 400, 600, 800, 1000)]
    quarter = 0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi / 4))
    assert rates == pytest.approx([1.0, quarter, 0.55, 1.1 - quarter, 0.1], abs=1e-12)


def test_wsd_stays_at_the_peak_and_decays_linearly_at_the_end() -> None:
    optimizer = OptimizerConfig(schedule="wsd", warmup_tokens=100, decay_tokens=400, min_lr_ratio=0.25)
    rates = [lr_at(tokens, peak=1.0, optimizer=optimizer, total_tokens=1000) for tokens in (50, 100, 600, 800, 1000)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.625, 0.25], abs=1e-12)


def test_wsd_without_a_decay_never_leaves_the_peak() -> None:
    optimizer = OptimizerConfig(schedule="wsd", decay_tokens=0)
    assert lr_at(1000, peak=1.0, optimizer=optimizer, total_tokens=1000) == 1.0


def test_a_warm_up_as_long_as_the_run_ends_at_the_peak() -> None:
    optimizer = OptimizerConfig(warmup_tokens=1000)
    assert lr_at(1000, peak=1.0, optimizer=optimizer, total_tokens=1000) == 1.0


def test_a_stage_has_its_own_peak_and_the_cosine_runs_over_all_stages() -> None:
    schedule = build_schedule(STAGES, OptimizerConfig(lr=1.0, min_lr_ratio=0.0))
    assert schedule.lr(0) == pytest.approx(0.5 * (1.0 + math.cos(math.pi * 0.1)))
    assert schedule.lr(3) == pytest.approx(0.5 * (1.0 + math.cos(math.pi * 0.4)))
    assert schedule.lr(4) == pytest.approx(0.5 * 0.5 * (1.0 + math.cos(math.pi * 0.6)))
    assert schedule.lr(6) == 0.0


@pytest.mark.parametrize(
    ("stage", "where"),
    [
        (StageConfig(tokens=100, tokens_per_step=100, seq_len=30), "stages.0.tokens_per_step"),
        (StageConfig(tokens=100, tokens_per_step=0, seq_len=30), "stages.0.tokens_per_step"),
        (StageConfig(tokens=150, tokens_per_step=100, seq_len=50), "stages.0.tokens"),
        (StageConfig(tokens=0, tokens_per_step=100, seq_len=50), "stages.0.tokens"),
    ],
)
def test_a_stage_that_is_no_whole_number_of_steps_is_refused(stage: StageConfig, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_schedule((stage,), OptimizerConfig())
    assert caught.value.where == where


UNTIL = UntilConfig(loss_plateau=0.01)
DECIDING = (
    StageConfig(name="a", tokens=1000, tokens_per_step=100, seq_len=50, until=UNTIL),
    StageConfig(name="b", tokens=1000, tokens_per_step=200, seq_len=200, lr=0.5, until=UNTIL),
    StageConfig(name="c", tokens=400, tokens_per_step=100, seq_len=50),
)


def test_stages_move_up_when_the_end_of_one_is_decided() -> None:
    longest = build_schedule(DECIDING, OptimizerConfig())
    schedule = longest.with_decided({0: 3})
    assert (longest.total_steps, longest.total_tokens) == (10 + 5 + 4, 2400)
    assert (schedule.total_steps, schedule.total_tokens) == (3 + 5 + 4, 1700)
    assert schedule.place(2) == Place(0, 2, rows=2, is_stage_end=True)
    assert schedule.place(3) == Place(1, 0, rows=1, is_stage_end=False)
    assert (schedule.tokens_after(3), schedule.tokens_after(4)) == (300, 500)
    assert list(schedule.sample_ids(4)) == [1]
    assert build_schedule(DECIDING, OptimizerConfig(), {0: 3}) == schedule
    assert longest.with_decided({}) is longest and schedule.with_decided({0: 3}) is schedule


def test_a_run_that_is_to_be_evaluated_first_goes_on_in_the_stage_of_its_last_step() -> None:
    schedule = build_schedule(STAGES, OptimizerConfig())
    assert [schedule.stage_of_next_step(Progress(step)) for step in (0, 3, 4, 7)] == [0, 0, 1, 1]
    assert [schedule.stage_of_next_step(Progress(step, evaluated=False)) for step in (0, 3, 4, 5, 7)] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("warmup_tokens", [0, 250])
def test_no_learning_rate_depends_on_a_decision_that_has_not_been_made(warmup_tokens: int) -> None:
    """The rules of the configuration: "wsd", and a decay within the stages behind the last one that decides."""
    optimizer = OptimizerConfig(schedule="wsd", decay_tokens=400, warmup_tokens=warmup_tokens)
    longest = build_schedule(DECIDING, optimizer)
    rates = [longest.lr(step) for step in range(15)]
    for first in range(1, 11):
        assert [longest.with_decided({0: first}).lr(step) for step in range(first)] == rates[:first]
        known = longest.with_decided({0: first})
        for second in range(1, 6):
            both = known.with_decided({0: first, 1: second})
            done = first + second
            assert [both.lr(step) for step in range(done)] == [known.lr(step) for step in range(done)]
            assert both.lr(both.total_steps - 1) == pytest.approx(optimizer.lr * optimizer.min_lr_ratio)


def test_a_schedule_without_stages_is_refused() -> None:
    with pytest.raises(ConfigError, match="no stage"):
        build_schedule((), OptimizerConfig())
