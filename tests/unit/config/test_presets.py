"""Presets have the published shapes: their parameter counts are those of the model cards."""

from __future__ import annotations

import pytest

from moba_train.config.load import decode_toml
from moba_train.config.presets import preset_model, preset_names
from moba_train.config.schema import ModelConfig
from moba_train.model.plan import count_parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-3.2-1b", 1_235_814_400), ("llama-3.1-8b", 8_030_261_248), ("qwen3-8b", 8_190_735_360)],
)
def test_a_preset_has_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert count_parameters(preset_model(name)) == parameters


def test_only_qwen3_normalises_queries_and_keys() -> None:
    assert [name for name in preset_names() if preset_model(name).qk_norm] == ["qwen3-8b"]


def test_custom_is_the_schema_as_it_stands() -> None:
    assert preset_model("custom") == ModelConfig() == decode_toml("").model


def test_a_file_changes_single_fields_of_a_preset() -> None:
    model = decode_toml('[model]\npreset = "qwen3-8b"\nnum_layers = 2').model
    assert (model.num_layers, model.hidden_size, model.qk_norm, model.norm_eps) == (2, 4096, True, 1e-6)
