"""Small models, stages and rows that the engine tests share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from moba_train.config.schema import (
    EngineConfig,
    FullLayers,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    StageConfig,
)
from moba_train.data.row import Row
from moba_train.engine.megatron import MegatronEngine, build_engine
from moba_train.parallel.topology import close_topology

VOCABULARY = 96
BASE_MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=VOCABULARY,
    init_std=0.2,  # wide enough that attention, and so routing, matters
)
MOBA_STAGE = StageConfig(name="moba", chunk_size=4, topk=3)
FULL_STAGE = StageConfig(name="full", attention="full", chunk_size=4, topk=3)
PLAIN_ENGINE = EngineConfig(device="cpu", distributed_optimizer=False)
NO_CLIPPING = OptimizerConfig(clip_grad=0.0)


@dataclass(frozen=True)
class Case:
    """One model under one schedule; stage 0 is what the tests run."""

    model: ModelConfig
    stages: tuple[StageConfig, ...]
    layout: str = "zigzag"
    engine: EngineConfig = PLAIN_ENGINE
    optimizer: OptimizerConfig = NO_CLIPPING


MIXED = Case(
    replace(BASE_MODEL, key_conv=3),
    (replace(MOBA_STAGE, full_layers=FullLayers(last=1)), replace(FULL_STAGE, full_layers=FullLayers(last=1))),
)
GROUPED = Case(
    replace(BASE_MODEL, key_conv=5, qk_norm=True, qkv_bias=True),
    (replace(MOBA_STAGE, select="group"),),
    "contiguous",
)
FULL = Case(replace(BASE_MODEL, tied_head=False), (FULL_STAGE,))
RECOMPUTED = Case(
    replace(BASE_MODEL, key_conv=3),
    (MOBA_STAGE,),
    engine=replace(PLAIN_ENGINE, recompute="full"),
)
CASES = {"mixed": MIXED, "grouped": GROUPED, "full": FULL, "recomputed": RECOMPUTED}


def engine_of(
    case: Case, *, cp: int = 1, tp: int = 1, pp: int = 1, seed: int = 7, transport: str = "auto"
) -> MegatronEngine:
    """Build the case's engine on a fresh mesh, over the default process group where there is one."""
    close_topology(keep_process_group=True)
    layout, chosen = cast(Any, case.layout), cast(Any, transport)
    parallel = ParallelConfig(cp=cp, tp=tp, pp=pp, layout=layout, transport=chosen)
    return build_engine(case.model, case.stages, case.engine, case.optimizer, parallel, seed=seed)


def packed_row(seed: int, cu_seqlens: tuple[int, ...] = (0, 1, 24, 24, 53, 61)) -> Row:
    """Random tokens in documents; the last one is padding and does not count. The default length divides by nothing."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, cu_seqlens[-1])
    mask = np.ones(len(tokens), np.float32)
    mask[cu_seqlens[-2] :] = 0.0
    mask[rng.integers(0, len(tokens), 5)] = 0.0
    return Row(tokens, np.roll(tokens, -1), mask, cu_seqlens)


def gradients(engine: MegatronEngine) -> dict[str, np.ndarray]:
    """The gradients of the last step, before clipping, by parameter name."""
    return {name: parameter.main_grad.numpy().copy() for name, parameter in engine._gpt.named_parameters()}


def weights(engine: MegatronEngine) -> dict[str, np.ndarray]:
    return {name: parameter.detach().float().numpy().copy() for name, parameter in engine._gpt.named_parameters()}


def moments(engine: MegatronEngine) -> list[np.ndarray]:
    """All of AdamW's state that this rank holds."""
    state = [part.optimizer.state for part in engine._optimizer.chained_optimizers]
    return [held[name].numpy().copy() for one in state for held in one.values() for name in sorted(held)]


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def relative_l2(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def one_thread() -> None:
    torch.set_num_threads(1)
