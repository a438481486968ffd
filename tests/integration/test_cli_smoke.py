"""The whole program as a user runs it: prepare, train, stop, resume, look for the needle, report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from moba_train.config.load import load_config

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "configs" / "smoke.toml")
# Four steps of MoBA and two of full attention.
SHORT = ("--stages.0.tokens", "4096", "--stages.1.tokens", "2048", "--optimizer.warmup-tokens", "1024")


def moba_train(folder: Path, *words: str) -> str:
    """Run one sub-command in `folder`; its standard output. Nothing may be said on standard error."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "moba_train", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def test_a_small_run_from_text_to_report(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "smoke"
    prep = ("prep", "stdlib", "--out", "data/smoke", "--vocab-size", "1024", "--max-mib", "1", "--needles", "64:512")
    assert "512" in moba_train(tmp_path, *prep)
    assert "up to date" in moba_train(tmp_path, *prep)

    stopped = moba_train(tmp_path, "train", SMOKE, *SHORT, "--run.stop-after-steps", "3")
    assert "stopped (stop_after_steps) after step 3/6" in stopped
    resumed = moba_train(tmp_path, "train", SMOKE, *SHORT)
    assert "resuming from runs/smoke/checkpoints/step_00000003" in resumed
    assert "stage 2/2 'full' from step 5" in resumed
    assert "finished after step 6/6" in resumed

    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["stage"] for record in records] == ["moba"] * 4 + ["full"] * 2
    at_stage_ends = [record for record in records if "eval/loss_moba" in record]
    assert [record["step"] for record in at_stage_ends] == [4, 6]
    for key in ("eval/loss_full", "eval/bits_per_byte_unigram", "eval/niah_moba", "eval/niah_full"):
        assert all(key in record for record in at_stage_ends), key

    resolved = load_config(run / "config.toml")
    assert resolved.stages[0].tokens == 4096
    assert load_config(run / "checkpoints" / "step_00000006" / "config.toml") == resolved

    table = moba_train(tmp_path, "eval", "niah", "runs/smoke", "--lengths", "64", "--depths", "2", "--samples", "1")
    assert "evaluating runs/smoke/checkpoints/step_00000006" in table
    cells = [json.loads(line) for line in (run / "niah.jsonl").read_text().splitlines()]
    assert {(c["attention"], c["context_length"], c["depth_percent"]) for c in cells} == {
        (attention, 64, depth) for attention in ("moba", "full", "random") for depth in (0.0, 100.0)
    }
    assert (run / "niah.png").read_bytes().startswith(b"\x89PNG")

    summary = moba_train(tmp_path, "report", "runs/smoke")
    assert "report: runs/smoke/report.html" in summary
    html = (run / "report.html").read_text()
    assert html.count("data:image/") >= 5
    assert "Needle in a haystack" in html and "What the switch did" in html
