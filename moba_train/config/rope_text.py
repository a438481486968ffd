"""A position embedding in a few words, for the plan and the log."""

from __future__ import annotations

from moba_train.config.schema import RopeConfig


def describe_rope(rope: RopeConfig) -> str:
    """ "base 500,000, llama3 scaling, factor 8 from 8,192 tokens": what the angles depend on."""
    words = f"base {rope.base:,.0f}"
    if rope.scaling == "none":
        return words
    words += f", {rope.scaling} scaling, factor {rope.factor:g}"
    return words if rope.scaling == "linear" else f"{words} from {rope.original_seq_len:,} tokens"
