"""Run folders of the drills: one never disturbed, copies of one that was stopped half-way, and what is equal."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moba_train.train.manifest import find_damage
from moba_train.train.metrics import read_metrics
from tests.drills.faults import read_trace
from tests.drills.nursery import Ending, Nursery
from tests.drills.victim import Job
from tests.unit.train.toy import TOTAL_STEPS

OF_JOB = ("fault", "environment", "pause_s", "waits")
HALF = 4
"""Steps after which the run that is copied was stopped: the end of its first stage."""


@dataclass
class Drill:
    """One drill: a copy of the run that was stopped half-way, and what happens to it.

    Attributes:
        nursery: where victims come from.
        folder: the test's own folder.
        straight: the run that was never disturbed.
        half: the run that was stopped after HALF steps; it has checkpoints of 2 and 4 steps.
    """

    nursery: Nursery
    folder: Path
    straight: Path
    half: Path
    name: str = "run"
    _logs: int = field(default=0)

    @property
    def run_dir(self) -> Path:
        return self.folder / self.name

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def begin(self, name: str = "run", *, half: bool = True) -> None:
        """A fresh copy of the half run, or an empty folder."""
        self.name = name
        shutil.rmtree(self.run_dir, ignore_errors=True)
        if half:
            shutil.copytree(self.half, self.run_dir)

    def job(self, **options: Any) -> Job:
        """A victim that goes on with the run. The names in OF_JOB: see Job; others: see ToyRun."""
        self._logs += 1
        outer = {key: options.pop(key) for key in OF_JOB if key in options}
        outer["fault"] = {"folder": str(self.checkpoints), **outer["fault"]} if outer.get("fault") else {}
        log = self.folder / f"{self.name}.{self._logs}.log"
        return Job(str(self.run_dir), str(log), options={"keep_last": 1, **options}, **outer)

    def go(self, **options: Any) -> Ending:
        """Run a victim to its end."""
        return self.nursery.run(self.job(**options))

    def points(self, **options: Any) -> list[str]:
        """Every moment at which a run that goes on changes its checkpoints."""
        trace = self.folder / f"{self.name}.trace"
        ending = self.go(fault={"trace": str(trace)}, **options)
        assert ending.code == 0, ending.log
        return read_trace(trace, self.checkpoints)

    def whole(self) -> list[str]:
        """Names of the whole checkpoints, oldest first."""
        found = [path for path in self.checkpoints.glob("step_*") if path.name[5:].isdecimal()]
        return sorted(path.name for path in found if not find_damage(path))

    def files(self) -> dict[str, int]:
        """Everything below the checkpoints, with its size in bytes (-1 = a folder)."""
        found = self.checkpoints.rglob("*")
        return {str(p.relative_to(self.checkpoints)): p.stat().st_size if p.is_file() else -1 for p in found}

    @property
    def leftovers(self) -> list[str]:
        """Names of saves that were cut short before they had a name."""
        return [path.name for path in self.checkpoints.glob("step_*.tmp")]

    def goes_on(self, **options: Any) -> str:
        """Resume without faults: from the newest whole checkpoint, to the same end. Returns the log."""
        newest = self.whole()[-1:]
        ending = self.go(**options)
        assert ending.code == 0, ending.log
        said = f"resuming from {self.checkpoints}/{newest[0]}\n" if newest else "starting from nothing"
        assert said in ending.log, ending.log
        self.is_undisturbed()
        has_saved = newest != [f"step_{TOTAL_STEPS:08d}"]
        assert not has_saved or [name for name in self.files() if name.endswith((".tmp", ".old"))] == []
        return ending.log

    def is_undisturbed(self) -> None:
        """Weights, optimizer state, metrics and pointer are those of the straight run."""
        assert digests(self.run_dir) == digests(self.straight)
        assert records(self.run_dir) == records(self.straight)
        assert (self.checkpoints / "latest").read_text() == f"step_{TOTAL_STEPS:08d}\n"


def digests(run_dir: Path) -> dict[str, str]:
    """SHA-256 of the shards of a toy's last checkpoint."""
    return digests_of(run_dir / "checkpoints" / f"step_{TOTAL_STEPS:08d}")


def digests_of(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of the shards of a checkpoint, which must be whole."""
    assert find_damage(checkpoint) == ""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".distcp")}


def records(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock or the memory of the machine decides."""
    found = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in record.items() if not k.startswith(("perf/", "memory/"))} for record in found]
