from __future__ import annotations

from moba_train.config.schema import StageConfig
from moba_train.train.figures import memory_rows, take_memory, time_per_token_us
from moba_train.train.summary import RunSummary
from tests.unit.train.test_metrics import a_record

STAGES = (StageConfig(name="short", seq_len=1_000), StageConfig(name="long", seq_len=1_048_576))


def test_the_last_lines_compare_the_time_per_token_of_stages_and_name_the_largest_memory() -> None:
    summary = RunSummary(STAGES)
    assert summary.lines() == []
    for step, (stage, rate, attention) in enumerate(
        [("short", 500.0, 0.5), ("short", 1000.0, 0.25), ("long", 800.0, 2.0), ("long", 800.0, 1.0)], start=1
    ):
        memory = {"memory/attention_gib": attention, "memory/peak_gib": 3.0, "memory/peak_all_ranks_gib": 5.5}
        summary.write(a_record(step, stage=stage) | {"perf/tokens_per_s": rate} | memory)
    lines = summary.lines()
    assert [line.split()[0] for line in lines[1:3]] == ["short", "long"]
    assert "1000.00 us per token" in lines[1] and "1.00 x the first stage" in lines[1]
    assert "1,048,576" in lines[2] and "1250.00 us per token" in lines[2] and "1.25 x the first stage" in lines[2]
    assert [line.split()[:2] for line in lines[4:6]] == [["attention", "2.000"], ["peak", "3.000"]]
    assert lines[6].startswith("  peak all ranks   5.500 GiB")


def test_the_peak_of_one_rank_is_never_above_that_of_all_of_them() -> None:
    summary, largest = RunSummary(STAGES), {}
    asked = {"memory/peak_gib": 3.0, "memory/peak_all_ranks_gib": 3.0}
    for step, memory in enumerate([{"memory/peak_gib": 2.5}, asked, {"memory/peak_gib": 3.2}], start=1):
        summary.write(a_record(step, stage="short") | {"perf/tokens_per_s": 1.0} | memory)
        take_memory(largest, memory)
        assert largest == (asked if step > 1 else memory)
    assert [line.split(" GiB")[0].split() for line in summary.lines()[3:]] == [
        ["peak", "3.000"],
        ["peak", "all", "ranks", "3.000"],
    ]


def test_the_first_of_two_steps_does_not_count_and_of_many_the_middle_one_does() -> None:
    assert time_per_token_us([100.0, 200.0]) == 5000.0
    assert time_per_token_us([100.0]) == 10_000.0
    assert time_per_token_us([1.0, 200.0, 250.0]) == 5000.0


def test_components_stand_in_the_order_of_a_step_and_only_those_that_were_measured() -> None:
    rows = memory_rows({"memory/peak_gib": 1.5, "memory/weights_gib": 0.5, "train/loss": 1.0})
    assert [(name, gib) for name, gib, _ in rows] == [("weights", 0.5), ("peak", 1.5)]
