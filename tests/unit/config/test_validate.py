"""Rules across fields: each has a message of its own, and all broken ones are shown together."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from moba_train.config.load import decode_toml, load_config
from moba_train.config.schema import ParallelConfig, RunConfig, StageConfig
from moba_train.config.validate import check_rows_per_step, check_world_size, validate
from moba_train.errors import ConfigError, ConfigErrors

SMOKE = Path(__file__).parents[3] / "configs" / "smoke.toml"


@pytest.fixture(scope="module")
def smoke() -> RunConfig:
    return load_config(SMOKE)


def replace(tree: Any, path: str, value: object) -> Any:
    """A copy of a frozen tree with the value at a dotted path replaced."""
    key, _, rest = path.partition(".")
    if isinstance(tree, tuple):
        i = int(key)
        return (*tree[:i], replace(tree[i], rest, value) if rest else value, *tree[i + 1 :])
    if isinstance(tree, dict):
        return {**tree, key: replace(tree[key], rest, value) if rest else value}
    return dataclasses.replace(tree, **{key: replace(getattr(tree, key), rest, value) if rest else value})


def test_the_smoke_configuration_is_valid(smoke: RunConfig) -> None:
    validate(smoke)


@pytest.mark.parametrize(
    ("path", "value", "where", "fragment"),
    [
        ("run.dir", "", "run.dir", "no name"),
        ("run.dir", "a\0b", "run.dir", "NUL"),
        ("run.seed", -1, "run.seed", ">= 0"),
        ("run.log_every", 0, "run.log_every", ">= 1"),
        ("run.max_bad_steps", 0, "run.max_bad_steps", ">= 1"),
        ("run.stop_after_steps", -1, "run.stop_after_steps", ">= 0"),
        ("model.num_layers", 0, "model.num_layers", ">= 1"),
        ("model.num_heads", 3, "model.num_heads", "multiples of 2 (model.num_kv_heads)"),
        ("model.head_dim", 31, "model.head_dim", "rotates pairs"),
        ("model.norm_eps", 0.0, "model.norm_eps", "> 0"),
        ("model.init_std", -1.0, "model.init_std", "> 0"),
        ("parallel.cp", 0, "parallel.cp", ">= 1"),
        ("parallel.dp", 0, "parallel.dp", ">= 1"),
        ("parallel.pp", 4, "model.num_layers", "parallel.pp"),
        ("engine.timeout_s", 0.0, "engine.timeout_s", "positive"),
        ("optimizer.lr", 0.0, "optimizer.lr", "> 0"),
        ("optimizer.lr", math.inf, "optimizer.lr", "finite"),
        ("optimizer.beta2", 1.0, "optimizer.beta2", "0 <= beta2 < 1"),
        ("optimizer.min_lr_ratio", 1.5, "optimizer.min_lr_ratio", "0 to 1"),
        ("optimizer.eps", 0.0, "optimizer.eps", "> 0"),
        ("optimizer.weight_decay", -0.1, "optimizer.weight_decay", ">= 0"),
        ("optimizer.warmup_tokens", 10**9, "optimizer.warmup_tokens", "at most 30720"),
        ("optimizer.schedule", "wsd", "optimizer.decay_tokens", "needs a decay"),
        ("optimizer.decay_tokens", 1024, "optimizer.decay_tokens", "no meaning"),
        ("data.tokenizer", "", "data.tokenizer", "moba-train prep"),
        ("data.sources.text.path", "", "data.sources.text.path", "no path"),
        ("data.sources.text.path", "data/x.bin", "data.sources.text.path", 'write "data/x"'),
        ("data.sources.text.path", "a\0", "data.sources.text.path", "NUL"),
        ("data.valid.path", "", "data.valid.path", "no path"),
        ("data.valid.min_doc_tokens", -1, "data.valid.min_doc_tokens", ">= 0"),
        ("stages", (), "stages", "[[stages]]"),
        ("stages.0.name", " ", "stages.0.name", "no name"),
        ("stages.1.name", "moba", "stages.1.name", '"moba", as stages.0'),
        ("stages.0.topk", 0, "stages.0.topk", ">= 1"),
        ("stages.0.chunk_size", 0, "stages.0.chunk_size", ">= 1"),
        ("stages.0.chunk_size", 513, "stages.0.chunk_size", "1 to 512 (seq_len)"),
        ("stages.0.tokens", 1000, "stages.0.tokens", "multiples of 1024 (tokens_per_step)"),
        ("stages.0.tokens", 0, "stages.0.tokens", ">= 1"),
        ("stages.0.seq_len", 0, "stages.0.seq_len", ">= 1"),
        ("stages.0.seq_len", 500, "stages.0.tokens_per_step", "multiples of 500 (seq_len)"),
        ("stages.0.mix", {}, "stages.0.mix", "no source"),
        ("stages.0.mix", {"txt": 1.0}, "stages.0.mix.txt", "text, needle_64"),
        ("stages.0.mix", {"text": 0.0}, "stages.0.mix.text", "> 0"),
        ("stages.0.mix", {"text": math.nan}, "stages.0.mix.text", "finite"),
        ("stages.0.lr", 0.0, "stages.0.lr", "> 0"),
        ("stages.0.full_layers.last", 3, "stages.0.full_layers", "at most 2 (model.num_layers)"),
        ("stages.0.full_layers.every", -1, "stages.0.full_layers.every", ">= 0"),
        ("stages.0.rope.base", 1.0, "stages.0.rope.base", "> 1"),
        ("stages.0.rope.factor", 2.0, "stages.0.rope.factor", '2.0 with scaling "none"'),
        ("stages.0.rope.low_freq_factor", 4.0, "stages.0.rope.low_freq_factor", "less than high_freq_factor"),
        ("engine.offload", "host", "engine.offload", 'engine.recompute = "full"'),
        ("eval.rows", -1, "eval.rows", ">= 0"),
        ("eval.buckets", 513, "eval.buckets", "at most 512"),
        ("niah.lengths", (), "niah.lengths", "no length"),
        ("niah.lengths", (64, 8), "niah.lengths.1", ">= 48"),
        ("niah.lengths", (64, 64), "niah.lengths.1", "twice"),
        ("niah.depths", 0, "niah.depths", ">= 1"),
        ("checkpoint.keep_last", 0, "checkpoint.keep_last", ">= 1"),
    ],
)
def test_a_broken_rule_is_reported_where_it_is_broken(
    smoke: RunConfig, path: str, value: object, where: str, fragment: str
) -> None:
    config = replace(smoke, path, value)
    with pytest.raises(ConfigError) as caught:
        validate(config)
    errors = caught.value.errors if isinstance(caught.value, ConfigErrors) else (caught.value,)
    error = next(error for error in errors if error.where == where)
    assert fragment in error.message()
    assert error.what and error.got is not None and error.allowed and error.fix


def test_a_full_stage_may_have_chunks_longer_than_its_rows(smoke: RunConfig) -> None:
    validate(replace(smoke, "stages.1.chunk_size", 4096))


def test_bf16_on_a_cpu_is_allowed(smoke: RunConfig) -> None:
    validate(replace(replace(smoke, "engine.precision", "bf16"), "engine.device", "cpu"))


def test_all_broken_rules_are_reported_together(smoke: RunConfig) -> None:
    config = replace(replace(replace(smoke, "stages.0.topk", 0), "parallel.tp", 3), "run.log_every", 0)
    with pytest.raises(ConfigErrors) as caught:
        validate(config)
    where = [error.where for error in caught.value.errors]
    assert where == ["run.log_every", "model.num_heads", "model.num_kv_heads", "model.vocab_size", "stages.0.topk"]


def test_an_empty_file_names_everything_that_is_missing() -> None:
    with pytest.raises(ConfigErrors) as caught:
        validate(decode_toml(""))
    where = {error.where for error in caught.value.errors}
    assert where == {"data.tokenizer", "data.sources", "data.valid.path", "stages"}


@pytest.mark.parametrize("name", ["tp", "cp", "pp", "dp"])
def test_a_degree_below_one_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} must be at least 1\n  where:   parallel.{name}\n  got:     0"):
        check_world_size(ParallelConfig(**{name: 0}), 1)


@pytest.mark.parametrize(("world_size", "dp"), [(2, 1), (4, 2), (6, 3)])
def test_dp_auto_takes_the_ranks_that_are_left(world_size: int, dp: int) -> None:
    assert check_world_size(ParallelConfig(cp=2), world_size) == dp


@pytest.mark.parametrize(
    ("parallel", "world_size", "allowed"),
    [
        (ParallelConfig(cp=2), 3, "a multiple of 2 ranks"),
        (ParallelConfig(cp=2), 1, "a multiple of 2 ranks"),
        (ParallelConfig(tp=2, cp=2, dp=2), 4, "exactly 8 ranks"),
    ],
)
def test_ranks_that_do_not_fit_the_mesh_are_refused(parallel: ParallelConfig, world_size: int, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_world_size(parallel, world_size)
    assert caught.value.allowed == allowed
    assert f"{world_size} ranks for tp" in str(caught.value.got)
    assert "torchrun --nproc-per-node" in caught.value.fix


def test_every_data_parallel_rank_takes_as_many_rows() -> None:
    stages = (StageConfig(tokens_per_step=4096, seq_len=1024),)
    check_rows_per_step(stages, 4)
    with pytest.raises(ConfigError, match="cannot be shared evenly") as caught:
        check_rows_per_step(stages, 3)
    assert caught.value.allowed == "multiples of 3072 (dp * seq_len)"


def test_a_fixed_dp_is_checked_against_the_rows_of_every_stage(smoke: RunConfig) -> None:
    with pytest.raises(ConfigErrors) as caught:
        validate(replace(smoke, "parallel.dp", 4))
    assert [error.where for error in caught.value.errors] == ["stages.0.tokens_per_step", "stages.1.tokens_per_step"]
