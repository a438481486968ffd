"""A run folder as training leaves it, made from formulas: three stages, evaluations, needle records, a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moba_train.eval.cells import NiahRecord, depth_grid

# name, attention, seq_len, steps, chunk_size, topk
STAGES = [("short", "moba", 512, 150, 16, 3), ("long", "moba", 2048, 220, 64, 3), ("full", "full", 2048, 80, 64, 3)]
CONFIG = """
[run]
dir = "runs/synthetic"
seed = 1234

[model]
num_layers = 2
hidden_size = 128
"""
STAGE = """
[[stages]]
name = "{}"
attention = "{}"
seq_len = {}
tokens = {}
tokens_per_step = 8192
chunk_size = {}
topk = {}
"""


def _evaluation(progress: float, loss: float, edges: list[float]) -> dict[str, Any]:
    moba, full = min(1.0, 1.3 * progress) * 0.8, min(1.0, 1.3 * progress)
    curve = [loss + 0.5 * math.exp(-3 * i / 8) for i in range(8)]
    return {
        "eval/loss_moba": loss + 0.12,
        "eval/loss_full": loss + 0.06,
        "eval/trailing_loss_moba": loss - 0.02,
        "eval/trailing_loss_full": loss - 0.11,
        "eval/bits_per_byte_moba": (loss + 0.12) / 2.1,
        "eval/bits_per_byte_full": (loss + 0.06) / 2.1,
        "eval/bits_per_byte_unigram": 3.05,
        "eval/position_edges": edges,
        "eval/position_loss_moba": [value + 0.02 * i for i, value in enumerate(curve)],
        "eval/position_loss_full": [*curve[:-1], None],
        "eval/niah_moba": moba,
        "eval/niah_full": full,
        "eval/niah_routed_moba": 0.2 + 0.6 * progress,
    }


def _metrics() -> list[dict[str, Any]]:
    rng = random.Random(7)
    total = sum(stage[3] for stage in STAGES)
    lines, step = [], 0
    for index, (name, attention, seq_len, count, _, _) in enumerate(STAGES):
        for i in range(count):
            step += 1
            progress = step / total
            loss = 2.1 + 5.2 * math.exp(-9 * progress) + rng.gauss(0, 0.07)
            line: dict[str, Any] = {
                "step": step,
                "stage": name,
                "stage_index": index,
                "tokens": step * 8192,
                "train/loss": loss,
                "train/lr": 3e-3 * min(1, step / 30) * (0.55 + 0.45 * math.cos(math.pi * progress)),
                "train/grad_norm": 0.4 + 1.5 * math.exp(-6 * progress) + abs(rng.gauss(0, 0.08)),
                "train/loss_tokens": 8100,
                "train/density": [0.31, 0.14, 1.0][index] + rng.gauss(0, 0.004) * (index < 2),
                "perf/step_time_s": 0.8,
                "perf/tokens_per_s": [10400, 9800, 8600][index] + rng.gauss(0, 180),
                "memory/peak_gib": [0.8, 1.1, 1.2][index],
            }
            if attention == "moba":
                line |= {"moba/entropy": 0.95 - 0.3 * progress, "moba/top_chunk_share": 0.1 + 0.2 * progress}
                shares = {"1": 0.4 - 0.2 * progress, "2_4": 0.3, "5_16": 0.2 + 0.1 * progress, "17_64": 0.1}
                line |= {f"moba/distance_{key}": share + 0.1 * progress / 4 for key, share in shares.items()}
            if step % 50 == 0 or i == count - 1:
                line |= _evaluation(progress, loss, [seq_len * k / 8 for k in range(9)])
            lines.append(line)
    return lines


def _niah() -> list[NiahRecord]:
    rng = random.Random(3)
    records = []
    for attention, quality in (("moba", 0.9), ("full", 0.99), ("random", 0.25)):
        for length in (128, 256, 512, 1024, 2048):
            for depth in depth_grid(6):
                for sample in range(8):
                    dense = attention != "full" and length <= 192
                    chance = min(1.0, 2 * 64 / length)
                    routed = None if attention == "full" else 1.0 if dense else chance
                    records.append(
                        NiahRecord(
                            context_length=length,
                            depth_percent=depth,
                            sample=sample,
                            attention=attention,
                            score=float(rng.random() < (0.99 if dense else quality)),
                            log_prob=-rng.random(),
                            routed=routed if routed is None or attention == "random" else min(1.0, routed + 0.5),
                            routed_expected=None if attention == "full" else 1.0 if dense else chance,
                            dense=dense,
                            model_response="silver walnut",
                            expected="silver walnut",
                            key="amber river",
                            needle_chunk=1,
                            needle_offset=rng.randrange(64),
                            needle_tokens=9,
                            chunk_size=64,
                            topk=3,
                            select="head",
                            step=450,
                            weights="f0",
                            stage="full",
                            seed=1,
                            sample_hash="00",
                        )
                    )
    return records


def write_run(
    folder: Path, *, steps: int = 10**6, with_niah: bool = True, only_metrics: bool = False, stage_name: str = ""
) -> Path:
    """Writes a run folder into `folder`; parts can be left out and stages renamed."""
    run = folder / "demo run"
    checkpoint = run / "checkpoints" / "step_00000450"
    checkpoint.mkdir(parents=True)
    lines = _metrics()[:steps]
    if stage_name:
        lines = [line | {"stage": stage_name} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if only_metrics:
        return run
    if with_niah:
        text = "".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in _niah())
        (run / "niah.jsonl").write_text(text)
    stages = "".join(STAGE.format(s[0], s[1], s[2], s[3] * 8192, s[4], s[5]) for s in STAGES)
    (run / "config.toml").write_text(CONFIG + stages)
    state = {
        "step": 450,
        "mesh": {"tp": 1, "cp": 2, "pp": 1, "dp": 1},
        "versions": {"python": "3.11.9", "torch": "2.13.0"},
    }
    (checkpoint / "state.json").write_text(json.dumps(state))
    return run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """`write_run` into this test's folder."""
    return partial(write_run, tmp_path)
