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
from moba_train.config.engine_rules import describe_engine
from moba_train.config.mesh import describe_mesh, parallel_of_stage
from moba_train.config.mix_rules import doc_floor
from moba_train.config.rope_text import describe_rope
from moba_train.config.schema import RunConfig, StageConfig
from moba_train.model.plan import attention_plan, count_parameters
from moba_train.model.transport_plan import KindPlan, format_bytes, format_seconds, transport_plan
from moba_train.parallel.hardware import PRESETS, Hardware, with_overrides
from moba_train.train.flops import document_pairs
from moba_train.train.memory_plan import MemoryPlan, estimate_memory, memory_lines
from moba_train.train.until import describe_rule

GIB = 2**30


@dataclass(frozen=True)
class StagePlan:
    """One stage in numbers.

    Attributes:
        attention: compact text, "L0-28 MoBA 4096/12, L29-31 full".
        density: attended pairs / causal pairs over all layers, for rows that are one document.
        transports: of each kind of layer, for rows that are one document; () where a row is not shared by ranks.
        mesh: its degrees, where they are not those of [parallel].
        until: the rule that may end it before its tokens are used up, in words; "" = there is none.
    """

    name: str
    tokens: int
    steps: int
    rows_per_step: int
    seq_len: int
    attention: str
    density: float
    mix: str
    transports: tuple[KindPlan, ...] = ()
    mesh: str = ""
    until: str = ""

    @property
    def at_most(self) -> str:
        """What stands before its tokens and steps."""
        return "<= " if self.until else ""


@dataclass(frozen=True)
class Plan:
    """Everything that `moba-train plan` shows."""

    mesh: str
    num_parameters: int
    stages: tuple[StagePlan, ...]
    memory: MemoryPlan
    hardware: str
    """What the transports are chosen for."""
    host_read_s: float
    """Seconds that a host read takes there."""

    @property
    def at_most(self) -> str:
        """What stands before the totals."""
        return "at most " if any(stage.until for stage in self.stages) else ""

    @property
    def total_tokens(self) -> int:
        return sum(stage.tokens for stage in self.stages)

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


def build_plan(config: RunConfig) -> Plan:
    """The plan of a validated configuration."""
    parallel = config.parallel
    hardware, assumed = planned_hardware(config)
    ranks = parallel.tp * parallel.cp * parallel.pp
    size = f"{ranks} ranks per replica" if parallel.dp == "auto" else f"{ranks * parallel.dp} ranks"
    return Plan(
        mesh=f"tp {parallel.tp} x cp {parallel.cp} x pp {parallel.pp} x dp {parallel.dp} ({size}), {parallel.layout}",
        num_parameters=count_parameters(config.model),
        stages=tuple(_stage_plan(config, stage, hardware) for stage in config.stages),
        memory=estimate_memory(config),
        hardware=hardware.name + assumed,
        host_read_s=hardware.host_read_s,
    )


def planned_hardware(config: RunConfig) -> tuple[Hardware, str]:
    """The machine that the plan assumes, and a remark where the run will go by its devices or by measurements."""
    wanted = config.parallel.hardware.preset
    if wanted not in ("auto", "measured"):
        return with_overrides(PRESETS[wanted], config.parallel.hardware), ""
    assumed = PRESETS["cpu" if config.engine.device == "cpu" else "h100"]
    remark = f', assumed: parallel.hardware.preset = "{wanted}" is settled when the run starts'
    return with_overrides(assumed, config.parallel.hardware), remark


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
        lengths = (f"{stage.at_most}{stage.tokens:,}", f"{stage.at_most}{stage.steps:,}")
        numbers = (*lengths, f"{stage.rows_per_step:,}", f"{stage.seq_len:,}")
        stages.add_row(stage.name, *numbers, f"{stage.density:.4f}", stage.attention, stage.mix)
    with console.capture() as capture:
        for line in _head_lines(plan, config):
            console.print(line, markup=False)
        console.print()
        console.print(stages)
        console.print("density: attended / causal pairs, mean over layers, of a row that is one document", markup=False)
        for line in (*_rope_lines(config), *_until_lines(plan), *_mesh_lines(plan), *_transport_lines(plan)):
            console.print(line, markup=False)
        console.print()
        for line in memory_lines(plan.memory, config):
            console.print(line, markup=False)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def _rope_lines(config: RunConfig) -> list[str]:
    names = max(len(stage.name) for stage in config.stages)
    told = [describe_rope(stage.rope) for stage in config.stages]
    lines = [
        f"  {stage.name:<{names}}  {'as above' if i > 0 and told[i] == told[i - 1] else told[i]}"
        for i, stage in enumerate(config.stages)
    ]
    return ["", "position embedding (RoPE) of each stage", *lines]


def _until_lines(plan: Plan) -> list[str]:
    """Nothing where all stages have a fixed length."""
    if not plan.at_most:
        return []
    names = max(len(stage.name) for stage in plan.stages)
    lines = [f"  {stage.name:<{names}}  {stage.until}" for stage in plan.stages if stage.until]
    return ["", "stages that may end before their tokens are used up", *lines]


