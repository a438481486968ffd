"""The machine that a run is on, as the cost model sees it: by its device's name, or measured.

Measured are, with the slowest rank of the job counting each time: an all-to-all of a small and of a large message among
the ranks of a node, and among ranks of one place in all nodes (bandwidth from the difference, latency from the small
one); full attention in the precision of the run; a host read. Everything else stays as the preset of the device says,
the ratio of MoBA's rate to that of full attention among it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moba_kernels import Full, attend
from moba_train.config.schema import HardwareConfig

from . import collectives, ranks
from .hardware import PRESETS, Hardware, preset_of_device, with_overrides
from .wire import Group, Wire

if TYPE_CHECKING:
    from .topology import Topology  # brings Megatron, which takes a second to import

# Bytes to each peer. The large message is long enough for bandwidth to count, and takes seconds on no machine.
_SMALL, _LARGE = 4 << 10, 4 << 20
_REPEATS = 3


def hardware_of_run(config: HardwareConfig, mesh: Topology, dtype: torch.dtype, backend: str) -> Hardware:
    """Collective over all ranks of the job, and the same on all: rank 0's device decides, or the slowest rank's times.

    dtype, backend: of the run's attention.
    """
    device = mesh.device
    name = ranks.from_rank_0(lambda: torch.cuda.get_device_name(device) if device.type == "cuda" else "")
    known = preset_of_device(name) if config.preset in ("auto", "measured") else config.preset
    hardware = with_overrides(PRESETS[known], replace(HardwareConfig(), node_ranks=config.node_ranks))
    if config.preset == "measured" and mesh.cp > 1:
        node_ranks = max(1, hardware.node_ranks // mesh.tp)
        hardware = measure(hardware, mesh.cp_group, node_ranks=node_ranks, device=device, dtype=dtype, backend=backend)
    return with_overrides(hardware, replace(config, node_ranks="preset"))


def measure(
    hardware: Hardware,
    group: Group,
    *,
    node_ranks: int,
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "auto",
) -> Hardware:
    """`hardware` with what was measured in place of its assumptions.

    Takes less than a second where links are fast, and as long as its kernels take to be compiled on a new GPU.
    """
    num_ranks, rank = group.size(), group.rank()
    node = [r for r in range(num_ranks) if r // node_ranks == rank // node_ranks]
    place = [r for r in range(num_ranks) if r % node_ranks == rank % node_ranks]
    near = _link(Wire(group, transport="measurement"), node, device)
    far = _link(Wire(group, transport="measurement"), place, device)
    collectives.forget_among(group)  # nodes of unequal size: some are also groups of a transport
    flops, attend_once = _attention(device, dtype, backend)
    times = (*near, *far, _seconds(attend_once), _host_read_s(device))
    near_small, near_large, far_small, far_large, attention_s, host_read_s = _slowest(times)
    near_peers, far_peers = min(node_ranks, num_ranks) - 1, -(-num_ranks // node_ranks) - 1
    peak = flops / attention_s / hardware.attention_share
    return replace(
        hardware,
        name=f"measured ({hardware.name})",
        node_bytes_s=_bandwidth(near_peers, near_small, near_large) or hardware.node_bytes_s * hardware.link_share,
        cross_bytes_s=_bandwidth(far_peers, far_small, far_large) or hardware.cross_bytes_s * hardware.link_share,
        link_share=1.0,
        latency_s=max(near_small if near_peers else 0.0, far_small if far_peers else 0.0),
        peer_latency_s=0.0,  # part of the latency, with as many peers as there are
        host_read_s=host_read_s,
        bf16_flops=peak,
        fp32_flops=peak,
    )


def _bandwidth(peers: int, small_s: float, large_s: float) -> float:
    """Bytes/s of one rank in one direction; 0.0 = there is no peer."""
    return peers * (_LARGE - _SMALL) / max(large_s - small_s, 1e-9)


def _link(wire: Wire, members: Sequence[int], device: torch.device) -> tuple[float, float]:
    """Seconds of a small and of a large all-to-all among `members`; every rank of the group takes part in its own."""
    among = wire.among(members)

    def exchange(size: int) -> Callable[[], None]:
        sent = torch.zeros((among.size, size), dtype=torch.uint8, device=device)
        rows = [1] * among.size
        return lambda: _settle(among.all_to_all(sent, rows, rows, phase="measurement").wait())

    return _seconds(exchange(_SMALL)), _seconds(exchange(_LARGE))


def _attention(device: torch.device, dtype: torch.dtype, backend: str) -> tuple[float, Callable[[], None]]:
    """(FLOPs of it, full attention forward and backward): long enough for a steady rate."""
    num_tokens, num_heads, num_kv_heads, dim = (16384, 16, 4, 128) if device.type == "cuda" else (1024, 4, 2, 64)
    q, k, v = (
        torch.ones((num_tokens, heads, dim), device=device, dtype=dtype, requires_grad=True)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    dout = torch.ones_like(q)

    def attend_once() -> None:
        _settle(torch.autograd.grad(attend(q, k, v, Full(), backend=backend).out, (q, k, v), dout)[0])

    # two products of 2 D a pair forward, five backward
    return 14.0 * dim * num_heads * num_tokens * (num_tokens + 1) / 2, attend_once


def _host_read_s(device: torch.device) -> float:
    x = torch.zeros(1, device=device)
    return _seconds(lambda: _settle(x)) if device.type == "cuda" else 0.0


def _settle(x: Tensor) -> None:
    """Wait until the device has it."""
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


def _seconds(run: Callable[[], None]) -> float:
    """The best of a few runs after one to warm up; as many on every rank, because they are collective."""
    run()
    times = []
    for _ in range(_REPEATS):
        started_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - started_s)
    return min(times)


def _slowest(times: Sequence[float]) -> list[float]:
    """The largest over all ranks of the job, number by number."""
    return [max(of_ranks) for of_ranks in zip(*ranks.gather_all(tuple(times)), strict=True)]


__all__ = ["hardware_of_run", "measure"]
