"""The words of docs/scaling.md, around the tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import TextWrapper

from moba_kernels.spec import MoBA
from moba_train.model.plan import count_parameters
from moba_train.parallel.hardware import PRESETS
from moba_train.plan_view import row_density
from scaling_steps import FREE_SHARE, GEMM_SHARE, HOST_BYTES_S, TP_TRANSFERS, Step
from scaling_tables import (
    COUNT_SPEC,
    COUNT_TOKENS,
    PAPER_SPEEDUP,
    PLAN_SCALE,
    SPEC,
    M,
    line,
    number,
    table,
    tokens,
    transports,
)

_IMAGES = "images/scaling_"
_RESULTS = "../kernels/bench/results/nvidia-h200.md"
_CHUNKS = (128, 512, 4096)


@dataclass(frozen=True)
class Facts:
    """Steps that sentences speak of.

    Attributes:
        best: the fastest of the main case on 64 H100; config: the same on the mesh of configs/llama_8b_1m.toml.
        far: row length -> the fastest on 512 H100.
        ring: Qwen3-8B at 1M on 8 H100, all layers full and MoBA.
        longest: GPUs -> the longest row of Llama-3.1-8B that fits on H100.
        offload_share: the time that checkpoints take to host memory and back / the step, the largest of all.
    """

    best: Step
    config: Step
    far: Mapping[int, Step]
    ring: tuple[Step, Step]
    longest: Mapping[int, int]
    offload_share: float


def page(tables: Mapping[str, str], facts: Facts) -> str:
    """The page; tables by name."""
    parts = (
        _head(facts),
        _assumptions(facts.offload_share),
        _counted(tables),
        _steps(tables),
        _bytes(tables),
        _balance(tables),
        _memory(tables),
        _published(facts.ring, facts.longest, facts.best),
        _tries(tables, facts.best),
    )
    blocks = "\n\n".join(part.strip() for part in parts).split("\n\n")
    return "\n\n".join(_filled(block) for block in blocks) + "\n"


def _filled(block: str) -> str:
    """Paragraphs and list items in lines of 120 characters; tables, headings and pictures as they are."""
    if block.startswith(("|", "#", "!", "<")):
        return block
    items = block.replace("\n  ", " ").split("\n* ") if block.startswith("* ") else [block.replace("\n", " ")]
    wrapper = TextWrapper(width=120, break_long_words=False, break_on_hyphens=False)
    if block.startswith("* "):
        wrapper.initial_indent, wrapper.subsequent_indent = "* ", "  "
    return "\n".join(wrapper.fill(item.removeprefix("* ")) for item in items)


def _head(facts: Facts) -> str:
    best, config = facts.best, facts.config
    far = " and ".join(
        f"{100 * step.cp_s / step.total_s:.0f} % at {tokens(seq_len)} tokens" for seq_len, step in facts.far.items()
    )
    return f"""
<!-- Written by docs/scaling/make.py (`make scaling`); edit that. -->
# Scale on paper

What a training step of Llama-3.1-8B costs at 128K, 1M and 10M tokens on 8 to 512 GPUs: bytes, time, balance, memory.
**No step of it was run.** Two kinds of numbers stand here, and each table says which it has:

* **counted**: the framework's own transports ran over up to 512 ranks (threads of one process) on small rows, and
  their byte and pair counters were read;
* **calculated**: closed forms, the cost model of `transport = "auto"`, data sheets and the assumptions below. One of
  these was measured, on one H200: the rate of attention.

The main case is the last stage of `configs/llama_8b_1m.toml`: one document of 1M = 1,048,576 tokens, MoBA 4096/12,
the
last 3 of 32 layers full. A step has 4M tokens (32 rows of 128K, 4 of 1M), or one row of 10M = 10,485,760.

In short, for the main case on 64 H100 (calculated):

* The fastest mesh is tp x cp x dp = {best.mesh}, a step takes {number(best.total_s)} s, MFU {100 * best.mfu:.0f} %.
  The mesh of the configuration file, {config.mesh}, takes {number(config.total_s)} s and
  {config.memory.total / 1e9:.0f} instead of {best.memory.total / 1e9:.0f} GB a GPU: memory to spare, paid for with
  exchanges inside and between nodes.
