"""What every engine over a Megatron GPT has in common: rows in, shards through the model, numbers out.

One step: each row of this data-parallel rank is sharded over context-parallel ranks and runs through the model as one
micro-batch; losses are summed, not averaged, so that after the reduction over data- and context-parallel ranks the
gradient is that of sum(loss * mask) / sum(mask) over all tokens of the step, however they were packed. How gradients
are reduced, where the optimizer's state lies and how it is kept is the matter of a subclass.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moba_train.config.schema import EngineConfig, ModelConfig, ParallelConfig, StageConfig
from moba_train.data.row import Row
from moba_train.engine.agreement import facts_of_rows, facts_of_work
from moba_train.engine.base import AttentionMode, RowScores, StepResult
from moba_train.engine.local_row import LocalRow, RowPlan
from moba_train.engine.measured import hardware_of_state, measured_state
from moba_train.engine.megatron_score import broadcast_from_last_stage, picks_at
from moba_train.engine.memory import GIB, MemoryMeter, largest_gib, release_unused
from moba_train.engine.phases import OnPhase, Phase, watched
from moba_train.engine.step_traffic import exchange_numbers
from moba_train.model.gpt import FillWeights, Gpt, build_gpt
from moba_train.model.plan import attention_plan, count_parameters
from moba_train.model.routing_stats import routing_numbers, routing_totals
from moba_train.model.row_context import RandomPicks, RowContext
from moba_train.model.transport_plan import transport_plan
from moba_train.parallel import ranks
from moba_train.parallel.fingerprint import check_agreement
from moba_train.parallel.measure import hardware_of_run
from moba_train.parallel.rules import AUTO_TRANSPORTS
from moba_train.parallel.topology import Topology
from moba_train.parallel.traffic import Traffic, Waits
from moba_train.parallel.watch import Watch
from moba_train.quiet import ignore_known_advice

RowOutput = tuple[Tensor, Tensor]
"""What the model gives for a row in an evaluation: log-probability fp32 [T] of each label, most probable token [T]."""


class GptEngine(ABC):
    """Implements `moba_train.engine.base.Engine` but for what is abstract here; see there for every method's meaning.

    Args:
        model: shape of the transformer.
        stages: the schedule; stage 0 is current after construction.
        engine: precision, recompute, attention backend, optimizer sharding.
        topology: process groups and device of this rank.
        seed: of the initial weights and of random routing.
        parallel: how rows are sharded and how keys and values reach queries.
        fill: where the initial weights come from, if not from the seed.

    Raises ConfigError where the mesh does not divide the model.
    """

    def __init__(
        self,
        model: ModelConfig,
        stages: tuple[StageConfig, ...],
        engine: EngineConfig,
        topology: Topology,
        parallel: ParallelConfig,
        *,
        seed: int,
        fill: FillWeights | None = None,
    ) -> None:
        ignore_known_advice()
        self.topology = topology
        self._model = model
        self._stages = stages
        self._engine = engine
        self._seed = seed
        self._parallel = parallel
        dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
        self._hardware = hardware_of_run(parallel.hardware, topology, dtype, engine.attention_backend)
        self._step = 0
        self._memory = MemoryMeter(topology.device)
        self._gpt: Gpt = build_gpt(model, engine, topology, seed=seed, fill=fill)

    @abstractmethod
    def _forward_and_backward(self, local_rows: Iterator[LocalRow], rows: Sequence[Row]) -> Sequence[Tensor]:
        """Leave the gradient of the step; returns [2] for each row (on the last pipeline rank): see `summed_loss`."""

    @abstractmethod
    def _take_step(self, *, lr: float, loss_is_finite: bool) -> tuple[float, bool]:
        """Clip and step; returns (global gradient norm before clipping, whether the step was taken)."""

    @abstractmethod
    def _evaluate(self, local: LocalRow) -> RowOutput | None:
        """One row without gradients; None where this rank does not hold the end of the model. Collective."""

    @abstractmethod
    def _sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        """{"model": ..., "optimizer": ...} for `megatron.core.dist_checkpointing`. Collective."""

    @abstractmethod
    def _restore(self, state: dict[str, Any]) -> None:
        """Take over model and optimizer of a loaded state. Collective."""

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, over all ranks."""
        return count_parameters(self._model)

    def set_stage(self, index: int, *, documents: Sequence[tuple[int, ...]] = ()) -> tuple[str, ...]:
        """Switch attention plan, transports and RoPE to stage `index`; weights and optimizer state stay. Collective.

        documents: cumulative document lengths of typical rows, for the choice of transports; () = one document a row.
        Returns what the log should say. IndexError when there is no such stage.
        """
        if not 0 <= index < len(self._stages):
            raise IndexError(f"stage index must lie in 0..{len(self._stages) - 1}; got {index}")
        self._stage = self._stages[index]
        release_unused(self.topology.device)
        arguments = (self._model, self._stage, self._parallel, self._engine, self._hardware)
        self._transports = ranks.from_rank_0(lambda: transport_plan(*arguments, documents=documents))
        return () if self._transports is None else (self._transports.describe(),)

    def train_step(
        self,
        rows: Sequence[Row],
        *,
        lr: float,
        step: int = 1,
        collect_routing: bool = False,
        measure_memory: bool = False,
        on_phase: OnPhase | None = None,
    ) -> StepResult:
        """Accumulate gradients over this data-parallel rank's rows, then step once with learning rate `lr`.

        Every data-parallel rank passes the same number of rows, at least one. A loss or gradient norm that is not
        finite, on any rank, leaves weights and optimizer state untouched on all (`skipped`). `collect_routing` looks
        at the first row of each data-parallel rank. `measure_memory` costs about 0.1 ms a phase, and on CUDA
        times the waits for exchanges, too; all ranks ask for it.

        `step`, counted from 1, is named in messages. Raises ConfigError on every rank where ranks disagree on step,
        plan or rows, ExchangeError where a collective breaks off.
        """
        if not rows:
            raise ValueError("train_step needs at least one row; got none; fix: give every data-parallel rank a row")
        contexts: list[RowContext] = []
        traffic = Traffic(waits=Waits(on_device=measure_memory))  # on log steps, as everything that costs
        self._step = step
        watch = self.topology.watch
        with watch.during(f"step {step}, agreement"):
            self._agree("training", rows, lr)
        local_rows = self._local_rows(rows, traffic, contexts if collect_routing else None)
        on_watch = partial(_note_phase, watch, step) if watch.is_read else None
        watchers = (self._memory if measure_memory else None, on_phase, on_watch)
        listeners: list[OnPhase] = [watcher for watcher in watchers if watcher is not None]
        tell = partial(_tell, listeners)
        self._memory.begin_step()
        tell(Phase("data"))
        with watch.during(f"step {step}, forward and backward"), watched(self._gpt, tell if listeners else None):
            sums = self._forward_and_backward(local_rows, rows)
        tell(Phase("optimizer"))
        with watch.during(f"step {step}, loss and optimizer"):
            loss, num_tokens = self._mean_loss(sums)
            plan, device = self._transports, self.topology.device
            comm, waited_s = ({}, None) if plan is None else exchange_numbers(traffic, plan, len(rows), device)
            norm, taken = self._take_step(lr=lr, loss_is_finite=math.isfinite(loss))
            routing = self._routing_numbers(contexts) if collect_routing else {}
            memory = largest_gib(self._memory.end_step(), device) if measure_memory else {}
        peak_gib = memory.get("peak") or self._memory.peak / GIB
        return StepResult(loss, num_tokens, norm, not taken, routing, memory, peak_gib, comm, waited_s)

    def _local_rows(
        self, rows: Sequence[Row], traffic: Traffic, contexts: list[RowContext] | None
    ) -> Iterator[LocalRow]:
        """This rank's shards, made one at a time; the context of the first row goes into `contexts`, its picks kept."""
        recompute = self._engine.recompute == "full"
        for index, row in enumerate(rows):
            looked_at = contexts is not None and index == 0
            local = self._row_plan("stage").local_row(
                row, self.topology, keep_routing=looked_at or recompute, traffic=traffic
            )
            if contexts is not None and index == 0:
                contexts.append(local.context)
            yield local

    def score(self, row: Row, *, attention: AttentionMode = "stage", query_positions: Sequence[int] = ()) -> RowScores:
        """Evaluate one row without gradients. Collective over the model's ranks (tensor, context, pipeline parallel).

        IndexError for a query position outside the row; ConfigError and ExchangeError as in `train_step`.
        """
        outside = [position for position in query_positions if not 0 <= position < row.tokens_S.size]
        if outside:
            raise IndexError(f"query_positions must lie in 0..{row.tokens_S.size - 1}; got {outside[:4]}")
        with self.topology.watch.during(f"evaluation after step {self._step}, sample {row.sample_id}", limit="step"):
            return self._score(row, attention, query_positions)

    def _score(self, row: Row, attention: AttentionMode, query_positions: Sequence[int]) -> RowScores:
        self._agree(f"scores, {attention} attention", [row])
        # Rows differ in their random picks: a needle must not meet the same picks in every sample of its depth.
        random_seed = (row.sample_id << 64) + self._seed
        random = RandomPicks(random_seed, self.topology.tp_rank) if attention == "random" else None
        local = self._row_plan(attention).local_row(
            row, self.topology, keep_routing=bool(query_positions), random_picks=random
        )
        self._gpt.eval()
        with torch.no_grad():
            found = self._evaluate(local)
        self._gpt.train()
        device, num_tokens = self.topology.device, row.tokens_S.size
        log_prob_T, argmax_T = found or (
            torch.zeros(num_tokens, dtype=torch.float32, device=device),
            torch.zeros(num_tokens, dtype=torch.int64, device=device),
        )
        log_prob = broadcast_from_last_stage(log_prob_T, self.topology).cpu().numpy()
        argmax = broadcast_from_last_stage(argmax_T, self.topology).cpu().numpy()
        picks = picks_at(local.context, query_positions, self.topology) if query_positions else {}
        return RowScores(log_prob, argmax, picks)

    def sharded_state_dict(self, *, is_loading: bool) -> dict[str, Any]:
        """Model and optimizer state for `megatron.core.dist_checkpointing`, loadable by any other mesh. Collective."""
        state = self._sharded_state(is_loading=is_loading)
        if is_loading:
            return state
        measured = measured_state(self._hardware, self._parallel.hardware, self.topology)
        return {**state, "engine": self._engine.kind, **measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `megatron.core.dist_checkpointing.load` returned for `sharded_state_dict(is_loading=True)`.

        What the run measured of its machine counts from the next `set_stage` on.
        """
        self._hardware = hardware_of_state(state, self._hardware, self._parallel.hardware, self.topology)
        self._restore(state)

    def _agree(self, work: str, rows: Sequence[Row], lr: float = 0.0) -> None:
        """ConfigError unless all ranks mean the same: in training all of them, in an evaluation those of a replica."""
        mesh = self.topology
        parallel, chosen = self._parallel, None if self._transports is None else self._transports.transports
        asked = f"transport {parallel.transport!r}, for full layers {parallel.transport_full!r}"
        sharding = f"layout {parallel.layout}, {asked}, chosen {chosen}, {len(rows)} rows"  # lengths: cu_seqlens
        facts = facts_of_work(self._step, work, self._model, self._engine, self._stage, sharding, lr)
        group, replicas = mesh.control_group, mesh.replicas
        if work != "training":
            group, replicas = mesh.replica_group, (tuple(range(mesh.tp * mesh.cp * mesh.pp)),)
        check_agreement(facts, facts_of_rows(rows), group=group, replicas=replicas)

    def _mean_loss(self, sums: Sequence[Tensor]) -> tuple[float, int]:
        """(mean loss, counted tokens) of the step from this rank's rows; on earlier pipeline ranks there are none."""
        none = torch.zeros(2, dtype=torch.float64, device=self.topology.device)
        totals = torch.stack(list(sums)).sum(0) if sums else none
        dist.all_reduce(totals, group=self.topology.dp_cp_group)
        loss_sum, num_tokens = broadcast_from_last_stage(totals, self.topology).tolist()
        return loss_sum / num_tokens if num_tokens else math.nan, int(num_tokens)

    def _row_plan(self, attention: AttentionMode) -> RowPlan:
        return RowPlan(
            specs=attention_plan(self._model, self._stage, attention),
            rope=self._stage.rope,
            head_dim=self._model.head_dim,
            layout=self._parallel.layout,
            transports=AUTO_TRANSPORTS if self._transports is None else self._transports.transports,
            node_ranks=1 if self._transports is None else self._transports.node_ranks,
            backend=self._engine.attention_backend,
        )

    def _routing_numbers(self, contexts: list[RowContext]) -> dict[str, float]:
        routings = contexts[0].routings
        totals = routing_totals(routings, self.topology.cp_group, self.topology.device)
        dist.all_reduce(totals)  # CP ranks hold equal vectors, so means over all ranks are means over layers and heads
        return routing_numbers(totals)


def _tell(listeners: Sequence[OnPhase], phase: Phase) -> None:
    for listener in listeners:
        listener(phase)


def summed_loss(local: LocalRow, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token losses [1,S] -> (their masked sum, counted tokens, both in fp64 for the report)."""
    loss_sum = (losses.float() * local.loss_mask).sum()
    num_tokens = local.loss_mask.count_nonzero()
    report = torch.stack([loss_sum.detach().double(), num_tokens.double()])
    return loss_sum, num_tokens.to(torch.int), report


def sharded_parameters(gpt: Gpt, metadata: dict[str, Any]) -> dict[str, Any]:
    """Name -> Megatron's description of each parameter in a checkpoint. Weights must be whole."""
    state = gpt.sharded_state_dict(metadata=metadata)
    # slots for Transformer Engine's scaling factors: always empty here, and they would be stored as pickles
    return {name: part for name, part in state.items() if not name.endswith("_extra_state")}


def _note_phase(watch: Watch, step: int, phase: Phase) -> None:
    watch.begin(f"step {step}: {phase}")


__all__ = ["GptEngine", "RowOutput", "sharded_parameters", "summed_loss"]
