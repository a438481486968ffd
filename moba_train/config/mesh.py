"""The device mesh of a stage: the degrees of [parallel], replaced where the stage says so. Pure, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from moba_train.config.schema import ParallelConfig, StageConfig


def parallel_of_stage(parallel: ParallelConfig, stage: StageConfig) -> ParallelConfig:
    """`parallel` with the degrees of `stage`."""
    asked = {field.name: getattr(stage.mesh, field.name) for field in fields(stage.mesh)}
    return replace(parallel, **{name: value for name, value in asked.items() if value != "inherit"})


def stages_on_mesh(parallel: ParallelConfig, stages: Sequence[StageConfig], first: int) -> int:
    """The index behind the last of the stages from `first` on that run on one and the same mesh."""
    mesh = parallel_of_stage(parallel, stages[first])
    last = first
    while last < len(stages) and parallel_of_stage(parallel, stages[last]) == mesh:
        last += 1
    return last


__all__ = ["parallel_of_stage", "stages_on_mesh"]
