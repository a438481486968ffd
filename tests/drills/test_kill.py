"""kill -9 at every moment of a save: what is whole is found, named, and gone on with to the same end."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from moba_train.train.manifest import MANIFEST
from tests.drills.runs import HALF, Drill


def kill_at_each(drill: Drill, *, half: bool = True, **options: Any) -> None:
    """Kill a run at the first moment at which it changes its checkpoints, another at the second, ...; each goes on.

    Going on is a matter of what stands on the disk, so it is tried once where two kills leave the same.
    """
    drill.begin("traced", half=half)
    moments = drill.points(**options)
    seen = []
    for number, moment in enumerate(moments, start=1):
        drill.begin(f"killed_at_{number}", half=half)
        before = drill.whole()
        ending = drill.go(fault={"kill_at": number}, **options)
        assert ending.code == -signal.SIGKILL, f"{moment}: {ending.log}"
        assert drill.whole()[-1:] >= before[-1:], f"{moment}: {drill.whole()}"
        if (left := drill.files()) in seen:
            continue
        seen.append(left)
        cut_short = drill.leftovers
        log = drill.goes_on(**{key: options[key] for key in options.keys() - {"stop_after_steps"}})
        untold = [name for name in cut_short if f"skipped {name}: its save was cut short" not in log]
        assert untold == [], f"{moment}: {log}"


def test_a_run_killed_at_any_moment_of_a_save_goes_on_to_the_same_end(drill: Drill) -> None:
    kill_at_each(drill, stop_after_steps=2)  # one save, and the pruning of the one before the last


def test_every_phase_of_a_save_is_among_the_moments(drill: Drill) -> None:
    moments = drill.points(stop_after_steps=2)
    final, aside, old = "step_00000006", "step_00000006.tmp", "step_00000002.old"
    files = (".metadata.tmp", "__0_0.distcp", "common.pt", "metadata.json", "state.json", "config.toml", MANIFEST)
    expected = [f"mkdir {aside}", *(f"{what} {aside}/{name}" for name in files for what in ("open", "fsync"))]
    expected += [f"rename {aside} -> {final}", "open latest.tmp", "fsync latest.tmp", "rename latest.tmp -> latest"]
    expected += [f"rename step_00000002 -> {old}", f"remove {old}/manifest.json", f"rmdir {old}"]
    assert [moment for moment in expected if moment not in moments] == []


@pytest.mark.parametrize("torn_bytes", [0, 100])
def test_a_run_killed_in_the_middle_of_any_file_goes_on_to_the_same_end(drill: Drill, torn_bytes: int) -> None:
    moments = drill.points(stop_after_steps=2)
    torn = [number for number, moment in enumerate(moments, start=1) if moment.startswith("open step_")]
    for number in torn[:: 1 if torn_bytes else 3]:
        drill.begin(f"torn_at_{number}")
        ending = drill.go(stop_after_steps=2, fault={"torn_at": number, "torn_bytes": torn_bytes})
        assert ending.code == -signal.SIGXFSZ, f"{moments[number - 1]}: {ending.log}"
        assert drill.whole()[-1] >= "step_00000004"  # the pointer is too short to be torn
        drill.goes_on()


@pytest.mark.parametrize("damaged", ["step_00000004", "step_00000002"])
def test_a_run_killed_while_it_sets_damaged_checkpoints_aside_goes_on(drill: Drill, damaged: str) -> None:
    def begin(name: str) -> None:
        drill.begin(name)
        (drill.checkpoints / damaged / "common.pt").unlink()

    begin("traced")
    moments = drill.points(stop_after_steps=1)
    for number in range(1, 1 + min(5, len(moments))):
        begin(f"killed_at_{number}")
        assert drill.go(stop_after_steps=1, fault={"kill_at": number}).was_killed
        assert drill.whole()
        drill.goes_on()


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_killed_at_any_moment_from_the_first_save_to_the_last_goes_on_to_the_same_end(
    drill: Drill, asynchronous: bool
) -> None:
    kill_at_each(drill, half=False, asynchronous=asynchronous, keep_every=HALF)
