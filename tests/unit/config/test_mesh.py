"""Meshes of stages: what they inherit, where they change, and the rules that they must keep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moba_train.config.load import decode_toml, load_config, to_toml
from moba_train.config.mesh import describe_mesh, mesh_errors, parallel_of_stage, stages_on_mesh
from moba_train.config.schema import ParallelConfig, RunConfig, StageConfig, StageMesh
from moba_train.config.validate import check_ranks_of_job, check_rows_per_step
from moba_train.errors import ConfigError
from moba_train.plan_view import build_plan, render_plan
from moba_train.train.memory_plan import estimate_memory, memory_by_mesh

CONFIGS = Path(__file__).parents[3] / "configs"
PARALLEL = ParallelConfig(tp=2, cp=2)


def stages_of(*meshes: StageMesh) -> tuple[StageConfig, ...]:
    return tuple(StageConfig(name=str(i), mesh=mesh) for i, mesh in enumerate(meshes))


def with_meshes(config: RunConfig, *meshes: StageMesh) -> RunConfig:
    stages = (replace(stage, mesh=mesh) for stage, mesh in zip(config.stages, meshes, strict=True))
    return replace(config, stages=tuple(stages))


@pytest.fixture
def smoke() -> RunConfig:
    return load_config(CONFIGS / "smoke.toml")


def test_a_stage_takes_what_it_does_not_say_from_parallel() -> None:
    plain, own = stages_of(StageMesh(), StageMesh(cp=8, dp=3))
    assert parallel_of_stage(PARALLEL, plain) == PARALLEL
    assert parallel_of_stage(PARALLEL, own) == replace(PARALLEL, cp=8, dp=3)
    assert describe_mesh(parallel_of_stage(PARALLEL, own)) == "tp 2, cp 8, pp 1, dp 3"


def test_stages_run_without_a_restart_as_long_as_the_degrees_are_the_same() -> None:
    stages = stages_of(StageMesh(), StageMesh(cp=2), StageMesh(cp=8), StageMesh(cp=8), StageMesh())
    assert [stages_on_mesh(PARALLEL, stages, first) for first in range(5)] == [2, 2, 4, 4, 5]


def test_a_mesh_survives_the_way_through_toml(smoke: RunConfig) -> None:
    config = with_meshes(smoke, StageMesh(), StageMesh(cp=2, dp="auto"))
    assert decode_toml(to_toml(config)) == config


@pytest.mark.parametrize(
    ("mesh", "where", "fragment"),
    [
        (StageMesh(cp=0), "stages.1.mesh.cp", ">= 1"),
        (StageMesh(tp=4), "model.num_heads", "multiples of 4 (stages.1.mesh.tp)"),
        (StageMesh(pp=4), "model.num_layers", "multiples of 4 (stages.1.mesh.pp)"),
        (StageMesh(dp=3), "stages.1.tokens_per_step", "for dp 3"),
    ],
)
def test_a_broken_rule_of_a_stage_is_told_by_the_key_of_the_stage(
    smoke: RunConfig, mesh: StageMesh, where: str, fragment: str
) -> None:
    errors = list(mesh_errors(with_meshes(smoke, StageMesh(), mesh)))
    error = next(error for error in errors if error.where == where)
    assert fragment in error.message()
    assert error.what and error.got is not None and error.allowed and error.fix


def test_a_transport_must_serve_the_mesh_of_every_stage_and_is_told_of_once(smoke: RunConfig) -> None:
    a2a = replace(smoke, parallel=replace(smoke.parallel, transport="a2a"))
    (error,) = mesh_errors(with_meshes(a2a, StageMesh(), StageMesh(cp=3)))
    assert error.where == "parallel.transport, in stages.1.mesh"
    everywhere = replace(a2a, parallel=replace(a2a.parallel, cp=3))
    (error,) = mesh_errors(with_meshes(everywhere, StageMesh(), StageMesh()))
    assert error.where == "parallel.transport"


def test_ranks_that_fit_no_stage_are_refused_and_those_that_fit_one_are_not(smoke: RunConfig) -> None:
    config = with_meshes(smoke, StageMesh(cp=3), StageMesh(cp=2))
    for world_size in (2, 3, 4, 6):
        check_ranks_of_job(config, world_size)
    with pytest.raises(ConfigError) as caught:
        check_ranks_of_job(config, 5)
    assert "stages.0.mesh" in caught.value.message() and "stages.1.mesh" in caught.value.message()
    with pytest.raises(ConfigError, match=r"where:   parallel\n"):
        check_ranks_of_job(replace(smoke, parallel=replace(smoke.parallel, cp=2)), 3)


def test_rows_are_counted_for_the_stages_that_are_still_to_come() -> None:
    stages = (StageConfig(tokens_per_step=1024, seq_len=1024), StageConfig(tokens_per_step=4096, seq_len=1024))
    check_rows_per_step(stages, 4, first=1)
    with pytest.raises(ConfigError, match=r"stages\.0\.tokens_per_step"):
        check_rows_per_step(stages, 4)


def test_the_plan_shows_meshes_that_differ_and_the_memory_of_the_one_that_needs_most(smoke: RunConfig) -> None:
    assert "mesh of each stage" not in render_plan(build_plan(smoke), smoke)
    config = with_meshes(smoke, StageMesh(), StageMesh(cp=4))
    plan = build_plan(config)
    assert [stage.mesh for stage in plan.stages] == ["", "tp 1, cp 4, pp 1, dp auto"]
    assert [bool(stage.transports) for stage in plan.stages] == [False, True]
    text = render_plan(plan, config)
    assert "where the mesh changes the run saves" in text and "on the mesh of " in text
    first, second = memory_by_mesh(config)
    assert first.optimizer == 4 * second.optimizer
    assert estimate_memory(config) == max(first, second, key=lambda memory: memory.total)
