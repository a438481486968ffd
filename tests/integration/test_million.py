"""`make million` at a sixteenth of its length: a document of 65,536 tokens on two ranks, through the same commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moba_train.train.figures import COMPONENTS
from moba_train.train.flops import document_pairs
from moba_train.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "million_cpu.toml"
SHORT, LONG = 16_384, 65_536


def command(words: list[str], folder: Path) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def stage(index: int, name: str, seq_len: int, steps: int) -> list[str]:
    lengths = {"name": name, "tokens": steps * seq_len, "tokens-per-step": seq_len, "seq-len": seq_len}
    return [word for key, value in lengths.items() for word in (f"--stages.{index}.{key}", str(value))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]], Path]:
    """What training said, its metrics, and the folder that it ran in."""
    folder = tmp_path_factory.mktemp("million")
    moba_train = [sys.executable, "-m", "moba_train"]
    prepared = command(
        [*moba_train, "prep", "stdlib", "--out", "data/million", "--vocab-size", "1024", "--max-mib", "1", "--join"],
        folder,
    )
    assert re.search(r"million/train +1 ", prepared), prepared
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    stages = [*stage(0, "short", SHORT, 2), *stage(1, "long", LONG, 1)]
    said = command([*launcher, "-m", "moba_train", "train", str(CONFIG), *stages], folder)
    command([*moba_train, "report", "runs/million"], folder)
    return said, read_metrics(folder / "runs" / "million" / "metrics.jsonl"), folder


def test_the_row_is_one_document_and_trains(run: tuple[str, list[dict[str, Any]], Path]) -> None:
    _, records, _ = run
    assert [record["stage"] for record in records] == ["short", "short", "long"]
    pairs = document_pairs(LONG, chunk_size=1024, topk=3)
    assert records[-1]["train/density"] == pytest.approx(pairs / (LONG * (LONG + 1) / 2))
    assert records[-1]["train/loss_tokens"] == LONG
    losses = [record["train/loss"] for record in records]
    assert losses[0] == pytest.approx(8.32, abs=0.1)  # ln 4096, and then it learns
    assert losses[2] < losses[1] < losses[0]


def test_memory_is_known_by_component_and_small(run: tuple[str, list[dict[str, Any]], Path]) -> None:
    said, records, folder = run
    record = records[-1]
    assert {f"memory/{name}_gib" for name, _ in COMPONENTS} <= record.keys()
    parts = [record[f"memory/{name}_gib"] for name in ("libraries", "data", "kept", "attention")]
    assert 0.7 * sum(parts) < record["memory/peak_gib"] < 1.3 * sum(parts)
    assert record["memory/peak_all_ranks_gib"] < 2.8  # the whole logits and activations would be another 3
    assert record["memory/loss_gib"] < 0.25 * LONG / 2 * 4096 * 4 / 2**30
    assert "peak memory by component" in said and "  attention " in said
    report = (folder / "runs" / "million" / "report.html").read_text("utf-8")
    assert "Peak memory by component" in report and "us per token" in report


def test_the_time_per_token_does_not_grow_with_the_row(run: tuple[str, list[dict[str, Any]], Path]) -> None:
    said, records, _ = run
    short_us, long_us = (1e6 / records[i]["perf/tokens_per_s"] for i in (1, 2))
    assert long_us < 2.5 * short_us  # four times, where work grows with the square; other processes may disturb
    assert "time per token, median step of each stage:" in said
