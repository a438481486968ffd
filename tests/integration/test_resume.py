"""The real engine, stopped and resumed: what a straight run computes, bit for bit, and on another mesh."""

from __future__ import annotations

import gc
import hashlib
import shutil
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moba_train.config.schema import (
    CheckpointConfig,
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RopeConfig,
    RunSection,
    StageConfig,
)
from moba_train.data.row import Row
from moba_train.engine.megatron import build_engine
from moba_train.errors import CheckpointError
from moba_train.parallel.topology import close_topology
from moba_train.train.checkpoint import CheckpointStore
from moba_train.train.console import SilentLog
from moba_train.train.loop import Training
from moba_train.train.metrics import JsonlWriter, read_metrics
from moba_train.train.progress import Identity, model_fingerprint
from moba_train.train.record import Meter
from moba_train.train.resume import begin
from moba_train.train.schedule import build_schedule
from moba_train.train.signals import StopSignals
from moba_train.train.stopping import Stopping
from tests.distributed import run_ranks

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    vocab_size=64,
    key_conv=3,
    init_std=0.1,
)
STAGES = (
    StageConfig(name="moba", tokens=384, tokens_per_step=128, seq_len=64, chunk_size=8, topk=2),
    StageConfig(
        name="full",
        tokens=768,
        tokens_per_step=256,
        seq_len=128,
        attention="full",
        rope=RopeConfig(base=50000.0),
        lr=5e-3,
    ),
)
OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_tokens=256)
SEED = 11
CLOCK = ("perf/", "memory/")


