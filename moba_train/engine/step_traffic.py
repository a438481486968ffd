"""Bytes that context parallelism moved in a step, next to those that were predicted: numbers for the metrics."""

from __future__ import annotations

import torch
import torch.distributed as dist

from moba_train.model.transport_plan import TransportPlan
from moba_train.parallel.traffic import Traffic


def busiest_bytes(traffic: Traffic, plan: TransportPlan, num_rows: int, device: torch.device) -> dict[str, float | str]:
    """The `comm/*` numbers of a step, the same on every rank. Collective over all ranks; counts are on the host.

    Args:
        traffic: what this rank's layers exchanged.
        num_rows: rows that went through them.
    Returns:
        "sent_bytes", "received_bytes": of the rank that sent, received most (forward, recompute and backward of all
        its layers); "predicted_bytes": of the rank that receives most by the plan; the last two also by phase,
        "received_bytes/PHASE"; "transport_moba", "transport_full": names, of the kinds of layers that the stage has.
    """
    predicted = plan.predicted("received", num_rows)
    phases = sorted(phase for phase in predicted if phase)  # alike on all ranks
    mine = [traffic.total_sent(), traffic.total_received(), *(traffic.received[phase] for phase in phases)]
    most = torch.tensor(mine, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(most, dist.ReduceOp.MAX)
    sent, received, *of_phases = most.tolist()
    return {
        "sent_bytes": sent,
        "received_bytes": received,
        "predicted_bytes": predicted[""],
        **{f"received_bytes/{phase}": size for phase, size in zip(phases, of_phases, strict=True)},
        **{f"predicted_bytes/{phase}": predicted[phase] for phase in phases},
        **{f"transport_{kind.kind}": kind.cost.transport for kind in plan.kinds},
    }


__all__ = ["busiest_bytes"]
