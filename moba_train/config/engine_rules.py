"""What engine.kind = "deepspeed" can do, and what it cannot: found before a job is queued. Pure, no torch."""

from __future__ import annotations

from collections.abc import Iterator

from moba_train.config.mesh import mesh_key, parallel_of_stage
from moba_train.config.schema import EngineConfig, RunConfig
from moba_train.errors import ConfigError


def describe_engine(engine: EngineConfig) -> str:
    """ "megatron" or "DeepSpeed ZeRO-2"."""
    return f"DeepSpeed ZeRO-{engine.zero_stage}" if engine.kind == "deepspeed" else engine.kind


def engine_errors(config: RunConfig) -> Iterator[ConfigError]:
    """An error for every setting that the engine would have to ignore."""
    if config.engine.kind == "megatron":
        return
    meshes = {"parallel": config.parallel}
    for index, stage in enumerate(config.stages):
        meshes[mesh_key(config.stages, index)] = parallel_of_stage(config.parallel, stage)
    for key, mesh in meshes.items():
        for name, degree in (("tp", mesh.tp), ("pp", mesh.pp)):
            if degree > 1:
                yield ConfigError(
                    "DeepSpeed shards over data- and context-parallel ranks only",
                    where=f"{key}.{name}",
                    got=degree,
                    allowed='1 with engine.kind = "deepspeed"',
                    fix=f'set {key}.{name} = 1 (ZeRO-3 shards weights, cp shards rows), or engine.kind = "megatron"',
                )
    if not config.engine.distributed_optimizer:
        yield ConfigError(
            "ZeRO shards the optimizer's state in every stage",
            where="engine.distributed_optimizer",
            got=False,
            allowed='true with engine.kind = "deepspeed"',
            fix="remove it",
        )
    if config.engine.offload != "none":
        yield ConfigError(
            "the DeepSpeed engine does not offload checkpoints of recompute",
            where="engine.offload",
            got=f'"{config.engine.offload}"',
            allowed='"none" with engine.kind = "deepspeed"',
            fix='remove it, or set engine.kind = "megatron"',
        )


__all__ = ["describe_engine", "engine_errors"]
