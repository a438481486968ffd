"""The tables of docs/scaling.md, row by row, so that a test can compare a few rows with the committed page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moba_kernels.spec import AttentionSpec, Full, MoBA
from moba_train.config.presets import preset_model
from moba_train.parallel.cost import transport_cost
from moba_train.parallel.cut import Layout
from moba_train.parallel.hardware import PRESETS, Hardware
from moba_train.parallel.rules import TRANSPORT_NAMES, refusals
from moba_train.parallel.volume import RowShape
from scaling_counts import HEADS, CountCase, count, planned_queries
from scaling_loads import KINDS, Kind, Loads, expected_loads, peak_to_mean, pick_chances
from scaling_memory import Mesh, tensor_parallel_heads, untiled_loss_bytes
from scaling_steps import Job, Step, best_step, llama_job, longest_row, step_on

SPEC = MoBA(4096, 12)
LAYOUTS: tuple[Layout, ...] = ("zigzag", "contiguous")
K, M = 1 << 10, 1 << 20
COUNT_SPEC, COUNT_TOKENS = MoBA(16, 4), 4096
CUDNN_SHARE = 0.54
"""Of the bf16 peak, causal, forward and backward, 128K tokens, D = 128 (kernels/bench/results/nvidia-h200.md)."""
PAPER_SPEEDUP = 6.5
"""MoBA 4096/12 against flash attention at 1M tokens, forward (arXiv 2502.13189)."""
PLAN_SCALE = 128
"""The main case with all lengths divided by this: as many chunks, picks and pieces."""

STEP_HEAD = (
    "GPUs | tp x cp x dp | transport: MoBA, full layers | step, s | matrix products | attention | uneven | "
    "CP exposed | TP exposed | once | tokens/s, GPU | MFU | all layers full: step, s | ratio"
)
MEMORY_HEAD = (
    "GPUs | weights | gradients | optimizer | checkpoints | picks | layer's attention | gathered | MLP | loss | "
    "total GB | host GB | untiled logits"
)
BYTES_HEAD = f"row | GPUs | tp x cp x dp | layers | {' | '.join(TRANSPORT_NAMES)} | exposed, ms a layer"
BALANCE_HEAD = (
    "row | CP ranks | layout | pairs, by query | pairs, by key: uniform | zipf | recency | "
    "pulled: uniform | zipf | recency | queries: uniform | zipf | recency"
)
COUNT_HEAD = "transport | ranks | routing | bytes counted | bytes predicted | agreement"
COUNT_LOAD_HEAD = (
    "ranks | routing | pairs by key: counted | expected | queries: counted | expected | pulled: counted | expected"
)
PLAN_HEAD = "ranks | routing | queries a rank: planned | expected | max / mean: planned | expected"
TRY_HEAD = "assumption | step, s | MFU"


def table(head: str, rows: Sequence[str], *, words: bool = False) -> str:
    """Markdown; beyond the first column, numbers are right-aligned and words left-aligned."""
    return "\n".join([f"| {head} |", "|---|" + ("---|" if words else "--:|") * head.count("|"), *rows])


def number(value: float) -> str:
    """Three digits that count, more above a thousand: 0.0123, 1.23, 12.3, 123, 12,345."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def tokens(count_: int) -> str:
    """128K, 1M, 10M: powers of two."""
    return f"{count_ // M}M" if count_ % M == 0 else f"{count_ // K}K"


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def step_row(num_gpus: int, step: Step | None, full: Step | None) -> str:
    """The fastest mesh, beside the fastest with all layers full; None = does not fit."""
    dense = "does not fit" if full is None else number(full.total_s)
    if step is None:
        return line(str(num_gpus), "does not fit", *["-"] * 10, dense, "-")
    ratio = "-" if full is None else f"{full.total_s / step.total_s:.2f}"
    seconds = (step.matrix_s, step.attention_s + step.gate_s, step.wait_s, step.cp_s, step.tp_s, step.once_s)
    return line(
        str(num_gpus),
        str(step.mesh) + (", host" if step.offload else ""),
        transports(step),
        number(step.total_s),
        *(f"{100 * part / step.total_s:.1f} %" for part in seconds),
        number(step.tokens_s),
        f"{100 * step.mfu:.1f} %",
        dense,
        ratio,
    )


def transports(step: Step) -> str:
    """The chosen ones, MoBA layers first."""
    return ", ".join("none" if step.mesh.cp == 1 else choice.transport for choice in step.choices.values())


