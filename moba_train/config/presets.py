"""Published model shapes by name. They fill the fields of `[model]` that the file leaves out; RoPE is per stage."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from moba_train.config.schema import ModelConfig

PRESETS: Final = MappingProxyType(
    {
        "tiny": ModelConfig(
            preset="tiny",
            num_layers=2,
            hidden_size=64,
            ffn_hidden_size=192,
            num_heads=2,
            num_kv_heads=2,
            head_dim=32,
            vocab_size=2048,
            tied_head=True,
            key_conv=3,
        ),
        # Llama 3.2 1B, model card and config.json: 1,235,814,400 parameters.
        "llama-3.2-1b": ModelConfig(
            preset="llama-3.2-1b",
            num_layers=16,
            hidden_size=2048,
            ffn_hidden_size=8192,
            num_heads=32,
            num_kv_heads=8,
            head_dim=64,
            vocab_size=128256,
            tied_head=True,
            norm_eps=1e-5,
        ),
        # Llama 3.1 8B (arXiv 2407.21783, table 3): 8,030,261,248 parameters.
        "llama-3.1-8b": ModelConfig(
            preset="llama-3.1-8b",
            num_layers=32,
            hidden_size=4096,
            ffn_hidden_size=14336,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            vocab_size=128256,
            tied_head=False,
            norm_eps=1e-5,
        ),
        # Qwen3 8B (arXiv 2505.09388, table 1), RMSNorm on queries and keys: 8,190,735,360 parameters.
        "qwen3-8b": ModelConfig(
            preset="qwen3-8b",
            num_layers=36,
            hidden_size=4096,
            ffn_hidden_size=12288,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            vocab_size=151936,
            tied_head=False,
            qk_norm=True,
            norm_eps=1e-6,
        ),
    }
)
"""Name -> every field of `[model]`. The name "custom" stands for the defaults of `ModelConfig`."""

CUSTOM: Final = "custom"


def preset_names() -> tuple[str, ...]:
    """Every value that `model.preset` may have."""
    return (CUSTOM, *PRESETS)


def preset_model(name: str) -> ModelConfig:
    """The shape called `name`; KeyError when there is none (the loader reports it with the allowed names)."""
    return ModelConfig() if name == CUSTOM else PRESETS[name]
