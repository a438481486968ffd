"""Floating-point operations of a step, counted and compared with what the device can do. Pure Python.

Four figures, kept apart because published numbers mix them:

* `model`: parameters and attended pairs, forward and backward, nothing twice. MFU is made from it.
* `gate`: MoBA's routing scores (forward only; no gradient flows through the choice).
* `with_recompute`: what the device really executes: attention's backward computes the scores again (10 instead of 8
  operations per pair and dimension), the loss's backward the logits (`moba_train.model.tiled_loss`), full activation
  recompute runs every layer's forward again, and the gate counts.
* `dense_equivalent`: what the same tokens would have cost under full causal attention.

A matrix multiplication with P weights costs 2 P per token forward and 4 P backward (arXiv 2001.08361). Attention costs
4 D H per (query, key) pair forward and 8 D H backward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from moba_train.config.schema import ModelConfig, StageConfig
from moba_train.model.plan import full_layer_numbers

PEAK_TFLOPS = (
    # (device name contains, bf16 dense, fp32 without tensor cores), from the vendors' data sheets
    ("B200", 2250.0, 75.0),
    ("H200", 989.4, 66.9),
    ("H100 PCIe", 756.0, 51.2),
    ("H100", 989.4, 66.9),
    ("A100", 312.0, 19.5),
)


@dataclass(frozen=True)
class PairCounts:
    """Work of attention over some rows, summed over layers, for one head.

    Attributes:
        attended: (query, key) pairs that attention computes.
        causal: pairs that full attention would compute.
        gate: (query, chunk) scores that routing computes, MoBA layers with per-head selection.
        gate_group: the same, MoBA layers that select once per key/value head.
    """

    attended: float = 0.0
    causal: float = 0.0
    gate: float = 0.0
    gate_group: float = 0.0

    def __add__(self, other: PairCounts) -> PairCounts:
        return PairCounts(
            self.attended + other.attended,
            self.causal + other.causal,
            self.gate + other.gate,
            self.gate_group + other.gate_group,
        )

    @property
    def density(self) -> float:
        """Attended pairs divided by causal pairs; 1.0 = full attention."""
        return self.attended / self.causal if self.causal else 1.0


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of one step, over all ranks."""

    model: float
    gate: float
    with_recompute: float
    dense_equivalent: float


def matmul_parameters(model: ModelConfig) -> int:
    """Weights that every token is multiplied with: projections, MLP and output head; no embedding, norm or key conv."""
    query = model.hidden_size * model.num_heads * model.head_dim
    key_value = 2 * model.hidden_size * model.num_kv_heads * model.head_dim
    mlp = 3 * model.hidden_size * model.ffn_hidden_size
    return model.num_layers * (2 * query + key_value + mlp) + model.hidden_size * model.vocab_size


def step_flops(model: ModelConfig, *, num_tokens: int, pairs: PairCounts, full_recompute: bool) -> StepFlops:
    """FLOPs of one training step.

    Args:
        num_tokens: tokens of the step, over all ranks.
        pairs: attention work of the step, over all ranks and layers.
        full_recompute: engine.recompute == "full".
    """
    weights, head_weights = matmul_parameters(model), model.hidden_size * model.vocab_size
    layer_weights = weights - head_weights
    per_pair = float(model.head_dim * model.num_heads)
    parameters = 6.0 * weights * num_tokens
    gate = 2.0 * model.head_dim * (model.num_heads * pairs.gate + model.num_kv_heads * pairs.gate_group)
    logits_again = 2.0 * head_weights * num_tokens
    forward_again = (2.0 * layer_weights * num_tokens + 4.0 * per_pair * pairs.attended) if full_recompute else 0.0
    return StepFlops(
        model=parameters + 12.0 * per_pair * pairs.attended,
        gate=gate,
        with_recompute=parameters + logits_again + 14.0 * per_pair * pairs.attended + forward_again + gate,
        dense_equivalent=parameters + 12.0 * per_pair * pairs.causal,
    )


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Peak of one device in TFLOP/s, or None where it is not known (every CPU): MFU is then "n/a", not a guess."""
    for name, bf16, fp32 in PEAK_TFLOPS:
        if all(part in device_name for part in name.split()):
            return bf16 if precision == "bf16" else fp32
    return None


def document_pairs(length: int, *, chunk_size: int, topk: int) -> int:
    """(query, key) pairs per head of one document of `length` tokens under MoBA(chunk_size, topk), in closed form.

    A query in chunk c attends the tokens of its own chunk up to itself and min(c, topk - 1) whole earlier chunks.
    """
    whole, tail = divmod(length, chunk_size)
    own = whole * (chunk_size * (chunk_size + 1) // 2) + tail * (tail + 1) // 2
    ramp = min(whole, topk)
    # chunk c < whole has chunk_size queries with min(c, topk - 1) picks each; the tail chunk has `tail` queries
    picks = chunk_size * (ramp * (ramp - 1) // 2 + (whole - ramp) * (topk - 1)) + tail * min(whole, topk - 1)
    return own + picks * chunk_size


def document_gate_scores(length: int, *, chunk_size: int) -> int:
    """(query, chunk) scores per head of one document: each query looks at every chunk that ends before its own."""
    whole, tail = divmod(length, chunk_size)
    return chunk_size * (whole * (whole - 1) // 2) + tail * whole


def row_pairs(model: ModelConfig, stage: StageConfig, cu_seqlens: Sequence[int]) -> PairCounts:
    """Attention work of one packed row in a stage, over all layers, for one head.

    Args:
        cu_seqlens: document boundaries of the row, from 0 to its length; padding counts as the document that it is.
    """
    lengths = Counter(end - start for start, end in pairwise(cu_seqlens))
    full_layers = len(full_layer_numbers(stage.full_layers, model.num_layers))
    moba_layers = 0 if stage.attention == "full" else model.num_layers - full_layers
    causal = sum(times * (length * (length + 1) // 2) for length, times in lengths.items())
    attended, scores = 0, 0
    if moba_layers:
        for length, times in lengths.items():
            attended += times * document_pairs(length, chunk_size=stage.chunk_size, topk=stage.topk)
            scores += times * document_gate_scores(length, chunk_size=stage.chunk_size)
    return PairCounts(
        attended=moba_layers * attended + (model.num_layers - moba_layers) * causal,
        causal=model.num_layers * causal,
        gate=moba_layers * scores if stage.select == "head" else 0,
        gate_group=moba_layers * scores if stage.select == "group" else 0,
    )
