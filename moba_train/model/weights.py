"""Initial weights: a pure function of (model configuration, seed), the same for any mesh.

Each tensor of the whole model is drawn from a generator of its own, seeded by its global name; a rank keeps the part
that its tensor-parallel rank holds. So neither the number of ranks nor the order of construction changes a weight.

Distributions: embeddings and projections N(0, init_std^2); projections back into the residual stream
N(0, init_std^2 / (2 * num_layers)) (GPT-2); norms 1; biases 0; key convolution N(0, 0.1^2) around a filter that passes
the token before. A key that begins as "what stood before me" is half of an induction head: a two-layer model then
starts to retrieve after about 150 steps instead of 250 (measured on the demo's 128-token needle stage).
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from moba_train.config.schema import ModelConfig
from moba_train.model.compat import mark_tensor_parallel
from moba_train.model.plan import layers_of_pipeline_rank
from moba_train.parallel.topology import Topology

# Key convolution: spread of all taps, and what the tap of the token before has on top (SiLU(2 x) is near 2 max(x, 0)).
KEY_CONV_STD = 0.1
KEY_CONV_PREVIOUS = 2.0


@torch.no_grad()
def initialize_weights(gpt: nn.Module, model: ModelConfig, topology: Topology, *, seed: int) -> None:
    """Fill every parameter of this rank's part of the model in place."""
    first_layer = layers_of_pipeline_rank(model.num_layers, topology.pp, topology.pp_rank).start
    for name, parameter in gpt.named_parameters():
        whole = _whole_tensor(_global_name(name, first_layer, model.tied_head), model, seed)
        parameter.copy_(_tensor_parallel_part(name, whole, topology.tp, topology.tp_rank))


def mark_weights(gpt: nn.Module) -> None:
    """Say which parameters tensor-parallel ranks share: the gradient norm counts those that they all hold once."""
    for name, parameter in gpt.named_parameters():
        if _is_sharded(name):
            mark_tensor_parallel(parameter, _sharded_dim(name))


def _global_name(name: str, first_layer: int, tied_head: bool) -> str:
    """The parameter's name in a model that one rank holds whole."""
    if tied_head and name == "output_layer.weight":  # the last pipeline rank's copy of the embedding
        return "embedding.word_embeddings.weight"
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + first_layer)
    return ".".join(parts)


def _whole_tensor(name: str, model: ModelConfig, seed: int) -> Tensor:
    """The tensor as one rank would hold it, fp32."""
    shape = _whole_shape(name, model)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    if name.endswith("key_conv.weight"):
        filters = torch.empty(shape).normal_(0.0, KEY_CONV_STD, generator=generator)
        filters[:, :, -2] += KEY_CONV_PREVIOUS
        return filters
    into_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
    std = model.init_std / math.sqrt(2 * model.num_layers) if into_residual else model.init_std
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def _whole_shape(name: str, model: ModelConfig) -> tuple[int, ...]:
    """Shape over all tensor-parallel ranks, by the last parts of Megatron's parameter names."""
    module, kind = name.rsplit(".", 2)[-2:]
    heads_width = model.num_heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "word_embeddings": (model.vocab_size, model.hidden_size),
        "output_layer": (model.vocab_size, model.hidden_size),
        "linear_qkv": (heads_width + 2 * model.num_kv_heads * model.head_dim, model.hidden_size),
        "linear_proj": (model.hidden_size, heads_width),
        "linear_fc1": (2 * model.ffn_hidden_size, model.hidden_size),
        "linear_fc2": (model.hidden_size, model.ffn_hidden_size),
        "key_conv": (model.num_kv_heads, model.head_dim, model.key_conv),
        "q_layernorm": (model.head_dim,),
        "k_layernorm": (model.head_dim,),
        "input_layernorm": (model.hidden_size,),
        "pre_mlp_layernorm": (model.hidden_size,),
        "final_layernorm": (model.hidden_size,),
    }
    return shapes[module][:1] if kind == "bias" else shapes[module]


def _tensor_parallel_part(name: str, whole: Tensor, tp: int, tp_rank: int) -> Tensor:
    """What a tensor-parallel rank holds of a whole tensor."""
    if not _is_sharded(name):
        return whole
    if "linear_fc1" in name:  # gate and up are cut each for itself
        gate, up = whole.chunk(2)
        return torch.cat([gate.chunk(tp)[tp_rank], up.chunk(tp)[tp_rank]])
    return whole.chunk(tp, _sharded_dim(name))[tp_rank]


def _is_sharded(name: str) -> bool:
    """Do tensor-parallel ranks share the parameter? They all hold the norms."""
    return not name.endswith("norm.weight")


def _sharded_dim(name: str) -> int:
    """The dim that tensor-parallel ranks share: inputs of row-parallel projections, else outputs."""
    return 1 if "linear_proj" in name or "linear_fc2" in name else 0


__all__ = ["initialize_weights", "mark_weights"]