@dataclass(frozen=True)
class Copying:
    """Row i of a stage: three documents of periodic tokens from an eighth of the vocabulary."""

    stage_index: int

    def row(self, index: int) -> Row:
        seq_len = STAGES[self.stage_index].seq_len
        rng = np.random.default_rng([SEED, self.stage_index, index])
        cut = int(rng.integers(9, seq_len // 2))
        tokens = np.resize(rng.integers(0, MODEL.vocab_size // 8, 5), seq_len).astype(np.int64)
        mask = np.ones(seq_len, np.float32)
        mask[[cut - 1, seq_len - 1]] = 0.0
        return Row(tokens, np.roll(tokens, -1), mask, (0, cut, seq_len - 3, seq_len), sample_id=index)


@dataclass(frozen=True)
class Part:
    """One process group's share of a run: where, on how many context-parallel ranks, how far."""

    run_dir: Path
    stop_after_steps: int = 0
    resume: str = "auto"
    model: ModelConfig = MODEL
    documents: str = "ab"


def train_part(rank: int, n: int, part: Part) -> dict[str, str]:
    """Begin or resume, train, and return the digests of this rank's weights and optimizer state."""

    def sources_of(index: int) -> dict[str, Any]:
        """The other ranks may not even see the data yet."""
        return {"text": {"documents": part.documents}} if rank == 0 else {"text": {"documents": "lags"}}

    gc.freeze()  # Megatron collects garbage at every save, 0.2 s of looking at what the imports left
    engine = build_engine(part.model, STAGES, EngineConfig(device="cpu"), OPTIMIZER, ParallelConfig(cp=n), seed=SEED)
    schedule = build_schedule(STAGES, OPTIMIZER)
    mesh = {"tp": 1, "cp": n, "pp": 1, "dp": 1}
    identity = Identity(model_fingerprint(part.model), "ab" * 32, SEED, mesh, {})
    start = begin(part.run_dir, part.resume, engine, identity, schedule, sources_of=sources_of)
    loaded = digests(engine.sharded_state_dict(is_loading=False))
    sinks = [JsonlWriter(part.run_dir / "metrics.jsonl", resume_step=start.progress.step)] if rank == 0 else []
    Training(
        engine,
        schedule=schedule,
        start=start.progress,
        run=RunSection(log_every=2, stop_after_steps=part.stop_after_steps),
        checkpoint=CheckpointConfig(every_steps=0),
        stage_data=Copying,
        evaluators=(),
        store=CheckpointStore(part.run_dir, identity, "", STAGES, keep_last=9, sources_of=sources_of),
        meter=Meter(part.model, False, n, n, engine.topology.device, None),
        sinks=sinks,
        log=SilentLog(),
        stopping=Stopping(StopSignals()),
    ).train(schedule.total_steps)
    state = digests(engine.sharded_state_dict(is_loading=False))
    close_topology(keep_process_group=True)
    return {f"loaded/{key}": value for key, value in loaded.items()} | state


def digests(state: Any, path: str = "") -> dict[str, str]:
    """Digest of every tensor and the text of every number in a sharded state dict, by its place in it."""
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in digests(value, f"{path}/{key}").items()}
    if isinstance(state, (list, tuple)):
        return {k: v for i, value in enumerate(state) for k, v in digests(value, f"{path}/{i}").items()}
    data = getattr(state, "data", state)
    if hasattr(data, "numpy"):
        content = data.detach().contiguous().numpy().tobytes()
        return {path: f"{tuple(data.shape)} {hashlib.sha256(content).hexdigest()}"}
    return {path: repr(data)}


def after(state: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in state.items() if not key.startswith("loaded/")}


def loaded(state: dict[str, str]) -> dict[str, str]:
    return {key.removeprefix("loaded/"): value for key, value in state.items() if key.startswith("loaded/")}


def records(run_dir: Path) -> list[dict[str, Any]]:
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(CLOCK)} for row in rows]


def losses(run_dir: Path) -> list[float]:
    return [row["train/loss"] for row in records(run_dir)]


def train_parts(rank: int, n: int, parts: list[Part]) -> list[dict[str, str]]:
    """Several parts one after the other, each with a new engine."""
    return [train_part(rank, n, part) for part in parts]


@dataclass(frozen=True)
class Runs:
    """On one mesh: a straight run; one stopped after 2, 3 and 4 of 6 steps (3 = the end of the first stage)."""

    straight: Path
    stopped: Path
    left_at_4: Path
    states: list[list[dict[str, str]]]
    """[rank][straight, four parts of the stopped one, the one left at 4]."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Runs]:
    found = {}
    for ranks in (1, 2):
        straight, stopped, left = (tmp_path_factory.mktemp(name) for name in ("straight", "stopped", "left"))
        parts = [Part(straight), *(Part(stopped, stop_after_steps=steps) for steps in (2, 1, 1)), Part(stopped)]
        states = run_ranks(train_parts, ranks, [*parts, Part(left, stop_after_steps=4)])
        found[ranks] = Runs(straight, stopped, left, states)
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_stopped_before_at_and_after_a_stage_boundary_is_bit_equal(runs: dict[int, Runs], ranks: int) -> None:
    assert records(runs[ranks].stopped) == records(runs[ranks].straight)
    assert [row["step"] for row in records(runs[ranks].stopped)] == [1, 2, 3, 4, 5, 6]
    for straight, *parts, _ in runs[ranks].states:
        assert after(parts[-1]) == after(straight)
        for earlier, later in pairwise(parts):
            assert loaded(later) == after(earlier)
    assert sum("param_state" in key for key in after(runs[ranks].states[0][0])) > 30  # optimizer state is compared too


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_a_checkpoint_continues_on_another_number_of_context_parallel_ranks(
    runs: dict[int, Runs], first: int, second: int
) -> None:
    run_dir, before = runs[first].left_at_4, runs[first].states[0][-1]
    resumed = run_ranks(train_part, second, Part(run_dir))  # in new processes, as in life
    assert loaded(resumed[0]) == after(before)  # rank 0 holds every weight and all optimizer state
    assert [row["step"] for row in records(run_dir)] == [1, 2, 3, 4, 5, 6]
    assert losses(run_dir) == pytest.approx(losses(runs[second].straight), rel=1e-4)


def test_training_learns_and_the_switch_is_seen_in_the_metrics(runs: dict[int, Runs]) -> None:
    seen = records(runs[1].straight)
    assert seen[-1]["train/loss"] < 0.9 * seen[0]["train/loss"]
    assert [row["train/density"] < 1.0 for row in seen] == [True] * 3 + [False] * 3
    assert [row["stage"] for row in seen] == ["moba"] * 3 + ["full"] * 3


def refusals(rank: int, n: int, parts: list[Part]) -> list[str]:
    messages = []
    for part in parts:
        try:
            train_part(rank, n, part)
            messages.append("not refused")
        except CheckpointError as error:
            messages.append(error.message())
        close_topology(keep_process_group=True)
    return messages


def test_a_checkpoint_that_cannot_be_used_is_refused_on_every_rank_alike(runs: dict[int, Runs], tmp_path: Path) -> None:
    shutil.copytree(runs[2].straight / "checkpoints", tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints" / "step_00000006"
    shard = newest / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    damaged = Part(tmp_path / "new", resume=str(newest))
    other_model = Part(tmp_path / "new", resume=str(runs[2].straight), model=replace(MODEL, qk_norm=True))
    half_way = runs[2].left_at_4 / "checkpoints" / "step_00000004"
    other_data = Part(tmp_path / "new", resume=str(half_way), documents="cd")
    first, second = run_ranks(refusals, 2, [damaged, other_model, other_data])
    assert first == second
    assert "__0_0.distcp has" in first[0]
    assert "model.qk_norm = False in the checkpoint" in first[1]
    assert "got:     documents of data.sources.text = sha256 cd..." in first[2]
