"""What ranks must agree on before a step or an evaluation, in words that a message can show."""

from __future__ import annotations

from collections.abc import Sequence

from moba_train.config.schema import EngineConfig, ModelConfig, StageConfig
from moba_train.data.row import Row
from moba_train.parallel.fingerprint import Facts, checksum


def facts_of_work(
    step: int, work: str, model: ModelConfig, engine: EngineConfig, stage: StageConfig, sharding: str, lr: float
) -> Facts:
    """Facts of all ranks. `step` counts from 1; `work` is what is done with the rows."""
    return {
        "step": str(step),
        "work": work,
        "model": str(model),
        "engine": str(engine),
        "stage": str(stage),
        "sharding": sharding,
        "learning rate": repr(lr),
    }


def facts_of_rows(rows: Sequence[Row]) -> Facts:
    """Facts of the ranks that share these rows, row by row."""
    return {
        "samples": "; ".join(f"{row.sample_id} of source {row.source!r}" for row in rows),
        "cu_seqlens": "; ".join(f"{row.cu_seqlens} of sample {row.sample_id}" for row in rows),
        "tokens": "; ".join(f"checksum {checksum(row.tokens_S)} of sample {row.sample_id}" for row in rows),
    }


__all__ = ["facts_of_rows", "facts_of_work"]
