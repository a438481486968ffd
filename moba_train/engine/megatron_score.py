"""Scores of a row, brought from shards of tokens, vocabulary, heads and layers to the same global arrays on every rank.

Legend: S tokens of this rank's shard, L the same with padding, T tokens of the row, M hidden size,
Q queried positions, R routing heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from moba_train.engine.local_row import LocalRow
from moba_train.model.row_context import RowContext
from moba_train.model.tiled_loss import Head, token_scores
from moba_train.parallel.topology import Topology


def row_scores(hidden: Tensor, local: LocalRow, topology: Topology, head: Head) -> tuple[Tensor, Tensor]:
    """Final hidden states [1,L/tp,M] -> log-probability of each label fp32 [T], most probable token int64 [T].

    Collective over the context- and tensor-parallel groups, which get the same arrays.
    """
    losses_L, best_L = token_scores(hidden[0], local.labels[0], head)
    num_tokens, context = local.context.num_local_tokens, local.context
    log_prob_T = torch.zeros(context.pack.num_tokens, dtype=torch.float32, device=hidden.device)
    argmax_T = torch.zeros(context.pack.num_tokens, dtype=torch.int64, device=hidden.device)
    log_prob_T[context.positions_S] = -losses_L[:num_tokens]
    argmax_T[context.positions_S] = best_L[:num_tokens]
    dist.all_reduce(log_prob_T, group=topology.cp_group)
    dist.all_reduce(argmax_T, group=topology.cp_group)
    return log_prob_T, argmax_T


def broadcast_from_last_stage(x: Tensor, topology: Topology) -> Tensor:
    """The last pipeline rank's value of `x`, in place, on every pipeline rank."""
    if topology.pp > 1:
        dist.broadcast(x, src=dist.get_global_rank(topology.pp_group, topology.pp - 1), group=topology.pp_group)
    return x


def picks_at(context: RowContext, query_positions: Sequence[int], topology: Topology) -> dict[int, NDArray[np.int32]]:
    """Global layer -> chunk ids int32 [Q,R,topk] that the queries at these global positions attended to.

    Collective over the model's ranks, which get the same arrays.
    """
    queries = np.asarray(query_positions, dtype=np.int64)
    mine = np.isin(queries, context.held)
    rows = torch.from_numpy(np.searchsorted(context.held, queries[mine]))
    slots = torch.from_numpy(np.flatnonzero(mine))
    picks: dict[int, NDArray[np.int32]] = {}
    for layer, routing in sorted(context.routings.items()):
        ids = routing.chunk_ids
        found = torch.zeros((len(queries), *ids.shape[1:]), dtype=torch.int32, device=ids.device)
        found[slots.to(ids.device)] = ids[rows.to(ids.device)]
        dist.all_reduce(found, group=topology.cp_group)
        if topology.tp > 1:
            parts = [torch.empty_like(found) for _ in range(topology.tp)]
            dist.all_gather(parts, found, group=topology.tp_group)
            found = torch.cat(parts, dim=1)
        picks[layer] = found.cpu().numpy()
    if topology.pp > 1:
        of_ranks: list[dict[int, NDArray[np.int32]]] = [{} for _ in range(topology.pp)]
        dist.all_gather_object(of_ranks, picks, group=topology.pp_group)
        picks = {layer: ids for part in of_ranks for layer, ids in part.items()}
    return picks


__all__ = ["broadcast_from_last_stage", "picks_at", "row_scores"]
