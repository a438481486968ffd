"""The default engine: a Megatron-core GPT under Megatron's DDP and distributed optimizer.

The rows of a step run through Megatron's schedule; its `finalize_model_grads` adds gradients up over ranks and divides
them by the counted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moba_train.config.schema import EngineConfig, ModelConfig, OptimizerConfig, ParallelConfig, StageConfig
from moba_train.data.row import Row
from moba_train.engine.gpt_engine import GptEngine, RowOutput, sharded_parameters, summed_loss
from moba_train.engine.local_row import LocalRow, padded_length
from moba_train.engine.megatron_optimizer import (
    build_optimizer,
    load_optimizer_state,
    optimizer_tensors,
    sharded_optimizer_state,
    wrap_data_parallel,
)
from moba_train.engine.megatron_optimizer import (
    step as take_step,
)
from moba_train.engine.megatron_score import row_scores
from moba_train.errors import BackendError
from moba_train.model import megatron_cpu
from moba_train.model.gpt import FillWeights, Gpt
from moba_train.parallel.shard import shard_length
from moba_train.parallel.topology import Topology, init_topology
from moba_train.quiet import quiet_imports

with quiet_imports():
    from megatron.core.pipeline_parallel import get_forward_backward_func


class MegatronEngine(GptEngine):
    """Implements `moba_train.engine.base.Engine`; see there for the meaning of every method, and `GptEngine` for the
    arguments. optimizer: AdamW.
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
        super().__init__(model, stages, engine, topology, parallel, seed=seed, fill=fill)
        self._clip_grad = optimizer.clip_grad
        self._ddp = wrap_data_parallel(self._gpt, self._gpt.config, engine)
        self._optimizer = build_optimizer(self._ddp, optimizer, engine)
        megatron_cpu.adapt_megatron()  # once more: the set-up imported further modules
        self._schedule = get_forward_backward_func()
        self._memory.hold("weights", self._gpt.parameters())
        self._memory.hold("gradients", (parameter.main_grad for parameter in self._gpt.parameters()))
        self._memory.hold("optimizer", optimizer_tensors(self._optimizer))
        self.set_stage(0)

    def _forward_and_backward(self, local_rows: Iterator[LocalRow], rows: Sequence[Row]) -> list[Tensor]:
        self._ddp.train()
        self._ddp.zero_grad_buffer()
        self._optimizer.zero_grad()
        return self._run(local_rows, [row.tokens_S.size for row in rows], summed_loss, forward_only=False)

    def _take_step(self, *, lr: float, loss_is_finite: bool) -> tuple[float, bool]:
        return take_step(self._optimizer, lr=lr, clip_grad=self._clip_grad, loss_is_finite=loss_is_finite)

    def _evaluate(self, local: LocalRow) -> RowOutput | None:
        last = partial(_scores, topology=self.topology, gpt=self._gpt)
        found = self._run(iter([local]), [local.context.pack.num_tokens], last, forward_only=True)
        return found[0] if found else None

    def _sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            # To the first data-parallel rank, over gloo; otherwise all ranks would get all of it, by way of their GPUs.
            "distrib_optim_fully_reshardable_mem_efficient": True,
            "dp_cp_group": self.topology.dp_cp_group,
        }
        with megatron_cpu.cuda_calls_on_cpu():
            model = sharded_parameters(self._gpt, metadata)
            optimizer = sharded_optimizer_state(self._optimizer, model, is_loading=is_loading, metadata=metadata)
        return {"model": model, "optimizer": optimizer}

    def _restore(self, state: dict[str, Any]) -> None:
        with megatron_cpu.cuda_calls_on_cpu():
            empty = {name: None for name in self._gpt.state_dict() if name.endswith("_extra_state")}
            self._gpt.load_state_dict({**state["model"], **empty})
            load_optimizer_state(self._optimizer, state["optimizer"])
            # Weights in fp32 are the optimizer's master weights, which may be finer than the saved ones (of a run in
            # bf16): each rank has loaded its shard of them.
            if self._ddp.ddp_config.use_distributed_optimizer:
                self._ddp.start_param_sync(force_sync=True)

    def _run(
        self,
        rows: Iterator[LocalRow],
        lengths: Sequence[int],
        on_output: Callable[..., Any],
        *,
        forward_only: bool,
    ) -> list[Any]:
        """Megatron's schedule over rows of so many tokens: what `on_output` gave for each (on the last pipeline rank,
        else empty)."""
        mesh = self.topology
        # Rows of one length need no exchange of shapes between stages, during which the host would wait for the device.
        self._gpt.config.variable_seq_lengths = mesh.pp > 1 and len(set(lengths)) > 1
        num_local = padded_length(shard_length(lengths[0], mesh.cp, mesh.cp_rank, self._parallel.layout), mesh.tp)
        outputs: list[Any] = self._schedule(
            forward_step_func=partial(_forward, on_output=on_output, with_labels=not forward_only),
            data_iterator=rows,
            model=[self._ddp],
            num_microbatches=len(lengths),
            seq_length=num_local * mesh.cp,  # of the shards; Megatron divides by cp, shards of a row differ by a token
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        return outputs


def _forward(
    rows: Iterator[LocalRow], module: torch.nn.Module, *, on_output: Callable[..., Any], with_labels: bool
) -> tuple[Tensor, Callable[..., Any]]:
    """One row through this rank's part of the model, in the form that Megatron's schedules ask for."""
    local = next(rows)
    labels = local.labels if with_labels else None
    output = module(local.tokens, None, None, labels=labels, packed_seq_params=local.context)
    return output, partial(on_output, local)


def _scores(
    local: LocalRow, hidden: Tensor, *, non_loss_data: bool, topology: Topology, gpt: Gpt
) -> tuple[Tensor, Tensor]:
    assert non_loss_data
    return row_scores(hidden, local, topology, gpt.head)


def choose_device(wanted: str) -> torch.device:
    """engine.device -> the device. BackendError when CUDA is asked for and there is none."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BackendError(
            "CUDA is asked for, and this machine has none",
            where="engine.device",
            got=wanted,
            allowed='"auto", "cpu"',
            fix='set engine.device = "auto"',
        )
    return torch.device("cuda")


def build_engine(
    model: ModelConfig,
    stages: tuple[StageConfig, ...],
    engine: EngineConfig,
    optimizer: OptimizerConfig,
    parallel: ParallelConfig,
    *,
    seed: int,
) -> MegatronEngine:
    """Join the other ranks, then build the engine. Raises ConfigError or BackendError; see `init_topology`."""
    topology = init_topology(parallel, device=choose_device(engine.device), timeout_s=engine.timeout_s)
    return MegatronEngine(
        model,
        stages,
        engine,
        optimizer,
        topology,
        parallel,
        seed=seed,
    )


__all__ = ["MegatronEngine", "build_engine", "choose_device"]