def _mesh_lines(plan: Plan) -> list[str]:
    """Nothing where all stages run on the mesh of [parallel]."""
    if not any(stage.mesh for stage in plan.stages):
        return []
    names = max(len(stage.name) for stage in plan.stages)
    lines = [f"  {stage.name:<{names}}  {stage.mesh or 'as above'}" for stage in plan.stages]
    told = "where the mesh changes the run saves and ends with exit code 4; launch/torchrun.sh starts it again"
    return ["", "mesh of each stage", *lines, told]


def _transport_lines(plan: Plan) -> list[str]:
    """Nothing where no row is shared by ranks."""
    if not any(stage.transports for stage in plan.stages):
        return []
    names = max(len(stage.name) for stage in plan.stages)
    reasons: dict[str, None] = {}  # each once, in order
    lines = ["", f"transports, for rows that are one document (hardware {plan.hardware})"]
    for stage in plan.stages:
        for kind in stage.transports:
            layers, cost = f"{kind.title} layers ({kind.num_layers})", kind.cost
            exposed, overhead = (format_seconds(seconds) for seconds in (cost.exposed_s, cost.overhead_s))
            numbers = f"{format_bytes(cost.received_bytes):>8} a layer a rank, exposed {exposed}, overhead {overhead}"
            others = ", ".join(f"{other.transport} {format_seconds(other.overhead_s)}" for other in kind.others[:2])
            line = f"  {stage.name:<{names}}  {layers:<16}  {cost.transport:<15}{numbers}"
            lines.append(f"{line}; others: {others}" if others else line)
            reasons |= {f"  {name} cannot serve: {'; '.join(why)}": None for name, why in kind.refused.items()}
    return [
        *lines,
        *reasons,
        "bytes: what the busiest rank receives, forward and backward of one row; overhead: exposed communication and "
        "uneven attention;",
        "the simplest transport is taken unless another saves a tenth of its overhead and half a percent of attention; "
        f"pull and route_queries hold a host read a MoBA layer, {format_seconds(plan.host_read_s)} of what is exposed",
    ]


def _stage_plan(config: RunConfig, stage: StageConfig, hardware: Hardware) -> StagePlan:
    specs = attention_plan(config.model, stage)
    parallel = parallel_of_stage(config.parallel, stage)
    moved = transport_plan(config.model, stage, parallel, config.engine, hardware)
    weight = sum(stage.mix.values())
    return StagePlan(
        name=stage.name,
        tokens=stage.tokens,
        steps=stage.tokens // stage.tokens_per_step,
        rows_per_step=stage.tokens_per_step // stage.seq_len,
        seq_len=stage.seq_len,
        attention=describe_attention(specs),
        density=row_density(specs, stage.seq_len),
        mix=", ".join(
            f"{name} {100 * share / weight:.0f}%{_describe_lengths(config, stage, name)}"
            for name, share in stage.mix.items()
        ),
        transports=() if moved is None else moved.kinds,
        mesh="" if parallel == config.parallel else describe_mesh(parallel),
        until=describe_rule(stage.until),
    )


def _describe_lengths(config: RunConfig, stage: StageConfig, name: str) -> str:
    """What the stage says of the lengths of a source: " (>= 1,024; 60% from >= 65,536)", or nothing."""
    if name not in stage.lengths:
        return ""
    lengths = stage.lengths[name]
    floor = doc_floor(config.data.sources[name], lengths)
    parts = [f">= {floor:,}"] if floor > 1 else []
    if lengths.long_doc_tokens:
        parts.append(f"{100 * lengths.long_share:g}% from >= {lengths.long_doc_tokens:,}")
    return f" ({'; '.join(parts)})" if parts else ""


def _describe_spec(spec: AttentionSpec) -> str:
    if not isinstance(spec, MoBA):
        return "full"
    group = " per group" if spec.select == "group" else ""
    return f"MoBA {spec.chunk_size}/{spec.topk}{group}"


def _head_lines(plan: Plan, config: RunConfig) -> list[str]:
    model, engine = config.model, config.engine
    heads = f"{model.num_heads} heads ({model.num_kv_heads} KV) of {model.head_dim}"
    extras = [
        "tied head" if model.tied_head else "untied head",
        *(["QK-norm"] if model.qk_norm else []),
        *(["biases on q, k, v"] if model.qkv_bias else []),
        *([f"key conv {model.key_conv}"] if model.key_conv else []),
    ]
    return [
        f"run         {config.run.dir}, seed {config.run.seed}",
        f"model       {model.preset}: {model.num_layers} layers, hidden {model.hidden_size}, ffn "
        f"{model.ffn_hidden_size}, {heads}, vocabulary {model.vocab_size:,}, {', '.join(extras)}",
        f"parameters  {plan.num_parameters:,}" + (f", from {model.init_from}" if model.init_from else ""),
        f"mesh        {plan.mesh}, {describe_engine(engine)}, {engine.precision}, recompute {engine.recompute}",
        f"schedule    {plan.at_most}{plan.total_tokens:,} tokens in {plan.total_steps:,} steps, "
        f"{config.optimizer.schedule}, peak lr {config.optimizer.lr:g}",
    ]