* Exchanges between context-parallel ranks that do not hide cost {100 * best.cp_s / best.total_s:.1f} % of the step.
  On 512 GPUs it is {far}.
* Three full layers take as long as {_full_in_moba(best):.0f} MoBA layers, {100 * _full_share(best):.0f} % of all
  attention.
"""


def _assumptions(offload_share: float) -> str:
    h100, h200 = PRESETS["h100"], PRESETS["h200"]
    rows = (
        ("NVLink, a GPU and direction", f"{h100.node_bytes_s / 1e9:.0f} GB/s", "data sheets of H100 and H200"),
        ("network, a GPU and direction", f"{h100.cross_bytes_s / 1e9:.0f} GB/s", "DGX H100: eight 400 Gb/s adapters"),
        ("share of both that exchanges reach", f"{100 * h100.link_share:.0f} %", "assumed"),
        ("latency of a collective", f"{h100.latency_s * 1e6:.0f} us", "assumed"),
        ("latency of each further peer", f"{h100.peer_latency_s * 1e6:.0f} us", "assumed"),
        ("what exchanges take from computing beside them", f"{100 * (1 - h100.overlap):.0f} %", "assumed"),
        ("dense bf16 peak", f"{h100.bf16_flops / 1e12:.0f} TFLOP/s", "data sheets"),
        (
            "share of it that full attention reaches",
            f"{100 * h100.attention_share:.0f} %",
            f"**measured** on an H200: [results]({_RESULTS})",
        ),
        (
            f"share of it that MoBA reaches, chunks of {', '.join(map(str, _CHUNKS))}",
            ", ".join(f"{100 * h100.attention_flops(MoBA(c, 1), 2) / h100.bf16_flops:.0f}" for c in _CHUNKS) + " %",
            "**measured** in the same way: 12, 25, 40 %; one curve through them",
        ),
        ("share of it that the rest of a layer reaches, norms counted in", f"{100 * GEMM_SHARE:.0f} %", "assumed"),
        ("FLOPs of attention a pair, forward / backward", "4 HD / 10 HD", "backward makes the scores once more"),
        ("memory of a GPU, H100", f"{h100.memory_bytes / 1e9:.0f} GB", "data sheet"),
        ("memory of a GPU, H200", f"{h200.memory_bytes / 1e9:.0f} GB", "data sheet"),
        ("share of it left free", f"{100 * FREE_SHARE:.0f} %", "assumed"),
        ("host memory", "unlimited", "assumed; the tables say what is needed"),
        (
            "a GPU to host memory",
            f"{HOST_BYTES_S / 1e9:.0f} GB/s, hidden",
            f"assumed; copies last {100 * offload_share:.0f} % of a step here at most",
        ),
    )
    return f"""
## Assumptions

{table("what | value | from", [line(*row) for row in rows], words=True)}

* bf16, full activation recompute (the routing is replayed, not made again), distributed optimizer, tiled loss and
  MLP,
  zigzag layout, one row at a time, pp = 1. Checkpoints of hidden states go to host memory only where they do not fit.
* Meshes: tp 1, 2, 4 or 8 inside a node; dp any power of two that divides the rows of a step; cp the rest. The fastest
  that fits is shown. Transports are chosen by `choose_transport`, for MoBA and for full layers, among those whose
  buffers fit.
* TP: {TP_TRANSFERS} transfers of hidden states a layer (sequence parallelism, recompute included); none hides.
  Gradients (fp32) and weights
  (bf16) cross once a step; none hides. The optimizer's arithmetic and the data loader are left out.
* Every row is one document. Packed documents attend to less and move less.
* Routing is uniform where nothing else is said.
* MFU: FLOPs of parameters and attended pairs, nothing twice, no gate, over the dense bf16 peak.
"""


def _counted(tables: Mapping[str, str]) -> str:
    return f"""
## Counted: what the transports send

Forward and backward of one attention layer on a row of {COUNT_TOKENS:,} tokens, MoBA
{COUNT_SPEC.chunk_size}/{COUNT_SPEC.topk}, 4 query heads on 2 KV heads
(a2a: as many query heads as ranks), fp32, zigzag; nodes of 8 ranks. The ranks are threads; everything above the
collectives is the code that real ranks run. Bytes received, mean over ranks; the picks are drawn beforehand, so no
pooled keys travel. Where shapes decide, closed forms and counters agree to the byte, on every rank in every phase;
where the draw decides, closed forms are expectations.

