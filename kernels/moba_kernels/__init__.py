"""moba_kernels: causal attention over packed rows, full or MoBA (arXiv 2502.13189), and its partial forms.

Depends on torch and numpy only. `attend` is the operator; `pool_sums`, `route_means`, `attend_partial`,
`attend_partial_backward` and `merge_partials` are what context parallelism is made of; `key_conv` convolves keys.

The specs are at hand at once; everything else is imported on first use (PEP 562), so that a program which only reasons
about plans (`moba-train plan`) does not wait for torch.
"""

import sys
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING

from .errors import BackendError
from .spec import AttentionSpec, Full, MoBA

if TYPE_CHECKING:
    from .key_conv import key_conv
    from .merge import merge_partials
    from .ops import (
        attend,
        attend_partial,
        attend_partial_backward,
        mean_keys,
        moba_attn_varlen,
        pool_sums,
        route,
        route_means,
    )
    from .pack import ChunkGeometry, ChunkTensors, Pack
    from .report import AttendResult, ExecutionReport, PairTally, Partial
    from .routing import Routing, random_routing

_HOME = MappingProxyType(
    {
        "AttendResult": "report",
        "ChunkGeometry": "pack",
        "ChunkTensors": "pack",
        "ExecutionReport": "report",
        "Pack": "pack",
        "PairTally": "report",
        "Partial": "report",
        "Routing": "routing",
        "attend": "ops",
        "attend_partial": "ops",
        "attend_partial_backward": "ops",
        "key_conv": "key_conv",
        "mean_keys": "ops",
        "merge_partials": "merge",
        "moba_attn_varlen": "ops",
        "pool_sums": "ops",
        "random_routing": "routing",
        "route": "ops",
        "route_means": "ops",
    }
)


class _LazyPackage(ModuleType):
    """The package: loads a public name when it is first asked for."""

    def __getattr__(self, name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{self.__name__}.{_HOME[name]}"), name)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # Python binds a subpackage to its parent when it is imported; `attend` and `route` are functions here, and
        # the folders of that name must not take their place.
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_HOME})


sys.modules[__name__].__class__ = _LazyPackage

__all__ = [
    "AttendResult",
    "AttentionSpec",
    "BackendError",
    "ChunkGeometry",
    "ChunkTensors",
    "ExecutionReport",
    "Full",
    "MoBA",
    "Pack",
    "PairTally",
    "Partial",
    "Routing",
    "attend",
    "attend_partial",
    "attend_partial_backward",
    "key_conv",
    "mean_keys",
    "merge_partials",
    "moba_attn_varlen",
    "pool_sums",
    "random_routing",
    "route",
    "route_means",
]
