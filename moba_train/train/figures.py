"""Numbers of a run as its last lines and its report show them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

COMPONENTS: Final = (
    ("libraries", "Python, PyTorch, Megatron, before the model is built: measured"),
    ("weights", "counted"),
    ("gradients", "counted"),
    ("optimizer", "moments and master weights: counted"),
    ("data", "tokens, positions, rotations of a row: measured, growth up to the first layer"),
    ("kept", "what forward keeps for backward: measured, growth from the first layer to the loss"),
    ("attention", "one layer without its MLP: measured, peak less the value before"),
    ("mlp", "one MLP: measured, peak less the value before"),
    ("loss", "tiles of the loss: measured, peak less the value before"),
    ("reduce", "gradients over ranks: measured, peak less the value before"),
    ("step", "the optimizer's step: measured, peak less the value before"),
    ("peak", "the most that one rank held at once: measured"),
    ("peak_all_ranks", "the same, added up over all ranks"),
)
"""(name, how it was got), in the order of a step; the record has memory/<name>_gib. See `moba_train.engine.memory`."""


_ALL_RANKS: Final = "memory/peak_all_ranks_gib"


def take_memory(largest: dict[str, float], record: Mapping[str, Any]) -> None:
    """Raise the `largest` memory so far by that of a step: by key, of the steps on which all ranks were asked.

    Between those `memory/peak_gib` is that of rank 0 so far, and may be more than the last sum over all ranks. It
    counts until all ranks are asked for the first time.
    """
    if _ALL_RANKS in largest and _ALL_RANKS not in record:
        return
    if _ALL_RANKS in record and _ALL_RANKS not in largest:
        largest.clear()
    found = {key: float(value) for key, value in record.items() if key.startswith("memory/")}
    largest |= {key: max(value, largest.get(key, 0.0)) for key, value in found.items()}


def memory_rows(record: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """(component, GiB, how it was got) of a record, those that it has. Components do not add up to the peak: a step
    needs attention, mlp, loss, reduce and step one after the other."""
    keys = ((name, f"memory/{name}_gib", how) for name, how in COMPONENTS)
    return [(name.replace("_", " "), float(record[key]), how) for name, key, how in keys if key in record]


def time_per_token_us(tokens_per_s: Sequence[float]) -> float:
    """Microseconds per token, of all ranks together: the median step, of two the faster (a first step is slow)."""
    return 1e6 / sorted(tokens_per_s)[len(tokens_per_s) // 2]
