"""Megatron's data parallelism and optimizer, set up, and a step that is not taken when a number is not finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moba_train.config.schema import EngineConfig, OptimizerConfig
from moba_train.model import megatron_cpu
from moba_train.quiet import quiet_imports

with quiet_imports():
    from megatron.core import optimizer as megatron_optimizer
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer.optimizer import MegatronOptimizer
    from megatron.core.transformer.transformer_config import TransformerConfig

# What a parameter group has from the configuration, each step anew in the case of the learning rate.
_CONFIGURED = ("weight_decay", "betas", "eps")


def wrap_data_parallel(gpt: nn.Module, config: TransformerConfig, engine: EngineConfig) -> DistributedDataParallel:
    """Megatron's DDP over data- and context-parallel ranks; gradients are accumulated and reduced in fp32."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=engine.distributed_optimizer,
        overlap_grad_reduce=False,
        check_for_nan_in_grad=False,  # `step` does, without ending the run
    )
    megatron_cpu.adapt_megatron()
    ddp = DistributedDataParallel(config, ddp_config, gpt)
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = ddp.no_sync
    return ddp


def build_optimizer(ddp: DistributedDataParallel, config: OptimizerConfig, engine: EngineConfig) -> MegatronOptimizer:
    """AdamW with fp32 master weights; its state exists from the start, so that step 0 can be saved like any other."""
    bf16 = engine.precision == "bf16"
    settings = megatron_optimizer.OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        decoupled_weight_decay=True,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        clip_grad=config.clip_grad,
        use_distributed_optimizer=engine.distributed_optimizer,
    )
    with megatron_cpu.cuda_calls_on_cpu():
        optimizer = megatron_optimizer.get_megatron_optimizer(settings, [ddp], use_gloo_process_groups=True)
    for group in optimizer.param_groups:  # Megatron leaves this to its own scheduler, which is not used here
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
    _create_state(optimizer)
    return optimizer


def sharded_optimizer_state(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], *, is_loading: bool, metadata: dict[str, Any]
) -> dict[str, Any]:
    """The optimizer's part of a sharded state dict, as Megatron makes it. Collective."""
    with _positions_without_padding(optimizer):
        state: dict[str, Any] = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
    _own_step_counts(optimizer)
    if state.get("param_state", ()) is None:  # another rank has it; `None` would be a value that ranks disagree on
        del state["param_state"]
    return state


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Restore loaded optimizer state: moments and step counts. Weight decay, betas and eps stay as they are configured,
    as the learning rate does; PyTorch would take them from the checkpoint.

    Three things that Megatron gets wrong with PyTorch's AdamW (it expects Apex's) are mended: its distributed optimizer
    looks for a "step" among the moments of each parameter, and gives all parameters one shared step tensor, which AdamW
    would then increment once per parameter; its other optimizers do not save a step count of 0.
    """
    common = {name: part for name, part in state.items() if name != "param_state"}
    if "param_state" not in state:
        common.get("optimizer", common)["state"].setdefault("common_step", torch.zeros(()))
    else:
        groups = _complete_groups(optimizer, common["optimizer"]["param_groups"])
        common["optimizer"] = {**common["optimizer"], "param_groups": groups}
    configured = [{name: group[name] for name in _CONFIGURED} for group in optimizer.param_groups]
    optimizer.load_state_dict(common)
    for group, settings in zip(optimizer.param_groups, configured, strict=True):
        group.update(settings)
    if "param_state" in state:
        steps = {parameter: held.pop("step", None) for parameter, held in _states(optimizer)}
        _parts(optimizer)[0].load_parameter_state_from_fully_reshardable(state["param_state"])
        for parameter, held in _states(optimizer):
            if steps[parameter] is not None:
                held["step"] = steps[parameter]
    _own_step_counts(optimizer)


def _complete_groups(optimizer: MegatronOptimizer, loaded: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The DeepSpeed engine saves the step count of parameter groups alone; the rest is in the configuration."""
    if all("wd_mult" in group for group in loaded):
        return loaded
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    return [{**group, "step": loaded[0]["step"]} for group in own]


@contextmanager
def _positions_without_padding(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Parameters' places in their buffer counted without the padding between buckets.

    Megatron 0.16 to 0.19 collects a buffer's state without that padding, then looks parameters up where they lie with
    it: what stands behind the first bucket would be saved shifted. A buffer has a second bucket where pipeline-parallel
    ranks share a tied embedding.
    """
    buffers = [buffer for part in _parts(optimizer) for buffer in getattr(part, "buffers", ())]
    padded = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        lengths = [bucket.numel_unpadded for bucket in buffer.buckets]
        shifts = [bucket.offset - sum(lengths[:i]) for i, bucket in enumerate(buffer.buckets)]
        buffer.param_index_map = {
            parameter: (start - shifts[bucket], stop - shifts[bucket], bucket)
            for parameter, (start, stop, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, positions in zip(buffers, padded, strict=True):
            buffer.param_index_map = positions


def optimizer_tensors(optimizer: MegatronOptimizer) -> list[torch.Tensor]:
    """What this rank's part of the optimizer holds: moments, and master weights where they are not the weights."""
    moments = [x for _, held in _states(optimizer) for x in held.values() if isinstance(x, torch.Tensor)]
    return [*moments, *optimizer.get_parameters()]


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    """Megatron chains one optimizer per kind of parameter; here there is one kind."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _states(optimizer: MegatronOptimizer) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    return [item for part in _parts(optimizer) for item in part.optimizer.state.items()]


def _create_state(optimizer: MegatronOptimizer) -> None:
    """AdamW's state as it would be before the first step."""
    for part in _parts(optimizer):
        part.init_state_fn(part.optimizer, part.config)  # moments of zero
        if isinstance(part.optimizer, torch.optim.AdamW):  # Apex and Transformer Engine count in the parameter group
            for held in part.optimizer.state.values():
                held["step"] = torch.zeros((), dtype=torch.float32)


def _own_step_counts(optimizer: MegatronOptimizer) -> None:
    """Give every parameter a step tensor of its own."""
    for _, held in _states(optimizer):
        if isinstance(held.get("step"), torch.Tensor):
            held["step"] = held["step"].clone()


@torch.no_grad()
def step(optimizer: MegatronOptimizer, *, lr: float, clip_grad: float, loss_is_finite: bool) -> tuple[float, bool]:
    """Clip and step with the gradients that the backward pass left.

    Returns (global gradient norm before clipping, whether the step was taken). It is not taken, and weights and
    optimizer state stay as they are, when the loss or the norm is not finite; both are reduced over ranks, so all
    ranks agree. Reads the norm on the host once, as Megatron's own step does.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not loss_is_finite or not _finite(norm):
        return norm, False
    if clip_grad > 0 and norm > clip_grad:
        gradients = [parameter.grad for parameter in optimizer.get_parameters() if parameter.grad is not None]
        torch._foreach_mul_(gradients, clip_grad / (norm + 1e-6))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step_with_ready_grads()
    return norm, True


def _finite(value: float) -> bool:
    return value - value == 0.0


__all__ = [
    "build_optimizer",
    "load_optimizer_state",
    "optimizer_tensors",
    "sharded_optimizer_state",
    "step",
    "wrap_data_parallel",
]
