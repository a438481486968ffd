"""Partial attention, the obvious way: one head after the other, a dense mask, fp64. arXiv 2502.13189, eq. 2 to 4.

Shape letters: T queries at hand, S keys at hand, H query heads, K key/value heads, D head dim, Dv value dim, P picks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..report import PairTally, Partial
from .call import AttendCall, accumulate_dtype


def mask_of_head(call: AttendCall, head: int, num_heads: int, device: torch.device) -> Tensor:
    """[T,S] bool: may query i attend to key j? Same document, not later, and (Full, or a chosen chunk)."""
    tokens = torch.arange(call.pack.num_tokens, device=device)
    query_T = tokens if call.q_positions is None else call.q_positions
    key_S = tokens if call.k_positions is None else call.k_positions
    bounds = torch.from_numpy(call.pack.bounds.copy()).to(device)
    document = torch.searchsorted(bounds, tokens, right=True)
    mask = (document[query_T][:, None] == document[key_S]) & (key_S <= query_T[:, None])
    if call.routing is not None:
        chunk_S = call.pack.chunks(call.routing.spec.chunk_size).tensors(device).chunk_of_token_T[key_S]
        chosen_TC = call.routing.chunk_ids.repeat_interleave(num_heads // call.routing.num_routed_heads, 1)[:, head]
        mask &= (chosen_TC[:, :, None] == chunk_S).any(1)
    return mask


def attend_partial(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, call: AttendCall, tally: PairTally | None) -> Partial:
    """softmax(scale * q k^T + mask) v and its log-sum-exp."""
    acc = accumulate_dtype(q_THD)
    num_queries, num_heads, _ = q_THD.shape
    out = q_THD.new_zeros((num_queries, num_heads, v_SKD.shape[2]), dtype=acc)
    lse = q_THD.new_full((num_queries, num_heads), -torch.inf, dtype=acc)
    for head in range(num_heads):
        kv_head = head * k_SKD.shape[1] // num_heads
        mask = mask_of_head(call, head, num_heads, q_THD.device)
        scores = q_THD[:, head].double() @ k_SKD[:, kv_head].double().T * call.scale
        scores = scores.masked_fill(~mask, -torch.inf)
        lse_T = torch.logsumexp(scores, 1) if scores.shape[1] else lse[:, head].double()
        weights = torch.where(mask, torch.exp(scores - lse_T[:, None]), 0.0)
        out[:, head] = (weights @ v_SKD[:, kv_head].double()).to(acc)
        lse[:, head] = lse_T.to(acc)
        if tally is not None:
            tally.add(mask.sum(), mask.numel())
    return Partial(out.to(call.result_dtype), lse)


def attend_partial_backward(
    dout_THD: Tensor,
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    lse_TH: Tensor,
    delta_TH: Tensor,
    call: AttendCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """P = exp(scale q k^T - lse); dV = P^T dO; dS = P (dO V^T - delta); dQ = scale dS K; dK = scale dS^T Q."""
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float64) for x in (q_THD, k_SKD, v_SKD))
    num_heads = q_THD.shape[1]
    for head in range(num_heads):
        kv_head = head * k_SKD.shape[1] // num_heads
        q, k, v, dout = (x.double() for x in (q_THD[:, head], k_SKD[:, kv_head], v_SKD[:, kv_head], dout_THD[:, head]))
        mask = mask_of_head(call, head, num_heads, q_THD.device)
        weights = torch.where(mask, torch.exp(q @ k.T * call.scale - lse_TH[:, head, None].double()), 0.0)
        dscores = weights * (dout @ v.T - delta_TH[:, head, None].double()) * call.scale
        dq[:, head] = dscores @ k
        dk[:, kv_head] += dscores.T @ q
        dv[:, kv_head] += weights.T @ dout
    return dq.to(call.result_dtype), dk.to(call.result_dtype), dv.to(call.result_dtype)
