"""When a run stops for want of time: the lead, what it is measured from, and what is told."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from moba_train.config.load import load_config
from moba_train.errors import ConfigError
from moba_train.train.signals import StopSignals
from moba_train.train.stopping import (
    RECENT_STEPS,
    Deadline,
    Stopping,
    deadlines,
    first_save_s,
    process_age_s,
)

REPOSITORY = Path(__file__).parents[3]


class Job:
    """A run on a clock of our own, with a deadline."""

    def __init__(self, left_s: float, *, first_save_s: float = 0.0) -> None:
        self.now_s = 1000.0
        self.stopping = Stopping(
            StopSignals(),
            (Deadline("the far end", 1e9), Deadline("stop_after 1h", self.now_s + left_s)),
            first_save_s=first_save_s,
            clock=lambda: self.now_s,
        )

    def step(self, step_s: float, rest_s: float = 0.0, *, save_s: float = 0.0, in_flight_s: float | None = None) -> str:
        """A step, and what belongs to it; why the run stops, or ""."""
        self.now_s += step_s
        reason = self.stopping.wish(save_s, in_flight_s)
        self.now_s += rest_s
        self.stopping.step_done()
        return reason


def test_a_run_without_a_deadline_goes_on_and_says_nothing() -> None:
    stopping = Stopping(StopSignals())
    assert stopping.announce() == () and stopping.wish(0.0) == "" and stopping.reason == ""


def test_a_run_stops_when_less_is_left_than_a_step_a_save_and_a_minute() -> None:
    job = Job(200.0)
    steps = []
    while not (reason := job.step(12.0, save_s=8.0)):
        steps.append(job.now_s)
    # 200 - 12 * 10 = 80 is not more than 12 + 8 + 60
    assert len(steps) == 9
    assert reason == "stop_after 1h: 80 s left, a step takes 12.0 s, a save 8.0 s"
    assert job.step(0.1, save_s=8.0) == reason == job.stopping.reason, "a wish is not taken back"


def test_an_evaluation_counts_as_part_of_a_step_however_long_ago_it_was() -> None:
    job = Job(1000.0)
    job.step(1.0, rest_s=100.0)
    steps = 1
    while not (reason := job.step(1.0)):
        steps += 1
    assert steps > 3 * RECENT_STEPS
    assert reason.startswith("stop_after 1h: 161 s left, a step takes 101.0 s")


def test_the_first_evaluation_is_followed_by_no_step_that_does_not_fit_any_more() -> None:
    """Also one that was put off: there was no step before it."""
    for steps in (1, 0):
        job = Job(300.0)
        assert not any(job.step(10.0, save_s=5.0) for _ in range(steps))
        job.now_s += 150.0
        assert not job.stopping.wish_now(5.0)
        job.now_s += 90.0
        assert job.stopping.wish_now(5.0).startswith("stop_after 1h: ") and job.stopping.reason


def test_a_slow_first_step_is_forgotten_but_not_at_once() -> None:
    early, late = Job(500.0), Job(500.0)
    for job, steps in ((early, RECENT_STEPS // 2), (late, RECENT_STEPS)):
        assert not job.step(200.0)
        assert not any(job.step(1.0) for _ in range(steps))
    assert "250 s left, a step takes 200.0 s" in early.step(40.0)
    assert not late.step(40.0), "240 s are left, and 40 + 60 would do"


def test_longer_steps_of_a_new_stage_count_at_once() -> None:
    job = Job(400.0)
    assert not job.step(1.0) and not job.step(1.0)
    assert "a step takes 180.0 s" in job.step(180.0)


def test_the_first_save_is_estimated_and_measured_from_then_on() -> None:
    assert Job(200.0, first_save_s=150.0).step(1.0).endswith("a save perhaps 150.0 s")
    assert not Job(200.0, first_save_s=150.0).step(1.0, save_s=2.0)
    assert first_save_s(8_000_000_000) == pytest.approx(256.0)


def test_the_last_save_has_to_wait_for_one_that_is_under_way() -> None:
    """365 s are left: enough for a step, a save of 290 s and a minute, but not for two saves."""
    assert not Job(370.0).step(5.0, save_s=290.0)
    reason = Job(370.0).step(5.0, save_s=290.0, in_flight_s=40.0)
    assert reason.endswith("365 s left, a step takes 5.0 s, a save 290.0 s, the one under way 250.0 s more")
    assert not Job(370.0).step(5.0, save_s=290.0, in_flight_s=288.0), "it is nearly done"
    late = Job(200.0, first_save_s=1.0).step(5.0, in_flight_s=170.0)
    assert late.endswith("a save perhaps 170.0 s, the one under way 0.0 s more"), "the estimate was too low"


def test_a_signal_goes_before_a_deadline() -> None:
    job = Job(10.0)
    job.stopping._signals._name = "SIGTERM"
    assert job.step(1.0) == "SIGTERM"


def test_the_deadline_and_its_source_are_told_at_the_start() -> None:
    (line,) = Job(3600.0).stopping.announce()
    assert line.startswith("deadline: ") and "in 3600 s (stop_after 1h)" in line


def test_a_limit_of_our_own_that_is_always_too_short_is_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        Job(60.0).stopping.too_late()
    message = refused.value.message()
    assert "the deadline is too near to begin a step" in message and "stop_after 1h" in message
    assert "60 s left" in message
    assert Job(61.0).stopping.too_late() == ""
    assert Job(61.0).step(5.0), "one step is done all the same"


def test_under_slurms_own_deadline_a_late_start_is_a_planned_stop() -> None:
    """Ranks that are started again late in a job; the job's next start has all its time."""

    def late(left_s: float) -> str:
        (slurms,) = deadlines("never", {"SLURM_JOB_END_TIME": "2000"})
        own = Deadline("stop_after 1h", 9e9)
        return Stopping(StopSignals(), (own, slurms), clock=lambda: 2000.0 - left_s).too_late()

    assert late(61.0) == ""
    assert late(60.0).startswith("the end of the Slurm job, SLURM_JOB_END_TIME: 60 s left, too little to begin a step")
    assert "SLURM_JOB_END_TIME: 0 s left" in late(-500.0)


def test_stop_after_counts_from_the_start_of_the_process_and_slurm_tells_when_the_job_ends() -> None:
    before_s = time.time() - process_age_s()
    own, slurm = deadlines("1h30m", {"SLURM_JOB_END_TIME": "1900000000"})
    assert own.name == "stop_after 1h30m" and own.at_s == pytest.approx(before_s + 5400.0, abs=1.0)
    assert slurm.at_s == 1.9e9 and "SLURM_JOB_END_TIME" in slurm.name
    assert deadlines("never", {}) == ()


def test_an_end_of_the_job_that_is_no_time_is_refused() -> None:
    with pytest.raises(ConfigError, match="SLURM_JOB_END_TIME"):
        deadlines("never", {"SLURM_JOB_END_TIME": "tomorrow"})


def test_the_age_of_a_process_includes_what_came_before_our_first_line() -> None:
    program = (
        "import time; time.sleep(0.4); from moba_train.train.stopping import process_age_s; print(process_age_s())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert 0.4 <= float(done.stdout) < 30.0


def test_stop_after_is_short_for_a_key_of_the_configuration() -> None:
    config = load_config(REPOSITORY / "configs" / "smoke.toml", ["--stop-after", "3h50m"])
    assert config.run.stop_after == "3h50m"
