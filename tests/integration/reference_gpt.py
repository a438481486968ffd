"""The same GPT in plain PyTorch: dense masks, one document after another, no Megatron and no kernels."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from moba_kernels import AttentionSpec, MoBA
from moba_train.config.schema import ModelConfig
from moba_train.data.row import Row


def reference_loss(
    weights: dict[str, Tensor], model: ModelConfig, plan: tuple[AttentionSpec, ...], rows: list[Row]
) -> Tensor:
    """sum(loss * mask) / sum(mask) over all rows."""
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for row in rows:
        logits = reference_logits(weights, model, plan, row)
        losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(row.labels_S), reduction="none")
        total = total + (losses * torch.from_numpy(row.loss_mask_S)).sum()
        count += float(row.loss_mask_S.sum())
    return total / count


def reference_logits(
    weights: dict[str, Tensor], model: ModelConfig, plan: tuple[AttentionSpec, ...], row: Row
) -> Tensor:
    """[S, vocabulary]; weights by Megatron's parameter names."""
    x = weights["embedding.word_embeddings.weight"][torch.from_numpy(row.tokens_S)]
    for layer, spec in enumerate(plan):
        w = {name.split(f"layers.{layer}.")[1]: t for name, t in weights.items() if f"layers.{layer}." in name}
        x = x + attention(rms_norm(x, w["input_layernorm.weight"], model), w, model, spec, row.cu_seqlens)
        gate, up = (rms_norm(x, w["pre_mlp_layernorm.weight"], model) @ w["mlp.linear_fc1.weight"].T).chunk(2, -1)
        x = x + (gate * torch.sigmoid(gate) * up) @ w["mlp.linear_fc2.weight"].T
    x = rms_norm(x, weights["decoder.final_layernorm.weight"], model)
    head = "embedding.word_embeddings.weight" if model.tied_head else "output_layer.weight"
    return x @ weights[head].T


def rms_norm(x: Tensor, weight: Tensor, model: ModelConfig) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + model.norm_eps) * weight


def attention(
    x: Tensor, w: dict[str, Tensor], model: ModelConfig, spec: AttentionSpec, cu_seqlens: tuple[int, ...]
) -> Tensor:
    heads_per_group = model.num_heads // model.num_kv_heads
    qkv = x @ w["self_attention.linear_qkv.weight"].T
    if model.qkv_bias:
        qkv = qkv + w["self_attention.linear_qkv.bias"]
    qkv = qkv.view(len(x), model.num_kv_heads, -1, model.head_dim)
    q, k, v = qkv[:, :, :heads_per_group].flatten(1, 2), qkv[:, :, -2], qkv[:, :, -1]
    if model.qk_norm:
        q = rms_norm(q, w["self_attention.q_layernorm.weight"], model)
        k = rms_norm(k, w["self_attention.k_layernorm.weight"], model)
    outputs = []
    for start, stop in pairwise(cu_seqlens):
        own_k = k[start:stop]
        if model.key_conv:
            own_k = convolved(own_k, w["self_attention.core_attention.key_conv.weight"])
        own_q, own_k = rotated(q[start:stop]), rotated(own_k)
        outputs.append(document_attention(own_q, own_k, v[start:stop], spec))
    return torch.cat(outputs).flatten(1) @ w["self_attention.linear_proj.weight"].T


def convolved(k: Tensor, weight: Tensor) -> Tensor:
    width = weight.shape[-1]
    padded = torch.cat([torch.zeros(width - 1, *k.shape[1:], dtype=k.dtype), k])
    total = sum(padded[i : i + len(k)] * weight[:, :, i] for i in range(width))
    return k + total * torch.sigmoid(total)


def rotated(x: Tensor) -> Tensor:
    dim = x.shape[-1]
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = (torch.arange(len(x), dtype=torch.float64)[:, None] * frequencies)[:, None]
    pairs = torch.complex(x[..., : dim // 2].double(), x[..., dim // 2 :].double()) * torch.exp(1j * angles)
    return torch.cat([pairs.real, pairs.imag], -1).to(x.dtype)


def document_attention(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """[T,H,D] of one document, with every allowed pair in a mask."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    allowed = torch.ones(len(q), len(q), dtype=torch.bool).tril().expand(q.shape[1], -1, -1).clone()
    if isinstance(spec, MoBA):
        for head in range(q.shape[1]):
            for t in range(len(q)):
                for chunk in unpicked_chunks(q, k, head, t, spec):
                    allowed[head, t, chunk * spec.chunk_size : (chunk + 1) * spec.chunk_size] = False
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -math.inf).softmax(-1), v)


def unpicked_chunks(q: Tensor, k: Tensor, head: int, t: int, spec: MoBA) -> list[int]:
    """The earlier chunks that a query does not attend to; k has one head per query head."""
    own = t // spec.chunk_size
    group = q.shape[1] // 2 if spec.select == "group" else 1  # the test models have two key/value heads
    members = range(head // group * group, head // group * group + group)
    means = [k[c * spec.chunk_size : (c + 1) * spec.chunk_size].detach().double().mean(0) for c in range(own)]
    score = [sum(float(q[t, h].detach().double() @ mean[h]) for h in members) for mean in means]
    ranked = sorted(range(own), key=lambda c: (score[c], c), reverse=True)
    return ranked[spec.topk - 1 :]
