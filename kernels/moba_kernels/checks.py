"""Argument checks. They read shapes, dtypes, devices and host integers only, never a device tensor's values.

Shape letters: T query tokens, S key tokens, H query heads, K key/value heads, D head dim, Dv value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import bad_argument
from .pack import Pack
from .routing import Routing
from .spec import AttentionSpec, Full, MoBA

LARGEST_SCALE = torch.finfo(torch.float32).max
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_spec(spec: AttentionSpec) -> None:
    if not isinstance(spec, Full | MoBA):
        raise bad_argument("spec must be Full() or MoBA(...)", repr(spec), "pass moba_kernels.Full() or MoBA(512, 4)")


def check_tensors(**named: object) -> None:
    """What goes by these names are tensors."""
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise bad_argument(f"{name} must be a tensor", type(x).__name__, f"pass a tensor for {name}")


def check_rows(name: str, x: Tensor) -> None:
    """x is a float tensor [tokens, heads, dim >= 1]."""
    if not isinstance(x, Tensor) or x.dim() != 3:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise bad_argument(f"{name} must be [tokens, heads, dim]", got, "drop the batch dim: one packed row")
    if x.dtype not in FLOATS:
        raise bad_argument(f"{name} must be a float tensor", x.dtype, "pass bf16, fp16, fp32 or fp64")
    if x.shape[2] < 1:
        raise bad_argument(f"{name}'s last dim must be at least 1", tuple(x.shape), "pass [tokens, heads, dim >= 1]")


def check_qkv(q: Tensor, k: Tensor, *values: Tensor) -> None:
    """q [T,H,D], k [S,K,D] and, if given, v [S,K,Dv]: dims, dtypes, devices and head counts agree."""
    for name, x in zip("qkv", (q, k, *values), strict=False):
        check_rows(name, x)
        if x.dtype != q.dtype:
            raise bad_argument(f"{name} must have q's dtype {q.dtype}", x.dtype, "cast q, k and v alike")
        check_device(name, x, q)
    if k.shape[2] != q.shape[2]:
        raise bad_argument(
            "k must have q's head dim", f"k {tuple(k.shape)}, q {tuple(q.shape)}", "make k.shape[2] == q.shape[2]"
        )
    for v in values:
        if v.shape[:2] != k.shape[:2]:
            got = f"v {tuple(v.shape)}, k {tuple(k.shape)}"
            raise bad_argument("v must have k's tokens and heads", got, "only the last dim of v may differ")
    check_heads(q.shape[1], k.shape[1])


def check_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise bad_argument(f"{name} must lie on q's device {q.device}", x.device, "move all tensors to one device")


def check_backward(dout: Tensor, lse: Tensor, delta: Tensor, q: Tensor, value_dim: int) -> None:
    """dout [T,H,Dv] of any float dtype; lse and delta [T,H], fp32 or fp64."""
    check_tensors(dout=dout, lse=lse, delta=delta)
    expected = (*q.shape[:2], value_dim)
    if dout.shape != expected or dout.dtype not in FLOATS:
        got = f"{dout.dtype} {tuple(dout.shape)}"
        raise bad_argument(f"dout must be a float tensor {expected}", got, "pass the gradient of the merged output")
    for name, x in (("lse", lse), ("delta", delta)):
        if x.shape != q.shape[:2] or x.dtype not in (torch.float32, torch.float64):
            got, fix = f"{x.dtype} {tuple(x.shape)}", "pass one number per query and head, in fp32"
            raise bad_argument(f"{name} must be fp32 {tuple(q.shape[:2])}", got, fix)
    for name, x in (("dout", dout), ("lse", lse), ("delta", delta)):
        check_device(name, x, q)


def check_scale(softmax_scale: float | None) -> None:
    if softmax_scale is None:
        return
    number = isinstance(softmax_scale, int | float) and not isinstance(softmax_scale, bool)
    if not number or not abs(softmax_scale) <= LARGEST_SCALE:  # NaN is not, either
        raise bad_argument(
            "softmax_scale must be a finite number of fp32", repr(softmax_scale), "pass None for 1/sqrt(D)"
        )


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        got = f"{num_heads} query heads, {num_kv_heads} KV heads"
        raise bad_argument("query heads must be a multiple of KV heads", got, "make H % K == 0")


def check_positions(name: str, positions: Tensor | None, num_rows: int, pack: Pack) -> None:
    """Shape and dtype; that positions ascend is checked where they already lie on the host."""
    if not isinstance(pack, Pack):
        raise bad_argument("pack must be a Pack", type(pack).__name__, "pass moba_kernels.Pack(cu_seqlens)")
    fix = f"pass {name}_positions: ascending global token indices, one a row of {name}; None = all tokens of the pack"
    if positions is None:
        if num_rows != pack.num_tokens:
            raise bad_argument(f"{name} must hold all {pack.num_tokens} tokens of the pack", num_rows, fix)
        return
    tensor = isinstance(positions, Tensor)
    if not tensor or positions.dtype != torch.int64 or positions.dim() != 1 or positions.numel() != num_rows:
        got = f"{positions.dtype} {tuple(positions.shape)}" if tensor else type(positions).__name__
        raise bad_argument(f"{name}_positions must be int64 [{num_rows}]", got, fix)
    if positions.device.type == "cpu" and num_rows:
        low, high = int(positions[0]), int(positions[-1])
        if low < 0 or high >= pack.num_tokens or bool((positions[1:] <= positions[:-1]).any()):
            raise bad_argument(f"{name}_positions must ascend within 0..{pack.num_tokens - 1}", positions, fix)


def check_routing(
    routing: Routing, spec: AttentionSpec, pack: Pack, q: Tensor, num_kv_heads: int, q_positions: Tensor | None
) -> None:
    """A routing that was handed in must have been made under this spec and pack, for these queries.

    Positions are compared where both lie on the host, and picks of unknown origin looked at there (`Routing`);
    elsewhere that would wait for the device.
    """
    if not isinstance(routing, Routing):
        fix = "wrap chunk ids in Routing.from_chunk_ids"
        raise bad_argument("routing must be a Routing", type(routing).__name__, fix)
    if not isinstance(spec, MoBA):
        raise bad_argument("routing goes with MoBA only", repr(spec), "leave routing=None under Full()")
    if routing.spec != spec:
        raise bad_argument(f"routing was made under {routing.spec}", f"spec {spec}", "route again under this spec")
    if routing.pack is not pack and routing.pack != pack:
        raise bad_argument(f"routing was made for {routing.pack}", pack, "route again for this row")
    expected = (q.shape[0], spec.routed_heads(q.shape[1], num_kv_heads))
    got = (routing.num_queries, routing.num_routed_heads)
    if got != expected:
        raise bad_argument(
            f"routing must cover {expected} (queries, heads)", got, "use Routing.select for a part of it"
        )
    if routing.stored.device != q.device:
        raise bad_argument(f"routing must lie on q's device {q.device}", routing.stored.device, "route on that device")
    if routing.stored.device.type == "cpu":
        routing.validate()
    made_for = routing.q_positions
    if made_for is None or made_for is q_positions or made_for.device.type != "cpu":
        return  # made for all tokens of the pack, and as many queries at hand, which ascend: these are the same
    asked = torch.arange(pack.num_tokens) if q_positions is None else q_positions
    if asked.device.type == "cpu" and not torch.equal(made_for, asked):
        raise bad_argument(
            "routing was made for other queries", "other q_positions", "use Routing.select for a part of it"
        )
