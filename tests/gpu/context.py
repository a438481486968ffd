"""Attention over a row that several ranks share equals one rank's, on one device: every transport, gloo and NCCL.

Gloo ranks that share a GPU exchange through host memory (`moba_train.parallel.collectives`). NCCL refuses a GPU twice
in one host, so each of its ranks says that it is a host of its own: they exchange over sockets, by the calls, streams
and kernels of a cluster. Needs torch, triton and numpy, and of moba_train only what context attention needs.

Letters: T tokens of the row, S of a shard, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from moba_bench.parity import DTYPES, make_inputs
from moba_bench.shapes import Shape
from torch import Tensor

from moba_kernels import AttendResult, AttentionSpec, Full, MoBA, Routing, attend, route
from moba_train.parallel import context_attend, route_context
from moba_train.parallel.all_gather import AllGather
from moba_train.parallel.context_attention import TRANSPORTS, attend_shard
from moba_train.parallel.rules import refusals
from moba_train.parallel.shard import Layout, shard, shard_positions
from moba_train.parallel.traffic import Traffic, Waits
from moba_train.parallel.transport import ShardedCall, row_cut
from moba_train.parallel.wire import Wire
from tests.distributed import run_ranks

LAYOUTS: tuple[Layout, ...] = ("zigzag", "contiguous")
FLOOR = {"fp32": 1e-5, "bf16": 4e-3, "fp16": 1e-3}
"""Far below what an error looks like when something is wrong: outputs and gradients are of the order of 1."""
NAMES = ("out", "lse", "dq", "dk", "dv")


def check_context(
    shape: Shape, device: str, backend: str, num_ranks: int, spec: Full | None = None, exchange: str = "gloo"
) -> str:
    """Routing on small integers is one rank's, ties included; with one rank's routing forced, out, lse, dq, dk and dv
    err at most twice as much as one rank does, in every transport and layout. Returns a line for the log."""
    found = _one_rank(shape, device, backend, spec)
    worst = run_ranks(
        _one_of_the_ranks, num_ranks, shape, device, backend, spec, exchange, *found, method=_method(device)
    )
    error, transports = max(x for x, _ in worst), worst[0][1]
    return f"{num_ranks} {exchange} ranks on one {device}, {transports} transports: error {error:.2f}x one rank's"


def _method(device: str) -> str:
    return "spawn" if device == "cuda" else "forkserver"


def _group_of_all(rank: int, n: int, exchange: str) -> dist.ProcessGroup:
    """All ranks, over gloo or NCCL."""
    if exchange == "nccl":
        os.environ.update(NCCL_HOSTID=f"rank {rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
    group = dist.new_group(list(range(n)), backend=exchange)
    assert group is not None
    return group


def check_nccl(shape: Shape, backend: str, device: str = "cuda") -> str:
    """Every transport over a group of one rank of its own: NCCL takes what it is given, in stream order, and gives what
    `attend` gives. The host waits for nothing but the sizes that pull and route_queries read behind an event, and what
    the stream waits for is timed."""
    return str(*run_ranks(_alone, 1, shape, backend, device, method=_method(device)))


def _alone(rank: int, n: int, shape: Shape, backend: str, device: str) -> str:
    group = _group_of_all(rank, n, "nccl" if device == "cuda" else "gloo")
    q, k, v, dout = make_inputs(shape, device)
    served, waits = 0, Waits(on_device=True)
    for spec in (shape.spec, Full()):
        whole = attend(q, k, v, spec, cu_seqlens=shape.pack, backend=backend, return_routing=True)
        alone = partial(attend, spec=spec, cu_seqlens=shape.pack, routing=whole.routing, backend=backend)
        want = _with_gradients(alone, (q, k, v), dout)
        cut = row_cut(shape.pack, 1, "contiguous")
        positions = torch.arange(shape.tokens, device=device)
        routing = whole.routing.select(positions) if whole.routing is not None else None
        wire = Wire(group, Traffic(waits=waits))
        call = ShardedCall(spec, shape.pack, cut, 0, wire, positions, routing, None, backend)  # type: ignore[arg-type]
        for name, transport in TRANSPORTS.items():
            if refusals(name, spec, num_heads=shape.heads, num_kv_heads=shape.kv_heads, num_ranks=1):
                continue
            got = _with_gradients(partial(attend_shard, call=call, transport=transport), (q, k, v), dout)
            for part, x, one in zip(NAMES, got, want, strict=True):
                error = _gap(x, one) / max(1e-30, float(one.abs().max()))
                assert error <= 2e-2, f"{name}, {part}: relative error {error:.3g}, allowed 0.02"
            if device == "cuda":
                _check_host_runs_ahead(partial(attend_shard, call=call, transport=transport), (q, k, v), dout)
            served += 1
    if device == "cuda":
        assert waits.events and 0.0 <= waits.seconds() < 60.0, f"{len(waits.events)} waits, {waits.seconds()} s"
    return f"{served} transports over a {dist.get_backend(group)} group of one rank"


def _check_host_runs_ahead(run: Callable[..., AttendResult], inputs: Sequence[Tensor], dout: Tensor) -> None:
    """Forward and backward of a row whose tables are there: PyTorch notices when the host waits for a number."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(run(*leaves).out, leaves, dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_overlap(shape: Shape, backend: str) -> str:
    """Two NCCL ranks gather one KV head after the other: NCCL's kernels have a stream of their own, and attention's run
    at the same time."""
    shares = run_ranks(_overlap, 2, shape, backend, method="spawn")
    assert min(shares) >= 0.3, f"a kernel of NCCL's is under way in {min(shares):.0%} of the time of the others"
    return f"a kernel of NCCL's is under way in {min(shares):.0%} of the time of the others"


