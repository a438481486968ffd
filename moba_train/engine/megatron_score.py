"""Scores of a row, brought from shards of tokens, vocabulary, heads and layers to the same global arrays on every rank.

Legend: S tokens of this rank's shard, T tokens of the row, V vocabulary entries of this rank, Q queried positions,
R routing heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from moba_train.engine.local_row import LocalRow
from moba_train.model.loss import token_losses
from moba_train.model.row_context import RowContext
from moba_train.parallel.topology import Topology


def token_scores(logits: Tensor, local: LocalRow, topology: Topology) -> tuple[Tensor, Tensor]:
    """logits [1,S,V] -> log-probability of each label fp32 [T] and the most probable token int64 [T].

    Collective over the context- and tensor-parallel groups, which get the same arrays.
    """
    logits_SV = logits[0].float()
    best_S = _argmax_over_vocabulary(logits_SV, topology)
    own_SV = logits_SV.clone() if topology.tp > 1 else logits_SV  # Megatron's loss overwrites what it is given
    losses = token_losses(own_SV[:, None], local.labels.T.contiguous(), tp=topology.tp)
    log_prob_T = torch.zeros(local.context.pack.num_tokens, dtype=torch.float32, device=logits.device)
    argmax_T = torch.zeros(local.context.pack.num_tokens, dtype=torch.int64, device=logits.device)
    log_prob_T[local.context.positions_S] = -losses[:, 0]
    argmax_T[local.context.positions_S] = best_S
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


def _argmax_over_vocabulary(logits_SV: Tensor, topology: Topology) -> Tensor:
    """int64 [S]: the lowest token id with the largest logit over all tensor-parallel ranks."""
    best = logits_SV.max(dim=-1)
    if topology.tp == 1:
        return best.indices
    values = [torch.empty_like(best.values) for _ in range(topology.tp)]
    tokens = [torch.empty_like(best.indices) for _ in range(topology.tp)]
    dist.all_gather(values, best.values.contiguous(), group=topology.tp_group)
    dist.all_gather(tokens, best.indices + topology.tp_rank * logits_SV.shape[1], group=topology.tp_group)
    winner = torch.stack(values).max(dim=0).indices  # the first of equals: ranks hold rising token ids
    return torch.stack(tokens).gather(0, winner[None])[0]


__all__ = ["broadcast_from_last_stage", "picks_at", "token_scores"]
