"""Memory of one GPU while it trains on a long row: the plan's estimate, and what transports and routing add to it.

`moba_train.train.memory_plan` counts weights, gradients, optimizer, what the forward pass keeps, and the largest of
three moments of the backward pass: a layer's attention, a layer's MLP, the loss. It knows the all-gather only; here
stand the buffers of every transport, the picks that wait for the recomputed forward pass, and the fp32 sums of dq, dk
and dv. Arrays of the code, counted; not measured on a GPU.

Shape letters: T tokens of the row, S of the longest shard, H query heads, K key/value heads, D head dim (values too),
N context-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moba_kernels.spec import AttentionSpec, MoBA
from moba_train.config.schema import EngineConfig, ModelConfig, ParallelConfig, RunConfig, StageConfig
from moba_train.parallel.parts import pulled_tokens, sent_queries
from moba_train.parallel.rules import inner_ranks
from moba_train.parallel.volume import QUERY_STRIDE_BYTES, HeadShape, RowShape
from moba_train.train.memory_plan import MemoryPlan, estimate_memory, gathered_bytes

_BF16, _FP32 = 2, 4
# Index lists of a received query under route_queries (docstring of that module).
_QUERY_INDEX_BYTES = 32


@dataclass(frozen=True)
class Mesh:
    """Degrees of the device mesh; pp = 1."""

    tp: int
    cp: int
    dp: int

    @property
    def num_ranks(self) -> int:
        return self.tp * self.cp * self.dp

    def __str__(self) -> str:
        return f"{self.tp} x {self.cp} x {self.dp}"


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Attributes:
        plan: what `moba-train plan` says; its `gathered` is left out.
        picks: of all MoBA layers, kept so that the recomputed forward pass takes the same.
        sums: dq, dk and dv of one layer in fp32.
        exchanged: what the transport holds of other ranks.
        offloaded: checkpoints that travel to host memory and back; `plan.parked` is what they take there.
    """

    plan: MemoryPlan
    picks: float
    sums: float
    exchanged: float
    offloaded: float

    @property
    def attention(self) -> float:
        """One layer while its attention runs backward, without what is exchanged."""
        return self.plan.attention + self.sums

    @property
    def total(self) -> float:
        """The most at once; without the CUDA context, NCCL's buffers and the allocator's fragments."""
        plan = self.plan
        lasting = plan.weights + plan.gradients + plan.optimizer + plan.data + plan.kept + self.picks
        return lasting + max(self.attention + self.exchanged, plan.mlp, plan.loss)


def rank_memory(
    model: ModelConfig, mesh: Mesh, row: RowShape, layers: Mapping[AttentionSpec, int], *, offload: bool
) -> Memory:
    """Memory of one GPU before anything is exchanged: bf16, full recompute; see `exchanged_bytes`.

    Args:
        row: of `mesh.cp` ranks.
        layers: attention -> number of layers.
        offload: engine.offload = "host": two checkpoints are on the GPU at a time.
    """
    config = RunConfig(
        model=model,
        parallel=ParallelConfig(tp=mesh.tp, cp=mesh.cp, dp=mesh.dp),
        engine=EngineConfig(device="cuda", precision="bf16", recompute="full", offload="host" if offload else "none"),
        stages=(StageConfig(seq_len=row.num_tokens),),
    )
    heads = tensor_parallel_heads(model, mesh.tp)
    tokens = row.cut.longest
    checkpoints = model.num_layers * tokens / mesh.tp * model.hidden_size * _BF16
    return Memory(
        plan=estimate_memory(config),
        picks=sum(count * _pick_bytes(spec, heads, row) for spec, count in layers.items()),
        sums=float(tokens * (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim * _FP32),
        exchanged=0.0,
        offloaded=checkpoints if offload else 0.0,
    )


def tensor_parallel_heads(model: ModelConfig, tp: int) -> HeadShape:
    """The heads of one tensor-parallel rank."""
    return HeadShape(model.num_heads // tp, model.num_kv_heads // tp, model.head_dim, model.head_dim, _BF16)


def exchanged_bytes(transport: str, spec: AttentionSpec, heads: HeadShape, row: RowShape, *, node_ranks: int) -> float:
    """What a transport holds of other ranks at its worst moment.

    all_gather: `gathered_bytes`. pull: the same of what is pulled. a2a: q, k, v, out, dout in bf16 and dq, dk, dv in
    fp32, of all tokens and a share of the heads (more where KV heads are copied). route_queries: two strides of
    messages and the received queries of all heads.
    """
    if row.num_ranks == 1:
        return 0.0
    if transport == "all_gather":
        return _stride_bytes(row.num_tokens, heads)
    if transport in ("a2a", "a2a+all_gather"):
        limit = row.num_ranks if transport == "a2a" else node_ranks
        ranks = inner_ranks(heads.num_heads, heads.num_kv_heads, row.num_ranks, limit)
        held = replace(heads, num_heads=heads.num_heads // ranks, num_kv_heads=max(1, heads.num_kv_heads // ranks))
        elements = held.head_dim * (held.num_heads * (3 * _BF16 + _FP32) + 2 * held.num_kv_heads * (_BF16 + _FP32))
        swapped = float(row.cut.longest * ranks * elements) if ranks > 1 else 0.0
        return swapped + (_stride_bytes(row.num_tokens, held) if ranks < row.num_ranks else 0.0)
    parts = row.parts(spec)
    if transport == "pull":
        draws = heads.num_heads // heads.num_kv_heads if isinstance(spec, MoBA) else 1
        pulled = float(pulled_tokens(parts, draws).sum(0).max())
        return _stride_bytes(row.num_tokens, heads) * pulled / row.num_tokens
    assert isinstance(spec, MoBA)  # `rules.refusals`
    queries = float(sent_queries(parts).sum(0).max()) * heads.num_heads
    kept = heads.head_dim * _BF16 + 2 * spec.num_picks + _QUERY_INDEX_BYTES
    return queries * kept + min(queries * heads.head_dim * (_BF16 + _FP32), 2.0 * QUERY_STRIDE_BYTES)


def untiled_loss_bytes(model: ModelConfig, tokens: int) -> float:
    """What the logits of `tokens` tokens would take at once: bf16, fp32 and their fp32 gradient."""
    return float(tokens * model.vocab_size * (_BF16 + 2 * _FP32))


def _pick_bytes(spec: AttentionSpec, heads: HeadShape, row: RowShape) -> float:
    """The routing of one layer: two bytes a pick."""
    if not isinstance(spec, MoBA):
        return 0.0
    stored = min(spec.num_picks, -(-row.num_tokens // spec.chunk_size) - 1)
    return float(row.cut.longest * spec.routed_heads(heads.num_heads, heads.num_kv_heads) * stored * 2)


def _stride_bytes(num_tokens: int, heads: HeadShape) -> float:
    """One stride of KV heads of the whole row, keys, values and their gradients."""
    return gathered_bytes(num_tokens, heads.num_kv_heads, 2 * heads.head_dim, _BF16)


__all__ = ["Memory", "Mesh", "exchanged_bytes", "rank_memory", "tensor_parallel_heads", "untiled_loss_bytes"]
