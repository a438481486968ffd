"""The demo in miniature: prepare, train on two ranks, stop, resume, find the needle. Fails if retrieval is not learnt.

Model, optimizer, data format and MoBA settings are those of configs/demo_cpu.toml; stages and text are cut down.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moba_train.config.load import load_config, to_toml
from moba_train.config.schema import StageConfig

ROOT = Path(__file__).resolve().parents[2]
SHORT_STEPS, LONG_STEPS = 300, 40
STOP_AFTER = 120


def command(words: list[str], folder: Path) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def on_two_ranks(*words: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, "-m", "moba_train", *words]


def miniature_config(folder: Path) -> Path:
    demo = load_config(ROOT / "configs/demo_cpu.toml")
    first, last = demo.stages[0], demo.stages[-1]
    short: StageConfig = replace(first, tokens=SHORT_STEPS * first.tokens_per_step)
    long = replace(last, tokens=LONG_STEPS * 4096, tokens_per_step=4096, seq_len=1024)
    long = replace(long, mix={"needle_256": 0.75, "text": 0.25})
    sources = {name: demo.data.sources[name] for name in ("text", "needle_128", "needle_256")}
    config = replace(
        demo,
        stages=(short, long),
        data=replace(demo.data, sources=sources),
        optimizer=replace(demo.optimizer, decay_tokens=LONG_STEPS * 4096),
        eval=replace(demo.eval, every_steps=0, rows=2),
        niah=replace(demo.niah, lengths=(128, 256), depths=4, samples=4, every_steps=0, loop_samples=0),
    )
    path = folder / "miniature.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    return path


@pytest.mark.slow  # test_cli_smoke.py goes the same way in short
@pytest.mark.timeout(900)
def test_the_demo_in_miniature_learns_to_find_needles(tmp_path: Path) -> None:
    prep = ["prep", "stdlib", "--out", "data/demo", "--vocab-size", "2048", "--max-mib", "3"]
    command([sys.executable, "-m", "moba_train", *prep, "--needles", "128:4800,256:600"], tmp_path)
    config = str(miniature_config(tmp_path))
    run = tmp_path / "run"
    train = ("train", config, "--run-dir", str(run))

    stopped = command(on_two_ranks(*train, "--run.stop-after-steps", str(STOP_AFTER)), tmp_path)
    assert f"stopped (stop_after_steps) after step {STOP_AFTER}/" in stopped
    finished = command(on_two_ranks(*train, "--resume", "auto"), tmp_path)
    assert f"finished after step {SHORT_STEPS + LONG_STEPS}/" in finished
    command(on_two_ranks("eval", "niah", str(run)), tmp_path)

    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics] == list(range(1, SHORT_STEPS + LONG_STEPS + 1))
    assert metrics[SHORT_STEPS - 1]["train/loss"] < 0.5 * metrics[STOP_AFTER - 1]["train/loss"]

    records = [json.loads(line) for line in (run / "niah.jsonl").read_text().splitlines()]
    score = {
        attention: sum(found) / len(found)
        for attention in ("moba", "full", "random")
        if (found := [record["score"] for record in records if record["attention"] == attention])
    }
    assert score["full"] >= 0.6, score
    assert score["moba"] > score["random"], score
