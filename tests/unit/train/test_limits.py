"""Which limit of the watchdog holds where: the loop says it, part by part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moba_train.parallel.topology import Topology
from moba_train.parallel.watch import Stretch
from moba_train.train import checkpoint

from .toy import STAGES, ToyEngine, ToyRows, ToyRun


def test_every_part_of_the_loop_is_under_its_own_limit(
    tmp_path: Path, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Stretch] = {}

    def note(name: str) -> None:
        seen[name] = topology.watch.stretches()[0]

    class Engine(ToyEngine):
        def train_step(self, rows: Any, *, step: int = 1, **options: Any) -> Any:
            note(f"step {step}")
            return super().train_step(rows, step=step, **options)

        def sharded_state_dict(self, *, is_loading: bool) -> dict[str, Any]:
            note("save")
            return super().sharded_state_dict(is_loading=is_loading)

        def set_stage(self, index: int, *, documents: Any = ()) -> tuple[str, ...]:
            note(f"stage {index}")
            return super().set_stage(index, documents=documents)

    class Rows(ToyRows):
        def row(self, index: int) -> Any:
            note("row")
            return super().row(index)

    def evaluate(step: int, stage_name: str, stage_end: bool) -> dict[str, float]:
        note(f"evaluation {step}")
        return {}

    monkeypatch.setattr("tests.unit.train.toy.ToyEngine", Engine)
    monkeypatch.setattr("tests.unit.train.toy.ToyRows", Rows)
    ToyRun(tmp_path, topology, evaluators=(evaluate, evaluate)).go()
    limits = {name: stretch.limit for name, stretch in seen.items()}
    assert {limits[f"stage {index}"] for index in range(len(STAGES))} == {"start"}
    assert limits["save"] == "save" and limits["row"] == "step"
    assert limits["step 3"] == limits["evaluation 3"] == "step"
    assert len({seen[name] for name in ("step 3", "evaluation 3", "step 4")}) == 3, "each counts from its beginning"
    assert seen["evaluation 3"].name == "evaluation after step 3"
    assert [stretch.limit for stretch in topology.watch.stretches()] == ["save"], "the last one is waited for"


def test_a_save_beside_the_training_is_under_the_limit_of_saves_until_it_is_published(
    tmp_path: Path, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []
    seal_files = checkpoint.seal_files

    def seal(paths: Any) -> Any:
        seen.extend((stretch.limit, stretch.name) for stretch in topology.watch.stretches()[1:])
        return seal_files(paths)

    monkeypatch.setattr(checkpoint, "seal_files", seal)
    ToyRun(tmp_path, topology, asynchronous=True).go()
    assert ("save", "saving step 2") in seen
    assert len(topology.watch.stretches()) == 1, "nothing is left"
