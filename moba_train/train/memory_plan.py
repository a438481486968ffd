"""What a rank's memory will hold, before anything runs: pure arithmetic on the configuration; imports no torch.

Component by component as `moba_train.engine.memory` measures it. Largest tensors only, for the stage with the longest
rows on pipeline rank 0; a few per cent of the total is left out (allocator, small buffers). Legend: S tokens of this
rank's shard, T tokens of the row, M hidden size, F ffn width, H query heads, K key/value heads (of this tensor-parallel
rank), D head dim, e bytes of an element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moba_train.config.mesh import parallel_of_stage
from moba_train.config.schema import EngineConfig, ModelConfig, ParallelConfig, RunConfig, StageConfig
from moba_train.model.plan import count_layer_parameters, full_layer_numbers
from moba_train.model.tiles import tile_rows
from moba_train.parallel.volume import STRIDE_BYTES

GIB = 2**30
CPU_LIBRARIES = int(0.45 * GIB)
"""Resident memory of a rank before the model is built (Python 3.11, torch 2.13, megatron-core 0.16); none on a GPU."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per rank.

    Attributes:
        libraries: Python, PyTorch and Megatron (CPU).
        weights, gradients, optimizer: over the whole run.
        data: tokens, positions and rotations of a row.
        kept: what the forward pass keeps for the backward pass, without `picks`.
        picks: the routing of MoBA layers, likewise.
        attention: what one layer needs on top while the backward of its attention runs, without `gathered`.
        gathered: keys and values of a whole row, and their gradients, of one stride of KV heads.
        mlp: what one layer needs on top while the backward of its MLP runs.
        loss: a tile of logits, and the last hidden states, their norm and the gradients of both.
        parked: pinned host memory in which checkpoints of recompute wait (engine.offload = "host").
        stages: names of the stages that it holds for, which share a mesh.
    """

    libraries: float
    weights: float
    gradients: float
    optimizer: float
    data: float
    kept: float
    picks: float
    attention: float
    gathered: float
    mlp: float
    loss: float
    parked: float = 0.0
    stages: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """The most at once, without `parked`: loss, MLP and attention follow one another."""
        always = self.libraries + self.weights + self.gradients + self.optimizer + self.data + self.kept + self.picks
        return always + max(self.attention + self.gathered, self.mlp, self.loss)


def estimate_memory(config: RunConfig) -> MemoryPlan:
    """Bytes per rank, on the mesh that needs most where stages have meshes of their own; dp = "auto" counts as 1."""
    return max(memory_by_mesh(config), key=lambda plan: plan.total)


def memory_by_mesh(config: RunConfig) -> list[MemoryPlan]:
    """One estimate for each mesh that stages run on, in the order of the stages."""
    stages_of: dict[ParallelConfig, list[StageConfig]] = {} if config.stages else {config.parallel: []}
    for stage in config.stages:
        stages_of.setdefault(parallel_of_stage(config.parallel, stage), []).append(stage)
    return [_estimate(config.model, mesh, config.engine, stages) for mesh, stages in stages_of.items()]


def _estimate(
    model: ModelConfig, parallel: ParallelConfig, engine: EngineConfig, stages: Sequence[StageConfig]
) -> MemoryPlan:
    """Bytes per rank of stages that share a mesh.

    Weights, gradients, optimizer (arXiv 1910.02054, section 3.1): P parameters per rank take 4 P (fp32) or 2 P (bf16)
    bytes of weights, 4 P of gradients, and 8 P (Adam's moments; bf16 adds 4 P of master weights) divided by dp * cp
    where the optimizer is sharded. ZeRO divides gradients too (stage 2), and weights (3); it holds fp32 weights twice.
    """
    dp = 1 if parallel.dp == "auto" else parallel.dp
    ends = 1 if model.tied_head or parallel.pp > 1 else 2
    embedding = ends * model.vocab_size * model.hidden_size
    layers = model.num_layers // parallel.pp
    parameters = (embedding + layers * count_layer_parameters(model)) / parallel.tp
    zero = engine.zero_stage if engine.kind == "deepspeed" else 0
    optimizer = parameters * (12 if engine.precision == "bf16" or zero else 8)
    if engine.distributed_optimizer:
        optimizer /= dp * parallel.cp
    row = max((stage.seq_len for stage in stages), default=0)
    shard = _Shard(model, engine, tokens=row / parallel.cp, tp=parallel.tp)
    return MemoryPlan(
        libraries=CPU_LIBRARIES if engine.device == "cpu" else 0.0,
        weights=parameters * shard.element / (dp * parallel.cp if zero == 3 else 1),
        gradients=parameters * 4 / (dp * parallel.cp if zero >= 2 else 1),
        optimizer=optimizer,
        data=shard.data + 20 * row,  # the row itself on the host: tokens, labels, mask
        kept=shard.kept(layers, parallel.pp),
        picks=max((shard.picks(stage) for stage in stages), default=0.0),
        attention=shard.attention,
        gathered=shard.gathered(row) if parallel.cp > 1 else 0.0,
        mlp=shard.mlp,
        loss=shard.loss,
        parked=shard.parked(layers, parallel.pp),
        stages=tuple(stage.name for stage in stages),
    )


@dataclass(frozen=True)
class _Shard:
    """One rank's share of a row, in bytes."""

    model: ModelConfig
    engine: EngineConfig
    tokens: float
    tp: int

    @property
    def element(self) -> int:
        return 2 if self.engine.precision == "bf16" else 4

    @property
    def hidden(self) -> float:
        """One tensor of hidden states: S * M * e; tensor-parallel ranks share its tokens."""
        return self.tokens * self.model.hidden_size * self.element / self.tp

    def heads(self, query: int, key_value: int) -> float:
        """`query` tensors of S * H * D * e and `key_value` of S * K * D * e."""
        heads = query * self.model.num_heads + key_value * self.model.num_kv_heads
        return self.tokens * heads * self.model.head_dim * self.element / self.tp

    @property
    def lse(self) -> float:
        return 4 * self.tokens * self.model.num_heads / self.tp

    @property
    def data(self) -> float:
        """Tokens, labels, mask, two kinds of positions, and cos and sin of D/2 angles."""
        return self.tokens * (8 + 8 + 4 + 8 + 8 + 4 * self.model.head_dim)

    @property
    def of_attention(self) -> float:
        """A layer's activations up to attention, its input not counted: norm, q, k, v, attention output, lse."""
        return self.hidden + self.heads(2, 2) + self.lse

    def inner(self, tokens: float) -> float:
        """The MLP's inner activations: both branches and their product."""
        return 3 * tokens * self.model.ffn_hidden_size * self.element / self.tp

    def kept(self, layers: int, pp: int) -> float:
        """Of each layer its input, or all activations. A pipeline of pp ranks holds pp rows in flight."""
        if self.engine.recompute == "none":
            return layers * pp * (3 * self.hidden + self.of_attention + self.inner(self.tokens))
        if self.engine.offload == "host":
            return 2 * self.hidden  # one under way, one in use
        return layers * pp * self.hidden

    def parked(self, layers: int, pp: int) -> float:
        """Of each layer its input. PyTorch rounds an allocation of pinned memory up to a power of two
        (ATen/core/CachingHostAllocator.h)."""
        if self.engine.offload != "host":
            return 0.0
        return layers * pp * float(1 << (math.ceil(self.hidden) - 1).bit_length())

    def picks(self, stage: StageConfig) -> float:
        """Two bytes for each query, head and pick of the MoBA layers; as many layers as rows in flight under pp."""
        moba = self.model.num_layers - len(full_layer_numbers(stage.full_layers, self.model.num_layers))
        heads = self.model.num_heads if stage.select == "head" else self.model.num_kv_heads
        return 0.0 if stage.attention == "full" else 2.0 * self.tokens * heads * (stage.topk - 1) * moba / self.tp

    @property
    def attention(self) -> float:
        """Gradients of the residual and of the norm's output, of the attention output and of q; under recompute the
        activations up to attention."""
        again = self.of_attention if self.engine.recompute == "full" else 0.0
        return again + 2 * self.hidden + self.heads(2, 0)

    @property
    def mlp(self) -> float:
        """Gradients of its input and output; under recompute the activations up to there, the layer's output, and a
        tile's inner activations and gradients; else the gradients of all inner activations."""
        if self.engine.recompute == "none":
            return 2 * self.hidden + self.inner(self.tokens)
        inner = 3 * self.model.ffn_hidden_size // self.tp
        return self.of_attention + 5 * self.hidden + 2 * self.inner(self.tile(inner))

    def tile(self, inner: int) -> float:
        """Tokens of a tile with so many values a token."""
        rows = int(self.tokens / self.tp)
        cpu = self.engine.device == "cpu"
        return min(self.tokens, self.tp * tile_rows(rows, self.model.hidden_size, inner, num_ranks=self.tp, cpu=cpu))

    def gathered(self, row: int) -> float:
        kv_heads = max(1, self.model.num_kv_heads // self.tp)
        return gathered_bytes(row, kv_heads, 2 * self.model.head_dim, self.element)

    @property
    def loss(self) -> float:
        """A tile of logits in the element's precision and in fp32, the gradient of the weight in fp32, the last hidden
        states, their norm, and the gradients of both."""
        vocabulary = self.model.vocab_size // self.tp
        tile = self.tile(vocabulary) * vocabulary * (self.element + 4)
        return tile + 4 * vocabulary * self.model.hidden_size + 4 * self.hidden


def gathered_bytes(num_tokens: int, num_kv_heads: int, width: int, element: int) -> float:
    """What all_gather holds of a whole row at its worst moment, in the backward pass.

    One stride of KV heads: gradients in fp32 and the message that they leave in. Where strides follow one another, also
    the keys and values of this one and those of the next, which arrive. width: values of a key and its value.
    """
    of_head = num_tokens * width
    stride = max(1, min(num_kv_heads, STRIDE_BYTES // max(1, of_head * element)))
    beside = 0 if stride == num_kv_heads else 2 * element
    return float(stride * of_head * (2 * 4 + beside))


def memory_lines(memory: MemoryPlan, config: RunConfig) -> list[str]:
    """The plan as text."""
    rows = [
        ("libraries", memory.libraries, "Python, PyTorch, Megatron; on a GPU they are not in its memory"),
        ("weights", memory.weights, "bytes per parameter / (tp * pp)"),
        ("gradients", memory.gradients, "4 bytes per parameter / (tp * pp)"),
        ("optimizer", memory.optimizer, "Adam moments and master weights, / (dp * cp) when sharded"),
        ("data", memory.data, "tokens, positions and rotations of the longest row / cp"),
        ("kept", memory.kept, f"for backward; recompute {config.engine.recompute}, offload {config.engine.offload}"),
        ("picks", memory.picks, "the routing of MoBA layers, two bytes a pick"),
        ("attention", memory.attention, "one layer's activations and gradients, while its attention's backward runs"),
        ("gathered", memory.gathered, "keys, values of a whole row and gradients, a stride of KV heads (all_gather)"),
        ("mlp", memory.mlp, "one layer's activations and gradients, while its MLP's backward runs"),
        ("loss", memory.loss, "a tile of logits, the last hidden states and gradients"),
        ("total", memory.total, "the largest of attention + gathered, mlp and loss, with all others"),
    ]
    if memory.parked:
        rows.append(("parked", memory.parked, "in host memory: checkpoints, each rounded up to a power of two"))
    title = "memory per rank, estimated" + (" (dp = auto counts as 1)" if config.parallel.dp == "auto" else "")
    others = [plan for plan in memory_by_mesh(config) if plan.stages != memory.stages]
    if others:
        totals = ", ".join(f"{'/'.join(plan.stages)} {plan.total / GIB:.3f} GiB" for plan in others)
        title += f", on the mesh of {'/'.join(memory.stages)} (in all, on other meshes: {totals})"
    lines = [title, *(f"  {name:<12}{size / GIB:>9.3f} GiB  {how}" for name, size, how in rows)]
    if config.engine.device == "cpu":  # measured by `make million` and its short form
        lines.append("  on a CPU expect 1.3 to 1.4 times the total: memory that was freed stays with the process")
    return lines
