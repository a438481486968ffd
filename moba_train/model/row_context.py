"""What every layer needs to know about the row in hand, passed through Megatron's `packed_seq_params`.

Legend: S tokens of this rank's shard, T tokens of the row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moba_kernels import AttentionSpec, MoBA, Pack, Routing, random_routing
from moba_kernels.pack import device_copy
from moba_train.config.schema import RopeConfig
from moba_train.model.rope import RopeTable, rope_table
from moba_train.parallel.rules import AUTO_TRANSPORTS, LayerTransports
from moba_train.parallel.shard import Layout, shard_positions
from moba_train.parallel.traffic import Traffic
from moba_train.parallel.watch import Watch
from moba_train.quiet import quiet_imports

with quiet_imports():
    from megatron.core.packed_seq_params import PackedSeqParams


@dataclass(frozen=True)
class RandomPicks:
    """The control experiment: uniform picks, a pure function of (seed, layer, position, head), whatever the mesh."""

    seed: int
    tp_rank: int

    def routing(self, layer: int, spec: MoBA, query_SHD: Tensor, num_kv_heads: int, context: RowContext) -> Routing:
        """The routing of this rank's queries [S,H,D] in a global layer."""
        text = f"{self.seed}/{layer}".encode()
        num_heads = query_SHD.shape[1]
        return random_routing(
            spec,
            pack=context.pack,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            q_positions=context.positions_S,
            seed=int.from_bytes(hashlib.sha256(text).digest()[:7], "little"),
            head_offset=self.tp_rank * spec.routed_heads(num_heads, num_kv_heads),
            device=query_SHD.device,
        )


@dataclass
class RowContext(PackedSeqParams):
    """One row under one attention plan, as this rank sees it.

    Attributes:
        pack: documents of the whole row.
        plan: attention spec of every global layer.
        rope: rotations of this rank's tokens.
        held: int64 [S] on the host, their global token indices, ascending.
        positions_S: the same on the device.
        document_offset_S: int64 [S], tokens of the same document before each.
        layout, cp_group, backend: how the row is sharded and attention is executed.
        transports: of each kind of layer; node_ranks: context-parallel ranks that share a node.
        traffic: counts the bytes that this rank's layers exchange.
        watch: is told which exchange this rank waits for.
        random_picks: routes at random where it is given.
        keep_routing: keep each layer's picks in `routings`: activation recompute replays them, statistics read them.
        routings: global layer -> this rank's picks. A layer found here does not route again.
    """

    pack: Pack = field(default_factory=lambda: Pack([0]))
    plan: tuple[AttentionSpec, ...] = ()
    rope: RopeTable | None = None
    held: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    positions_S: Tensor | None = None
    document_offset_S: Tensor | None = None
    layout: Layout = "zigzag"
    transports: LayerTransports = AUTO_TRANSPORTS
    node_ranks: int = 1
    traffic: Traffic = field(default_factory=Traffic)
    backend: str = "auto"
    watch: Watch | None = None
    random_picks: RandomPicks | None = None
    keep_routing: bool = False
    routings: dict[int, Routing] = field(default_factory=dict)

    @property
    def num_local_tokens(self) -> int:
        """S: tokens of this rank's shard; may be 0. What layers hold beyond them is padding."""
        return len(self.held)


def document_offsets(positions: NDArray[np.int64], cu_seqlens: tuple[int, ...]) -> NDArray[np.int64]:
    """int64 [S]: how many tokens of its own document stand before each of the tokens at `positions` (any int64 [S])."""
    bounds = np.asarray(cu_seqlens, dtype=np.int64)
    return positions - bounds[np.searchsorted(bounds, positions, side="right") - 1]


def row_context(
    cu_seqlens: Sequence[int],
    plan: tuple[AttentionSpec, ...],
    rope: RopeConfig,
    *,
    head_dim: int,
    layout: Layout,
    cp_group: torch.distributed.ProcessGroup | None,
    device: torch.device,
    transports: LayerTransports = AUTO_TRANSPORTS,
    node_ranks: int = 1,
    traffic: Traffic | None = None,
    backend: str = "auto",
    watch: Watch | None = None,
    random_picks: RandomPicks | None = None,
    keep_routing: bool = False,
) -> RowContext:
    """Everything that the layers share about a row, computed once. cu_seqlens: of the whole row, alike on all ranks."""
    pack = Pack(cu_seqlens)
    num_ranks = 1 if cp_group is None else cp_group.size()
    rank = 0 if cp_group is None else cp_group.rank()
    positions = shard_positions(pack.num_tokens, num_ranks, rank, layout)
    offsets_S = device_copy(document_offsets(positions, pack.cu_seqlens), device)
    return RowContext(
        qkv_format="thd",
        cp_group=cp_group,
        pack=pack,
        plan=plan,
        rope=rope_table(rope, head_dim, offsets_S),
        held=positions,
        positions_S=device_copy(positions, device),
        document_offset_S=offsets_S,
        layout=layout,
        transports=transports,
        node_ranks=node_ranks,
        traffic=Traffic() if traffic is None else traffic,
        backend=backend,
        watch=watch,
        random_picks=random_picks,
        keep_routing=keep_routing,
    )


__all__ = ["RandomPicks", "RowContext", "document_offsets", "row_context"]
