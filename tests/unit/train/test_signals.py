from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moba_train.train.signals import StopSignals, interrupting

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


def test_what_a_signal_leads_to_is_said_at_once_and_once() -> None:
    lines: list[str] = []
    with StopSignals(say=lines.append):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.2)  # the main thread asks for nothing meanwhile, as in a long step
    (line,) = lines
    assert line.startswith("SIGUSR1: the run saves and stops after the step under way; a second SIGTERM")


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """As in a terminal: a shell script's `command &` has SIGINT ignored, and so have these tests if that ran them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_an_evaluation_breaks_off_for_any_of_them_as_it_does_for_ctrl_c(name: str, ctrl_c: None) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), interrupting():
        os.kill(os.getpid(), getattr(signal, name))
    assert signal.getsignal(signal.SIGTERM) == before


def send(*names: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", TWICE, *names]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=REPOSITORY)


@pytest.mark.parametrize("names", [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGINT", "SIGTERM")])
def test_a_second_signal_ends_the_process_at_once(names: tuple[str, str]) -> None:
    done = send(*names)
    assert done.returncode == -getattr(signal, names[1])
    assert "still here" not in done.stdout


@pytest.mark.parametrize("names", [("SIGUSR1", "SIGUSR1"), ("SIGUSR1", "SIGTERM")])
def test_a_warning_ahead_of_the_time_limit_leaves_time_to_save(names: tuple[str, str]) -> None:
    done = send(*names)
    assert done.returncode == 0
    assert "still here" in done.stdout


# A mutex that is locked twice: the main thread waits for ever in C, without Python's lock, as in a collective.
STUCK = """
import ctypes
from moba_train.train.signals import StopSignals
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
with StopSignals(burst_s=0.05):
    libc.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)
"""


def test_a_second_signal_ends_a_process_whose_main_thread_waits_in_a_collective() -> None:
    command = [sys.executable, "-c", STUCK]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    try:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None, "the first one asks"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 128 + signal.SIGTERM
    finally:
        process.kill()
