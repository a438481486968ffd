"""What DeepSpeed is asked to do, and which configurations are refused before a job is queued."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from moba_train.config.engine_rules import describe_engine, engine_errors
from moba_train.config.schema import (
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    StageConfig,
    StageMesh,
)
from moba_train.engine.deepspeed import import_deepspeed
from moba_train.engine.deepspeed_config import deepspeed_config
from moba_train.engine.deepspeed_state import spread
from moba_train.errors import BackendError

ZERO = EngineConfig(kind="deepspeed")
LARGE = ModelConfig(hidden_size=4096, num_layers=32, ffn_hidden_size=14336, vocab_size=128_256)


def config_of(engine: EngineConfig, model: ModelConfig | None = None, **optimizer: float) -> dict[str, Any]:
    settings = OptimizerConfig(**optimizer)  # type: ignore[arg-type]
    return deepspeed_config(model or ModelConfig(), engine, settings, num_ranks=8)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_the_configuration_is_json_that_deepspeed_reads_without_a_word(zero_stage: Any) -> None:
    import_deepspeed(torch.device("cpu"))
    from deepspeed import DeepSpeedConfig

    for precision in ("fp32", "bf16"):
        asked = config_of(replace(ZERO, zero_stage=zero_stage, precision=precision), clip_grad=0.7)
        assert json.loads(json.dumps(asked)) == asked
        read = DeepSpeedConfig({**asked, "train_batch_size": 1})
        assert read.zero_optimization_stage == zero_stage
        assert read.gradient_clipping == 0.7
        assert read.bfloat16_config.enabled == (precision == "bf16")
        assert read.bfloat16_config.check_grad_overflow
        assert read.grad_accum_dtype == "fp32"
        assert read.communication_data_type == torch.float32


def test_one_row_is_one_micro_batch_of_every_rank() -> None:
    config = config_of(ZERO)
    assert config["train_batch_size"] == 8
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (1, 1)


def test_buffers_hold_no_more_than_the_model_and_no_more_than_a_bucket() -> None:
    small = config_of(ZERO)["zero_optimization"]["reduce_bucket_size"]
    assert 300_000 < small < 400_000  # the default model's parameters
    assert config_of(ZERO, LARGE)["zero_optimization"]["reduce_bucket_size"] == 200_000_000


def test_only_zero_3_says_which_weights_stay_whole() -> None:
    for zero_stage in (1, 2):
        config = config_of(replace(ZERO, zero_stage=zero_stage))  # type: ignore[arg-type]
        assert not [name for name in config["zero_optimization"] if name.startswith("stage3_")]
    config = config_of(replace(ZERO, zero_stage=3), LARGE)
    assert config["zero_optimization"]["stage3_param_persistence_threshold"] == 40_960  # norms, and no projection


REFUSED = {
    "engine.distributed_optimizer": RunConfig(engine=replace(ZERO, distributed_optimizer=False)),
    "engine.offload": RunConfig(engine=replace(ZERO, offload="host", recompute="full")),
    "parallel.tp": RunConfig(engine=ZERO, parallel=ParallelConfig(tp=2)),
    "parallel.pp": RunConfig(engine=ZERO, parallel=ParallelConfig(pp=2)),
    "stages.1.mesh.tp": RunConfig(
        engine=ZERO, stages=(StageConfig(name="short"), StageConfig(name="long", mesh=StageMesh(tp=4)))
    ),
}


@pytest.mark.parametrize("where", REFUSED)
def test_what_the_deepspeed_engine_cannot_do_is_refused_by_name(where: str) -> None:
    refused = REFUSED[where]
    (error,) = engine_errors(refused)
    assert error.where == where
    assert error.fix
    megatron = replace(refused, engine=replace(refused.engine, kind="megatron"))
    assert not list(engine_errors(megatron))


def test_what_the_deepspeed_engine_can_do_is_not_refused() -> None:
    stages = (StageConfig(name="short"), StageConfig(name="long", mesh=StageMesh(cp=8)))
    for zero_stage in (1, 2, 3):
        engine = replace(ZERO, zero_stage=zero_stage, recompute="full", precision="bf16")  # type: ignore[arg-type]
        assert not list(engine_errors(RunConfig(engine=engine, parallel=ParallelConfig(cp=2, dp=4), stages=stages)))


def test_a_missing_deepspeed_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(BackendError) as caught:
        import_deepspeed(torch.device("cpu"))
    assert "pip install 'moba-train[deepspeed]'" in str(caught.value)


def test_deepspeed_loaded_for_another_device_is_refused() -> None:
    import_deepspeed(torch.device("cpu"))
    with pytest.raises(BackendError, match="another device"):
        import_deepspeed(torch.device("cuda"))


def test_keepers_of_the_state_hold_about_as_much() -> None:
    sizes = {"embedding": 100, "head": 100, "a": 30, "b": 30, "c": 30, "d": 30, "norm": 1}
    keepers = spread(sizes, 3)
    assert list(keepers) == list(sizes)
    held = [sum(size for name, size in sizes.items() if keepers[name] == rank) for rank in range(3)]
    assert sorted(held) == [100, 101, 120]
    assert set(spread(sizes, 1).values()) == {0}


def test_the_plan_and_the_log_name_the_engine() -> None:
    assert describe_engine(EngineConfig()) == "megatron"
    assert describe_engine(replace(ZERO, zero_stage=3)) == "DeepSpeed ZeRO-3"
