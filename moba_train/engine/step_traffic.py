"""What context parallelism moved and waited for in a step, next to what was predicted: numbers for the metrics."""

from __future__ import annotations

import torch
import torch.distributed as dist

from moba_train.model.transport_plan import TransportPlan
from moba_train.parallel.traffic import Traffic


def exchange_numbers(
    traffic: Traffic, plan: TransportPlan, num_rows: int, device: torch.device
) -> tuple[dict[str, float | str], float | None]:
    """The `comm/*` numbers of a step and the seconds waited, the same on every rank. Collective over all ranks.

    Args:
        traffic: what this rank's layers exchanged; its waits were timed on all ranks or on none.
        num_rows: rows that went through them.
    Returns:
        "sent_bytes", "received_bytes": of the rank that sent, received most (forward, recompute and backward of all
        its layers); "predicted_bytes": of the rank that receives most by the plan; the last two also by phase,
        "received_bytes/PHASE"; "predicted_exposed_s", of attention's exchanges by the plan; "transport_moba",
        "transport_full": names, of the kinds of layers that the stage has.
    """
    predicted = plan.predicted("received", num_rows)
    phases = sorted(phase for phase in predicted if phase)  # alike on all ranks
    waited_s = traffic.waits.seconds()
    mine = [traffic.total_sent(), traffic.total_received(), waited_s, *(traffic.received[phase] for phase in phases)]
    most = torch.tensor(mine, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(most, dist.ReduceOp.MAX)
    sent, received, waited_s, *of_phases = most.tolist()
    numbers: dict[str, float | str] = {
        "sent_bytes": sent,
        "received_bytes": received,
        "predicted_bytes": predicted[""],
        "predicted_exposed_s": plan.predicted_exposed_s(num_rows),
        **{f"received_bytes/{phase}": size for phase, size in zip(phases, of_phases, strict=True)},
        **{f"predicted_bytes/{phase}": predicted[phase] for phase in phases},
        **{f"transport_{kind.kind}": kind.cost.transport for kind in plan.kinds},
    }
    return numbers, waited_s if device.type == "cpu" or traffic.waits.on_device else None


__all__ = ["exchange_numbers"]
