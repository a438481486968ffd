"""Strict decoding: what a file may say, and what the user reads when it says something else."""

from __future__ import annotations

import pytest

from moba_train.config.load import decode_toml
from moba_train.config.schema import FullLayers, SourceConfig
from moba_train.errors import ConfigError, ConfigErrors


def error_of(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        decode_toml(text, source="x.toml")
    return caught.value


def test_values_of_every_kind_arrive_with_their_types() -> None:
    config = decode_toml(
        """
        [optimizer]
        lr = 1
        [parallel]
        dp = 3
        [niah]
        lengths = [64, 128]
        [data.sources.text]
        path = "a/b"
        [[stages]]
        name = "one"
        mix = { text = 1 }
        full_layers = { last = 2 }
        lr = 1e-4
        [[stages]]
        name = "two"
        rope = { base = 5e5, scaling = "yarn", factor = 4 }
        """
    )
    assert config.optimizer.lr == 1.0 and isinstance(config.optimizer.lr, float)
    assert config.parallel.dp == 3
    assert config.niah.lengths == (64, 128)
    assert config.data.sources == {"text": SourceConfig(path="a/b")}
    assert [stage.name for stage in config.stages] == ["one", "two"]
    assert config.stages[0].full_layers == FullLayers(last=2)
    assert config.stages[0].mix == {"text": 1.0}
    assert (config.stages[0].lr, config.stages[1].lr) == (1e-4, "inherit")
    assert config.stages[1].rope.factor == 4.0


def test_a_misspelt_key_is_named_with_its_path_and_the_key_that_was_meant() -> None:
    error = error_of("[[stages]]\nname = 'a'\n[[stages]]\nchunksize = 4")
    assert (error.what, error.where, error.got) == ("unknown key", "x.toml: stages.1.chunksize", "chunksize")
    assert error.fix == "did you mean stages.1.chunk_size?"
    assert "topk" in error.allowed


def test_a_key_like_nothing_at_all_is_to_be_removed() -> None:
    assert error_of("[run]\nqqqqqq = 1").fix == "remove the key"


def test_a_misspelt_section_is_found() -> None:
    assert error_of("[optimiser]\nlr = 1.0").fix == "did you mean optimizer?"


@pytest.mark.parametrize(
    ("text", "where", "got", "allowed"),
    [
        ("[run]\nseed = '1'", "run.seed", '"1" (a string)', "an integer"),
        ("[run]\nseed = true", "run.seed", "true (true or false)", "an integer"),
        ("[model]\nqk_norm = 1", "model.qk_norm", "1 (an integer)", "true or false"),
        ("[model]\nkey_conv = false", "model.key_conv", "false (true or false)", "0, 3, 5"),
        ("[model]\nkey_conv = 4", "model.key_conv", "4 (an integer)", "0, 3, 5"),
        ("[parallel]\ndp = 1.5", "parallel.dp", "1.5 (a number)", 'an integer or "auto"'),
        ("[parallel]\nlayout = 'zigzg'", "parallel.layout", '"zigzg"', '"zigzag", "contiguous"'),
        ("[niah]\nlengths = 256", "niah.lengths", "256 (an integer)", "an array"),
        ("[niah]\nlengths = [256, 'x']", "niah.lengths.1", '"x" (a string)', "an integer"),
        ("[data]\nsources = 3", "data.sources", "3 (an integer)", "a table"),
        ("stages = [1]", "stages.0", "1 (an integer)", "a table"),
        ("model = 1", "model", "1 (an integer)", "a table"),
    ],
)
def test_a_wrong_type_says_where_what_and_what_would_do(text: str, where: str, got: str, allowed: str) -> None:
    error = error_of(text)
    assert (error.where, error.got, error.allowed) == (f"x.toml: {where}", got, allowed)


def test_a_whole_float_is_told_to_be_written_as_an_integer() -> None:
    assert error_of("[run]\nseed = 1e3").fix == "write 1000"


def test_all_mistakes_are_reported_in_one_pass() -> None:
    error = error_of("[run]\nsede = 1\nlog_every = 'x'\n[model]\nnum_layer = 2\npreset = 'lama-3.1-8b'")
    assert isinstance(error, ConfigErrors)
    assert [part.where.removeprefix("x.toml: ") for part in error.errors] == [
        "run.sede",
        "run.log_every",
        "model.num_layer",
        "model.preset",
    ]
    message = error.message()
    assert message.startswith("4 errors in the configuration\n1. unknown key\n")
    assert 'did you mean "llama-3.1-8b"?' in message


def test_text_that_is_not_toml_names_the_line() -> None:
    error = error_of("[run]\nseed = \n")
    assert error.what == "the file is not valid TOML"
    assert "line 2" in str(error.got)
