"""Which backend serves a call, and why not. A backend refuses with every reason; nothing falls back silently.

A backend is loaded when it is first asked for: importing the operator imports neither triton nor flash-attn. To add
one, write pool/NAME.py, route/NAME.py and attend/NAME.py (or reuse a part of another backend), and give it a loader in
`LOADERS`, with a `refuse` that lists what it cannot serve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from .attend.call import AttendCall
from .errors import BackendError, bad_argument
from .pack import Pack
from .ranges import row_dot
from .report import PairTally, Partial
from .routing import Routing
from .spec import MoBA


class PoolSums(Protocol):
    def __call__(
        self, k_SKD: Tensor, *, pack: Pack, chunk_size: int, k_positions: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...


class RouteMeans(Protocol):
    def __call__(
        self, q_THD: Tensor, mean_CKD: Tensor, spec: MoBA, *, pack: Pack, q_positions: Tensor | None
    ) -> Routing: ...


class AttendForward(Protocol):
    def __call__(
        self, q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, call: AttendCall, tally: PairTally | None, /
    ) -> Partial: ...


class AttendBackward(Protocol):
    def __call__(
        self,
        dout_THD: Tensor,
        q_THD: Tensor,
        k_SKD: Tensor,
        v_SKD: Tensor,
        lse_TH: Tensor,
        delta_TH: Tensor,
        call: AttendCall,
        /,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class RowDot(Protocol):
    def __call__(self, a: Tensor, b: Tensor, dtype: torch.dtype, /) -> Tensor: ...


def serves_everything(*tensors: Tensor) -> tuple[str, ...]:
    """No reason to refuse."""
    return ()


@dataclass(frozen=True)
class Backend:
    """One way to run the operator. `refuse(*tensors)` lists why it cannot serve a call on these tensors."""

    name: str
    pool_sums: PoolSums
    route_means: RouteMeans
    attend_partial: AttendForward
    attend_partial_backward: AttendBackward
    refuse: Callable[..., tuple[str, ...]] = serves_everything
    row_dot: RowDot = row_dot
    """rowsum(a * b) of two [T,H,D] tensors: the delta of a backward pass."""


def _reference() -> Backend:
    from .attend import reference as attend
    from .pool import reference as pool
    from .route import reference as route

    return Backend(
        "reference", pool.pool_sums, route.route_means, attend.attend_partial, attend.attend_partial_backward
    )


def _torch() -> Backend:
    from .attend import torch as attend
    from .pool import torch as pool
    from .route import torch as route

    return Backend("torch", pool.pool_sums, route.route_means, attend.attend_partial, attend.attend_partial_backward)


def _triton() -> Backend:
    from .triton_support import refuse, require_triton

    require_triton()
    from .attend import triton as attend
    from .pool import triton as pool
    from .route import triton as route
    from .triton_row_dot import row_dot

    return Backend(
        "triton",
        pool.pool_sums,
        route.route_means,
        attend.attend_partial,
        attend.attend_partial_backward,
        refuse,
        row_dot,
    )


def _flash() -> Backend:
    from .attend import flash as attend
    from .pool import torch as pool
    from .route import torch as route

    return Backend(
        "flash", pool.pool_sums, route.route_means, attend.attend_partial, attend.attend_partial_backward, attend.refuse
    )


LOADERS: Mapping[str, Callable[[], Backend]] = MappingProxyType(
    {"reference": _reference, "torch": _torch, "triton": _triton, "flash": _flash}
)


def resolve(name: str, *tensors: Tensor) -> Backend:
    """The backend that `name` means for a call on these tensors.

    "auto" is "triton" for CUDA tensors that it serves, else "torch"; the report of a call names what ran. Raises
    ValueError for an unknown name and BackendError, with every reason, for a backend that cannot serve the call.
    """
    if name == "auto":
        return _automatic(tensors)
    if not isinstance(name, str) or name not in LOADERS:
        allowed = ", ".join(repr(known) for known in ("auto", *LOADERS))
        raise bad_argument(f"unknown backend; allowed: {allowed}", repr(name), "pass backend='auto'")
    backend = LOADERS[name]()
    reasons = list(backend.refuse(*tensors))
    if reasons:
        raise BackendError(backend.name, reasons)
    return backend


def _automatic(tensors: tuple[Tensor, ...]) -> Backend:
    if tensors[0].device.type == "cuda":
        try:
            return resolve("triton", *tensors)
        except BackendError:
            pass  # "auto" promises no particular backend
    return _torch()
