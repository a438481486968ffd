"""Rules that span fields. `validate` reports every broken rule at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from moba_train.config.engine_rules import engine_errors
from moba_train.config.job_rules import job_errors
from moba_train.config.mesh import degree_errors, mesh_errors, mesh_key, parallel_of_stage, rows_errors
from moba_train.config.mix_rules import mix_errors
from moba_train.config.rules import at_least, divides, positive
from moba_train.config.schema import (
    ModelConfig,
    NiahConfig,
    ParallelConfig,
    RopeConfig,
    RunConfig,
    StageConfig,
)
from moba_train.config.until_rules import decides, until_errors
from moba_train.errors import ConfigError, ConfigErrors

# Shortest needle sample: needle, question and answer take about thirty tokens, and some haystack must be left.
_SHORTEST_NIAH = 48


def validate(config: RunConfig) -> None:
    """Check every rule that needs no file and no device; ConfigError (or ConfigErrors) when one is broken."""
    raise_all(list(find_errors(config)))


def find_errors(config: RunConfig) -> Iterator[ConfigError]:
    """Every broken rule, in the order of the file."""
    yield from _finite(config, "")
    yield from job_errors(config)
    yield from engine_errors(config)
    yield from _model(config.model)
    yield from mesh_errors(config)
    yield from _optimizer(config)
    yield from _data(config)
    yield from _stages(config)
    yield from _evaluation(config)
    yield from _niah(config.niah)
    yield from until_errors(config)


def raise_all(errors: Sequence[ConfigError], *, source: str = "") -> None:
    """Raise nothing, the one error, or all of them together; `source` goes in front of every `where`."""
    if source:
        errors = [_with_source(error, source) for error in errors]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ConfigErrors(errors)


def check_world_size(parallel: ParallelConfig, world_size: int, *, where: str = "parallel") -> int:
    """Data-parallel degree of a job of `world_size` ranks; `where` says which mesh it is.

    Raises:
        ConfigError: a degree < 1, or world_size != tp * cp * pp * dp (dp = "auto": no multiple of tp * cp * pp).
    """
    raise_all(list(degree_errors(parallel, key=where)))
    replica = parallel.tp * parallel.cp * parallel.pp
    dp = max(1, world_size // replica) if parallel.dp == "auto" else parallel.dp
    wanted = replica * dp
    if world_size != wanted:
        raise ConfigError(
            "the number of ranks does not fit the mesh",
            where=where,
            got=f"{world_size} ranks for tp {parallel.tp} * cp {parallel.cp} * pp {parallel.pp} * dp {parallel.dp}",
            allowed=f"a multiple of {replica} ranks" if parallel.dp == "auto" else f"exactly {wanted} ranks",
            fix=f"start {wanted} ranks (torchrun --nproc-per-node {wanted} -m moba_train ...), or change the degrees",
        )
    return dp


def check_ranks_of_job(config: RunConfig, world_size: int) -> None:
    """Is there a stage whose mesh these ranks fit? Which one the run begins in is known once ranks have met."""
    errors: dict[ParallelConfig, ConfigError] = {}
    for index, stage in enumerate(config.stages):
        mesh = parallel_of_stage(config.parallel, stage)
        try:
            check_world_size(mesh, world_size, where=mesh_key(config.stages, index))
            return
        except ConfigError as error:
            errors.setdefault(mesh, error)
    raise_all(list(errors.values()))


def check_rows_per_step(stages: Sequence[StageConfig], dp: int, *, first: int = 0) -> None:
    """Every data-parallel rank takes the same number of rows of a step; ConfigError where that cannot be.

    first: stages before this one are done.
    """
    raise_all(list(rows_errors(stages, [dp] * len(stages), first=first)))


def _with_source(error: ConfigError, source: str) -> ConfigError:
    where = f"{source}: {error.where}" if error.where and error.where != source else source
    return ConfigError(error.what, where=where, got=error.got, allowed=error.allowed, fix=error.fix)


def _finite(tree: Any, path: str) -> Iterator[ConfigError]:
    """TOML knows inf and nan; no field of ours does. NUL in a string would end a path early."""
    if is_dataclass(tree):
        for field in fields(tree):
            yield from _finite(getattr(tree, field.name), f"{path}.{field.name}".lstrip("."))
    elif isinstance(tree, dict):
        for key, item in tree.items():
            yield from _finite(item, f"{path}.{key}")
    elif isinstance(tree, tuple):
        for i, item in enumerate(tree):
            yield from _finite(item, f"{path}.{i}")
    elif isinstance(tree, float) and not math.isfinite(tree):
        yield ConfigError("the number must be finite", where=path, got=tree, allowed="finite", fix="write a number")
    elif isinstance(tree, str) and "\0" in tree:
        yield ConfigError(
            "the string contains a NUL character", where=path, got=repr(tree), allowed="text", fix="remove it"
        )


def _model(model: ModelConfig) -> Iterator[ConfigError]:
    for name in (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "vocab_size",
    ):
        yield from at_least(getattr(model, name), 1, f"model.{name}")
    fix = "each key/value head serves the same number of query heads"
    yield from divides(model.num_heads, model.num_kv_heads, "model.num_heads", "model.num_kv_heads", fix)
    yield from divides(model.head_dim, 2, "model.head_dim", "2", "RoPE rotates pairs of dimensions")
    yield from at_least(model.vocab_padding, 0, "model.vocab_padding")
    if model.vocab_padding >= model.vocab_size >= 1:
        yield ConfigError(
            "the vocabulary consists of padding",
            where="model.vocab_padding",
            got=model.vocab_padding,
            allowed=f"less than {model.vocab_size} (model.vocab_size)",
            fix="lower vocab_padding; it is 0 in most models",
        )
    yield from positive(model.norm_eps, "model.norm_eps")
    yield from positive(model.init_std, "model.init_std")


def _optimizer(config: RunConfig) -> Iterator[ConfigError]:
    optimizer, total_tokens = config.optimizer, sum(stage.tokens for stage in config.stages)
    yield from positive(optimizer.lr, "optimizer.lr")
    ranges = (("beta1", "0 <= beta1 < 1"), ("beta2", "0 <= beta2 < 1"), ("min_lr_ratio", "0 to 1"))
    for name, allowed in ranges:
        value = getattr(optimizer, name)
        if not 0 <= value <= 1 or (name != "min_lr_ratio" and value == 1):
            where, fix = f"optimizer.{name}", "write a number in this range"
            yield ConfigError(f"{name} is out of range", where=where, got=value, allowed=allowed, fix=fix)
    yield from positive(optimizer.eps, "optimizer.eps")
    for name in ("weight_decay", "clip_grad", "warmup_tokens", "decay_tokens"):
        yield from at_least(getattr(optimizer, name), 0, f"optimizer.{name}")
    if optimizer.warmup_tokens + optimizer.decay_tokens > total_tokens > 0:
        yield ConfigError(
            "warm-up and decay are longer than the run",
            where="optimizer.warmup_tokens",
            got=f"{optimizer.warmup_tokens} + {optimizer.decay_tokens} tokens",
            allowed=f"together at most {total_tokens} tokens, the sum over the stages",
            fix="shorten warmup_tokens or decay_tokens",
        )
    if optimizer.schedule == "wsd" and optimizer.decay_tokens == 0 and not any(map(decides, config.stages)):
        yield ConfigError(
            'schedule "wsd" needs a decay',
            where="optimizer.decay_tokens",
            got=0,
            allowed=">= 1",
            fix="set decay_tokens, for instance to a tenth of the run",
        )
    if optimizer.schedule == "cosine" and optimizer.decay_tokens > 0:
        yield ConfigError(
            "decay_tokens has no meaning in a cosine schedule",
            where="optimizer.decay_tokens",
            got=optimizer.decay_tokens,
            allowed="0",
            fix='remove it, or set schedule = "wsd"',
        )


def _data(config: RunConfig) -> Iterator[ConfigError]:
    data = config.data
    if not data.tokenizer.strip():
        fix = "run `moba-train prep` and name the tokenizer that it wrote"
        allowed = "a .model file or a tokenizer.json"
        yield ConfigError("no tokenizer is given", where="data.tokenizer", got='""', allowed=allowed, fix=fix)
    if not data.sources:
        fix = "add a table [data.sources.NAME] with the path prefix of a .bin/.idx pair"
        yield ConfigError("there is no training source", where="data.sources", got="{}", allowed="one or more", fix=fix)
    for name, source in (*((f"sources.{key}", item) for key, item in data.sources.items()), ("valid", data.valid)):
        where, pair = f"data.{name}", "the path of a .bin/.idx pair without the ending"
        if not source.path.strip():
            fix = f"set {where}.path, or remove the table"
            yield ConfigError("the source has no path", where=f"{where}.path", got='""', allowed=pair, fix=fix)
        elif source.path.endswith((".bin", ".idx")):
            fix = f'write "{source.path[:-4]}"'
            what, got = "a source is named without its ending", source.path
            yield ConfigError(what, where=f"{where}.path", got=got, allowed=pair, fix=fix)
        yield from at_least(source.min_doc_tokens, 0, f"{where}.min_doc_tokens")


def _stages(config: RunConfig) -> Iterator[ConfigError]:
    if not config.stages:
        fix = "add a [[stages]] table with name, tokens, tokens_per_step, seq_len and mix"
        yield ConfigError("the schedule has no stage", where="stages", got="[]", allowed="one or more", fix=fix)
    seen: dict[str, int] = {}
    for i, stage in enumerate(config.stages):
        first = seen.setdefault(stage.name, i)
        if first != i:
            yield ConfigError(
                "two stages have the same name",
                where=f"stages.{i}.name",
                got=f'"{stage.name}", as stages.{first}',
                allowed="a name of its own",
                fix="name every stage differently",
            )
        yield from _stage(stage, f"stages.{i}", config)


def _stage(stage: StageConfig, where: str, config: RunConfig) -> Iterator[ConfigError]:
    if not stage.name.strip():
        yield ConfigError("the stage has no name", where=f"{where}.name", got='""', allowed="text", fix="name it")
    for name in ("tokens", "tokens_per_step", "seq_len", "chunk_size", "topk"):
        yield from at_least(getattr(stage, name), 1, f"{where}.{name}")
    fix = "a stage consists of whole steps"
    yield from divides(stage.tokens, stage.tokens_per_step, f"{where}.tokens", "tokens_per_step", fix)
    fix = "a step consists of whole rows"
    yield from divides(stage.tokens_per_step, stage.seq_len, f"{where}.tokens_per_step", "seq_len", fix)
    if stage.attention == "moba" and stage.chunk_size > stage.seq_len >= 1:
        yield ConfigError(
            "chunk_size must not exceed seq_len",
            where=f"{where}.chunk_size",
            got=stage.chunk_size,
            allowed=f"1 to {stage.seq_len} (seq_len)",
            fix='choose smaller chunks, or attention = "full"',
        )
    if stage.lr != "inherit":
        yield from positive(stage.lr, f"{where}.lr", 'write a number above zero, or "inherit"')
    layers = stage.full_layers
    for name in ("first", "last", "every"):
        yield from at_least(getattr(layers, name), 0, f"{where}.full_layers.{name}")
    if layers.first + layers.last > config.model.num_layers:
        yield ConfigError(
            "full_layers names more layers than the model has",
            where=f"{where}.full_layers",
            got=f"first {layers.first} + last {layers.last}",
            allowed=f"at most {config.model.num_layers} (model.num_layers)",
            fix='lower them, or set attention = "full"',
        )
    yield from mix_errors(stage, where, config.data.sources)
    yield from _rope(stage.rope, f"{where}.rope")


def _rope(rope: RopeConfig, where: str) -> Iterator[ConfigError]:
    if not rope.base > 1:
        fix = "10000.0 is the usual base of short sequences"
        yield ConfigError("the RoPE base must exceed 1", where=f"{where}.base", got=rope.base, allowed="> 1", fix=fix)
    if rope.factor < 1 or (rope.scaling == "none" and rope.factor != 1):
        yield ConfigError(
            "the RoPE factor does not fit its scaling",
            where=f"{where}.factor",
            got=f'{rope.factor} with scaling "{rope.scaling}"',
            allowed='1.0 with scaling "none", >= 1 with linear, llama3 and yarn',
            fix="set scaling, or remove factor",
        )
    yield from at_least(rope.original_seq_len, 1, f"{where}.original_seq_len")
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if not 0 < getattr(rope, low) < getattr(rope, high):
            yield ConfigError(
                f"{low} must be positive and less than {high}",
                where=f"{where}.{low}",
                got=f"{low} {getattr(rope, low)}, {high} {getattr(rope, high)}",
                allowed=f"0 < {low} < {high}",
                fix="swap or correct them",
            )


def _evaluation(config: RunConfig) -> Iterator[ConfigError]:
    yield from at_least(config.eval.every_steps, 0, "eval.every_steps")
    yield from at_least(config.eval.rows, 0, "eval.rows")
    yield from at_least(config.eval.buckets, 1, "eval.buckets")
    shortest = min((stage.seq_len for stage in config.stages), default=0)
    if config.eval.buckets > shortest >= 1:
        yield ConfigError(
            "there are more position buckets than positions",
            where="eval.buckets",
            got=config.eval.buckets,
            allowed=f"at most {shortest}, the shortest seq_len",
            fix="lower eval.buckets",
        )


def _niah(niah: NiahConfig) -> Iterator[ConfigError]:
    if not niah.lengths:
        yield ConfigError(
            "the grid has no length", where="niah.lengths", got="[]", allowed="one or more", fix="add one"
        )
    for i, length in enumerate(niah.lengths):
        fix = "needle, question and answer need that much room"
        yield from at_least(length, _SHORTEST_NIAH, f"niah.lengths.{i}", fix)
        if length in niah.lengths[:i]:
            yield ConfigError(
                "a length stands twice", where=f"niah.lengths.{i}", got=length, allowed="once", fix="remove one"
            )
    yield from at_least(niah.depths, 1, "niah.depths")
    yield from at_least(niah.samples, 1, "niah.samples")
    yield from at_least(niah.every_steps, 0, "niah.every_steps")
    yield from at_least(niah.loop_samples, 0, "niah.loop_samples")
