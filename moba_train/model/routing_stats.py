"""What routing does, in a few numbers: is it spread, does it collapse onto one chunk, how far does it look.

Legend: S queries at hand, R routing heads, P picks besides the own chunk, C chunks of the row, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from moba_kernels import Routing

# Upper ends of the distance buckets, in chunks between the query's own chunk and the picked one; the last is open.
DISTANCE_ENDS = (1, 4, 16, 64)
DISTANCE_NAMES = ("distance_1", "distance_2_4", "distance_5_16", "distance_17_64", "distance_65_up")


def routing_totals(routings: Mapping[int, Routing], cp_group: dist.ProcessGroup | None, device: torch.device) -> Tensor:
    """Sums over this rank's layers and heads, equal on all ranks of `cp_group`. Collective over it.

    Returns fp64 [4 + buckets]: sum of normalised entropies, heads that have one, sum of top-chunk shares, heads that
    have picks, picks by distance bucket. Add the vectors of other ranks and give the sum to `routing_numbers`.
    """
    totals = torch.zeros(4 + len(DISTANCE_NAMES), dtype=torch.float64, device=device)
    for _, routing in sorted(routings.items()):
        counts_RC, distances = _counts(routing)
        if cp_group is not None and cp_group.size() > 1:
            dist.all_reduce(counts_RC, group=cp_group)
            dist.all_reduce(distances, group=cp_group)
        picks_R = counts_RC.sum(1)
        routed = picks_R > 0
        share_RC = counts_RC / picks_R.clamp_min(1)[:, None]
        geometry = routing.pack.chunks(routing.spec.chunk_size)
        candidates = geometry.num_chunks - int(
            (geometry.first_chunk_of_doc[1:] > geometry.first_chunk_of_doc[:-1]).sum()
        )
        if candidates > 1:
            entropy_R = -torch.special.xlogy(share_RC, share_RC).sum(1) / math.log(candidates)
            totals[0] += entropy_R[routed].sum()
            totals[1] += routed.sum()
        totals[2] += share_RC.amax(1)[routed].sum() if share_RC.shape[1] else 0.0
        totals[3] += routed.sum()
        totals[4:] += distances
    return totals


def routing_numbers(totals: Tensor) -> dict[str, float]:
    """The numbers of `StepResult.routing` from summed totals; only those that are defined. Reads the device."""
    values = totals.tolist()
    numbers: dict[str, float] = {}
    if values[1]:
        numbers["entropy"] = values[0] / values[1]
    if values[3]:
        numbers["top_chunk_share"] = values[2] / values[3]
    picks = sum(values[4:])
    if picks:
        numbers.update({name: value / picks for name, value in zip(DISTANCE_NAMES, values[4:], strict=True)})
    return numbers


def _counts(routing: Routing) -> tuple[Tensor, Tensor]:
    """How often each head picks each chunk (fp64 [R,C]), and picks by distance bucket (fp64 [buckets])."""
    picks_SRP = routing.picks.long()
    num_chunks = routing.pack.chunks(routing.spec.chunk_size).num_chunks
    heads = picks_SRP.shape[1]
    picked = picks_SRP >= 0
    slot = picks_SRP + torch.arange(heads, device=picks_SRP.device)[:, None] * num_chunks
    counts = torch.bincount(slot[picked], minlength=heads * num_chunks).double().view(heads, num_chunks)
    distance = (routing.own_chunks[:, None, None] - picks_SRP)[picked]
    ends = torch.tensor(DISTANCE_ENDS, device=distance.device)
    buckets = torch.bincount(torch.bucketize(distance, ends), minlength=len(DISTANCE_NAMES)).double()
    return counts, buckets


__all__ = ["DISTANCE_NAMES", "routing_numbers", "routing_totals"]
