"""From a file and a command line to a resolved configuration, and back to TOML."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moba_train.config.load import apply_overrides, decode_toml, load_config, to_toml
from moba_train.config.schema import (
    DataConfig,
    FullLayers,
    ModelConfig,
    NiahConfig,
    OptimizerConfig,
    RopeConfig,
    RunConfig,
    RunSection,
    SourceConfig,
    StageConfig,
)
from moba_train.errors import ConfigError, ConfigErrors

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.toml"))
SMOKE = next(path for path in CONFIGS if path.name == "smoke.toml")

names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)
numbers = st.floats(allow_nan=False, allow_infinity=False)
stages = st.builds(
    StageConfig,
    name=names,
    tokens=st.integers(0, 2**60),
    mix=st.dictionaries(names, numbers, max_size=3),
    attention=st.sampled_from(["moba", "full"]),
    full_layers=st.builds(FullLayers, first=st.integers(0, 9)),
    rope=st.builds(RopeConfig, base=numbers, scaling=st.sampled_from(["none", "yarn"])),
    lr=st.one_of(numbers, st.just("inherit")),
)
configs = st.builds(
    RunConfig,
    run=st.builds(RunSection, dir=names, seed=st.integers(0, 2**62)),
    model=st.builds(
        ModelConfig,
        preset=st.sampled_from(["custom", "tiny", "qwen3-8b"]),
        key_conv=st.sampled_from([0, 3, 5]),
        qk_norm=st.booleans(),
    ),
    optimizer=st.builds(OptimizerConfig, lr=numbers, eps=numbers),
    data=st.builds(DataConfig, sources=st.dictionaries(names, st.builds(SourceConfig, path=names), max_size=3)),
    stages=st.lists(stages, max_size=3).map(tuple),
    niah=st.builds(NiahConfig, lengths=st.lists(st.integers(1, 2**40), max_size=4).map(tuple)),
)


@settings(max_examples=60, deadline=None)
@given(configs)
def test_a_resolved_configuration_survives_toml_exactly(config: RunConfig) -> None:
    assert decode_toml(to_toml(config)) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid_and_round_trips(path: Path) -> None:
    config = load_config(path)
    assert decode_toml(to_toml(config)) == config
    assert set(config.stages[0].mix) <= set(config.data.sources)


def test_the_shipped_configurations_are_those_that_the_docs_name() -> None:
    named = {"demo_cpu", "llama_1b_128k", "llama_1b_32k", "llama_8b_128k", "llama_8b_1m", "llama_8b_1m_sft", "smoke"}
    assert {path.stem for path in CONFIGS} >= named | {"million_cpu", "qwen3_8b_256k"}


def test_overrides_replace_what_the_file_says_and_nothing_else() -> None:
    before = load_config(SMOKE)
    after = load_config(
        SMOKE,
        ["--parallel.cp", "2", "--stages.0.tokens=4096", "--run-dir", "runs/other", "--stages.1.mix.text", "0.25"],
    )
    assert after.parallel.cp == 2
    assert after.stages[0].tokens == 4096
    assert after.run.dir == "runs/other"
    assert after.stages[1].mix == {**before.stages[1].mix, "text": 0.25}
    first, second = before.stages
    assert after == dataclasses.replace(
        before,
        parallel=dataclasses.replace(before.parallel, cp=2),
        run=dataclasses.replace(before.run, dir="runs/other"),
        stages=(
            dataclasses.replace(first, tokens=4096),
            dataclasses.replace(second, mix=after.stages[1].mix),
        ),
    )


def test_overrides_know_dashes_underscores_tuples_unions_and_booleans() -> None:
    after = load_config(
        SMOKE,
        [
            *("--run.stop-after-steps", "4", "--run.log_every", "7", "--niah.lengths", "64", "96"),
            *("--parallel.dp", "1", "--stages.0.lr", "1e-3", "--model.no-tied-head"),
        ],
    )
    assert (after.run.stop_after_steps, after.run.log_every) == (4, 7)
    assert after.niah.lengths == (64, 96)
    assert after.parallel.dp == 1
    assert after.stages[0].lr == 1e-3
    assert after.model.tied_head is False


def test_a_preset_from_the_command_line_fills_what_the_file_leaves_out(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(SMOKE.read_text().replace('preset = "tiny"', 'preset = "tiny"\nnum_layers = 4'))
    model = load_config(file, ["--model.preset", "llama-3.2-1b", "--model.num-kv-heads", "4"]).model
    assert (model.preset, model.hidden_size, model.num_heads) == ("llama-3.2-1b", 2048, 32)
    assert (model.num_layers, model.vocab_size) == (4, 1024), "the file's own values stay"
    assert model.num_kv_heads == 4, "the command line has the last word"


@pytest.mark.parametrize(
    ("words", "where", "fragment"),
    [
        (["--parallel.cpp", "2"], "command line", "did you mean --parallel.cp?"),
        (["--stages.0.chunk-sizes", "2"], "command line", "did you mean --stages.0.chunk-size?"),
        (["--stages.7.tokens", "2"], "command line", "did you mean --stages."),
        (["--zzz", "2"], "command line", "--help-config"),
        (["stray"], "command line", "unexpected word"),
        (["--parallel.cp", "two"], "command line: --parallel.cp", "got:     two\n  allowed: an integer"),
        (["--parallel.dp=x"], "command line: --parallel.dp", 'allowed: an integer or "auto"'),
        (["--niah.lengths", "64", "x"], "command line: --niah.lengths", "an integer, once or several times"),
        (["--stages.1.mix.text", "a"], "command line: --stages.1.mix.text", "allowed: a number"),
        (["--parallel.layout", "zigzig"], "command line: --parallel.layout", "did you mean zigzag?"),
        (["--run-dir"], "command line: --run.dir", "needs a value"),
        (["--model.preset"], "command line", "needs a value"),
        (["--model.preset", "gpt-5"], f"{SMOKE}: model.preset", "unknown model preset"),
    ],
)
def test_a_mistaken_override_is_a_configuration_error(words: list[str], where: str, fragment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(SMOKE, words)
    assert caught.value.where == where
    assert fragment in caught.value.message()
    assert "│" not in caught.value.message()


def test_several_unknown_options_are_all_named() -> None:
    with pytest.raises(ConfigErrors) as caught:
        load_config(SMOKE, ["--parallel.cpp", "2", "--stages.0.tokes", "1"])
    assert [error.got for error in caught.value.errors] == ["--parallel.cpp", "--stages.0.tokes"]


def test_wrong_values_and_unknown_options_are_reported_together() -> None:
    words = ["stray", "--stages.0.topk", "1.5", "--parallel.cpp", "2", "--run.seed", "7", "--parallel.dp", "x"]
    with pytest.raises(ConfigErrors) as caught:
        load_config(SMOKE, words)
    assert [error.got for error in caught.value.errors] == ["stray", "1.5", "--parallel.cpp", "x"]


def test_keys_types_and_ranges_are_reported_together(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    text = SMOKE.read_text().replace("log_every", "log_evry").replace("1234", "-1").replace("topk = 3", "topk = 0")
    file.write_text(text.replace("rows = 2", 'rows = "2"').replace("tokens_per_step = 1_024", "tokens_per_stp = 1_024"))
    with pytest.raises(ConfigErrors) as caught:
        load_config(file)
    assert [error.where.removeprefix(f"{file}: ") for error in caught.value.errors] == [
        *("run.log_evry", "stages.0.tokens_per_stp", "stages.1.tokens_per_stp", "eval.rows"),
        *("run.seed", "stages.0.topk", "stages.1.topk"),
    ]


def test_no_overrides_leave_the_configuration_as_it_is() -> None:
    config = load_config(SMOKE)
    assert apply_overrides(config, []) is config


def test_a_missing_file_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist") as caught:
        load_config(tmp_path / "none.toml")
    assert str(tmp_path / "none.toml") in caught.value.where


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None])
def test_an_unreadable_file_is_a_configuration_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "c.toml"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(path)
