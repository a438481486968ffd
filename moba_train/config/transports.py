"""Rules of `parallel.transport` and `parallel.hardware`, checked before anything starts.

They say what `moba_train.parallel.rules.refusals` says of a call, in the words of the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from moba_train.config.schema import ModelConfig, ParallelConfig
from moba_train.errors import ConfigError


def transport_errors(model: ModelConfig, parallel: ParallelConfig) -> Iterator[ConfigError]:
    """Every broken rule: transports that could serve no call, and impossible numbers of the cost model."""
    hardware = parallel.hardware
    for field in fields(hardware):
        value = getattr(hardware, field.name)
        may_be_zero = field.name.endswith("_us")
        if not isinstance(value, str) and not (value > 0 or (may_be_zero and value == 0)):
            yield ConfigError(
                f"{field.name} must be {'zero or more' if may_be_zero else 'positive'}",
                where=f"parallel.hardware.{field.name}",
                got=value,
                allowed=">= 0" if may_be_zero else "> 0",
                fix='write a number in this range, or "preset"',
            )
    if min(parallel.cp, parallel.tp) < 1 or parallel.cp == 1:
        return  # reported elsewhere, or nothing is moved
    full = parallel.transport if parallel.transport_full == "inherit" else parallel.transport_full
    if full == "route_queries":
        yield ConfigError(
            "route_queries cannot serve full attention, which picks no chunk to send a query to",
            where="parallel.transport_full",
            got='"inherit" with parallel.transport = "route_queries"',
            allowed='"auto", "all_gather", "a2a", "a2a+all_gather", "pull"',
            fix='set parallel.transport_full = "auto"',
        )
    heads, kv_heads = model.num_heads // parallel.tp, model.num_kv_heads // parallel.tp
    divide = heads % parallel.cp == 0 and kv_heads > 0 and (kv_heads % parallel.cp == 0 or parallel.cp % kv_heads == 0)
    for name, transport in (("transport", parallel.transport), ("transport_full", parallel.transport_full)):
        if transport == "a2a" and not divide:
            yield ConfigError(
                "a2a gives every context-parallel rank the same number of heads, and they do not divide",
                where=f"parallel.{name}",
                got=f"{heads} query and {kv_heads} KV heads (per tensor-parallel rank) for cp {parallel.cp}",
                allowed="query heads a multiple of cp; KV heads a multiple of cp, or cp a multiple of them",
                fix='set it to "auto" or "a2a+all_gather", or lower parallel.cp',
            )


__all__ = ["transport_errors"]
