from __future__ import annotations

import io

from rich.console import Console

from moba_train.engine.phases import Phase
from moba_train.train.console import ConsoleLogger
from tests.unit.train.test_metrics import a_record


def log_of(records: list[dict[str, object]], *, terminal: bool = False, log_every: int = 4) -> list[str]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=200, highlight=False, soft_wrap=True)
    logger = ConsoleLogger(log_every=log_every, total_steps=10, resume_step=0, console=console)
    for record in records:
        logger.write(record)
    logger.close()
    return stream.getvalue().splitlines()


def test_a_line_every_n_steps_and_for_the_first_step_of_a_stage_and_the_last_of_the_run() -> None:
    stages = ["short"] * 5 + ["long"] * 5
    lines = log_of([a_record(step, stage=stages[step - 1]) for step in range(1, 11)])
    assert [int(line.split("/")[0].removeprefix("step ")) for line in lines] == [1, 4, 6, 8, 10]


def test_bad_and_evaluated_steps_are_never_left_out() -> None:
    records = [a_record(step) for step in range(1, 4)]
    records[1]["train/bad"] = True
    records[2]["eval/loss_moba"] = 2.0
    lines = log_of(records)
    assert "NOT FINITE" in lines[1] and lines[2].startswith("step  3/10") and lines[3] == "  eval | held-out 2.000 MoBA"


def test_the_evaluation_line_is_short_and_compares_the_attentions() -> None:
    record = a_record(1) | {
        "eval/loss_moba": 4.39912,
        "eval/loss_full": 4.39644,
        "eval/position_loss_moba": [4.0, None],
        "eval/trailing_loss_moba": 4.54,
        "eval/trailing_loss_full": 4.515,
        "eval/bits_per_byte_moba": 2.498,
        "eval/bits_per_byte_full": 2.4971,
        "eval/bits_per_byte_unigram": 3.3219,
        "eval/niah_moba": 2 / 3,
        "eval/niah_full": 0.96,
        "eval/niah_log_prob_moba": -0.7,
    }
    assert log_of([record])[1] == (
        "  eval | held-out 4.399 MoBA, 4.396 full | trailing 4.540 MoBA, 4.515 full"
        " | bits/byte 2.498 MoBA, 2.497 full (unigram 3.322) | needle 0.67 MoBA, 0.96 full"
    )


def test_a_held_out_loss_that_is_not_a_number_is_seen() -> None:
    assert "held-out NAN full" in log_of([a_record(1) | {"eval/loss_full": float("nan")}])[1]


def test_throughput_is_the_mean_since_the_last_line() -> None:
    slow = {"perf/step_time_s": 1.5, "perf/tokens_per_s": 16 / 1.5, "perf/tokens_per_s_per_rank": 8 / 1.5}
    lines = log_of([a_record(1), a_record(2, **slow), a_record(3)], log_every=3)
    assert "32 tok/s (16/rank)" in lines[0]
    assert "16 tok/s (8/rank)" in lines[1]  # steps of 1.5 s and 0.5 s, 16 tokens each
    assert "ETA 5s" in lines[1]  # 7 steps to go, at the mean of 0.5 s (the first line) and 1.0 s (since then)


def test_no_control_characters_reach_a_file() -> None:
    assert all(line.isprintable() for line in log_of([a_record(1), a_record(2)]))


def test_brackets_in_a_stage_name_are_not_markup() -> None:
    assert "| [bold] |" in log_of([a_record(1, stage="[bold]")])[0]


def test_a_terminal_gets_a_progress_bar() -> None:
    assert "\x1b[" in "".join(log_of([a_record(1)], terminal=True))


def phases_at(times_s: list[float], *, terminal: bool = False) -> str:
    """What is written when phases of step 3 begin at these times; the first is "data"."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=200, highlight=False, soft_wrap=True)
    clock = iter([0.0, *times_s])
    logger = ConsoleLogger(log_every=1, total_steps=10, resume_step=2, console=console, clock=lambda: next(clock))
    logger.phase(Phase("data"))
    for layer in range(len(times_s) - 1):
        logger.phase(Phase("attention", "forward", layer=layer, of=4))
    logger.close()
    return stream.getvalue()


def test_a_long_step_says_now_and_then_where_it_is_and_a_short_one_says_nothing() -> None:
    assert phases_at([100.0, 100.1, 101.0, 109.0]) == ""
    assert phases_at([100.0, 108.0, 111.0, 113.0, 175.0]).splitlines() == [
        "  in step 3/10 since 11s: forward, layer 2/4, attention",
        "  in step 3/10 since 1m15s: forward, layer 4/4, attention",
    ]


def test_on_a_terminal_the_bar_says_where_the_step_is() -> None:
    assert "in step" not in phases_at([100.0, 175.0], terminal=True)
    assert "step 3: forward, layer 1/4, attention" in phases_at([100.0, 100.1], terminal=True)
