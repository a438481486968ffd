"""The same Megatron GPT under DeepSpeed's ZeRO (arXiv 1910.02054). The only file that imports deepspeed.

ZeRO shards over all data- and context-parallel ranks together: each of them holds another part of the gradient of the
same weights. Nothing is compiled: the optimizer is PyTorch's AdamW, and DeepSpeed's own exchange through shared memory,
which it would compile on the first use on a CPU, is switched off.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moba_train.config.schema import EngineConfig, ModelConfig, OptimizerConfig, ParallelConfig, StageConfig
from moba_train.data.row import Row
from moba_train.engine.deepspeed_config import deepspeed_config
from moba_train.engine.deepspeed_state import Kind, StateLayout, steps_of
from moba_train.engine.gpt_engine import GptEngine, RowOutput, summed_loss
from moba_train.engine.local_row import LocalRow
from moba_train.engine.megatron_score import row_scores
from moba_train.errors import BackendError, ConfigError
from moba_train.model.gpt import FillWeights
from moba_train.parallel.topology import Topology

# Where DeepSpeed's optimizers have the flat fp32 weights of this rank: ZeRO 1 and 2, ZeRO 1 in bf16, ZeRO 3.
_MASTERS = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
# Gradients that live as long as the run: ZeRO 1 in bf16, ZeRO 3. The others are made in each backward pass.
_GRADIENTS = ("fp32_groups_gradients_flat", "grad_partitions_flat_buffer")


class DeepSpeedEngine(GptEngine):
    """Implements `moba_train.engine.base.Engine`; see there for the meaning of every method, and `GptEngine` for the
    arguments. optimizer: AdamW.

    Under ZeRO-3 every rank of the job takes part in gathering weights: `score` is collective over all of them.

    Raises ConfigError where the mesh has tensor- or pipeline-parallel ranks, BackendError where DeepSpeed is missing.
    """

    def __init__(
        self,
        model: ModelConfig,
        stages: tuple[StageConfig, ...],
        engine: EngineConfig,
        optimizer: OptimizerConfig,
        topology: Topology,
        parallel: ParallelConfig,
        *,
        seed: int,
        fill: FillWeights | None = None,
    ) -> None:
        if topology.tp * topology.pp > 1:
            raise ConfigError(
                "DeepSpeed shards over data- and context-parallel ranks only",
                where="parallel",
                got=f"tp {topology.tp}, pp {topology.pp}",
                allowed="tp 1, pp 1",
                fix='set them to 1, or engine.kind = "megatron"',
            )
        self._deepspeed = import_deepspeed(topology.device)
        super().__init__(model, stages, engine, topology, parallel, seed=seed, fill=fill)
        self._parameters = dict(self._gpt.named_parameters())
        self._layout = StateLayout.of(self._gpt, topology)
        if engine.zero_stage == 3 and engine.recompute == "full":
            for layer in self._gpt.decoder.layers:  # gathered as a whole: its tiles differ in number between ranks
                self._deepspeed.utils.set_z3_leaf_module(layer.mlp, True)
        self._adamw = _adamw(self._parameters.values(), optimizer)
        # DeepSpeed reads it at any time, and takes that CUDA device: under srun a rank may have only one, number 0.
        if topology.device.type == "cuda" or "LOCAL_RANK" not in os.environ:
            os.environ["LOCAL_RANK"] = str(topology.device.index or 0)
        with _errors_only():
            self._zero = self._deepspeed.initialize(
                model=self._gpt,
                optimizer=self._adamw,
                config=deepspeed_config(model, engine, optimizer, num_ranks=topology.dp_cp_group.size()),
                mpu=_Groups(topology),
                dist_init_required=False,
            )[0]
        self._create_state()
        self._hold_memory()
        self.set_stage(0)

    def _forward_and_backward(self, local_rows: Iterator[LocalRow], rows: Sequence[Row]) -> list[Tensor]:
        """DeepSpeed averages gradients over ranks, hence their number in the scale of the loss."""
        num_tokens = self._tokens_of_step(rows)
        scale = self._layout.group.size() / num_tokens if num_tokens else math.nan
        self._zero.train()
        sums = []
        for index, local in enumerate(local_rows):
            self._zero.set_gradient_accumulation_boundary(index == len(rows) - 1)
            losses = self._zero(local.tokens, None, None, labels=local.labels, packed_seq_params=local.context)
            loss_sum, _, report = summed_loss(local, losses)
            # A loss that is not finite must not hide behind finite gradients: all ranks learn of it by their norm.
            factor = torch.where(report[0].isfinite(), scale, math.nan).to(loss_sum.dtype)
            self._zero.backward(loss_sum * factor)
            sums.append(report)
        return sums

    def _take_step(self, *, lr: float, loss_is_finite: bool) -> tuple[float, bool]:
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._zero.step()
        taken = bool(self._zero.was_step_applied())
        assert loss_is_finite or not taken
        return float(self._zero.get_global_grad_norm()), taken

    def _evaluate(self, local: LocalRow) -> RowOutput | None:
        hidden = self._zero(local.tokens, None, None, packed_seq_params=local.context)
        with self._whole(self._gpt.head.weight_VM):  # outside of the model's forward nobody gathers it
            return row_scores(hidden, local, self.topology, self._gpt.head)

    def _sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        if is_loading:
            return self._layout.to_load()
        steps = next(float(held["step"]) for held in self._adamw.state.values())
        return self._layout.to_save(self._whole_fp32, steps)

    @torch.no_grad()
    def _restore(self, state: dict[str, Any]) -> None:
        utils = self._deepspeed.utils
        for name, kind, tensor in self._layout.loaded(state):  # the model's weights are the rounded master weights
            parameter = self._parameters[name]
            if kind != "param":
                utils.safe_set_full_optimizer_state(parameter, tensor, kind)
                continue
            utils.safe_set_full_fp32_param(parameter, tensor)
            with self._whole(parameter, changes=True):
                parameter.data.copy_(tensor)
        steps = steps_of(state)
        for held in self._adamw.state.values():
            held["step"].fill_(steps)

    def _whole_fp32(self, name: str, kind: Kind) -> Tensor:
        """The whole master weight or moment of a parameter, on every rank. Collective."""
        utils, parameter = self._deepspeed.utils, self._parameters[name]
        whole: Tensor
        if kind == "param":
            whole = utils.safe_get_full_fp32_param(parameter)
        else:
            whole = utils.safe_get_full_optimizer_state(parameter, kind)
        return whole

    def _whole(self, parameter: Tensor, *, changes: bool = False) -> AbstractContextManager[Any]:
        """The parameter is whole inside; with `changes`, what is written there stays. Collective under ZeRO-3."""
        gathered: AbstractContextManager[Any] = self._deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=0 if changes else None
        )
        return gathered

    def _tokens_of_step(self, rows: Sequence[Row]) -> int:
        """Counted tokens of all rows of the step, over all ranks."""
        mine = sum(int((row.loss_mask_S != 0).sum()) for row in rows) if self.topology.cp_rank == 0 else 0
        total = torch.tensor(mine, dtype=torch.int64, device=self.topology.device)
        dist.all_reduce(total, group=self._layout.group)
        return int(total)

    def _masters(self) -> list[Tensor]:
        """This rank's flat fp32 weights."""
        optimizer = self._zero.optimizer
        return next(list(getattr(optimizer, name)) for name in _MASTERS if hasattr(optimizer, name))

    def _create_state(self) -> None:
        """AdamW's state as before the first step, so that step 0 can be saved, and any step loaded, like any other."""
        for master in self._masters():
            moments = {kind: torch.zeros_like(master, requires_grad=False) for kind in ("exp_avg", "exp_avg_sq")}
            self._adamw.state[master] = {"step": torch.zeros((), dtype=torch.float32), **moments}
        link = getattr(self._zero.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:  # ZeRO 1 and 2 look moments up through each parameter
            link()

    def _hold_memory(self) -> None:
        """Tell the meter what lives as long as the run."""
        whole = list(self._parameters.values())
        parts = [parameter.ds_tensor for parameter in whole if hasattr(parameter, "ds_tensor")]  # under ZeRO-3
        gradients = [x for name in _GRADIENTS for x in _tensors(getattr(self._zero.optimizer, name, []))]
        moments = [x for held in self._adamw.state.values() for x in held.values()]
        self._memory.hold("weights", [*whole, *parts])
        self._memory.hold("gradients", gradients)
        self._memory.hold("optimizer", [*moments, *self._masters()])


class _Groups:
    """What DeepSpeed asks its client about process groups ("mpu"): ours, so that it makes none."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Context-parallel ranks hold parts of the same gradient: they belong to it."""
        return self._topology.dp_cp_group

    def get_data_parallel_world_size(self) -> int:
        return self._topology.dp_cp_group.size()

    def get_data_parallel_rank(self) -> int:
        return self._topology.dp_cp_group.rank()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._topology.tp_group

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


def import_deepspeed(device: torch.device) -> Any:
    """The library, for this kind of device. BackendError where it is missing, or loaded for another one."""
    try:
        with _accelerator(device.type):
            import deepspeed
    except ImportError as error:
        raise BackendError(
            "DeepSpeed is not installed",
            where="engine.kind",
            got=f'"deepspeed"; {error}',
            allowed='"megatron"',
            fix="pip install 'moba-train[deepspeed]', or set engine.kind = \"megatron\"",
        ) from error
    loaded_for = deepspeed.get_accelerator().device_name()
    if loaded_for != device.type:
        raise BackendError(
            "DeepSpeed has been loaded for another device",
            where="engine.device",
            got=f"{device.type}, while DeepSpeed runs on {loaded_for}",
            fix="start a new process",
        )
    # The operations that it may compile: none. It looks here before it builds its exchange through shared memory.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def _adamw(parameters: Iterable[Tensor], config: OptimizerConfig) -> torch.optim.AdamW:
    """Norms and biases, which have one dimension, do not decay."""
    every = list(parameters)
    groups = [
        {"params": [parameter for parameter in every if parameter.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in every if parameter.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def _tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


@contextmanager
def _accelerator(name: str) -> Iterator[None]:
    """Tell DeepSpeed, which reads the environment while it is imported, what to run on."""
    before = os.environ.get("DS_ACCELERATOR")
    os.environ["DS_ACCELERATOR"] = name
    try:
        yield
    finally:
        del os.environ["DS_ACCELERATOR"]
        if before is not None:
            os.environ["DS_ACCELERATOR"] = before


@contextmanager
def _errors_only() -> Iterator[None]:
    """While it is set up DeepSpeed logs and prints what it has been told, and the memory of the machine."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        logger.setLevel(level)


__all__ = ["DeepSpeedEngine", "import_deepspeed"]
