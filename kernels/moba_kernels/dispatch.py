"""Which backend serves a call, and why not. A backend refuses with every reason; nothing falls back silently.

To add a backend: write pool/NAME.py, route/NAME.py and attend/NAME.py (or reuse a part of another backend), and give it
an entry in `BACKENDS`, with a `refuse` that lists what it cannot serve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from torch import Tensor

from .attend import reference as attend_reference
from .attend import torch as attend_torch
from .attend.call import AttendCall
from .errors import BackendError, bad_argument
from .pack import Pack
from .pool import reference as pool_reference
from .pool import torch as pool_torch
from .report import PairTally, Partial
from .route import reference as route_reference
from .route import torch as route_torch
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
        self, q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, call: AttendCall, tally: PairTally | None
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
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def serves_everything(q: Tensor) -> tuple[str, ...]:
    """No reason to refuse."""
    return ()


@dataclass(frozen=True)
class Backend:
    """One way to run the operator. `refuse(q)` lists the reasons why it cannot serve queries like q."""

    name: str
    pool_sums: PoolSums
    route_means: RouteMeans
    attend_partial: AttendForward
    attend_partial_backward: AttendBackward
    refuse: Callable[[Tensor], tuple[str, ...]] = serves_everything


BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        "reference": Backend(
            "reference",
            pool_reference.pool_sums,
            route_reference.route_means,
            attend_reference.attend_partial,
            attend_reference.attend_partial_backward,
        ),
        "torch": Backend(
            "torch",
            pool_torch.pool_sums,
            route_torch.route_means,
            attend_torch.attend_partial,
            attend_torch.attend_partial_backward,
        ),
    }
)

# Names of the public vocabulary that this build does not serve.
UNBUILT = ("triton", "flash")


def resolve(name: str, q: Tensor) -> Backend:
    """The backend that `name` means for queries like q ("auto" = "torch").

    Raises ValueError for an unknown name and BackendError, with every reason, for one that cannot serve the call.
    """
    if name in UNBUILT:
        reasons = [f"backend {name!r} is not part of this build"]
        if q.device.type != "cuda":
            reasons.append(f"it needs CUDA tensors, q lies on {q.device}")
        raise BackendError(name, reasons)
    backend = BACKENDS.get("torch" if name == "auto" else name)
    if backend is None:
        allowed = ", ".join(repr(known) for known in ("auto", *BACKENDS, *UNBUILT))
        raise bad_argument(f"unknown backend; allowed: {allowed}", repr(name), "pass backend='auto'")
    reasons = list(backend.refuse(q))
    if reasons:
        raise BackendError(backend.name, reasons)
    return backend
