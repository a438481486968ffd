"""Our configuration -> DeepSpeed's. Pure, no torch: what DeepSpeed is asked to do can be read and tested by itself.

Nothing here is an option of its own; what a user may choose stands in `moba_train.config.schema`.
"""

from __future__ import annotations

from typing import Any

from moba_train.config.schema import EngineConfig, ModelConfig, OptimizerConfig
from moba_train.model.plan import count_parameters

# Elements that one collective of gradients or weights takes at most; DeepSpeed holds a buffer of that size.
BUCKET_ELEMENTS = 200_000_000
# ZeRO-3 keeps tensors below this many hidden sizes whole on every rank: norms, not worth a collective of their own.
PERSISTENT_HIDDEN_SIZES = 10


def deepspeed_config(
    model: ModelConfig, engine: EngineConfig, optimizer: OptimizerConfig, *, num_ranks: int
) -> dict[str, Any]:
    """What `deepspeed.initialize` takes as its configuration.

    One row is one micro-batch, and the engine says itself where a step ends, so that its number of rows may change
    with the stage: gradient_accumulation_steps is 1 throughout, and no batch size is meant. The optimizer is a PyTorch
    AdamW that the engine brings. Gradients are accumulated and reduced in fp32 under both precisions.

    Args:
        num_ranks: data- and context-parallel ranks together: all that ZeRO shards over.
    """
    bucket = min(BUCKET_ELEMENTS, count_parameters(model) + count_parameters(model) % 2)  # DeepSpeed wants it even
    return {
        "train_batch_size": num_ranks,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.clip_grad,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": engine.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": False,  # on streams of its own, which have not been verified on a GPU
            **(_sharded_weights(model, bucket) if engine.zero_stage == 3 else {}),
        },
        "bf16": {"enabled": engine.precision == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def _sharded_weights(model: ModelConfig, bucket: int) -> dict[str, Any]:
    """What only ZeRO-3 has: when weights are gathered, and which are always whole."""
    return {
        "stage3_prefetch_bucket_size": bucket,
        "stage3_max_live_parameters": 2 * bucket,
        "stage3_max_reuse_distance": bucket,
        "stage3_param_persistence_threshold": PERSISTENT_HIDDEN_SIZES * model.hidden_size,
    }


__all__ = ["BUCKET_ELEMENTS", "PERSISTENT_HIDDEN_SIZES", "deepspeed_config"]
