"""Tiles, offload, phases and memory of a whole training step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moba_train.config.schema import OptimizerConfig
from moba_train.engine.phases import Phase
from moba_train.errors import ConfigError
from moba_train.model import tiles
from moba_train.model.offload import Wait
from tests.distributed import run_ranks
from tests.integration.engine_case import (
    PLAIN_ENGINE,
    RECOMPUTED,
    Case,
    engine_of,
    gradients,
    one_thread,
    packed_row,
    relative_l2,
    same,
)

ROWS = (packed_row(0), packed_row(1))  # of 61 tokens
NOT_RECOMPUTED = replace(RECOMPUTED, engine=PLAIN_ENGINE)
TILE = 8


@pytest.fixture(autouse=True)
def single_thread() -> None:
    one_thread()


@contextmanager
def tiles_of(tokens: int) -> Iterator[None]:
    usual, tiles.MIN_TILE_TOKENS = tiles.MIN_TILE_TOKENS, tokens
    try:
        yield
    finally:
        tiles.MIN_TILE_TOKENS = usual


def gradients_of(engine: Any) -> dict[str, Any]:
    engine.train_step(ROWS, lr=0.0)
    return gradients(engine)


def test_the_mlp_runs_by_tiles_forward_twice_and_gives_the_same_gradients() -> None:
    expected = gradients_of(engine_of(NOT_RECOMPUTED))
    engine = engine_of(RECOMPUTED)
    sizes: list[int] = []
    for layer in engine._gpt.decoder.layers:
        layer.mlp.linear_fc1.register_forward_pre_hook(lambda _module, args: sizes.append(args[0].shape[0]))
    with tiles_of(TILE):
        found = gradients_of(engine)
    assert sizes == [*[TILE] * 7, 5] * (2 * 2 * 2)  # layers, rows, and twice: in forward and in its own backward
    for name, gradient in found.items():
        assert relative_l2(gradient, expected[name]) < 1e-6, name


def train_with_tiles(rank: int, n: int) -> tuple[list[float], float]:
    """Losses of some steps, by which wrong gradients would show, and the norm of the first gradient."""
    one_thread()
    case = replace(RECOMPUTED, optimizer=OptimizerConfig())
    with tiles_of(TILE):
        engine = engine_of(case, tp=n)
        steps = [engine.train_step(ROWS, lr=1e-2) for _ in range(4)]
    return [step.loss for step in steps], steps[0].grad_norm


def test_tiles_of_tensor_parallel_ranks_train_like_one_rank() -> None:
    (one,), both = run_ranks(train_with_tiles, 1), run_ranks(train_with_tiles, 2)
    for losses, norm in both:
        assert norm == pytest.approx(one[1], rel=1e-5)
        assert losses == pytest.approx(one[0], rel=1e-5)
    assert one[0][-1] < one[0][0] - 0.5


class Shelf:
    """Copies in order; remembers which tensors were put, and for each layer which were under way."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.parked: list[Tensor] = []

    def put(self, x: Tensor) -> Tensor:
        self.log.append(f"put {len(self.parked)}")
        self.parked.append(x.clone())
        return self.parked[-1]

    def fetch(self, parked: Tensor) -> Wait:
        index = next(i for i, x in enumerate(self.parked) if x is parked)
        self.log.append(f"fetch {index}")

        def wait() -> Tensor:
            self.log.append(f"use {index}")
            return parked.clone()

        return wait


def test_checkpoints_that_travel_give_the_same_gradients_and_the_next_is_fetched_ahead() -> None:
    expected = gradients_of(engine_of(RECOMPUTED))
    engine = engine_of(RECOMPUTED)
    shelf = engine._gpt.checkpoint_link = Shelf()
    engine.train_step(ROWS[:1], lr=0.0)
    # layers 0 and 1, and the final norm's input
    assert shelf.log == [
        *("put 0", "put 1", "put 2"),
        *("fetch 2", "fetch 1", "use 2", "fetch 0", "use 1", "use 0"),
    ]
    assert same(gradients_of(engine), expected)


def test_evaluation_sends_nothing_away() -> None:
    engine = engine_of(RECOMPUTED)
    shelf = engine._gpt.checkpoint_link = Shelf()
    engine.score(ROWS[0])
    assert shelf.log == []


def test_offload_is_refused_where_the_model_is_in_host_memory() -> None:
    with pytest.raises(ConfigError, match=r"engine\.offload"):
        engine_of(replace(RECOMPUTED, engine=replace(RECOMPUTED.engine, offload="host")))


def phases_of(case: Case) -> list[str]:
    told: list[Phase] = []
    engine = engine_of(case)
    engine.train_step(ROWS[:1], lr=0.0, on_phase=told.append)
    engine.train_step(ROWS[:1], lr=0.0)
    return [str(phase) for phase in told]


def test_a_step_tells_where_it_is() -> None:
    ends = ["adding up gradients over ranks", "optimizer step"]
    forward = [
        "data",
        *("forward, layer 1/2, attention", "forward, layer 1/2, mlp"),
        *("forward, layer 2/2, attention", "forward, layer 2/2, mlp"),
        *("forward, loss, tile 1/1", "backward, loss, tile 1/1"),
    ]
    assert phases_of(NOT_RECOMPUTED) == [
        *forward,
        *("backward, layer 2/2, mlp", "backward, layer 2/2, attention"),
        *("backward, layer 1/2, mlp", "backward, layer 1/2, attention"),
        *ends,
    ]
    assert phases_of(RECOMPUTED) == [
        *forward,
        *("recompute, layer 2/2, attention", "backward, layer 2/2, mlp", "backward, layer 2/2, attention"),
        *("recompute, layer 1/2, attention", "backward, layer 1/2, mlp", "backward, layer 1/2, attention"),
        *ends,
    ]


def test_a_measured_step_accounts_for_its_memory_and_computes_the_same() -> None:
    plain = engine_of(RECOMPUTED)
    expected = plain.train_step(ROWS, lr=0.0)
    assert expected.memory == {} and expected.peak_memory_gib > 0.05
    engine = engine_of(RECOMPUTED)
    measured = engine.train_step(ROWS, lr=0.0, measure_memory=True)
    assert same(gradients(engine), gradients(plain)) and measured.loss == expected.loss
    parameters = sum(parameter.numel() for parameter in engine._gpt.parameters())
    gib = 2.0**30
    assert measured.memory["weights"] == pytest.approx(4 * parameters / gib, rel=0.1)  # padded in Megatron's buffer
    assert measured.memory["gradients"] == pytest.approx(4 * parameters / gib, rel=0.1)
    assert measured.memory["optimizer"] == pytest.approx(8 * parameters / gib, rel=0.1)
    assert measured.memory["peak"] == measured.memory["peak_all_ranks"] == measured.peak_memory_gib
    assert measured.memory["libraries"] > 0.05
    assert torch.is_grad_enabled()
