"""The device mesh of a stage: the degrees of [parallel], replaced where the stage says so. Pure, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

from moba_train.config.rules import at_least, divides
from moba_train.config.schema import ModelConfig, ParallelConfig, RunConfig, StageConfig, StageMesh
from moba_train.config.transports import transport_errors
from moba_train.errors import ConfigError

_DEGREES = tuple(field.name for field in fields(StageMesh))


def parallel_of_stage(parallel: ParallelConfig, stage: StageConfig) -> ParallelConfig:
    """`parallel` with the degrees of `stage`."""
    asked = {name: getattr(stage.mesh, name) for name in _DEGREES}
    return replace(parallel, **{name: value for name, value in asked.items() if value != "inherit"})


def stages_on_mesh(parallel: ParallelConfig, stages: Sequence[StageConfig], first: int) -> int:
    """The index behind the last of the stages from `first` on that run on one and the same mesh."""
    mesh = parallel_of_stage(parallel, stages[first])
    last = first
    while last < len(stages) and parallel_of_stage(parallel, stages[last]) == mesh:
        last += 1
    return last


def describe_mesh(parallel: ParallelConfig) -> str:
    """ "tp 1, cp 8, pp 1, dp auto"."""
    return ", ".join(f"{name} {getattr(parallel, name)}" for name in _DEGREES)


def mesh_key(stages: Sequence[StageConfig], index: int) -> str:
    """The part of the configuration that gives stage `index` its mesh."""
    return "parallel" if stages[index].mesh == StageMesh() else f"stages.{index}.mesh"


def mesh_errors(config: RunConfig) -> Iterator[ConfigError]:
    """Broken rules of [parallel], and of the meshes of stages that have one of their own."""
    model, parallel = config.model, config.parallel
    yield from degree_errors(parallel)
    yield from rows_errors(config.stages, [parallel_of_stage(parallel, stage).dp for stage in config.stages])
    yield from _division_errors(model, parallel, _DEGREES, "parallel")
    of_all = list(transport_errors(model, parallel))
    yield from of_all
    for i, stage in enumerate(config.stages):
        key, own = f"stages.{i}.mesh", parallel_of_stage(parallel, stage)
        asked = [name for name in _DEGREES if getattr(stage.mesh, name) != "inherit"]
        yield from degree_errors(own, asked, key)
        yield from _division_errors(model, own, asked, key)
        known = [(error.what, error.got) for error in of_all]
        for error in transport_errors(model, own):
            if (error.what, error.got) not in known:
                where = f"{error.where}, in {key}"
                yield ConfigError(error.what, where=where, got=error.got, allowed=error.allowed, fix=error.fix)


def degree_errors(
    parallel: ParallelConfig, names: Sequence[str] = _DEGREES, key: str = "parallel"
) -> Iterator[ConfigError]:
    """An error for each of the degrees `names` that is less than 1; `key` is where they are written."""
    for name in names:
        degree = getattr(parallel, name)
        if degree != "auto":
            yield from at_least(degree, 1, f"{key}.{name}", "use 1 for a dimension that is not parallel")


def rows_errors(
    stages: Sequence[StageConfig], dp_of_stages: Sequence[int | str], *, first: int = 0
) -> Iterator[ConfigError]:
    """An error for each stage, from `first` on, whose steps do not give every data-parallel rank as many rows."""
    for i, (stage, dp) in enumerate(zip(stages, dp_of_stages, strict=True)):
        whole = stage.seq_len >= 1 and stage.tokens_per_step >= 1 and stage.tokens_per_step % stage.seq_len == 0
        if i < first or isinstance(dp, str) or dp < 1 or not whole:
            continue
        rows = stage.tokens_per_step // stage.seq_len
        if rows % dp:
            yield ConfigError(
                "the rows of a step cannot be shared evenly by the data-parallel ranks",
                where=f"stages.{i}.tokens_per_step",
                got=f"{stage.tokens_per_step} tokens = {rows} rows of {stage.seq_len} for dp {dp}",
                allowed=f"multiples of {dp * stage.seq_len} (dp * seq_len)",
                fix="change tokens_per_step, or use more context-parallel and fewer data-parallel ranks",
            )


def _division_errors(
    model: ModelConfig, parallel: ParallelConfig, names: Sequence[str], key: str
) -> Iterator[ConfigError]:
    """Heads, widths and layers that the degrees `names` do not divide."""
    if "tp" in names:
        for name in ("num_heads", "num_kv_heads", "ffn_hidden_size", "vocab_size"):
            fix = f"change {name} or lower {key}.tp"
            yield from divides(getattr(model, name), parallel.tp, f"model.{name}", f"{key}.tp", fix)
    if "pp" in names:
        fix = f"change num_layers or {key}.pp"
        yield from divides(model.num_layers, parallel.pp, "model.num_layers", f"{key}.pp", fix)


__all__ = [
    "degree_errors",
    "describe_mesh",
    "mesh_errors",
    "mesh_key",
    "parallel_of_stage",
    "rows_errors",
    "stages_on_mesh",
]
