"""A run in miniature: the same stages and code paths with tiny shapes, for a laptop, without data or weights at hand.

    scaled(config, world_size=1)    what `--scale tiny` runs in place of `config`

Kept as they are: number, order and names of stages; attention, topk, select and full_layers of each; the ratio of
query heads to key/value heads, QK-norm, biases, tied head, key convolution; kind, base and factor of RoPE; kind of the
learning-rate schedule and its rates; `until` rules, shares of sources and of long documents; layout, transports,
engine, recompute, and which stages have meshes of their own. Divided by one number, so that the longest row has about
`ROW_TOKENS`: row and chunk lengths, document lengths, needle lengths, the length before an extension. Chunks keep
`MIN_CHUNK` tokens, and where that is more than their share, topk falls so that density stays. Cut down: layers, widths,
vocabulary, steps (warm-up and decay in proportion), degrees of the mesh (to 1 and 2, as ranks allow), evaluations.

Data, tokenizer and weights come from a folder beside the run's, which `moba_train.commands.miniature` fills. Pure.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from typing import Final, Literal

from moba_train.config.mesh import parallel_of_stage
from moba_train.config.schema import (
    DataConfig,
    EngineConfig,
    EvalConfig,
    ModelConfig,
    NiahConfig,
    OptimizerConfig,
    ParallelConfig,
    RopeConfig,
    RunConfig,
    SourceLengths,
    StageConfig,
    StageMesh,
)
from moba_train.config.until_rules import decides

SCALES: Final = ("tiny",)
"""Values of `--scale`."""
ROW_TOKENS: Final = 1024
"""Tokens of the longest row."""
MIN_ROW: Final = 64
"""Tokens that a row has at least: the shortest conversations of the miniature fit."""
MIN_CHUNK: Final = 4
VOCAB_SIZE: Final = 1024
NUM_TOKENS: Final = 1000
"""Ids of the miniature's tokenizer, at most: the other rows of the embedding are padding, or never seen."""
LONGEST_FLOOR: Final = ROW_TOKENS
"""min_doc_tokens is lowered to this: the text of the miniature has documents of this and of twice this length."""

_STEPS = 2
_ROWS_PER_STEP = 2
_WIDTH = 64
_HEAD_DIM = 16  # the least that a GPU's matrix units take
_MIN_NEEDLE = 96  # the tokenizer knows no word of a needle, so that needle and question take some sixty tokens
_SUFFIX = "-tiny"


@dataclass(frozen=True)
class MiniaturePaths:
    """Where the material of miniatures lies; all recipes with run folders in the same place share it."""

    root: str

    @property
    def tokenizer(self) -> str:
        """A tokenizer.json, as that of the model that a run begins with."""
        return str(PurePath(self.root, "tokenizer", "tokenizer.json"))

    def text(self, name: str) -> str:
        """Path prefix of prepared text; name: "train" or "valid"."""
        return str(PurePath(self.root, "text", name))

    def chat(self, name: str, longest: int) -> str:
        """Path prefix of prepared conversations of at most `longest` tokens."""
        return str(PurePath(self.root, f"chat-{longest}", name))

    def weights(self, model: ModelConfig, rope: RopeConfig) -> str:
        """Folder of weights of this shape and position embedding, as `moba-train convert from-hf` writes them."""
        shape = {name: value for name, value in asdict(model).items() if name not in ("preset", "init_from")}
        kind = repr((shape, rope)).encode()
        return str(PurePath(self.root, f"weights-{hashlib.sha256(kind).hexdigest()[:8]}"))


def miniature_paths(run_dir: str) -> MiniaturePaths:
    """The folder for a run folder, full-sized or tiny: `miniature` beside it."""
    return MiniaturePaths(str(PurePath(run_dir).parent / "miniature"))