def _overlap(rank: int, n: int, shape: Shape, backend: str) -> float:
    """Share of the time of this rank's other kernels in which an NCCL kernel runs, on another stream."""
    group = _group_of_all(rank, n, "nccl")
    cut = row_cut(shape.pack, n, "zigzag")
    positions = torch.from_numpy(shard_positions(shape.tokens, n, rank, "zigzag")).cuda()
    inputs = [shard(x, 0, num_ranks=n, rank=rank, layout="zigzag").cuda() for x in make_inputs(shape, "cpu")]
    leaves, dout = [x.requires_grad_() for x in inputs[:3]], inputs[3]
    routing = route_context(*leaves[:2], shape.spec, layout="zigzag", group=group, pack=shape.pack, backend=backend)
    call = ShardedCall(shape.spec, shape.pack, cut, rank, Wire(group), positions, routing, None, backend)  # type: ignore[arg-type]

    def once() -> None:
        out = attend_shard(*leaves, call=call, transport=AllGather(stride_bytes=1)).out
        torch.autograd.grad(out, leaves, dout)
        torch.cuda.synchronize()

    once()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        once()
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    streams: dict[bool, set[int]] = {True: set(), False: set()}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            is_nccl = "nccl" in event.name.lower()
            spans[is_nccl].append((event.time_range.start, event.time_range.end))
            streams[is_nccl].add(event.device_resource_id)
    assert spans[True] and not streams[True] & streams[False], f"NCCL's kernels run on {streams[True]}, others too"
    shared = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in spans[True] for b in spans[False])
    return shared / sum(stop - start for start, stop in spans[False])


