"""What a configuration will do, before anything runs: mesh, parameters, stages, attention of each layer, memory.

Pure arithmetic on the configuration; imports no torch, so that `moba-train plan` answers at once. Everything is in
tokens, rows and bytes of the whole job unless the name says "rank". The memory figures are estimates; the formulas
stand beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from moba_kernels.spec import AttentionSpec, MoBA
from moba_train.config.schema import ModelConfig, RunConfig, StageConfig
from moba_train.model.plan import attention_plan, count_layer_parameters, count_parameters
from moba_train.train.flops import document_pairs

GIB = 2**30


@dataclass(frozen=True)
class StagePlan:
    """One stage in numbers.

    Attributes:
        attention: compact text, "L0-28 MoBA 4096/12, L29-31 full".
        density: attended pairs / causal pairs over all layers, for rows that are one document.
    """

    name: str
    tokens: int
    steps: int
    rows_per_step: int
    seq_len: int
    attention: str
    density: float
    mix: str


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per rank, roughly; pipeline rank 0, the stage with the longest rows."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


@dataclass(frozen=True)
class Plan:
    """Everything that `moba-train plan` shows."""

    mesh: str
    num_parameters: int
    stages: tuple[StagePlan, ...]
    memory: MemoryPlan

    @property
    def total_tokens(self) -> int:
        return sum(stage.tokens for stage in self.stages)

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


def build_plan(config: RunConfig) -> Plan:
    """The plan of a validated configuration."""
    parallel = config.parallel
    ranks = parallel.tp * parallel.cp * parallel.pp
    size = f"{ranks} ranks per replica" if parallel.dp == "auto" else f"{ranks * parallel.dp} ranks"
    return Plan(
        mesh=f"tp {parallel.tp} x cp {parallel.cp} x pp {parallel.pp} x dp {parallel.dp} ({size}), {parallel.layout}",
        num_parameters=count_parameters(config.model),
        stages=tuple(_stage_plan(config.model, stage) for stage in config.stages),
        memory=estimate_memory(config),
    )


def describe_attention(specs: Sequence[AttentionSpec]) -> str:
    """Runs of layers with the same attention: "L0-28 MoBA 4096/12, L29-31 full"."""
    parts = []
    first = 0
    for spec, run in groupby(specs):
        last = first + len(list(run)) - 1
        layers = f"L{first}" if first == last else f"L{first}-{last}"
        parts.append(f"{layers} {_describe_spec(spec)}")
        first = last + 1
    return ", ".join(parts)


def row_density(specs: Iterable[AttentionSpec], seq_len: int) -> float:
    """Attended pairs / causal pairs, averaged over layers, for one document of seq_len tokens; 1.0 = full attention."""
    causal = seq_len * (seq_len + 1) // 2
    shares = [
        document_pairs(seq_len, chunk_size=spec.chunk_size, topk=spec.topk) / causal if isinstance(spec, MoBA) else 1.0
        for spec in specs
    ]
    return sum(shares) / len(shares)


def estimate_memory(config: RunConfig) -> MemoryPlan:
    """Rough bytes per rank.

    Weights, gradients, optimizer (arXiv 1910.02054, section 3.1): P parameters per rank take 4 P (fp32) or 2 P (bf16)
    bytes of weights, 4 P of gradients, and 8 P (Adam's moments; bf16 adds 4 P of master weights) divided by dp * cp
    where the optimizer is sharded. Activations: see `_activation_bytes`. dp = "auto" counts as 1.
    """
    model, parallel, engine = config.model, config.parallel, config.engine
    dp = 1 if parallel.dp == "auto" else parallel.dp
    ends = 1 if model.tied_head or parallel.pp > 1 else 2
    embedding = ends * model.vocab_size * model.hidden_size
    layers = model.num_layers // parallel.pp
    parameters = (embedding + layers * count_layer_parameters(model)) / parallel.tp
    element = 2 if engine.precision == "bf16" else 4
    optimizer = parameters * (12 if engine.precision == "bf16" else 8)
    if engine.distributed_optimizer:
        optimizer /= dp * parallel.cp
    tokens = max((stage.seq_len for stage in config.stages), default=0) / parallel.cp
    activations, logits = _activation_bytes(config, tokens, layers, element)
    return MemoryPlan(
        weights=parameters * element,
        gradients=parameters * 4,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
    )


def render_plan(plan: Plan, config: RunConfig, *, width: int = 0) -> str:
    """The plan as text: aligned columns, the same on a terminal and in a file. width 0: as wide as it needs."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=width or 160, no_color=True, highlight=False, force_terminal=False)
    stages = Table(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0))
    for name in ("stage", "tokens", "steps", "rows/step", "seq_len", "density"):
        stages.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    stages.add_column("attention")
    stages.add_column("mix")
    for stage in plan.stages:
        numbers = (f"{stage.tokens:,}", f"{stage.steps:,}", f"{stage.rows_per_step:,}", f"{stage.seq_len:,}")
        stages.add_row(stage.name, *numbers, f"{stage.density:.4f}", stage.attention, stage.mix)
    with console.capture() as capture:
        for line in _head_lines(plan, config):
            console.print(line, markup=False)
        console.print()
        console.print(stages)
        console.print("density: attended / causal pairs, mean over layers, of a row that is one document", markup=False)
        console.print()
        for line in _memory_lines(plan.memory, config):
            console.print(line, markup=False)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def _stage_plan(model: ModelConfig, stage: StageConfig) -> StagePlan:
    specs = attention_plan(model, stage)
    weight = sum(stage.mix.values())
    return StagePlan(
        name=stage.name,
        tokens=stage.tokens,
        steps=stage.tokens // stage.tokens_per_step,
        rows_per_step=stage.tokens_per_step // stage.seq_len,
        seq_len=stage.seq_len,
        attention=describe_attention(specs),
        density=row_density(specs, stage.seq_len),
        mix=", ".join(f"{name} {100 * share / weight:.0f}%" for name, share in stage.mix.items()),
    )