def scaled(config: RunConfig, world_size: int = 1) -> RunConfig:
    """The miniature of a validated configuration, which is valid too.

    Args:
        config: full-sized, command-line overrides included.
        world_size: ranks that will run it.
    """
    paths = miniature_paths(config.run.dir)
    factor = row_factor(config)
    meshes = _cut_meshes([config.parallel, *(parallel_of_stage(config.parallel, s) for s in config.stages)], world_size)
    longest = _longest_documents(config, factor)
    stages = tuple(
        _stage(stage, mesh, factor, world_size, longest) for stage, mesh in zip(config.stages, meshes[1:], strict=True)
    )
    model = _model(config.model, config.stages, pp=max(mesh.pp for mesh in meshes))
    return replace(
        config,
        run=replace(config.run, dir=_run_dir(config.run.dir), log_every=1),
        model=replace(model, init_from=paths.weights(model, stages[0].rope)) if model.init_from else model,
        parallel=meshes[0],
        engine=_engine(config.engine),
        optimizer=_optimizer(config.optimizer, config.stages, stages),
        data=_data(config.data, paths, factor, longest),
        stages=stages,
        eval=_eval(config.eval, min(stage.seq_len for stage in stages), every_step=any(map(decides, config.stages))),
        niah=_niah(config.niah, factor),
        checkpoint=replace(config.checkpoint, every_steps=min(config.checkpoint.every_steps, 2), keep_every=0),
    )


def row_factor(config: RunConfig) -> float:
    """What lengths are divided by; at least 1."""
    return max(1.0, max(stage.seq_len for stage in config.stages) / ROW_TOKENS)


def _run_dir(run_dir: str) -> str:
    """A folder that is named as one of a miniature stays: a job passes it on to the ranks, which come here again."""
    return run_dir.rstrip("/").removesuffix(_SUFFIX) + _SUFFIX


def describe_scale(config: RunConfig, tiny: RunConfig, world_size: int = 1) -> list[str]:
    """Lines that say what a miniature is, for the reader of a plan or a log."""
    full, model = config.model, tiny.model
    cut = [
        f"lengths divided by {row_factor(config):,.4g}",
        f"{_num_steps(tiny):,} of {_num_steps(config):,} steps",
        f"{model.num_layers} of {full.num_layers} layers",
        f"width {model.hidden_size} of {full.hidden_size}",
        f"vocabulary {model.vocab_size:,} of {full.vocab_size:,}",
        f"meshes for {world_size} rank(s)",
    ]
    for name in ("device", "precision", "offload", "attention_backend"):
        before, after = getattr(config.engine, name), getattr(tiny.engine, name)
        cut += [f"{name} {after} for {before}"] if after != before else []
    fewer = [
        f"topk {small.topk} for {stage.topk} in {stage.name!r}"
        for stage, small in zip(config.stages, tiny.stages, strict=True)
        if small.topk != stage.topk
    ]
    topk = "" if fewer else " topk,"
    return [
        f"MINIATURE of the run (--scale tiny), run folder {tiny.run.dir}: its losses and speed mean nothing",
        f"  cut   {', '.join(cut + fewer)}",
        f"  made  random weights, text of Python's own library, in {miniature_paths(config.run.dir).root}",
        f"  kept  stages, attention,{topk} full layers, RoPE, mix, learning rates, rules, transports, recompute",
        "",
    ]


