"""Time of a training step on paper: the cost model's attention and exchanges, and what stands beside them.

    step = rows of a data-parallel rank * (matrix products + attention + gate + exchanges between CP ranks
                                           + exchanges between TP ranks) + gradients and weights once

Everything that cannot hide is added; what hides is the cost model's affair (`moba_train.parallel.cost`).

Shape letters: T tokens of the row, S of the longest shard, M hidden size, N context-parallel ranks, G GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from moba_kernels.spec import AttentionSpec, Full, MoBA
from moba_train.config.presets import preset_model
from moba_train.config.schema import FullLayers, ModelConfig, StageConfig
from moba_train.model.plan import attention_plan, count_parameters
from moba_train.parallel.cost import Choice, choose_transport, exchange_seconds
from moba_train.parallel.hardware import PRESETS, Hardware
from moba_train.parallel.rules import TRANSPORT_NAMES, refusals
from moba_train.parallel.volume import Exchange, HeadShape, RowShape
from moba_train.train.flops import document_gate_scores, matmul_parameters, row_pairs, step_flops
from scaling_memory import Memory, Mesh, exchanged_bytes, rank_memory, tensor_parallel_heads

GEMM_SHARE = 0.6
"""Share of the peak that the layers' matrix products reach, norms, activations and residuals counted with them."""
FREE_SHARE = 0.1
"""Share of the memory left to the CUDA context, NCCL, kernels' scratch and the allocator."""
TP_TRANSFERS = 14
"""Transfers of a layer's hidden states between TP ranks under sequence parallelism: 4 forward, 4 in the recomputed
forward pass, 4 backward, and 2 inputs gathered again for the gradients of weights."""
HOST_BYTES_S = 50e9
"""Of one GPU to host memory, one direction: PCIe 5.0 x16 carries 64 GB/s."""


@dataclass(frozen=True)
class Job:
    """A model, its attention and the rows of a step. spec is that of all but the last `full_layers` layers."""

    model: ModelConfig
    spec: AttentionSpec
    full_layers: int
    seq_len: int
    rows: int

    def stage(self) -> StageConfig:
        moba = self.spec if isinstance(self.spec, MoBA) else None
        return StageConfig(
            seq_len=self.seq_len,
            attention="moba" if moba else "full",
            chunk_size=moba.chunk_size if moba else 1,
            topk=moba.topk if moba else 1,
            full_layers=FullLayers(last=self.full_layers if moba else 0),
        )

    def layers(self) -> dict[AttentionSpec, int]:
        """Attention -> number of layers."""
        counts: dict[AttentionSpec, int] = {}
        for spec in attention_plan(self.model, self.stage()):
            counts[spec] = counts.get(spec, 0) + 1
        return counts