def _describe_spec(spec: AttentionSpec) -> str:
    if not isinstance(spec, MoBA):
        return "full"
    group = " per group" if spec.select == "group" else ""
    return f"MoBA {spec.chunk_size}/{spec.topk}{group}"


def _activation_bytes(config: RunConfig, tokens: float, layers: int, element: int) -> tuple[float, float]:
    """Activations kept for the backward pass, and the logits, in bytes, for `tokens` tokens on this rank.

    Per token and layer: 4 hidden (residual and norm inputs and outputs), then per tensor-parallel share (2 H + 2 K) D
    (q, k, v, attention output), 3 ffn (two branches and their product), and 4 H bytes of lse. Full recompute keeps one
    hidden vector per layer and one layer in full. A pipeline of pp ranks holds pp rows in flight.
    """
    model, parallel = config.model, config.parallel
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    shared = (heads + 3 * model.ffn_hidden_size) * element + 4 * model.num_heads
    per_layer = 4 * model.hidden_size * element + shared / parallel.tp
    if config.engine.recompute == "full":
        activations = tokens * (layers * model.hidden_size * element * parallel.pp + per_layer)
    else:
        activations = tokens * layers * per_layer * parallel.pp
    # logits in the compute precision, their fp32 softmax and its gradient
    logits = tokens * model.vocab_size / parallel.tp * (element + 8)
    return activations, logits


def _head_lines(plan: Plan, config: RunConfig) -> list[str]:
    model, engine = config.model, config.engine
    heads = f"{model.num_heads} heads ({model.num_kv_heads} KV) of {model.head_dim}"
    extras = [
        "tied head" if model.tied_head else "untied head",
        *(["QK-norm"] if model.qk_norm else []),
        *([f"key conv {model.key_conv}"] if model.key_conv else []),
    ]
    return [
        f"run         {config.run.dir}, seed {config.run.seed}",
        f"model       {model.preset}: {model.num_layers} layers, hidden {model.hidden_size}, ffn "
        f"{model.ffn_hidden_size}, {heads}, vocabulary {model.vocab_size:,}, {', '.join(extras)}",
        f"parameters  {plan.num_parameters:,}",
        f"mesh        {plan.mesh}, {engine.kind}, {engine.precision}, recompute {engine.recompute}",
        f"schedule    {plan.total_tokens:,} tokens in {plan.total_steps:,} steps, {config.optimizer.schedule}, "
        f"peak lr {config.optimizer.lr:g}",
    ]


def _memory_lines(memory: MemoryPlan, config: RunConfig) -> list[str]:
    rows = [
        ("weights", memory.weights, "bytes per parameter / (tp * pp)"),
        ("gradients", memory.gradients, "4 bytes per parameter / (tp * pp)"),
        ("optimizer", memory.optimizer, "Adam moments and master weights, / (dp * cp) when sharded"),
        ("activations", memory.activations, f"longest row / cp, recompute {config.engine.recompute}"),
        ("logits", memory.logits, "longest row / cp * vocabulary / tp, with fp32 softmax"),
        ("total", memory.total, "without buffers of kernels, communication and allocator"),
    ]
    title = "memory per rank, estimated" + (" (dp = auto counts as 1)" if config.parallel.dp == "auto" else "")
    return [title, *(f"  {name:<12}{size / GIB:>9.3f} GiB  {how}" for name, size, how in rows)]
