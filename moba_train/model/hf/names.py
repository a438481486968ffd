"""Which Hugging Face tensor is which rows of which tensor of Megatron's. Pure: no torch.

Megatron stacks the layers of a model (dim 0 of the stored tensor) and fuses projections along their outputs:

    linear_qkv   key/value group after group: the query heads of the group, its key head, its value head
    linear_fc1   gate, then up

The order inside a head is the same on both sides: pairs (i, i + D/2) turn together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from moba_train.config.schema import ModelConfig

HEAD: Final = "lm_head.weight"
EMBEDDING: Final = "model.embed_tokens.weight"
_LAYER = "decoder.layers"


@dataclass(frozen=True)
class Part:
    """A Hugging Face tensor inside one of Megatron's.

    Attributes:
        name: its name in the file.
        shape: its shape.
        first: row of Megatron's tensor at which it begins.
        runs: its rows come in this many equal runs, evenly spread over the rows of Megatron's tensor.
    """

    name: str
    shape: tuple[int, ...]
    first: int = 0
    runs: int = 1


@dataclass(frozen=True)
class Place:
    """A tensor of one layer, or one outside of the layers, as Megatron stores it.

    Attributes:
        key: name of the stored tensor.
        shape: without the dim of the layers.
        parts: what it consists of; rows that belong to none are zeros (padding of the vocabulary).
        layer: which entry of dim 0 of the stored tensor it is; None = the stored tensor has no dim of layers.
    """

    key: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    layer: int | None = None

    def rows(self, part: Part) -> Iterator[tuple[int, int, int]]:
        """(row of the part, row of this tensor, number of rows) of each run."""
        run, stride = part.shape[0] // part.runs, self.shape[0] // part.runs
        for i in range(part.runs):
            yield i * run, part.first + i * stride, run


def places(model: ModelConfig) -> Iterator[Place]:
    """Every tensor of the model that Hugging Face's form can hold (the key convolution it cannot), in reading order."""
    vocabulary = (model.vocab_size, model.hidden_size)
    tokens = (model.vocab_size - model.vocab_padding, model.hidden_size)
    yield Place("embedding.word_embeddings.weight", vocabulary, (Part(EMBEDDING, tokens),))
    for layer in range(model.num_layers):
        yield from _places_of_layer(model, layer)
    yield _whole("decoder.final_layernorm.weight", "model.norm.weight", (model.hidden_size,))
    if not model.tied_head:
        yield Place("output_layer.weight", vocabulary, (Part(HEAD, tokens),))


def stored_shape(place: Place, model: ModelConfig) -> tuple[int, ...]:
    """Shape of the stored tensor, the dim of the layers included."""
    return place.shape if place.layer is None else (model.num_layers, *place.shape)


def _places_of_layer(model: ModelConfig, layer: int) -> Iterator[Place]:
    ours, theirs = _LAYER, f"model.layers.{layer}"
    hidden, inner, heads_width = model.hidden_size, model.ffn_hidden_size, model.num_heads * model.head_dim
    norm = f"{ours}.self_attention.linear_qkv.layer_norm_weight"
    yield _whole(norm, f"{theirs}.input_layernorm.weight", (hidden,), layer)
    yield _qkv(model, layer, "weight", (hidden,))
    if model.qkv_bias:
        yield _qkv(model, layer, "bias", ())
    if model.qk_norm:
        for letter in ("q", "k"):
            key, name = f"{ours}.self_attention.{letter}_layernorm.weight", f"{theirs}.self_attn.{letter}_norm.weight"
            yield _whole(key, name, (model.head_dim,), layer)
    key, name = f"{ours}.self_attention.linear_proj.weight", f"{theirs}.self_attn.o_proj.weight"
    yield _whole(key, name, (hidden, heads_width), layer)
    norm = f"{ours}.mlp.linear_fc1.layer_norm_weight"
    yield _whole(norm, f"{theirs}.post_attention_layernorm.weight", (hidden,), layer)
    branches = (
        Part(f"{theirs}.mlp.gate_proj.weight", (inner, hidden)),
        Part(f"{theirs}.mlp.up_proj.weight", (inner, hidden), first=inner),
    )
    yield Place(f"{ours}.mlp.linear_fc1.weight", (2 * inner, hidden), branches, layer)
    yield _whole(f"{ours}.mlp.linear_fc2.weight", f"{theirs}.mlp.down_proj.weight", (hidden, inner), layer)


def _qkv(model: ModelConfig, layer: int, kind: str, inputs: tuple[int, ...]) -> Place:
    """The fused projection of a layer, or its bias."""
    groups, head_dim = model.num_kv_heads, model.head_dim
    queries = model.num_heads // groups * head_dim  # rows of a group
    parts = tuple(
        Part(f"model.layers.{layer}.self_attn.{letter}_proj.{kind}", (groups * rows, *inputs), first, groups)
        for letter, rows, first in (("q", queries, 0), ("k", head_dim, queries), ("v", head_dim, queries + head_dim))
    )
    shape = (groups * (queries + 2 * head_dim), *inputs)
    return Place(f"{_LAYER}.self_attention.linear_qkv.{kind}", shape, parts, layer)


def _whole(key: str, name: str, shape: tuple[int, ...], layer: int | None = None) -> Place:
    return Place(key, shape, (Part(name, shape),), layer)
