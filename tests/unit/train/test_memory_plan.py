from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moba_train.config.load import load_config
from moba_train.config.schema import RunConfig
from moba_train.train.memory_plan import GIB, estimate_memory

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def llama() -> RunConfig:
    """1M tokens, tp 4 x cp 16, bf16, full recompute."""
    config = load_config(CONFIGS / "llama_8b_1m.toml")
    return replace(config, stages=config.stages[-1:])


def test_weights_gradients_and_optimizer_are_shared_as_the_mesh_says(llama: RunConfig) -> None:
    one = estimate_memory(llama)
    assert one.weights == pytest.approx(8_030_261_248 / 4 * 2)
    assert one.gradients == pytest.approx(8_030_261_248 / 4 * 4)
    assert one.optimizer == pytest.approx(8_030_261_248 / 4 * 12 / 16)
    assert one.libraries == 0
    whole = estimate_memory(replace(llama, engine=replace(llama.engine, distributed_optimizer=False)))
    assert whole.optimizer == one.optimizer * 16


def test_zero_shares_the_optimizer_then_gradients_then_weights(llama: RunConfig) -> None:
    mesh = replace(llama.parallel, tp=1, pp=1)  # 16 context-parallel ranks
    for zero_stage, (weights, gradients) in enumerate(((2, 4), (2, 4 / 16), (2 / 16, 4 / 16)), start=1):
        engine = replace(llama.engine, kind="deepspeed", zero_stage=zero_stage)  # type: ignore[arg-type]
        plan = estimate_memory(replace(llama, parallel=mesh, engine=engine))
        assert plan.weights == pytest.approx(8_030_261_248 * weights)
        assert plan.gradients == pytest.approx(8_030_261_248 * gradients)
        assert plan.optimizer == pytest.approx(8_030_261_248 * 12 / 16)


def test_what_is_kept_is_one_hidden_state_a_layer_and_everything_without_recompute(llama: RunConfig) -> None:
    hidden = 2**16 * 4096 * 2 / 4  # 1M / 16 tokens, shared by the 4 tensor-parallel ranks
    assert estimate_memory(llama).kept == 32 * hidden
    offloaded = estimate_memory(replace(llama, engine=replace(llama.engine, offload="host")))
    assert offloaded.kept == 2 * hidden
    assert (offloaded.parked, estimate_memory(llama).parked) == (32 * hidden, 0)
    plain = estimate_memory(replace(llama, engine=replace(llama.engine, recompute="none")))
    # four hidden states, and q, k, v, attention output, lse and three ffn vectors of a tensor-parallel rank
    per_token = (4 * 4096 * 2 + (2 * 32 + 2 * 8) * 128 * 2 + 4 * 32 + 3 * 14336 * 2) / 4
    assert plain.kept == pytest.approx(32 * 2**16 * per_token)


def test_checkpoints_on_the_host_take_powers_of_two_as_pytorch_allocates_pinned_memory(llama: RunConfig) -> None:
    engine = replace(llama.engine, offload="host")
    stages = (replace(llama.stages[0], seq_len=3 * 2**18),)
    config = replace(llama, engine=engine, stages=stages)
    assert estimate_memory(config).parked == 32 * 2**27  # 3/4 of a million tokens take as much as a million


def test_more_context_parallel_ranks_share_what_belongs_to_tokens_but_not_what_is_gathered(llama: RunConfig) -> None:
    one, half = estimate_memory(llama), estimate_memory(replace(llama, parallel=replace(llama.parallel, cp=32)))
    assert (half.kept, half.attention, half.optimizer) == (one.kept / 2, one.attention / 2, one.optimizer / 2)
    assert half.gathered == one.gathered == 2**20 * 2 * 128 * (2 * 2 + 2 * 4)  # one KV head at a time


def test_a_loss_never_counts_more_logits_than_a_tile(llama: RunConfig) -> None:
    logits_of_all = 2**16 * 128256 / 4 * 6
    assert estimate_memory(llama).loss < logits_of_all / 4


def test_one_rank_gathers_nothing_and_the_total_is_the_largest_moment() -> None:
    plan = estimate_memory(load_config(CONFIGS / "smoke.toml"))
    assert plan.gathered == 0
    always = plan.libraries + plan.weights + plan.gradients + plan.optimizer + plan.data + plan.kept + plan.picks
    assert plan.total == always + max(plan.attention, plan.mlp, plan.loss)


def test_a_million_tokens_on_two_cpu_ranks_fit_twelve_gib() -> None:
    assert 8 * GIB < 2 * estimate_memory(load_config(CONFIGS / "million_cpu.toml")).total < 12 * GIB
