"""Which transport each kind of layer takes in a stage, and what it will move: a pure function of configuration, typical
rows and `Hardware`; no torch. Every rank that passes the same arguments gets the same plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from moba_kernels.spec import AttentionSpec, Full, MoBA
from moba_train.config.schema import EngineConfig, ModelConfig, ParallelConfig, StageConfig
from moba_train.config.transports import transport_errors
from moba_train.config.validate import raise_all
from moba_train.model.plan import attention_plan, layers_of_pipeline_rank
from moba_train.parallel.cost import TransportCost, choose_transport, transport_cost
from moba_train.parallel.hardware import Hardware
from moba_train.parallel.parts import FloatArray
from moba_train.parallel.rules import LayerTransports
from moba_train.parallel.volume import HeadShape, RowShape, halo_exchanges

Kind = Literal["moba", "full"]
Direction = Literal["sent", "received"]
_TITLES: Mapping[Kind, str] = {"moba": "MoBA", "full": "full"}


@dataclass(frozen=True)
class KindPlan:
    """The layers of one kind. num_layers: of the stage, over all pipeline ranks; evaluation may run others as well."""

    kind: Kind
    num_layers: int
    cost: TransportCost
    """Of one layer and one row, forward (twice under recompute) and backward."""
    others: tuple[TransportCost, ...] = ()
    """Of the transports that lost, cheapest first; () where the configuration names one."""
    refused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Transports that cannot serve, and why."""

    @property
    def title(self) -> str:
        return _TITLES[self.kind]


@dataclass(frozen=True)
class TransportPlan:
    """The plan of one stage; there is one only where a row is shared by several ranks.

    Attributes:
        specs: attention of every global layer.
        halo: (phase, bytes that each rank sends, and receives) of the key convolution of one layer and one row.
        node_ranks: context-parallel ranks of a node.
    """

    specs: tuple[AttentionSpec, ...]
    moba: KindPlan
    full: KindPlan
    halo: tuple[tuple[str, FloatArray], ...]
    hardware: Hardware
    node_ranks: int
    pp: int

    @property
    def transports(self) -> LayerTransports:
        return LayerTransports(moba=self.moba.cost.transport, full=self.full.cost.transport)

    @property
    def kinds(self) -> tuple[KindPlan, ...]:
        """Those that the stage has layers of."""
        return tuple(kind for kind in (self.moba, self.full) if kind.num_layers)

    def describe(self) -> str:
        """The line that the log and the plan show."""
        parts = (
            f"{kind.title} layers {kind.cost.transport} (predicted {format_bytes(kind.cost.received_bytes)} a layer a "
            f"rank, exposed {format_seconds(kind.cost.exposed_s)})"
            for kind in self.kinds
        )
        return f"transports: {', '.join(parts)}; hardware {self.hardware.name}, {self.node_ranks} CP ranks a node"

    def predicted(self, direction: Direction, num_rows: int) -> dict[str, float]:
        """Bytes by phase, and "" = in total, of the rank that moves most, for `num_rows` rows through its layers."""
        num_layers = len(self.specs)
        totals: dict[str, float] = {}
        for pp_rank in range(self.pp):
            of_rank: dict[str, FloatArray] = {}
            for layer in layers_of_pipeline_rank(num_layers, self.pp, pp_rank):
                cost = (self.moba if isinstance(self.specs[layer], MoBA) else self.full).cost
                by_phase = cost.sent_N if direction == "sent" else cost.received_N
                for phase, bytes_N in (*by_phase.items(), *self.halo):
                    of_rank[phase] = of_rank.get(phase, np.zeros(1)) + bytes_N * num_rows
            of_rank[""] = sum(of_rank.values(), np.zeros(1))
            for phase, bytes_N in of_rank.items():
                totals[phase] = max(totals.get(phase, 0.0), float(bytes_N.max()))
        return totals

    def predicted_exposed_s(self, num_rows: int) -> float:
        """Seconds that attention's exchanges do not hide, of the pipeline rank with most, for `num_rows` rows."""
        cost_of = [(self.moba if isinstance(spec, MoBA) else self.full).cost for spec in self.specs]
        stages = (layers_of_pipeline_rank(len(cost_of), self.pp, pp_rank) for pp_rank in range(self.pp))
        return num_rows * max(sum(cost_of[layer].exposed_s for layer in layers) for layers in stages)


def transport_plan(
    model: ModelConfig,
    stage: StageConfig,
    parallel: ParallelConfig,
    engine: EngineConfig,
    hardware: Hardware,
    *,
    documents: Sequence[tuple[int, ...]] = (),
) -> TransportPlan | None:
    """The plan of a stage; None where cp is 1 and nothing moves.

    Args:
        documents: cumulative document lengths of typical rows; () = every row is one document.
    Raises ConfigError for a transport that cannot serve.
    """
    if parallel.cp == 1:
        return None
    raise_all(list(transport_errors(model, parallel)))
    heads = HeadShape(
        model.num_heads // parallel.tp,
        model.num_kv_heads // parallel.tp,
        model.head_dim,
        model.head_dim,
        2 if engine.precision == "bf16" else 4,
    )
    rows = [
        RowShape(bounds[-1], parallel.cp, parallel.layout, tuple(bounds))
        for bounds in documents or ((0, stage.seq_len),)
    ]
    node_ranks = max(1, hardware.node_ranks // parallel.tp)
    forwards = 2 if engine.recompute == "full" else 1
    specs = attention_plan(model, stage)
    moba = MoBA(stage.chunk_size, stage.topk, stage.select)
    full_name = parallel.transport if parallel.transport_full == "inherit" else parallel.transport_full

    def kind_plan(kind: Kind, spec: AttentionSpec, wanted: str) -> KindPlan:
        count = sum(type(layer) is type(spec) for layer in specs)
        if wanted != "auto":
            cost = transport_cost(wanted, spec, heads, rows, hardware, node_ranks=node_ranks, forwards=forwards)
            return KindPlan(kind, count, cost)
        choice = choose_transport(spec, heads, rows, hardware, node_ranks=node_ranks, forwards=forwards)
        others = tuple(cost for cost in choice.costs if cost is not choice.cost)
        return KindPlan(kind, count, choice.cost, others, choice.refused)

    halos = halo_exchanges(max(0, model.key_conv - 1), heads, rows[0])
    return TransportPlan(
        specs=specs,
        moba=kind_plan("moba", moba, parallel.transport),
        full=kind_plan("full", Full(), full_name),
        halo=tuple((halo.phase, halo.sent_N * (forwards if halo.forward else 1)) for halo in halos),
        hardware=hardware,
        node_ranks=node_ranks,
        pp=parallel.pp,
    )


def format_bytes(size: float) -> str:
    """1.23 GB, 45.6 MB, 789 KB, 16 B (powers of 1000)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.3g} B"


def format_seconds(seconds: float) -> str:
    """1.23 s, 45.6 ms, 0.789 ms."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


__all__ = ["KindPlan", "TransportPlan", "format_bytes", "format_seconds", "transport_plan"]
