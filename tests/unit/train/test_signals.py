from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moba_train.train.signals import StopSignals

REPOSITORY = Path(__file__).parents[3]

TWICE = """
import os, signal, sys, time
from moba_train.train.signals import StopSignals
with StopSignals(burst_s=0.05):
    for name in sys.argv[1:]:
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(0.1)
print("still here")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_becomes_a_wish_to_stop(name: str) -> None:
    before = signal.getsignal(getattr(signal, name))
    with StopSignals() as signals:
        assert signals.requested == ""
        os.kill(os.getpid(), getattr(signal, name))
        assert signals.requested == name
        os.kill(os.getpid(), getattr(signal, name))  # the same request, delivered twice in a burst
    assert signal.getsignal(getattr(signal, name)) == before


def send(*names: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", TWICE, *names]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=REPOSITORY)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_the_same_signal_again_ends_the_process_at_once(name: str) -> None:
    done = send(name, name)
    assert done.returncode == -getattr(signal, name)
    assert "still here" not in done.stdout


@pytest.mark.parametrize("names", [("SIGUSR1", "SIGUSR1"), ("SIGUSR1", "SIGTERM")])
def test_a_warning_ahead_of_the_time_limit_leaves_time_to_save(names: tuple[str, str]) -> None:
    done = send(*names)
    assert done.returncode == 0
    assert "still here" in done.stdout