def _num_steps(config: RunConfig) -> int:
    """At most, where a rule may end a stage."""
    return sum(stage.tokens // stage.tokens_per_step for stage in config.stages)


# --------------------------------------------------------------------------------------------------------------- model


def _model(model: ModelConfig, stages: Sequence[StageConfig], *, pp: int) -> ModelConfig:
    group = model.num_heads // model.num_kv_heads
    # Two tensor-parallel times two context-parallel ranks can share the query heads.
    kv_heads = min(model.num_kv_heads, 2 if group % 2 == 0 else 4)
    heads = kv_heads * group
    head_dim = max(_HEAD_DIM, _WIDTH // heads)
    hidden = heads * head_dim
    is_square = model.num_heads * model.head_dim == model.hidden_size
    return replace(
        model,
        preset="custom",
        num_layers=_num_layers(model.num_layers, stages, pp),
        hidden_size=hidden,
        ffn_hidden_size=max(8, round(model.ffn_hidden_size / model.hidden_size * hidden / 8) * 8),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim if is_square else 2 * head_dim,
        vocab_size=VOCAB_SIZE,
        vocab_padding=min(model.vocab_padding, VOCAB_SIZE - NUM_TOKENS),
    )


def _num_layers(num_layers: int, stages: Sequence[StageConfig], pp: int) -> int:
    """The least number of layers with which full_layers of every stage means what it did."""
    for number in range(min(2, num_layers), num_layers):
        if number % pp == 0 and all(_keeps_pattern(stage, num_layers, number) for stage in stages):
            return number
    return num_layers


def _keeps_pattern(stage: StageConfig, before: int, after: int) -> bool:
    """Are there still MoBA layers (two, where there were), and a full one for each way to name them?"""
    layers = stage.full_layers
    if stage.attention == "full":
        return layers.first + layers.last <= after
    sparse_before, sparse_after = (_num_sparse(stage, number) for number in (before, after))
    fits = layers.first + layers.last <= after and (layers.every <= after or layers.every > before)
    return fits and sparse_after >= min(2, sparse_before)


def _num_sparse(stage: StageConfig, num_layers: int) -> int:
    """Layers that are MoBA; `moba_train.model.plan.full_layer_numbers` counts the others."""
    layers = stage.full_layers
    middle = range(layers.first, num_layers - layers.last)
    return sum(1 for layer in middle if not layers.every or (layer + 1) % layers.every)


def _engine(engine: EngineConfig) -> EngineConfig:
    """On a CPU, unless the run names CUDA; there precision and offload are the run's."""
    if engine.device == "cuda":
        return engine
    on_gpu_only = engine.attention_backend in ("triton", "flash")
    backend = "auto" if on_gpu_only else engine.attention_backend
    return replace(engine, device="cpu", precision="fp32", offload="none", attention_backend=backend)


# -------------------------------------------------------------------------------------------------------------- meshes


def _cut_meshes(meshes: Sequence[ParallelConfig], world_size: int) -> list[ParallelConfig]:
    """Every degree becomes 2 where it is the largest of the run, else 1: a mesh that changes still does.

    Ranks are given to cp first, then to tp and pp; the rest are data-parallel.
    """
    cut = []
    for mesh in meshes:
        left, degrees = world_size, {"cp": 1, "tp": 1, "pp": 1}
        for name in degrees:
            degree = getattr(mesh, name)
            is_largest = degree == max(getattr(other, name) for other in meshes)
            if degree > 1 and is_largest and left % 2 == 0:
                degrees[name], left = 2, left // 2
        cut.append(replace(mesh, tp=degrees["tp"], cp=degrees["cp"], pp=degrees["pp"], dp="auto"))
    return cut


# -------------------------------------------------------------------------------------------------------------- stages


def _row_tokens(stage: StageConfig, factor: float) -> int:
    return max(MIN_ROW, round(stage.seq_len / factor))


def _stage(
    stage: StageConfig, mesh: ParallelConfig, factor: float, world_size: int, longest: Mapping[str, int]
) -> StageConfig:
    """longest: `_longest_documents`."""
    seq_len = _row_tokens(stage, factor)
    chunk_size = min(seq_len, max(MIN_CHUNK, int(stage.chunk_size / factor)))
    topk = max(min(2, stage.topk), min(stage.topk, round(stage.topk * stage.chunk_size / factor / chunk_size)))
    dp = world_size // (mesh.tp * mesh.cp * mesh.pp)
    rows = -(-min(_ROWS_PER_STEP, stage.tokens_per_step // stage.seq_len) // dp) * dp
    # It is decided after evaluations + 1 steps at the earliest; one more shows that the stage may end before its end.
    steps = stage.until.evaluations + 2 if decides(stage) else _STEPS
    steps = min(steps, stage.tokens // stage.tokens_per_step)
    own = stage.mesh != StageMesh()
    return replace(
        stage,
        tokens=steps * rows * seq_len,
        tokens_per_step=rows * seq_len,
        seq_len=seq_len,
        lengths={name: _lengths(rule, factor, longest.get(name, 0)) for name, rule in stage.lengths.items()},
        chunk_size=chunk_size,
        topk=topk,
        rope=_rope(stage.rope, factor),
        mesh=StageMesh(tp=mesh.tp, cp=mesh.cp, pp=mesh.pp, dp="auto") if own else StageMesh(),
    )


def _rope(rope: RopeConfig, factor: float) -> RopeConfig:
    return replace(rope, original_seq_len=max(1, round(rope.original_seq_len / factor)))


def _lengths(lengths: SourceLengths, factor: float, longest: int) -> SourceLengths:
    """longest: of a source of whole documents, which are conversations of a quarter of it and more; else 0."""
    floor: int | Literal["inherit"] = "inherit"
    if lengths.min_doc_tokens != "inherit":
        floor = _floor(lengths.min_doc_tokens, factor, is_whole=longest > 0)
    long = min(longest // 2 or 2 * LONGEST_FLOOR, math.ceil(lengths.long_doc_tokens / factor))
    return replace(lengths, min_doc_tokens=floor, long_doc_tokens=long)


def _floor(tokens: int, factor: float, *, is_whole: bool) -> int:
    return 0 if is_whole else min(LONGEST_FLOOR, int(tokens / factor))


def _optimizer(
    optimizer: OptimizerConfig, before: Sequence[StageConfig], after: Sequence[StageConfig]
) -> OptimizerConfig:
    """Warm-up ends, and decay begins, at the same part of the same stage."""
    total = sum(stage.tokens for stage in before)
    warm = _moved(optimizer.warmup_tokens, before, after)
    decay = sum(stage.tokens for stage in after) - _moved(total - optimizer.decay_tokens, before, after)
    return replace(optimizer, warmup_tokens=warm, decay_tokens=max(decay, min(1, optimizer.decay_tokens)))


def _moved(tokens: int, before: Sequence[StageConfig], after: Sequence[StageConfig]) -> int:
    """The place in the miniature of the place `tokens` tokens after the beginning of the run."""
    place = 0.0
    for full, tiny in zip(before, after, strict=True):
        inside = min(tokens, full.tokens)
        place += tiny.tokens * inside / full.tokens
        tokens -= inside
    return round(place)


# ------------------------------------------------------------------------------------------------ data and evaluations


def _longest_documents(config: RunConfig, factor: float) -> dict[str, int]:
    """Sources whose documents come whole, and the tokens of the shortest row that has to hold them."""
    rows = [(stage.mix, _row_tokens(stage, factor)) for stage in config.stages]
    return {
        name: min([tokens for mix, tokens in rows if name in mix], default=MIN_ROW)
        for name, source in config.data.sources.items()
        if source.packing == "whole"
    }


def _data(data: DataConfig, paths: MiniaturePaths, factor: float, longest: Mapping[str, int]) -> DataConfig:
    sources = {}
    for name, source in data.sources.items():
        path = paths.chat("train", longest[name]) if name in longest else paths.text("train")
        floor = _floor(source.min_doc_tokens, factor, is_whole=name in longest)
        sources[name] = replace(source, path=path, min_doc_tokens=floor)
    is_chat = data.valid.packing == "whole"
    path = paths.chat("valid", ROW_TOKENS) if is_chat else paths.text("valid")
    floor = _floor(data.valid.min_doc_tokens, factor, is_whole=is_chat)
    valid = replace(data.valid, path=path, min_doc_tokens=floor)
    return replace(data, tokenizer=paths.tokenizer, sources=sources, valid=valid)


def _eval(settings: EvalConfig, shortest: int, *, every_step: bool) -> EvalConfig:
    every = 1 if every_step else min(settings.every_steps, 2)
    return replace(settings, every_steps=every, rows=min(settings.rows, 1), buckets=min(settings.buckets, shortest))


def _niah(niah: NiahConfig, factor: float) -> NiahConfig:
    ends = (min(niah.lengths), max(niah.lengths))
    lengths = dict.fromkeys(max(_MIN_NEEDLE, round(length / factor)) for length in ends)
    return replace(
        niah,
        lengths=tuple(lengths),
        depths=min(niah.depths, 3),
        samples=1,
        every_steps=min(niah.every_steps, 2),
        loop_samples=min(niah.loop_samples, 1),
    )
