"""A DeepSpeed engine's state in Megatron's checkpoint format: whole tensors by global name, so that any mesh reads it.

ZeRO cuts what the optimizer holds into flat pieces, whose borders follow from the number of ranks. A checkpoint must
not: each parameter's fp32 master weight and both moments are gathered, and kept by one rank, its keeper, which writes
them under the names that the Megatron engine uses. Keepers are spread evenly, so a save needs 12 bytes for each
parameter of the keeper, and one whole parameter in passing. Loading goes the other way: the keeper reads, and hands
each tensor to all ranks, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from moba_train.engine.gpt_engine import sharded_parameters
from moba_train.model import megatron_cpu
from moba_train.model.gpt import Gpt
from moba_train.parallel.topology import Topology
from moba_train.quiet import quiet_imports

with quiet_imports():
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

Kind = Literal["param", "exp_avg", "exp_avg_sq"]
KINDS: tuple[Kind, ...] = ("param", "exp_avg", "exp_avg_sq")
"""fp32 master weight and AdamW's moments, as Megatron's checkpoints call them."""
MAIN_REPLICA = (0, 0, 0)


@dataclass(frozen=True)
class StateLayout:
    """Where each parameter goes in a checkpoint, and who keeps it.

    Attributes:
        templates: name -> Megatron's description of the tensor in a checkpoint, without its data.
        shapes: name -> shape of the whole tensor.
        keepers: name -> rank in `group` that writes and reads it.
        dtype: of the model's weights.
        group: all ranks that ZeRO shards over.
        device: of this rank.
    """

    templates: Mapping[str, ShardedTensor | ShardedTensorFactory]
    shapes: Mapping[str, torch.Size]
    keepers: Mapping[str, int]
    dtype: torch.dtype
    group: dist.ProcessGroup
    device: torch.device

    @staticmethod
    def of(gpt: Gpt, topology: Topology) -> StateLayout:
        """The layout of a model whose weights are whole, that is before ZeRO-3 cuts them."""
        with megatron_cpu.cuda_calls_on_cpu():
            state = sharded_parameters(gpt, {"dp_cp_group": topology.dp_cp_group})
        shapes = {name: parameter.shape for name, parameter in gpt.named_parameters()}
        assert shapes.keys() == state.keys(), shapes.keys() ^ state.keys()
        return StateLayout(
            templates={name: replace(state[name], data=None, replica_id=MAIN_REPLICA) for name in shapes},
            shapes=shapes,
            keepers=spread({name: shape.numel() for name, shape in shapes.items()}, topology.dp_cp_group.size()),
            dtype=gpt.config.params_dtype,
            group=topology.dp_cp_group,
            device=topology.device,
        )

    def keeps(self, name: str) -> bool:
        """This rank is the keeper of `name`."""
        return self.keepers[name] == self.group.rank()

    def to_save(self, whole: Callable[[str, Kind], Tensor], steps: float) -> dict[str, Any]:
        """The state to write. `whole` gathers a tensor of a parameter and is collective; `steps` taken so far."""
        model: dict[str, Any] = {}
        moments: dict[str, dict[str, Any]] = {}
        for name in self.templates:
            for kind in KINDS:
                tensor = whole(name, kind)
                if self.keeps(name):
                    kept = tensor.detach().to("cpu", copy=True)
                    moments.setdefault(name, {})[kind] = self._named(name, kind, kept)
                    if kind == "param":
                        model[name] = replace(self.templates[name], data=kept.to(self.dtype, copy=True))
        groups = {"param_groups": [{"step": steps}]}
        optimizer = {"optimizer": groups, "param_state": moments, "param_state_sharding_type": "fully_reshardable"}
        return {"model": model, "optimizer": optimizer}

    def to_load(self) -> dict[str, Any]:
        """Asks for what this rank keeps. The model's weights follow from the master weights."""
        kept = {
            name: {kind: self._named(name, kind, torch.empty(self.shapes[name])) for kind in KINDS}
            for name in self.templates
            if self.keeps(name)
        }
        return {"optimizer": {"param_state": kept}}

    def loaded(self, state: Mapping[str, Any]) -> Iterator[tuple[str, Kind, Tensor]]:
        """Every tensor of a loaded state, whole, on every rank's device, one after the other. Collective."""
        kept = state["optimizer"].get("param_state", {})
        for name, keeper in self.keepers.items():
            for kind in KINDS:
                tensor = torch.empty(self.shapes[name], device=self.device)
                if self.keeps(name):
                    tensor.copy_(kept[name][kind])
                dist.broadcast(tensor, src=dist.get_global_rank(self.group, keeper), group=self.group)
                yield name, kind, tensor

    def _named(self, name: str, kind: Kind, tensor: Tensor) -> ShardedTensor | ShardedTensorFactory:
        """`tensor` under the name that the Megatron engine gives it."""
        return make_sharded_optimizer_tensor(self.templates[name], tensor, f"optimizer.state.{kind}")


def spread(sizes: Mapping[str, int], num_ranks: int) -> dict[str, int]:
    """Name -> rank, so that all ranks keep about as much: the largest first, each to the rank that has least."""
    held = [0] * num_ranks
    keepers: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        keepers[name] = held.index(min(held))
        held[keepers[name]] += sizes[name]
    return {name: keepers[name] for name in sizes}


def steps_of(state: Mapping[str, Any]) -> float:
    """Steps that a loaded state has behind it, of this engine or the Megatron engine."""
    return float(state["optimizer"]["optimizer"]["param_groups"][0]["step"])


__all__ = ["KINDS", "Kind", "StateLayout", "spread", "steps_of"]