{tables["counts"]}

Load of the busiest rank / mean, counted in the same way for three routings (see [Balance](#balance)), beside what the
chances say. The tables further down rest on these chances.

{tables["count_loads"]}

Planned, not sent: the queries that every rank would receive under route_queries, from the
transport's
own plan on drawn routings. The row is the main case with all lengths divided by {PLAN_SCALE}: as many chunks, picks
and pieces.

{tables["plans"]}
"""


def _steps(tables: Mapping[str, str]) -> str:
    return f"""
## Step time (calculated)

![Parts of a step, and throughput]({_IMAGES}steps.png)

"host": checkpoints wait in host memory. "uneven": waiting for the rank with the most attention. "CP exposed":
exchanges
of context parallelism that do not hide. "once": gradients and weights. "ratio": the same job with all layers full
takes
so many times as long, each on its own fastest mesh.

### H100, 128K tokens

{tables["steps_h100_128k"]}

### H100, 1M tokens

{tables["steps_h100_1024k"]}

### H100, 10M tokens

{tables["steps_h100_10240k"]}

H200: the same rates and links, more memory, so other meshes fit.

### H200, 128K tokens

{tables["steps_h200_128k"]}

### H200, 1M tokens

{tables["steps_h200_1024k"]}

### H200, 10M tokens

{tables["steps_h200_10240k"]}
"""


def _bytes(tables: Mapping[str, str]) -> str:
    return f"""
## Bytes by transport (calculated; exact where the table above says so)

![Bytes of a layer by transport, tp = 1]({_IMAGES}bytes.png)

MB that the busiest rank receives for one layer and one row / GB for all such layers in a step: forward, recomputed
forward and backward, pooled keys included; on the mesh of the step tables (H100). **Bold**: chosen. "-": cannot
serve (a2a: heads
do not divide; route_queries: full layers pick nothing). Fewest bytes do not always win: an all-gather over all ranks
enters each node once and hides behind attention, stride by stride; a transport that computes where the keys are waits
for the rank whose keys are in demand.

{tables["bytes"]}
"""


def _balance(tables: Mapping[str, str]) -> str:
    return f"""
## Balance

![Balance over ranks]({_IMAGES}balance.png)

Load of the busiest rank / mean over ranks for MoBA {SPEC.chunk_size}/{SPEC.topk}, one document, 32 query heads on 8
KV heads. *By
query*: where queries are (all_gather, pull); exact. *By key*: where keys are (route_queries). *Pulled*: keys and
values
received by pull. *Queries*: queries received by route_queries. Calculated from the chance that a query picks a chunk;
queries and heads pick independently:

* **uniform**: all chunks before a query's own alike. Early chunks have more queries after them, so their holders do
  more: uniform over queries is not uniform over ranks;
* **zipf**: by popularity 1, 1/2, 1/3, ...; the order is drawn once and shared by all heads, which is harsh;
* **recency**: by 1 / distance in chunks.

{tables["balance"]}

A rank's queries and heads together pick nearly every chunk before them, whatever the weights, as long as they pick
independently: pull then receives what lies before its last token, and its unevenness is that of causality.

MoBA's work by query is even in both layouts, so zigzag serves the full layers: their busiest rank does 1.00 times the
mean under zigzag, and 2 - 1/N times under contiguous. Where keys decide, zigzag helps as well: an early piece comes
with a late one.
"""


def _memory(tables: Mapping[str, str]) -> str:
    return f"""
## Memory of one GPU (calculated)

![Memory by component]({_IMAGES}memory.png)

GB = 1e9 bytes, the meshes of the step tables. The total counts the largest of attention with what is gathered, MLP,
and
loss, which follow one another. "picks": the routing kept for the recomputed forward pass. "gathered": buffers of the
transport, for all_gather those of one KV head of the whole row. "host GB": checkpoints, each in pinned memory that
PyTorch rounds up to a power of two. "untiled logits": what the loss would take without tiles.

### H100, 128K tokens

{tables["memory_h100_128k"]}

### H100, 1M tokens

{tables["memory_h100_1024k"]}

### H100, 10M tokens

{tables["memory_h100_10240k"]}

### H200, 1M tokens

{tables["memory_h200_1024k"]}

### H200, 10M tokens

{tables["memory_h200_10240k"]}
"""


def _published(ring: tuple[Step, Step], longest: Mapping[int, int], best: Step) -> str:
    full, moba = ring
    gathered_gb = M * 2 * best.job.model.num_heads * best.job.model.head_dim * 2 / 1e9
    pooled_mb = M // SPEC.chunk_size * best.job.model.num_kv_heads * best.job.model.head_dim * 4 / 1e6
    ratio = 1 / row_density([SPEC], M)
    fits = {gpus: "does not fit" if size == 0 else f"{size / 1e6:.1f}M" for gpus, size in longest.items()}
    gb = 1e9
    held_gb = 6 * count_parameters(best.job.model) / gb
    dense = f"all layers full, mesh {full.mesh}: {number(full.total_s)} s, {full.memory.total / gb:.0f} GB"
    sparse = f"MoBA 4096/12, 3 full layers, mesh {moba.mesh}: {number(moba.total_s)} s, {moba.memory.total / gb:.0f} GB"
    rows = (
        line(
            "TRL, ring attention: Qwen3-8B, 1M tokens, 8 H100, full attention",
            "380 s a step, 56 GB a GPU",
            f"{dense}, and {full.memory.plan.parked / gb:.0f} GB of host memory; {sparse}",
        ),
        line(
            "DeepSpeed ALST: Llama-8B, longest row on 1 / 8 / 32 H100",
            "500K / 3.7M / 15M tokens",
            f"{fits[1]} / {fits[8]} / {fits[32]}",
        ),
        line(
            "MTraining, MoBA with context parallelism: exchanged for the gate, a layer",
            f"all K and V, repeated for query heads: {gathered_gb:.1f} GB at this shape",
            f"pooled keys: {pooled_mb:.2f} MB",
        ),
        line(
            "MoBA paper: attention forward against flash attention, 1M tokens",
            f"{PAPER_SPEEDUP} times as fast (16 times at 10M)",
            f"{ratio:.1f} times fewer pairs under 4096/12; the time depends on the kernels",
        ),
    )
    return f"""
## Next to published systems

Their figures are measured, on their hardware; ours are calculated and have to be earned.

{table("system | published | this framework, calculated", rows, words=True)}

* TRL: no assumption was fitted to that figure. That full attention comes out this close says that the rate measured on
  an H200, and the 60 % assumed of matrix products, are plausible on H100; it says nothing about MoBA's kernels.
* ALST reaches longer rows: it shards weights and gradients too (ZeRO-3) and keeps optimizer state in host memory, so
  one
  GPU holds an 8B model, and eight have more room for activations. Here every tensor-parallel group holds bf16 weights
  and fp32 gradients ({held_gb:.0f} GB, / tp).
* The paper's {PAPER_SPEEDUP} of {ratio:.1f} is the measured efficiency of one implementation, forward only; see below.
"""


def _tries(tables: Mapping[str, str], best: Step) -> str:
    return f"""
## What if

The main case on 64 H100, mesh {best.mesh}, transports {transports(best)}, one assumption changed at a time (transports
are chosen again):

{tables["tries"]}

The Triton kernels of this repository make the scores twice in the backward pass (dQ is a pass of its own); the rates
have that in them. The rates of an H100, whose memory is slower, were not measured. The last line takes a MoBA layer
{PAPER_SPEEDUP} times as fast as a full one, forward and backward; by pairs it would be {1 / row_density([SPEC], M):.1f}
times.

Not modelled: stragglers, contention between groups that share adapters, network topology, kernels of odd shapes, data
loading, checkpoints to disk, evaluation; correlation between the picks of neighbouring queries (it lowers what pull
moves and makes route_queries less even).
"""


def _full_share(step: Step) -> float:
    """Share of attention time that full layers take."""
    full = sum(step.seconds_of(spec) for spec in step.choices if not isinstance(spec, MoBA))
    return full / sum(step.seconds_of(spec) for spec in step.choices)


def _full_in_moba(step: Step) -> float:
    """MoBA layers that take as long as all full layers."""
    moba_layers = step.job.model.num_layers - step.job.full_layers
    return moba_layers * _full_share(step) / (1 - _full_share(step))


__all__ = ["Facts", "page"]
