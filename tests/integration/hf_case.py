"""Small models made with transformers, one or more of every family, and what they say of a row."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from moba_train.commands.convert import run_from_hf
from moba_train.config.load import decode_toml
from moba_train.config.schema import RunConfig
from moba_train.data.row import Row
from tests.integration.hf_ranks import NUM_TOKENS

CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True)
class HfCase:
    """One model; 8 heads or more, of which groups of 1, 4 or 8 share a key/value head."""

    family: str
    heads: int = 8
    kv_heads: int = 2
    tied: bool = False
    rope: dict[str, Any] = field(default_factory=lambda: PLAIN)
    dtype: torch.dtype = torch.float32
    head_dim: int = 4


HF_CASES = {
    "llama, llama3 scaling, 1 query head a group": HfCase("llama", kv_heads=8, rope=LLAMA3),
    "llama, yarn, tied, 4 a group": HfCase("llama", tied=True, rope=YARN),
    "qwen2, tied, 8 a group": HfCase("qwen2", heads=16, tied=True),
    "qwen2, yarn, 4 a group": HfCase("qwen2", rope=YARN),
    "qwen3, llama3 scaling, tied, 4 a group": HfCase("qwen3", tied=True, rope=LLAMA3, head_dim=6),
    "qwen3, linear, 1 a group": HfCase("qwen3", kv_heads=8, rope=LINEAR),
}


def make_model(case: HfCase, folder: Path, *, seed: int = 0) -> PreTrainedModel:
    """The model with random weights, norms and biases among them, saved in several files."""
    torch.manual_seed(seed)
    shape = {} if case.family == "qwen2" else {"head_dim": case.head_dim}
    config = CONFIGS[case.family](
        vocab_size=NUM_TOKENS,
        hidden_size=case.heads * 4,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=case.tied,
        rope_parameters=dict(case.rope),
        initializer_range=0.2,  # wide enough that attention matters
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
        **shape,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=case.dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", ".bias")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


def converted(source: Path, out: Path) -> RunConfig:
    """Convert, and decode the configuration that came out."""
    run_from_hf(source, out)
    return decode_toml((out / "config.toml").read_text("utf-8"))


def logits_of(model: PreTrainedModel, row: Row) -> Tensor:
    """[S, vocabulary] of a packed row: document after document, each for itself."""
    spans = [span for span in pairwise(row.cu_seqlens) if span[0] < span[1]]
    tokens = torch.from_numpy(row.tokens_S)
    return torch.cat([model(tokens[None, start:stop]).logits[0] for start, stop in spans])
