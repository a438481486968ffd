"""Which transports can serve a call: rules on integers, alike on all ranks; no torch.

Shape letters: H query heads, K key/value heads (both of one tensor-parallel rank), N context-parallel ranks, U ranks
that exchange heads with one another.
"""

from __future__ import annotations

from dataclasses import dataclass

from moba_kernels.spec import AttentionSpec, MoBA

TRANSPORT_NAMES = ("all_gather", "a2a", "a2a+all_gather", "pull", "route_queries")


@dataclass(frozen=True)
class LayerTransports:
    """The transport of each kind of layer."""

    moba: str = "auto"
    full: str = "auto"

    def of(self, spec: AttentionSpec) -> str:
        return self.moba if isinstance(spec, MoBA) else self.full


AUTO_TRANSPORTS = LayerTransports()


def heads_divide(num_heads: int, num_kv_heads: int, ranks: int) -> bool:
    """Can `ranks` ranks share the heads evenly? H % U == 0, and K % U == 0 or (KV heads copied) U % K == 0."""
    return num_heads % ranks == 0 and (num_kv_heads % ranks == 0 or ranks % num_kv_heads == 0)


def inner_ranks(num_heads: int, num_kv_heads: int, num_ranks: int, node_ranks: int) -> int:
    """U of "a2a+all_gather": as many ranks of a node as divide N and the heads; 1 = only the all-gather is left."""
    fitting = [
        ranks
        for ranks in range(1, min(num_ranks, node_ranks) + 1)
        if num_ranks % ranks == 0 and heads_divide(num_heads, num_kv_heads, ranks)
    ]
    return max(fitting)


def refusals(
    transport: str, spec: AttentionSpec, *, num_heads: int, num_kv_heads: int, num_ranks: int
) -> tuple[str, ...]:
    """Why `transport` cannot serve; () = it can. ValueError for an unknown name."""
    if transport not in TRANSPORT_NAMES:
        allowed = ", ".join(repr(name) for name in ("auto", *TRANSPORT_NAMES))
        raise ValueError(f"unknown transport; got {transport!r}; allowed: {allowed}; fix: pass transport='auto'")
    reasons = []
    if transport == "a2a" and not heads_divide(num_heads, num_kv_heads, num_ranks):
        reasons.append(
            f"a2a gives every rank the same number of heads, and {num_heads} query heads with {num_kv_heads} KV heads "
            f"do not divide among {num_ranks} ranks"
        )
    if transport == "route_queries" and not isinstance(spec, MoBA):
        reasons.append("route_queries sends queries to the chunks that they picked; full attention picks none")
    return tuple(reasons)


__all__ = ["AUTO_TRANSPORTS", "TRANSPORT_NAMES", "LayerTransports", "heads_divide", "inner_ranks", "refusals"]
