"""config.json of Hugging Face checkpoints: what is read, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moba_train.config.presets import preset_model
from moba_train.config.schema import ModelConfig, RopeConfig
from moba_train.errors import CheckpointError
from moba_train.model.hf.config import parse_config, read_config
from moba_train.model.hf.export import hf_config
from moba_train.model.plan import count_parameters

# As published: Llama 3.1 8B, Qwen2.5 7B, Qwen3 8B, Llama 2 7B (without rope_theta, as its first release).
LLAMA_3 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN_25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN_3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA_2 = {
    "_name_or_path": "somewhere",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
PUBLISHED = {"llama": LLAMA_3, "qwen2": QWEN_25, "qwen3": QWEN_3, "llama 2": LLAMA_2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def test_published_settings_give_the_published_number_of_parameters() -> None:
    numbers = {name: count_parameters(parse_config(tree).model) for name, tree in PUBLISHED.items()}
    assert numbers == {
        "llama": 8_030_261_248,
        "qwen2": 7_615_616_512,
        "qwen3": 8_190_735_360,
        "llama 2": 6_738_415_616,
    }


def test_published_settings_are_those_of_the_presets() -> None:
    for name, tree in (("llama-3.1-8b", LLAMA_3), ("qwen3-8b", QWEN_3)):
        assert vars(parse_config(tree).model) | {"preset": name} == vars(preset_model(name))


def test_scaling_and_the_longest_sequence_are_read() -> None:
    llama = parse_config(LLAMA_3)
    assert llama.rope == RopeConfig(base=500000.0, scaling="llama3", factor=8.0, original_seq_len=8192)
    assert llama.max_seq_len == 131072
    assert parse_config(LLAMA_2).rope == RopeConfig(base=10000.0)
    yarn = parse_config({**QWEN_25, "rope_scaling": {**YARN, "beta_fast": 16}}).rope
    assert yarn == RopeConfig(base=1e6, scaling="yarn", factor=4.0, original_seq_len=32768, beta_fast=16.0)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        {"rope_scaling": {"type": "yarn", **YARN}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 32768},
        {"rope_scaling": None, "rope_theta": None, "rope_parameters": {**YARN, "rope_theta": 1000000.0}},
        {"rope_scaling": {**YARN, "attention_factor": 1.138629436111989, "truncate": True}},
        {"rope_scaling": YARN, "partial_rotary_factor": 1.0, "original_max_position_embeddings": 32768},
    ],
    ids=["old name", "both names", "length by default", "transformers 5", "usual factor", "told twice"],
)
def test_every_way_to_say_the_same_scaling_is_understood(change: dict[str, Any]) -> None:
    expected = RopeConfig(base=1e6, scaling="yarn", factor=4.0, original_seq_len=32768)
    assert parse_config({**QWEN_25, **change}).rope == expected


def test_a_window_that_no_layer_uses_does_not_matter() -> None:
    known = parse_config(QWEN_25).model
    assert parse_config({**QWEN_25, "use_sliding_window": True, "sliding_window": None}).model == known
    assert parse_config({**QWEN_25, "use_sliding_window": True}).model == known  # it would begin above the last layer
    assert parse_config({**QWEN_25, "layer_types": ["full_attention"] * 28}).model == known


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (LLAMA_3, {"model_type": "mistral"}, "model_type 'mistral'"),
    (LLAMA_3, {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    (LLAMA_3, {"architectures": "LlamaForCausalLM"}, "architectures 'LlamaForCausalLM'"),
    (LLAMA_3, {"attention_bias": True}, "attention_bias = true"),
    (LLAMA_3, {"mlp_bias": True}, "mlp_bias = true"),
    (LLAMA_3, {"hidden_act": "gelu"}, 'hidden_act = "gelu"'),
    (LLAMA_3, {"attention_dropout": 0.1}, "attention_dropout = 0.1"),
    (LLAMA_3, {"sliding_window": 4096}, "sliding_window = 4096"),
    (LLAMA_3, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    (LLAMA_3, {"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    (LLAMA_3, {"num_experts": 8}, "num_experts = 8"),
    (LLAMA_3, {"attention_multiplier": 0.5}, "attention_multiplier = 0.5"),
    (LLAMA_3, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    (LLAMA_3, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 'rope_type = "dynamic"'),
    (LLAMA_3, {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, 'type = "yarn"'),
    (LLAMA_3, {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor = missing"),
    (LLAMA_3, {"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "rope_scaling.factor = 0.5"),
    (LLAMA_3, {"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section = [1]"),
    (LLAMA_3, {"rope_scaling": [8]}, "rope_scaling = [8]"),
    (LLAMA_3, {"rope_scaling": {**LLAMA_3["rope_scaling"], "low_freq_factor": 4.0}}, "low_freq_factor = 4.0"),  # type: ignore[dict-item]
    (LLAMA_3, {"rope_parameters": {"rope_type": "default"}}, "rope_scaling = "),
    (LLAMA_3, {"rope_theta": "500000"}, 'rope_theta = "500000"'),
    (LLAMA_3, {"rope_theta": 1}, "rope_theta = 1"),
    (LLAMA_3, {"rope_theta": 10**400}, "rope_theta = 1000"),
    (LLAMA_3, {"rms_norm_eps": None}, "rms_norm_eps = missing"),
    (LLAMA_3, {"rms_norm_eps": float("nan")}, "rms_norm_eps = NaN"),
    (LLAMA_3, {"num_hidden_layers": True}, "num_hidden_layers = true"),
    (LLAMA_3, {"num_hidden_layers": -1}, "num_hidden_layers = -1"),
    (LLAMA_3, {"num_key_value_heads": 5}, "num_key_value_heads = 5"),
    (LLAMA_3, {"head_dim": 63}, "head_dim = 63"),
    (LLAMA_3, {"tie_word_embeddings": 1}, "tie_word_embeddings = 1"),
    (QWEN_25, {"num_key_value_heads": None}, "num_key_value_heads = missing"),
    (QWEN_25, {"attention_bias": False}, "attention_bias = false"),
    (QWEN_25, {"use_sliding_window": True, "max_window_layers": 27}, "sliding_window = 131072"),
    (QWEN_25, {"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, "layer_types = "),
    (QWEN_25, {"layer_types": ["full_attention"]}, "layer_types = "),
    (QWEN_25, {"use_mrope": True}, "use_mrope = true"),
    (QWEN_25, {"rope_scaling": {**YARN, "attention_factor": 1.0}}, "attention_factor = 1.0"),
    (QWEN_25, {"rope_scaling": {**YARN, "mscale": 1.0}}, "mscale = 1.0"),
    (QWEN_25, {"rope_scaling": {**YARN, "truncate": False}}, "truncate = false"),
    (QWEN_25, {"rope_scaling": {**YARN, "beta_fast": 0.5}}, "beta_slow = 1.0"),
    (QWEN_25, {"rope_scaling": YARN, "original_max_position_embeddings": 4096}, "original_max_position_embeddings"),
    (QWEN_25, {"rope_scaling": {**YARN, "rope_theta": 5.0}}, "rope_theta = 1000000.0"),
    (QWEN_25, {"rope_theta": 1e4, "rope_scaling": {**YARN, "rope_theta": 1e6}}, "rope_theta = 10000.0"),
    (QWEN_3, {"attention_bias": True}, "attention_bias = true"),
]


@pytest.mark.parametrize(("tree", "change", "named"), REFUSED, ids=[str(change)[:60] for _, change, _ in REFUSED])
def test_what_would_change_the_function_is_refused_by_name(
    tree: dict[str, Any], change: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_config({**tree, **change})
    assert named in str(caught.value.got)


def test_a_window_in_use_whose_length_is_not_told_is_refused() -> None:
    tree = {**QWEN_25, "use_sliding_window": True, "num_hidden_layers": 36}  # Qwen2 has a window of 4096 by default
    del tree["sliding_window"]
    with pytest.raises(CheckpointError) as caught:
        parse_config(tree)
    assert caught.value.got == "sliding_window = missing"


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_config({**LLAMA_3, "mlp_bias": True, "rms_norm_eps": 0, "wobble": 3})
    assert str(caught.value.got) == "rms_norm_eps = 0; mlp_bias = true; wobble = 3"


def test_the_vocabulary_is_filled_up_so_that_tensor_parallel_ranks_can_share_it() -> None:
    model = parse_config({**LLAMA_2, "vocab_size": 32001}).model
    assert (model.vocab_size, model.vocab_padding) == (32128, 127)


@pytest.mark.parametrize("text", ["[]", "{", "\xff", '{"a": ' * 100_000], ids=["list", "cut", "bytes", "deep"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        read_config(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the folder has no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_written_reads_as_what_was_read(name: str) -> None:
    first = parse_config(PUBLISHED[name])
    tree = hf_config(
        first.model, first.rope, max_seq_len=first.max_seq_len, dtype="bfloat16", token_ids=PUBLISHED[name]
    )
    assert parse_config(json.loads(json.dumps(tree))) == first
    assert (tree["bos_token_id"], tree["eos_token_id"]) == (
        PUBLISHED[name]["bos_token_id"],
        PUBLISHED[name]["eos_token_id"],
    )


@pytest.mark.parametrize(
    "rope", [RopeConfig(base=5e5, scaling="linear", factor=4.0), RopeConfig(scaling="yarn", factor=2.0, beta_slow=2.0)]
)
def test_every_scaling_is_written(rope: RopeConfig) -> None:
    tree = hf_config(ModelConfig(), rope, max_seq_len=64, dtype="float32", token_ids={})
    assert parse_config(tree).rope == rope


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (ModelConfig(qk_norm=True, qkv_bias=True), "qk_norm together with qkv_bias"),
        (ModelConfig(num_heads=3), "num_heads 3"),
    ],
)
def test_a_model_that_no_family_holds_is_refused(model: ModelConfig, named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        hf_config(model, RopeConfig(), max_seq_len=64, dtype="float32", token_ids={})
    assert named in str(caught.value.got)
