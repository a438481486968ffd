"""`make million` ends with a check: it passes within all limits on rows of one document, and fails on each alone."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECK = runpy.run_path(str(ROOT / "launch" / "check_million.py"))


def record(length: int, **changes: float) -> dict[str, Any]:
    return {
        "step": 1,
        "perf/tokens_per_s": 5000.0,
        "perf/step_time_s": length / 5000.0,
        "memory/peak_all_ranks_gib": 11.0,
        "train/loss_tokens": length,
        "train/density": CHECK["_density"](length),
    } | changes


def verdict(folder: Path, last: dict[str, Any], **before: float) -> int:
    records = [record(CHECK["SHORT"]), record(CHECK["SHORT"], **before), last]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    code: int = CHECK["main"](folder)
    return code


def test_a_run_within_all_limits_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict(tmp_path, record(CHECK["LONG"])) == 0
    said = capsys.readouterr().out
    assert "every row is one document" in said and "BROKEN" not in said


@pytest.mark.parametrize(
    "changes",
    [
        {"memory/peak_all_ranks_gib": 12.1},
        {"perf/step_time_s": 721.0},
        {"perf/tokens_per_s": 3300.0},
        {"train/loss_tokens": (1 << 20) - 1},
        {"train/density": 0.9},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_each_limit_alone_fails_it(
    changes: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict(tmp_path, record(CHECK["LONG"], **changes)) == 1
    assert capsys.readouterr().out.count("BROKEN") == 1


@pytest.mark.parametrize("changes", [{"train/loss_tokens": 4096}, {"train/density": 1.0}], ids=str)
def test_the_shorter_row_is_held_to_be_one_document_too(changes: dict[str, float], tmp_path: Path) -> None:
    assert verdict(tmp_path, record(CHECK["LONG"]), **changes) == 1


def test_the_check_speaks_of_what_is_configured() -> None:
    from moba_train.config.load import load_config

    stages = load_config(ROOT / "configs" / "million_cpu.toml").stages
    assert [stage.seq_len for stage in stages] == [CHECK["SHORT"], CHECK["LONG"]]
    assert {(stage.chunk_size, stage.topk) for stage in stages} == {(CHECK["CHUNK"], CHECK["TOPK"])}
