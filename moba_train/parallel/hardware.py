"""What the cost model knows about a machine: bandwidths, latencies, rates. Plain numbers, no torch.

Bandwidths, peaks and memory are those of the vendors' data sheets, named beside them. What attention reaches of the
peak was measured on an H200 (kernels/bench/results/nvidia-h200.md) and is taken for the other GPUs too. Latencies and
the shares of links are round assumptions, the same for all GPUs, and not measurements of ours. A configuration may
replace every number (`[parallel.hardware]`), or have them measured at start-up (`measure`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from moba_kernels.spec import AttentionSpec, MoBA
from moba_train.config.schema import HardwareConfig


@dataclass(frozen=True)
class Hardware:
    """One kind of machine. Bandwidths are per rank and direction."""

    name: str
    node_ranks: int
    """Ranks (GPUs) of a node."""
    node_bytes_s: float
    """Bytes/s between ranks of a node."""
    cross_bytes_s: float
    """Bytes/s between ranks of different nodes."""
    link_share: float
    """Share of both that exchanges reach."""
    latency_s: float
    """Seconds that a collective takes at least."""
    peer_latency_s: float
    """Seconds more for every other rank that takes part."""
    host_read_s: float
    """Seconds from a number being ready on the device to the host's next launch."""
    bf16_flops: float
    """Peak of dense bf16 matrix multiplication, FLOP/s."""
    fp32_flops: float
    """Peak of fp32 arithmetic, FLOP/s."""
    attention_share: float
    """Share of the peak that full attention reaches, forward and backward together."""
    pick_pairs: float
    """What a pick, or a query's own chunk, takes beyond its pairs (lists, gathering, merging), in pairs at the peak.
    The gate's products are no part of it: they are FLOPs at the rate of attention."""
    overlap: float
    """A second of communication beside computing slows the computing down by 1 - overlap seconds."""
    memory_bytes: float
    """Of one rank."""

    def attention_flops(self, spec: AttentionSpec, element_bytes: int) -> float:
        """FLOP/s that attention reaches on elements of that size (2: bf16, 4: fp32, 8: fp64)."""
        peak = self.bf16_flops if element_bytes == 2 else self.fp32_flops * 4 / element_bytes
        beyond = self.pick_pairs / spec.chunk_size if isinstance(spec, MoBA) else 0.0
        return peak / (1 / self.attention_share + beyond)


# Assumed of every GPU: a small NCCL collective takes some ten microseconds, each further peer about one; exchanges
# reach four fifths of a link, and take about a fifth of the GPU from what is computed beside them.
_H100 = Hardware(
    name="h100",
    node_ranks=8,
    node_bytes_s=450e9,  # NVIDIA H100 data sheet: NVLink 900 GB/s, both directions together
    cross_bytes_s=50e9,  # NVIDIA DGX H100 data sheet: eight 400 Gb/s adapters for eight GPUs
    link_share=0.8,
    latency_s=15e-6,
    peer_latency_s=1e-6,
    host_read_s=20e-6,
    bf16_flops=989.4e12,  # NVIDIA H100 SXM data sheet, without sparsity
    fp32_flops=66.9e12,
    # The Triton kernels on an H200, D = 128, forward and backward: 456 TFLOP/s where 4096/12 covers a document of 32K
    # tokens, which is full attention; and 115, 249, 396, 399 with chunks of 128, 512, 4096, 8192 from 128K tokens on,
    # which this fits to within 10 %. Short rows reach less: the host is their limit.
    attention_share=0.46,
    pick_pairs=900.0,
    overlap=0.8,
    memory_bytes=80e9,
)

PRESETS: Mapping[str, Hardware] = MappingProxyType(
    {
        "h100": _H100,
        # NVIDIA H200 data sheet: the H100 with 141 GB of memory; NVLink 900 GB/s.
        "h200": replace(_H100, name="h200", memory_bytes=141e9),
        "a100": replace(
            _H100,
            name="a100",
            node_bytes_s=300e9,  # NVIDIA A100 data sheet: NVLink 600 GB/s, both directions together
            cross_bytes_s=25e9,  # NVIDIA DGX A100 data sheet: eight 200 Gb/s adapters for eight GPUs
            bf16_flops=312e12,  # NVIDIA A100 data sheet
            fp32_flops=19.5e12,
            memory_bytes=80e9,
        ),
        # gloo between processes of a small machine, ten-gigabit Ethernet between machines: assumptions. gloo copies on
        # the cores that compute, so nothing hides.
        "cpu": Hardware(
            name="cpu",
            node_ranks=8,
            node_bytes_s=1e9,
            cross_bytes_s=1e9,
            link_share=1.0,
            latency_s=200e-6,
            peer_latency_s=50e-6,
            host_read_s=0.0,
            bf16_flops=5e9,
            fp32_flops=50e9,
            attention_share=0.5,
            pick_pairs=0.0,
            overlap=0.0,
            memory_bytes=8e9,
        ),
    }
)
"""By the names that `parallel.hardware.preset` takes, besides "auto" and "measured"."""


def preset_of_device(device_name: str) -> str:
    """The preset for a CUDA device by its name, "" = no CUDA device. An unknown GPU counts as an H100."""
    if not device_name:
        return "cpu"
    return next((name for name in ("h200", "a100") if name in device_name.lower()), "h100")


def with_overrides(hardware: Hardware, config: HardwareConfig) -> Hardware:
    """`hardware` with the numbers that the configuration gives instead."""
    given: dict[str, float] = {}
    for name, value, scale in (
        ("node_bytes_s", config.node_gb_s, 1e9),
        ("cross_bytes_s", config.cross_gb_s, 1e9),
        ("latency_s", config.latency_us, 1e-6),
        ("peer_latency_s", config.peer_latency_us, 1e-6),
        ("host_read_s", config.host_read_us, 1e-6),
    ):
        if value != "preset":
            given[name] = value * scale
    if "node_bytes_s" in given or "cross_bytes_s" in given:
        # what is given is what exchanges reach; the other one keeps its share
        for name in ("node_bytes_s", "cross_bytes_s"):
            given.setdefault(name, getattr(hardware, name) * hardware.link_share)
        given["link_share"] = 1.0
    if config.attention_tflops != "preset":
        reached = config.attention_tflops * 1e12
        given |= {"bf16_flops": reached, "fp32_flops": reached, "attention_share": 1.0, "pick_pairs": 0.0}
    node_ranks = hardware.node_ranks if config.node_ranks == "preset" else config.node_ranks
    if not given and node_ranks == hardware.node_ranks:
        return hardware
    return replace(hardware, name=f"{hardware.name} (adjusted)", node_ranks=node_ranks, **given)


__all__ = ["PRESETS", "Hardware", "preset_of_device", "with_overrides"]
