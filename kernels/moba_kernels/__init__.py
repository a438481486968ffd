"""moba_kernels: causal attention over packed rows, full or MoBA (arXiv 2502.13189), and its partial forms.

Depends on torch and numpy only. `attend` is the operator; `pool_sums`, `route_means`, `attend_partial`,
`attend_partial_backward` and `merge_partials` are what context parallelism is made of.
"""

from .errors import BackendError
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
from .spec import AttentionSpec, Full, MoBA

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
    "mean_keys",
    "merge_partials",
    "moba_attn_varlen",
    "pool_sums",
    "random_routing",
    "route",
    "route_means",
]
