"""One nursery for all drills, and the runs that they start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.drills.nursery import Nursery
from tests.drills.runs import HALF, Drill
from tests.drills.victim import Job


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="session")
def toy_runs(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a run that was never disturbed, one that was stopped after HALF steps)."""
    folder = tmp_path_factory.mktemp("toy_runs")
    for name, options in (("straight", {}), ("half", {"stop_after_steps": HALF, "keep_last": 2})):
        ending = nursery.run(Job(str(folder / name), str(folder / f"{name}.log"), options=options))
        assert ending.code == 0, ending.log
    return folder / "straight", folder / "half"


@pytest.fixture
def drill(nursery: Nursery, toy_runs: tuple[Path, Path], tmp_path: Path) -> Drill:
    """A drill on a copy of the half run."""
    drill = Drill(nursery, tmp_path, *toy_runs)
    drill.begin()
    return drill
