"""What ranks do with converted weights. Imports no transformers, which would take each of them seconds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moba_train.config.load import to_toml
from moba_train.config.schema import (
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    StageConfig,
)
from moba_train.data.row import Row
from moba_train.engine.base import RowScores
from moba_train.engine.gpt_engine import GptEngine
from moba_train.engine.local_row import LocalRow
from moba_train.engine.megatron import MegatronEngine
from moba_train.parallel.topology import close_topology, init_topology
from moba_train.train.checkpoint import CheckpointStore
from moba_train.train.progress import Identity, Progress, model_fingerprint
from moba_train.train.weights import InitialWeights

NUM_TOKENS = 97  # no multiple of anything, so the vocabulary has to be padded
OPTIMIZER = OptimizerConfig(lr=3e-3, weight_decay=0.1, clip_grad=1.0)
STEPS = 10
CPU = EngineConfig(device="cpu")


@dataclass(frozen=True)
class Job:
    """Converted weights on one mesh; they are saved in `run_dir` if it is given, and trained if `train` says so."""

    name: str
    model: ModelConfig
    stages: tuple[StageConfig, ...]
    path: Path
    mesh: dict[str, int]
    train: bool = False
    run_dir: Path | None = None
    engine: EngineConfig = CPU


@dataclass(frozen=True)
class Found:
    """What a mesh computed: scores of a row, its logits (on one rank), the losses of some steps."""

    scores: RowScores
    logits: np.ndarray | None
    losses: tuple[float, ...]


def hf_row(seed: int, cu_seqlens: tuple[int, ...] = (0, 1, 24, 24, 53, 61)) -> Row:
    """Random tokens in documents; the last document does not count."""
    tokens = np.random.default_rng(seed).integers(0, NUM_TOKENS, cu_seqlens[-1])
    mask = np.ones(len(tokens), np.float32)
    mask[cu_seqlens[-2] :] = 0.0
    return Row(tokens, np.roll(tokens, -1), mask, cu_seqlens)


def rows_of_step(step: int) -> list[Row]:
    """Two rows; they come again after some steps, so that there is something to learn."""
    return [hf_row(10 + step % 3), hf_row(20 + step % 3, (0, 40, 43))]


def engine_of_job(job: Job) -> GptEngine:
    """An engine on a fresh mesh, with the converted weights."""
    kind: type[GptEngine] = MegatronEngine
    if job.engine.kind == "deepspeed":
        from moba_train.engine.deepspeed import DeepSpeedEngine

        kind = DeepSpeedEngine
    close_topology(keep_process_group=True)
    parallel = ParallelConfig(**job.mesh)  # type: ignore[arg-type]
    topology = init_topology(parallel, device=torch.device("cpu"), timeout_s=60.0)
    return kind(
        job.model,
        job.stages,
        job.engine,
        OPTIMIZER,
        topology,
        parallel,
        seed=1,
        fill=InitialWeights(job.path, topology),
    )


def computed(rank: int, n: int, jobs: list[Job]) -> list[Found]:
    found = []
    for job in jobs:
        engine = engine_of_job(job)
        scores = engine.score(hf_row(0))
        logits = whole_logits(engine, hf_row(0)) if n == 1 else None
        if job.run_dir is not None:
            save(engine, job, job.run_dir)
        steps = range(STEPS if job.train else 0)
        losses = tuple(engine.train_step(rows_of_step(i), lr=OPTIMIZER.lr, step=i + 1).loss for i in steps)
        found.append(Found(scores, logits, losses))
    return found


def save(engine: GptEngine, job: Job, run_dir: Path) -> None:
    """A checkpoint as a run writes it."""
    config = RunConfig(model=job.model, stages=job.stages)
    identity = Identity(model_fingerprint(job.model), tokenizer="", seed=1, mesh=job.mesh, versions={})
    with CheckpointStore(run_dir, identity, to_toml(config), job.stages, keep_last=1) as store:
        store.save(engine, Progress(step=7), stage_end=False)


def whole_logits(engine: GptEngine, row: Row) -> np.ndarray:
    """[S, vocabulary], which the engine itself never holds."""

    def multiply(local: LocalRow, hidden: Tensor, *, non_loss_data: bool) -> Tensor:
        return hidden[0, : local.context.num_local_tokens] @ engine._gpt.head.weight_VM.T

    local = engine._row_plan("stage").local_row(row, engine.topology, keep_routing=False)
    engine._gpt.eval()
    with torch.no_grad():
        (logits,) = engine._run(iter([local]), [row.tokens_S.size], partial(multiply), forward_only=True)
    return logits.float().numpy()
