"""Lengths of time, and the rules of a job."""

from __future__ import annotations

import math

import pytest

from moba_train.config.job_rules import duration_s


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3h50m", 13800.0), ("90s", 90.0), ("2h", 7200.0), ("1d2h3m4s", 93784.0), (" 5m ", 300.0), ("never", math.inf)],
)
def test_a_length_of_time_reads_as_people_write_it(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "0s", "3", "3:50", "50m3h", "-5m", "1.5h", "soon", "NEVER"])
def test_what_is_no_length_of_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no length of time"):
        duration_s(text)
