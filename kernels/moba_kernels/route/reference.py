"""The gate, the obvious way: one query after the other. arXiv 2502.13189, eq. 5 (top-k) and 6 (score by mean pooling).

Shape letters: T queries at hand, H query heads, K key/value heads, R routing heads, D head dim, C chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..pack import Pack
from ..routing import Routing, stored_picks
from ..spec import MoBA


def route_means(q_THD: Tensor, mean_CKD: Tensor, spec: MoBA, *, pack: Pack, q_positions: Tensor | None) -> Routing:
    """Routing of the queries at hand given the means; products in fp64, compared as fp32, ties to the later chunk."""
    geometry = pack.chunks(spec.chunk_size)
    chunk_of_token = geometry.chunk_of_token_T
    num_queries, num_heads, _ = q_THD.shape
    num_kv_heads = mean_CKD.shape[1]
    queries = q_THD.double()
    if spec.select == "group":
        queries = queries.view(num_queries, num_kv_heads, num_heads // num_kv_heads, queries.shape[-1]).sum(2)
    routed = spec.routed_heads(num_heads, num_kv_heads)
    picks = torch.full((num_queries, routed, stored_picks(spec, pack)), -1, dtype=torch.int64)
    positions = range(num_queries) if q_positions is None else q_positions.tolist()
    for t, position in enumerate(positions):
        own = int(chunk_of_token[position])
        first = int(geometry.first_chunk_of_doc[geometry.doc_C[own]])
        for head in range(routed):
            means = mean_CKD[first:own, head * num_kv_heads // routed].double()
            scores = (means * queries[t, head]).sum(-1).float().tolist()
            ranked = sorted(range(own - first), key=lambda i, scores=scores: (scores[i], i), reverse=True)  # type: ignore[misc]
            for slot, candidate in enumerate(ranked[: spec.num_picks]):
                picks[t, head, slot] = first + candidate
    return Routing(picks.to(q_THD.device), spec, pack, q_positions, complete=True)