def _with_gradients(run: Callable[..., AttendResult], inputs: Sequence[Tensor], dout: Tensor) -> list[Tensor]:
    """NAMES, in fp64 on the CPU."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    result = run(*leaves)
    grads = torch.autograd.grad(result.out, leaves, dout)
    return [x.detach().double().cpu() for x in (result.out, result.lse, *grads)]


def _one_rank(
    shape: Shape, device: str, backend: str, full: Full | None
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Chunk ids, and what one rank gives on the device and in fp64 on the CPU: NAMES."""
    inputs = make_inputs(shape, "cpu")
    spec: AttentionSpec = full or shape.spec
    ids = None
    if isinstance(spec, MoBA):
        ids = route(inputs[0], inputs[1], spec, cu_seqlens=shape.pack, backend="reference").chunk_ids
    found = []
    for where, how, dtype in ((device, backend, inputs[0].dtype), ("cpu", "reference", torch.float64)):
        *there, dout = (x.to(where, dtype) for x in inputs)
        routing = None if ids is None else Routing.from_chunk_ids(ids.to(where), shape.spec, shape.pack)
        run = partial(attend, spec=spec, cu_seqlens=shape.pack, routing=routing, backend=how)
        found.append(_with_gradients(run, there, dout))
    return ids, found[0], found[1]


def _one_of_the_ranks(
    rank: int,
    n: int,
    shape: Shape,
    device: str,
    backend: str,
    full: Full | None,
    exchange: str,
    ids: Tensor | None,
    one: list[Tensor],
    exact: list[Tensor],
) -> tuple[float, int]:
    """(worst error as a multiple of one rank's, transports that serve)."""
    group = _group_of_all(rank, n, exchange)
    spec: AttentionSpec = full or shape.spec
    options = {"num_heads": shape.heads, "num_kv_heads": shape.kv_heads, "num_ranks": n}
    transports = [name for name in TRANSPORTS if not refusals(name, spec, **options)]
    worst = 0.0
    for layout in LAYOUTS:
        cut = {"num_ranks": n, "rank": rank, "layout": layout}
        if isinstance(spec, MoBA):
            _check_routing(shape, device, backend, group, cut)
        inputs = [shard(x, 0, **cut).to(device) for x in make_inputs(shape, "cpu")]
        positions_S = torch.from_numpy(shard_positions(shape.tokens, n, rank, layout))
        routing = None
        if ids is not None:
            mine = ids[positions_S].to(device)
            routing = Routing.from_chunk_ids(mine, shape.spec, shape.pack, positions_S.to(device))
        for transport in transports:
            options = {"layout": layout, "group": group, "transport": transport, "cu_seqlens": shape.pack}
            options |= {"routing": routing, "backend": backend, "node_ranks": 2}
            got = _with_gradients(partial(context_attend, spec=spec, **options), inputs[:3], inputs[3])
            for name, x, usual, truth in zip(NAMES, got, one, exact, strict=True):
                error, peer = _gap(x, shard(truth, 0, **cut)), _gap(usual, truth) + FLOOR[shape.dtype] / 2
                assert error <= 2 * peer, f"{transport}, {layout}, {name}: error {error:.3g}, one rank's is {peer:.3g}"
                worst = max(worst, error / peer)
    return worst, len(transports)


def _check_routing(shape: Shape, device: str, backend: str, group: dist.ProcessGroup, cut: dict[str, object]) -> None:
    """On small integers, where arithmetic is exact."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((shape.tokens, heads, shape.dim) for heads in (shape.heads, shape.kv_heads))
    q, k = (torch.randint(-1, 2, size, generator=generator).to(DTYPES[shape.dtype]) for size in sizes)
    want = shard(route(q, k, shape.spec, cu_seqlens=shape.pack, backend="reference").chunk_ids, 0, **cut)
    q_S, k_S = (shard(x, 0, **cut).to(device) for x in (q, k))
    options = {"layout": cut["layout"], "group": group, "pack": shape.pack, "backend": backend}
    got = route_context(q_S, k_S, shape.spec, **options).chunk_ids.cpu()
    wrong = int((got != want).any(-1).sum())
    assert wrong == 0, f"routing over shards: {wrong} rows differ on small integers"


def _gap(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).abs().max()) if exact.numel() else 0.0
