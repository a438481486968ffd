"""Which attention a layer runs in a stage: pure functions of the configuration, no torch.

Layers are global (0 .. num_layers - 1) whatever pipeline rank holds them. MoBA has no parameters, so that a stage or an
evaluation may change the plan of a trained model freely (arXiv 2502.13189, section 2.2, "hybrid of MoBA and full").
"""

from __future__ import annotations

from typing import Literal

from moba_kernels.spec import AttentionSpec, Full, MoBA
from moba_train.config.schema import FullLayers, ModelConfig, StageConfig

AttentionMode = Literal["stage", "moba", "full", "random"]
"""See `moba_train.engine.base.AttentionMode`; "random" has the plan of "moba", its picks are drawn elsewhere."""


def full_layer_numbers(full_layers: FullLayers, num_layers: int) -> frozenset[int]:
    """The layers, counted from 0, that stay on full attention inside a MoBA stage."""
    every = full_layers.every
    return frozenset(
        layer
        for layer in range(num_layers)
        if layer < full_layers.first
        or layer >= num_layers - full_layers.last
        or (every > 0 and (layer + 1) % every == 0)
    )


def attention_plan(model: ModelConfig, stage: StageConfig, mode: AttentionMode = "stage") -> tuple[AttentionSpec, ...]:
    """The attention spec of every global layer.

    mode "stage": as the stage says; "moba" and "random": MoBA with the stage's chunk_size and topk in every layer that
    full_layers does not name, also in a full stage; "full": full attention everywhere.
    """
    if mode == "full" or (mode == "stage" and stage.attention == "full"):
        return (Full(),) * model.num_layers
    full = full_layer_numbers(stage.full_layers, model.num_layers)
    moba = MoBA(stage.chunk_size, stage.topk, stage.select)
    return tuple(Full() if layer in full else moba for layer in range(model.num_layers))


def layers_of_pipeline_rank(num_layers: int, pp: int, pp_rank: int) -> range:
    """The global layers that a pipeline rank holds: equal contiguous shares (num_layers % pp == 0)."""
    share = num_layers // pp
    return range(pp_rank * share, (pp_rank + 1) * share)


def count_layer_parameters(model: ModelConfig) -> int:
    """Parameters of one transformer layer."""
    heads_width = model.num_heads * model.head_dim
    kv_width = model.num_kv_heads * model.head_dim
    attention = model.hidden_size * (heads_width + 2 * kv_width) + heads_width * model.hidden_size
    mlp = 3 * model.hidden_size * model.ffn_hidden_size
    norms = 2 * model.hidden_size + (2 * model.head_dim if model.qk_norm else 0)
    biases = heads_width + 2 * kv_width if model.qkv_bias else 0
    return attention + biases + mlp + norms + kv_width * model.key_conv


def count_parameters(model: ModelConfig) -> int:
    """Parameters of the whole model, as it is built by `moba_train.model.gpt`."""
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tied_head else 2)
    return embeddings + model.num_layers * count_layer_parameters(model) + model.hidden_size


__all__ = [
    "AttentionMode",
    "AttentionSpec",
    "attention_plan",
    "count_layer_parameters",
    "count_parameters",
    "full_layer_numbers",
    "layers_of_pipeline_rank",
]
