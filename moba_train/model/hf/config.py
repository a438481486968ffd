"""config.json of a Hugging Face checkpoint <-> our ModelConfig and RopeConfig. Pure: no torch, no files but that one.

Known are the dense families llama (Llama 2 and 3.x), qwen2 (Qwen2 and 2.5) and qwen3. What would change the function
and has no place here is refused by name: sliding windows that are in use, biases of other projections, rotary
embeddings of other types or over a part of the head, quantised weights, experts. A setting that this file does not
know is refused too: it might change the function.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from moba_train.config.schema import ModelConfig, RopeConfig
from moba_train.errors import CheckpointError
from moba_train.model.hf.settings import MISSING, Settings, read_json

Family = Literal["llama", "qwen2", "qwen3"]

ARCHITECTURES: Final[dict[Family, str]] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
VOCABULARY_MULTIPLE = 128
"""Rows of the embedding are filled up to a multiple of this, so that up to 128 tensor-parallel ranks can share them."""

# Names of special tokens, defaults of generation, labels, provenance: nothing that the function of the model reads.
_WITHOUT_EFFECT = frozenset(
    """_name_or_path _attn_implementation _attn_implementation_autoset _commit_hash transformers_version torch_dtype
    dtype unsloth_version unsloth_fixed use_cache initializer_range pretraining_tp bos_token_id eos_token_id
    pad_token_id unk_token_id sep_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id
    tokenizer_class prefix task_specific_params id2label label2id problem_type finetuning_task max_length min_length
    do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict return_dict_in_generate remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens output_attentions output_hidden_states
    torchscript use_bfloat16 tf_legacy_loss chunk_size_feed_forward is_decoder""".split()  # noqa: SIM905 - sixty lines otherwise
)


@dataclass(frozen=True)
class HfModel:
    """What a config.json says.

    Attributes:
        family: its model_type.
        model: shape of the model; the vocabulary is filled up to a multiple of `VOCABULARY_MULTIPLE`.
        rope: position embedding.
        max_seq_len: max_position_embeddings, tokens.
    """

    family: Family
    model: ModelConfig
    rope: RopeConfig
    max_seq_len: int


def read_config(folder: Path) -> HfModel:
    """Read config.json of a checkpoint folder; CheckpointError names all that cannot be represented."""
    path = folder / "config.json"
    return parse_config(read_json(path), source=str(path))


def parse_config(tree: Mapping[str, Any], *, source: str = "config.json") -> HfModel:
    """Turn the decoded config.json into our configuration.

    Raises:
        CheckpointError: another architecture, or every setting that would change the function and has no place here.
    """
    family = _family(tree, source)
    settings = Settings(tree)
    settings.take("model_type")
    settings.take("architectures")
    model = _model(settings, family)
    max_seq_len = settings.whole("max_position_embeddings")
    rope = _rope(settings, max_seq_len)
    _demand_plain_attention(settings, family, model.num_layers)
    settings.refuse_rest(_WITHOUT_EFFECT)
    if settings.refused:
        raise CheckpointError(
            "the model has settings that cannot be represented here",
            where=source,
            got="; ".join(got for got, _ in settings.refused),
            allowed="; ".join(allowed for _, allowed in settings.refused),
            fix="Choose another model. A setting that changes nothing may be removed from config.json.",
        )
    return HfModel(family, model, rope, max_seq_len)


def _family(tree: Mapping[str, Any], source: str) -> Family:
    for family, architecture in ARCHITECTURES.items():
        if tree.get("model_type") == family and tree.get("architectures") in (None, [architecture]):
            return family
    raise CheckpointError(
        "this architecture is not known",
        where=source,
        got=f"model_type {tree.get('model_type')!r}, architectures {tree.get('architectures')!r}",
        allowed=", ".join(f"{family} ({architecture})" for family, architecture in ARCHITECTURES.items()),
        fix="Choose a dense model of the Llama 2, 3.x, Qwen2, 2.5 or 3 families.",
    )


def _model(settings: Settings, family: Family) -> ModelConfig:
    hidden_size, num_heads = settings.whole("hidden_size"), settings.whole("num_attention_heads")
    num_kv_heads = settings.whole("num_key_value_heads", num_heads if family == "llama" else MISSING)
    if num_heads % num_kv_heads:
        settings.refuse("num_key_value_heads", num_kv_heads, f"a divisor of {num_heads} (num_attention_heads)")
    head_dim = settings.whole("head_dim", 128 if family == "qwen3" else hidden_size // num_heads or MISSING)
    if head_dim % 2:
        settings.refuse("head_dim", head_dim, "an even number")
    num_tokens = settings.whole("vocab_size")
    padding = -num_tokens % VOCABULARY_MULTIPLE
    return ModelConfig(
        num_layers=settings.whole("num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=settings.whole("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=num_tokens + padding,
        vocab_padding=padding,
        tied_head=settings.flag("tie_word_embeddings", False),
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2",
        norm_eps=settings.number("rms_norm_eps"),
    )


def _demand_plain_attention(settings: Settings, family: Family, num_layers: int) -> None:
    """No window, no other biases, no dropout, no quantised or foreign parts."""
    window = settings.take("sliding_window") if settings.holds("sliding_window") else MISSING  # Qwen's is 4096 then
    first = settings.take("max_window_layers", 0)
    used = settings.flag("use_sliding_window", False) and window is not None
    if used and not (type(first) is int and first >= num_layers):
        settings.refuse("sliding_window", window, "not in use: use_sliding_window = false")
    elif family == "llama" and window not in (None, MISSING):
        settings.refuse("sliding_window", window, "null")
    layers = settings.take("layer_types")
    plain = isinstance(layers, list) and len(layers) == num_layers and all(kind == "full_attention" for kind in layers)
    if layers is not None and not plain:
        settings.refuse("layer_types", layers, "full_attention in every layer")
    settings.demand("hidden_act", "silu")
    settings.demand("attention_bias", family == "qwen2")
    settings.demand("mlp_bias", False)
    settings.demand("attention_dropout", 0, 0.0)
    settings.demand("use_mrope", False)
    settings.demand("is_encoder_decoder", False)
    settings.demand("add_cross_attention", False)
    for name in ("quantization_config", "compression_config", "auto_map"):
        settings.demand(name)


def _rope(settings: Settings, max_seq_len: int) -> RopeConfig:
    """The rotary embedding, from rope_parameters (transformers 5) or from rope_theta and rope_scaling (before)."""
    new, old = settings.take("rope_parameters", {}), settings.take("rope_scaling", {})
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(value, dict):
            settings.refuse(name, value, "an object")
            return RopeConfig()
    if new and old and new != old:
        settings.refuse("rope_scaling", old, "the same as rope_parameters, or null")
    rope = Settings(new or old, "rope_parameters." if new else "rope_scaling.", settings.refused)
    outside = settings.take("rope_theta")
    base = rope.number("rope_theta", 10000.0 if outside is None else outside, above=1)
    if outside not in (None, base):
        settings.refuse("rope_theta", outside, f"{base}, as beside the scaling")
    settings.demand("partial_rotary_factor", 1, 1.0)
    rope.demand("partial_rotary_factor", 1, 1.0)
    original = settings.take("original_max_position_embeddings")
    old_name = rope.take("type", "default")
    kind = rope.take("rope_type", old_name)
    if old_name not in (kind, "default"):
        rope.refuse("type", old_name, f"{kind}, as in rope_type")
    parsed = _scaled(rope, kind, base, max_seq_len if original is None else original)
    if original is not None and parsed.scaling in ("llama3", "yarn") and parsed.original_seq_len != original:
        settings.refuse("original_max_position_embeddings", original, f"{parsed.original_seq_len}, as in the scaling")
    if parsed.factor < 1:
        rope.refuse("factor", parsed.factor, "a number >= 1")
    rope.refuse_rest()
    return parsed


def _scaled(rope: Settings, kind: object, base: float, original: object) -> RopeConfig:
    if kind == "linear":
        return RopeConfig(base=base, scaling="linear", factor=rope.number("factor"))
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if not low < high:
            rope.refuse("low_freq_factor", low, f"less than {high} (high_freq_factor)")
        return RopeConfig(
            base=base,
            scaling="llama3",
            factor=rope.number("factor"),
            original_seq_len=rope.whole("original_max_position_embeddings", original),
            low_freq_factor=low,
            high_freq_factor=high,
        )
    if kind == "yarn":
        return _yarn(rope, base, original)
    if kind != "default":
        rope.refuse("rope_type", kind, '"default", "linear", "llama3" or "yarn"')
    return RopeConfig(base=base)


def _yarn(rope: Settings, base: float, original: object) -> RopeConfig:
    fast, slow = rope.number("beta_fast", 32.0), rope.number("beta_slow", 1.0)
    if not slow < fast:
        rope.refuse("beta_slow", slow, f"less than {fast} (beta_fast)")
    factor = rope.number("factor")
    rope.demand("truncate", True)
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    given = rope.number("attention_factor", usual)
    if not math.isclose(given, usual, rel_tol=1e-6):
        rope.refuse("attention_factor", given, f"{usual} (0.1 ln(factor) + 1)")
    for name in ("mscale", "mscale_all_dim"):
        rope.demand(name)
    return RopeConfig(
        base=base,
        scaling="yarn",
        factor=factor,
        original_seq_len=rope.whole("original_max_position_embeddings", original),
        beta_fast=fast,
        beta_slow=slow,
    )