@dataclass(frozen=True)
class Step:
    """One step on a mesh, in seconds, and what it takes.

    Attributes:
        choices: the transport of each kind of layer.
        wait_s: for a rank whose attention is longer than the mean.
        offload: checkpoints wait in host memory, because they do not fit otherwise.
    """

    job: Job
    mesh: Mesh
    choices: dict[AttentionSpec, Choice]
    memory: Memory
    offload: bool
    matrix_s: float
    attention_s: float
    wait_s: float
    gate_s: float
    cp_s: float
    tp_s: float
    once_s: float
    peak_flops: float

    @property
    def total_s(self) -> float:
        return sum((self.matrix_s, self.attention_s, self.wait_s, self.gate_s, self.cp_s, self.tp_s, self.once_s))

    @property
    def exposed_s(self) -> float:
        """Exchanges of every kind that cost time."""
        return self.cp_s + self.tp_s + self.once_s

    def seconds_of(self, spec: AttentionSpec) -> float:
        """Attention of all layers of one kind, busiest rank."""
        rows = self.job.rows // self.mesh.dp
        return rows * self.job.layers()[spec] * self.choices[spec].cost.compute_s

    @property
    def offload_share(self) -> float:
        """Time of checkpoints to host memory and back / step."""
        return 2 * self.memory.offloaded * (self.job.rows // self.mesh.dp) / HOST_BYTES_S / self.total_s

    @property
    def tokens_s(self) -> float:
        """Tokens per second and GPU."""
        return self.job.seq_len * self.job.rows / self.total_s / self.mesh.num_ranks

    @property
    def mfu(self) -> float:
        """Model FLOPs (parameters and attended pairs, nothing twice) / peak."""
        job = self.job
        pairs = row_pairs(job.model, job.stage(), (0, job.seq_len))
        flops = step_flops(job.model, num_tokens=job.seq_len, pairs=pairs, full_recompute=True).model * job.rows
        return flops / (self.total_s * self.mesh.num_ranks * self.peak_flops)


def llama_job(seq_len: int, *, topk: int = 12, moba: bool = True) -> Job:
    """Llama-3.1-8B under 4096/12 with the last 3 of 32 layers full, or all full. A step has 4M tokens, or one row."""
    spec: AttentionSpec = MoBA(4096, topk) if moba else Full()
    return Job(preset_model("llama-3.1-8b"), spec, 3 if moba else 0, seq_len, max(1, (4 << 20) // seq_len))


def meshes(job: Job, num_gpus: int) -> Iterator[Mesh]:
    """tp in 1, 2, 4, 8 inside the node, dp that divides the rows, cp the rest (a rank holds 1024 tokens or more)."""
    for tp in (1, 2, 4, 8):
        for dp in (1 << i for i in range(10)):
            cp, rest = divmod(num_gpus, tp * dp)
            fits = not rest and cp >= 1 and job.rows % dp == 0 and job.seq_len // cp >= 1024
            if fits and job.model.num_kv_heads % tp == 0:
                yield Mesh(tp, cp, dp)


def step_on(job: Job, mesh: Mesh, hardware: Hardware) -> Step | None:
    """The step on this mesh, None where it does not fit. Checkpoints go to host memory if they must.

    Transports are chosen as `transport = "auto"` chooses them, among those whose buffers fit.
    """
    row = RowShape(job.seq_len, mesh.cp, "zigzag")
    heads = tensor_parallel_heads(job.model, mesh.tp)
    layers, rows = job.layers(), job.rows // mesh.dp
    node_ranks = max(1, hardware.node_ranks // mesh.tp)
    for offload in (False, True):
        memory = rank_memory(job.model, mesh, row, layers, offload=offload)
        if not fits(memory, hardware):
            continue
        fitting = {
            spec: {
                name: size
                for name, size in _buffers(spec, heads, row, node_ranks).items()
                if fits(replace(memory, exchanged=size), hardware)
            }
            for spec in layers
        }
        if all(fitting.values()):
            break
    else:
        return None
    choices = {
        spec: choose_transport(spec, heads, [row], hardware, node_ranks=node_ranks, forwards=2, among=names)
        for spec, names in fitting.items()
    }
    memory = replace(memory, exchanged=max(fitting[spec][choice.transport] for spec, choice in choices.items()))
    costs = {spec: choice.cost for spec, choice in choices.items()}
    peak = hardware.bf16_flops
    shared = mesh.tp * mesh.cp
    # forward, recomputed forward, and twice as much backward: 8 operations a weight and token; so too the tiled loss
    matrix_s = 8.0 * matmul_parameters(job.model) * job.seq_len / shared / (peak * GEMM_SHARE)
    gate_s = sum(n * _gate_flops(job, spec) / hardware.attention_flops(spec, 2) for spec, n in layers.items()) / shared
    mean_s = {spec: cost.compute_s / cost.balance for spec, cost in costs.items()}
    return Step(
        job=job,
        mesh=mesh,
        choices=choices,
        memory=memory,
        offload=offload,
        matrix_s=rows * matrix_s,
        attention_s=rows * sum(n * mean_s[spec] for spec, n in layers.items()),
        wait_s=rows * sum(n * (costs[spec].compute_s - mean_s[spec]) for spec, n in layers.items()),
        gate_s=rows * gate_s,
        cp_s=rows * sum(n * costs[spec].exposed_s for spec, n in layers.items()),
        tp_s=rows * job.model.num_layers * _tp_seconds(job, mesh, row, hardware),
        once_s=_once_seconds(job, mesh, hardware),
        peak_flops=peak,
    )


def _buffers(spec: AttentionSpec, heads: HeadShape, row: RowShape, node_ranks: int) -> dict[str, float]:
    """Transport that can serve -> bytes that it holds of other ranks."""
    return {
        name: exchanged_bytes(name, spec, heads, row, node_ranks=node_ranks)
        for name in TRANSPORT_NAMES
        if not refusals(name, spec, num_heads=heads.num_heads, num_kv_heads=heads.num_kv_heads, num_ranks=row.num_ranks)
    }


def fits(memory: Memory, hardware: Hardware) -> bool:
    """Does it leave `FREE_SHARE` of the GPU's memory?"""
    return memory.total <= (1 - FREE_SHARE) * hardware.memory_bytes


def best_step(job: Job, num_gpus: int, hardware: Hardware) -> Step | None:
    """The fastest step that fits; None where none does."""
    steps = (step_on(job, mesh, hardware) for mesh in meshes(job, num_gpus))
    return min((step for step in steps if step is not None), key=lambda step: step.total_s, default=None)


def longest_row(model: ModelConfig, num_gpus: int, hardware: Hardware, *, moba: bool) -> int:
    """The longest row, in units of 131,072 tokens, whose step fits on some mesh; 0 = not even one unit."""
    unit, low, high = 1 << 17, 0, 1 << 8
    while high - low > 1:
        middle = (low + high) // 2
        job = replace(llama_job(middle * unit, moba=moba), model=model, rows=1)
        if best_step(job, num_gpus, hardware) is None:
            high = middle
        else:
            low = middle
    return low * unit


def _gate_flops(job: Job, spec: AttentionSpec) -> float:
    """Scores of one layer and row, once: the recomputed forward pass keeps the picks.

    One product each, as the rates of MoBA count them, which were measured with the gate.
    """
    if not isinstance(spec, MoBA):
        return 0.0
    scores = document_gate_scores(job.seq_len, chunk_size=spec.chunk_size)
    return 2.0 * job.model.head_dim * spec.routed_heads(job.model.num_heads, job.model.num_kv_heads) * scores


def _tp_seconds(job: Job, mesh: Mesh, row: RowShape, hardware: Hardware) -> float:
    """One layer and row: all-gathers and reduce-scatters of hidden states inside the node; none hides."""
    if mesh.tp == 1:
        return 0.0
    hidden = row.cut.longest * job.model.hidden_size * 2
    transfer_s = hidden * (mesh.tp - 1) / mesh.tp / (hardware.node_bytes_s * hardware.link_share)
    return TP_TRANSFERS * (transfer_s + hardware.latency_s + (mesh.tp - 1) * hardware.peer_latency_s)


def _once_seconds(job: Job, mesh: Mesh, hardware: Hardware) -> float:
    """Distributed optimizer over dp * cp ranks: fp32 gradients reduce-scattered, bf16 weights gathered; none hides."""
    ranks = mesh.cp * mesh.dp
    if ranks == 1:
        return 0.0
    everyone = 1.0 - np.eye(ranks)
    parameters = count_parameters(job.model) / mesh.tp
    node_ranks = max(1, hardware.node_ranks // mesh.tp)
    passes = (Exchange("gradients", everyone * (size * parameters / ranks), ring=True) for size in (4, 2))
    return sum(exchange_seconds(exchange, hardware, node_ranks) for exchange in passes)


__all__ = [
    "FREE_SHARE",
    "GEMM_SHARE",
    "HOST_BYTES_S",
    "PRESETS",
    "TP_TRANSFERS",
    "Job",
    "Step",
    "best_step",
    "fits",
    "llama_job",
    "longest_row",
    "meshes",
    "step_on",
]