def memory_row(num_gpus: int, step: Step | None) -> str:
    """Memory of a step, GB (1e9 bytes)."""
    if step is None:
        return line(str(num_gpus), "does not fit", *["-"] * 11)
    memory, plan = step.memory, step.memory.plan
    sizes = [plan.weights, plan.gradients, plan.optimizer, plan.kept, memory.picks, memory.attention]
    sizes += [memory.exchanged, plan.mlp, plan.loss, memory.total, plan.parked]
    sizes.append(untiled_loss_bytes(step.job.model, step.job.seq_len // step.mesh.cp) / step.mesh.tp)
    return line(str(num_gpus), *(number(size / 1e9) for size in sizes))


def bytes_rows(num_gpus: int, step: Step, hardware: Hardware) -> list[str]:
    """MB a layer and row / GB a step that the busiest rank receives, MoBA layers and full; the chosen one is bold."""
    rows = []
    for spec, choice in step.choices.items():
        cells = []
        for name in TRANSPORT_NAMES:
            received = bytes_of(name, spec, step.job, step.mesh, hardware)
            times = step.job.layers()[spec] * step.job.rows // step.mesh.dp
            cell = "-" if received is None else f"{number(received / 1e6)} / {number(received * times / 1e9)}"
            cells.append(f"**{cell}**" if name == choice.transport else cell)
        kind = "MoBA" if isinstance(spec, MoBA) else "full"
        exposed_ms = number(1e3 * choice.cost.exposed_s)
        rows.append(line(tokens(step.job.seq_len), str(num_gpus), str(step.mesh), kind, *cells, exposed_ms))
    return rows


def bytes_of(transport: str, spec: AttentionSpec, job: Job, mesh: Mesh, hardware: Hardware) -> float | None:
    """Bytes that the busiest rank receives for a layer and row, recomputed forward pass included; None = refused."""
    heads = tensor_parallel_heads(job.model, mesh.tp)
    counts = {"num_heads": heads.num_heads, "num_kv_heads": heads.num_kv_heads, "num_ranks": mesh.cp}
    if refusals(transport, spec, **counts):
        return None
    row = RowShape(job.seq_len, mesh.cp, "zigzag")
    node_ranks = max(1, hardware.node_ranks // mesh.tp)
    cost = transport_cost(transport, spec, heads, [row], hardware, node_ranks=node_ranks, forwards=2)
    return cost.received_bytes


def balance_loads(num_tokens: int, ranks: Sequence[int]) -> dict[tuple[int, Layout, Kind], Loads]:
    """Expected loads of 32 query heads on 8 KV heads, by (ranks, layout, routing)."""
    chances = {kind: pick_chances(kind, -(-num_tokens // SPEC.chunk_size), SPEC.num_picks) for kind in KINDS}
    return {
        (num_ranks, layout, kind): expected_loads(
            chances[kind], SPEC, num_tokens=num_tokens, num_ranks=num_ranks, layout=layout, heads_per_kv=4
        )
        for num_ranks in ranks
        for layout in LAYOUTS
        for kind in KINDS
    }


def balance_rows(num_tokens: int, ranks: Sequence[int]) -> list[str]:
    """max / mean over ranks."""
    loads = balance_loads(num_tokens, ranks)
    rows = []
    for num_ranks in ranks:
        for layout in LAYOUTS:
            of_kind = [loads[num_ranks, layout, kind] for kind in KINDS]
            by_load = [[load.pairs_of_keys_N for load in of_kind], [load.pulled_N for load in of_kind]]
            by_load.append([load.queries_N for load in of_kind])
            cells = [f"{peak_to_mean(x):.2f}" for of_load in by_load for x in of_load]
            by_query = f"{peak_to_mean(of_kind[0].pairs_of_queries_N):.2f}"
            rows.append(line(tokens(num_tokens), str(num_ranks), layout, by_query, *cells))
    return rows


def count_rows(ranks: Sequence[int]) -> list[str]:
    """Bytes received, counted over threads and predicted; mean over ranks, forward and backward, one layer."""
    rows = []
    for num_ranks in ranks:
        for transport in TRANSPORT_NAMES:
            # a2a needs as many heads as ranks; models stop at some dozens
            if transport == "a2a" and num_ranks > 32:
                continue
            heads = replace(HEADS, num_heads=num_ranks) if transport == "a2a" else HEADS
            counted = count(CountCase(transport, num_ranks, COUNT_SPEC, COUNT_TOKENS, heads=heads))
            off = counted.counted_bytes / counted.predicted_bytes - 1
            agreement = "to the byte, each rank and phase" if counted.exact else f"{100 * off:+.2f} %"
            totals = (f"{counted.counted_bytes:,.0f}", f"{counted.predicted_bytes:,.0f}")
            rows.append(line(transport, str(num_ranks), "uniform", *totals, agreement))
    return rows


def count_load_rows(ranks: Sequence[int]) -> list[str]:
    """max / mean over ranks of what is counted over threads, beside `expected_loads`."""
    rows = []
    for num_ranks in ranks:
        for kind in KINDS:
            routed, pulled = (
                count(CountCase(transport, num_ranks, COUNT_SPEC, COUNT_TOKENS, kind=kind))
                for transport in ("route_queries", "pull")
            )
            loads = expected_loads(
                pick_chances(kind, COUNT_TOKENS // COUNT_SPEC.chunk_size, COUNT_SPEC.num_picks),
                COUNT_SPEC,
                num_tokens=COUNT_TOKENS,
                num_ranks=num_ranks,
                layout="zigzag",
                heads_per_kv=HEADS.num_heads // HEADS.num_kv_heads,
            )
            found = [routed.pairs_N, loads.pairs_of_keys_N, routed.received["forward/queries"], loads.queries_N]
            found += [pulled.received["forward/kv"], loads.pulled_N]
            rows.append(line(str(num_ranks), kind, *(f"{peak_to_mean(x):.2f}" for x in found)))
    return rows


def plan_rows(ranks: Sequence[int]) -> list[str]:
    """Queries that route_queries plans to receive on the main case scaled down, beside `expected_loads`."""
    spec, num_tokens = MoBA(SPEC.chunk_size // PLAN_SCALE, SPEC.topk), M // PLAN_SCALE
    rows = []
    for num_ranks in ranks:
        for kind in KINDS:
            planned_N = planned_queries(kind, spec, num_tokens=num_tokens, num_ranks=num_ranks)
            chance_CC = pick_chances(kind, num_tokens // spec.chunk_size, spec.num_picks)
            expected_N = (
                HEADS.num_heads
                * expected_loads(
                    chance_CC, spec, num_tokens=num_tokens, num_ranks=num_ranks, layout="zigzag", heads_per_kv=2
                ).queries_N
            )
            means = (f"{x.mean():,.0f}" for x in (planned_N, expected_N))
            rows.append(
                line(str(num_ranks), kind, *means, *(f"{peak_to_mean(x):.2f}" for x in (planned_N, expected_N)))
            )
    return rows


def try_rows(job: Job, mesh: Mesh, hardware: Hardware) -> list[str]:
    """The step when one assumption is another."""
    tries = {
        "as assumed": hardware,
        "all attention as fast as cuDNN's dense kernel": replace(hardware, attention_share=CUDNN_SHARE, pick_pairs=0.0),
        "attention reaches two thirds of the rates measured": replace(
            hardware, attention_share=hardware.attention_share / 1.5, pick_pairs=hardware.pick_pairs * 1.5
        ),
        "links reach 40 % of their bandwidth": replace(hardware, link_share=0.4),
        "nothing hides behind computing": replace(hardware, overlap=0.0),
        "a collective takes ten times as long to start": replace(
            hardware, latency_s=10 * hardware.latency_s, peer_latency_s=10 * hardware.peer_latency_s
        ),
    }
    rows = []
    for name, tried in tries.items():
        step = step_on(job, mesh, tried)
        assert step is not None  # the mesh fits; none of these changes memory
        rows.append(_try_row(name, step, 0.0))
    step = step_on(job, mesh, hardware)
    assert step is not None
    full_s, moba_s = (step.seconds_of(spec) / count for spec, count in ((Full(), job.full_layers), (job.spec, 1)))
    moba_layers = job.layers()[job.spec]
    more_s = moba_layers * full_s / PAPER_SPEEDUP - moba_s
    rows.append(_try_row("MoBA layers gain what the MoBA paper measured", step, more_s))
    return rows


def _try_row(name: str, step: Step, more_s: float) -> str:
    total_s = step.total_s + more_s
    return line(name, number(total_s), f"{100 * step.mfu * step.total_s / total_s:.1f} %")


def ring_comparison() -> tuple[Step, Step]:
    """Qwen3-8B at 1M tokens on 8 H100, one row: all layers full, and MoBA 4096/12 with 3 full layers."""
    qwen = preset_model("qwen3-8b")
    found = [
        best_step(replace(llama_job(M, moba=moba), model=qwen, rows=1), 8, PRESETS["h100"]) for moba in (False, True)
    ]
    full, moba = found
    assert full is not None and moba is not None
    return full, moba


def longest_rows() -> dict[int, int]:
    """GPUs -> the longest row of Llama-3.1-8B that fits on so many H100, MoBA."""
    model = preset_model("llama-3.1-8b")
    return {gpus: longest_row(model, gpus, PRESETS["h100"], moba=True) for gpus in (1, 8, 32)}


__all__ = [
    "BALANCE_HEAD",
    "BYTES_HEAD",
    "COUNT_HEAD",
    "COUNT_LOAD_HEAD",
    "COUNT_SPEC",
    "COUNT_TOKENS",
    "CUDNN_SHARE",
    "LAYOUTS",
    "MEMORY_HEAD",
    "PAPER_SPEEDUP",
    "PLAN_HEAD",
    "SPEC",
    "STEP_HEAD",
    "TRY_HEAD",
    "K",
    "M",
    "balance_loads",
    "balance_rows",
    "bytes_of",
    "bytes_rows",
    "count_load_rows",
    "count_rows",
    "longest_rows",
    "memory_row",
    "number",
    "plan_rows",
    "ring_comparison",
    "step_row",
    "table",
    "tokens",
    "try_rows",
]
