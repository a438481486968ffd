"""ModelConfig and RopeConfig -> config.json of the family that computes the same under full attention. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from moba_train.config.schema import ModelConfig, RopeConfig
from moba_train.errors import CheckpointError
from moba_train.model.hf.config import ARCHITECTURES, Family, parse_config

_TOKEN_IDS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")


def family_of(model: ModelConfig) -> Family:
    """The family that holds the model's parameters (but for the key convolution).

    Raises:
        CheckpointError: no family does.
    """
    refused = ""
    if model.qk_norm and model.qkv_bias:
        refused = "qk_norm together with qkv_bias"
    family: Family = "qwen3" if model.qk_norm else "qwen2" if model.qkv_bias else "llama"
    if family == "llama" and model.hidden_size % model.num_heads:
        refused = f"hidden_size {model.hidden_size} that is no multiple of num_heads {model.num_heads} (llama)"
    if refused:
        raise CheckpointError(
            "no family of Hugging Face models can hold this one",
            where="[model] of the checkpoint",
            got=refused,
            allowed="llama: neither qk_norm nor qkv_bias; qwen2: qkv_bias; qwen3: qk_norm",
            fix="Train a model of such a shape.",
        )
    return family


def hf_config(
    model: ModelConfig, rope: RopeConfig, *, max_seq_len: int, dtype: str, token_ids: Mapping[str, Any]
) -> dict[str, Any]:
    """The tree of a config.json.

    Args:
        model: shape of the model; its key convolution and the padding of its vocabulary are left out.
        rope: position embedding, as trained with last.
        max_seq_len: longest sequence that the model was made for, tokens.
        dtype: of the weights, as PyTorch calls it ("bfloat16").
        token_ids: bos_token_id, eos_token_id and pad_token_id, as far as they are known; other settings in it are
            passed over.

    Raises:
        CheckpointError: no family can hold the model.
    """
    family = family_of(model)
    tree: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": model.vocab_size - model.vocab_padding,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_seq_len,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied_head,
        "attention_dropout": 0.0,
        "initializer_range": model.init_std,
        "rope_theta": rope.base,
        "rope_scaling": _scaling(rope),
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if family != "qwen2":
        tree["attention_bias"] = False
    if family == "llama":
        tree["mlp_bias"] = False
    else:
        tree |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": model.num_layers}
    tree |= {name: token_ids[name] for name in _TOKEN_IDS if token_ids.get(name) is not None}
    read_back = parse_config(tree)
    shape = replace(
        model,
        preset="custom",
        init_from="",
        init_std=read_back.model.init_std,
        key_conv=0,
        vocab_size=read_back.model.vocab_size,
        vocab_padding=read_back.model.vocab_padding,
    )
    assert (read_back.model, read_back.family) == (shape, family), (read_back, shape)
    return tree


def _scaling(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.scaling == "none":
        return None
    tree: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling in ("llama3", "yarn"):
        tree["original_max_position_embeddings"] = rope.original_seq_len
    if rope.scaling == "llama3":
        tree |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        tree |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
    return tree
