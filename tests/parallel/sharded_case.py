"""What the tests of all transports share: rows, the check that attention over a sharded row equals one rank's, and eyes
on what a transport does in turn and reads from the device.

Routing exactly; output and gradients by the 2x rule: the error against a one-rank fp64 reference, with the routing
replayed, is at most twice the error of one rank in the same precision (plus a floor far below what such an error looks
like when something is wrong).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moba_kernels import AttentionSpec, Full, MoBA, Pack, Routing, attend
from moba_train.parallel import context_attend
from moba_train.parallel.shard import Layout, shard
from moba_train.parallel.wire import Group, Pending, Wire

LAYOUTS: tuple[Layout, ...] = ("zigzag", "contiguous")


@dataclass(frozen=True)
class Case:
    """One row. Heads: H query heads on K key/value heads of dim D, values of dim Dv."""

    name: str
    cu_seqlens: tuple[int, ...]
    spec: AttentionSpec
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (8, 8)


PACKED = (0, 0, 7, 7, 8, 40, 61, 61)
CASES = (
    Case("one document, chunks that fit the shards", (0, 64), MoBA(8, 3)),
    Case("packed, empty and one-token documents, chunks across shard edges", PACKED, MoBA(6, 2)),
    Case("own chunk only", PACKED, MoBA(5, 1), heads=(2, 2)),
    Case("group selection on one KV head, values of another dim", PACKED, MoBA(4, 3, "group"), (4, 1), (8, 6)),
    Case("chunks longer than shards", (0, 50, 61), MoBA(32, 2), heads=(2, 2)),
    Case("topk beyond the chunks there are", PACKED, MoBA(8, 9)),
    Case("full attention, packed", PACKED, Full(), dims=(8, 5)),
    Case("fewer tokens than ranks", (0, 1, 3), MoBA(2, 2)),
    Case("one token", (0, 1), Full()),
    Case("no token", (0, 0), MoBA(2, 2)),
)


def inputs_of(case: Case, *, integers: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of out, fp32."""
    generator = torch.Generator().manual_seed(len(case.name))
    num_tokens, (num_heads, num_kv_heads), (dim, value_dim) = case.cu_seqlens[-1], case.heads, case.dims
    shapes = ((num_heads, dim), (num_kv_heads, dim), (num_kv_heads, value_dim), (num_heads, value_dim))
    if integers:
        q, k, v, dout = (torch.randint(-2, 3, (num_tokens, *s), generator=generator).float() for s in shapes)
    else:
        q, k, v, dout = (torch.randn(num_tokens, *s, generator=generator) for s in shapes)
    return q, k, v, dout


def one_rank(
    case: Case, inputs: tuple[Tensor, ...], routing: Routing | None, dtype: torch.dtype, backend: str
) -> tuple[list[Tensor], Routing | None]:
    q, k, v, dout = (x.to(dtype) for x in inputs)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    q, k, v = leaves
    pack = Pack(case.cu_seqlens)
    result = attend(q, k, v, case.spec, cu_seqlens=pack, routing=routing, backend=backend, return_routing=True)
    grads = torch.autograd.grad(result.out, leaves, dout)
    return [result.out.detach(), result.lse, *grads], result.routing


def my_shard(x: Tensor, rank: int, n: int, layout: Layout) -> Tensor:
    return shard(x, 0, num_ranks=n, rank=rank, layout=layout)


def sharded(
    case: Case,
    inputs: tuple[Tensor, ...],
    group: Group,
    layout: Layout,
    dtype: torch.dtype,
    *,
    transport: str = "auto",
    node_ranks: int = 8,
) -> tuple[list[Tensor], Routing | None]:
    q, k, v, dout = (my_shard(x.to(dtype), group.rank(), group.size(), layout) for x in inputs)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    q, k, v = leaves
    result = context_attend(
        q,
        k,
        v,
        case.spec,
        layout=layout,
        group=group,
        transport=transport,
        cu_seqlens=Pack(case.cu_seqlens),
        node_ranks=node_ranks,
    )
    pairs = torch.tensor([result.report.planned_pairs, result.report.computed_pairs])
    planned, computed = Wire(group).all_reduce(pairs, phase="pairs of all ranks").wait().tolist()
    assert planned == computed, (case.name, transport)
    grads = torch.autograd.grad(result.out, leaves, dout)
    return [result.out.detach(), result.lse, *grads], result.routing


def error_of(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max()) if got.numel() else 0.0


def check_case(
    case: Case,
    group: Group,
    layout: Layout,
    dtype: torch.dtype,
    floor: float,
    *,
    transport: str = "auto",
    node_ranks: int = 8,
) -> None:
    """Fails unless routing, out, lse, dq, dk and dv of this rank's shard are those of one rank. Collective."""
    rank, n = group.rank(), group.size()
    inputs = tuple(x.to(dtype).float() for x in inputs_of(case))
    plain, routing = one_rank(case, inputs, None, dtype, "torch")
    exact, _ = one_rank(case, inputs, routing, torch.float64, "reference")
    mine, my_routing = sharded(case, inputs, group, layout, dtype, transport=transport, node_ranks=node_ranks)
    where = f"{case.name}, {layout}, {transport}, rank {rank} of {n}"
    if isinstance(case.spec, MoBA):
        assert routing is not None and my_routing is not None
        assert torch.equal(my_routing.chunk_ids, my_shard(routing.chunk_ids, rank, n, layout)), where
    else:
        assert my_routing is None
    for name, got, one, truth in zip(("out", "lse", "dq", "dk", "dv"), mine, plain, exact, strict=True):
        assert got.dtype == one.dtype, (where, name)
        limit = 2 * error_of(one, truth) + floor
        assert error_of(got, my_shard(truth, rank, n, layout)) <= limit, (where, name)


class NoHostRead(TorchDispatchMode):
    """Refuses operations that make the host wait for a GPU: for a value, or for the size of a result."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        refused = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "bincount", "unique", "equal"}
        assert name not in refused, name
        indices = args[1] if name in {"index", "index_put", "index_put_"} else ()
        assert all(x is None or x.dtype != torch.bool for x in indices), name
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class LoggingWire(Wire):
    """Notes when exchanges start and are waited for, in the log of this rank."""

    logs: tuple[list[str], ...] = ()

    def all_gather(self, sent: Tensor, *, phase: str) -> Pending:
        return self._noted(super().all_gather(sent, phase=phase))

    def reduce_scatter(self, sent: Tensor, *, phase: str) -> Pending:
        return self._noted(super().reduce_scatter(sent, phase=phase))

    def all_to_all(
        self, sent: Tensor, sent_rows: Sequence[int], received_rows: Sequence[int], *, phase: str
    ) -> Pending:
        return self._noted(super().all_to_all(sent, sent_rows, received_rows, phase=phase))

    def _noted(self, pending: Pending) -> Pending:
        log = self.logs[self.group.rank()]
        log.append(f"start {pending.phase}")

        def finish() -> Tensor:
            log.append(f"wait {pending.phase}")
            return pending.finish()

        return replace(pending, finish=finish)
