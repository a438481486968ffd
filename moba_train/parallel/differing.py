"""Where ranks say different things, who says what, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

_MOST_DETAIL = 200
"""Characters of a value that a message shows."""
_MOST_RANKS = 8


def tell_differing(names: Sequence[str] | Mapping[str, str], values: Sequence[Mapping[str, str]]) -> str:
    """The facts `names` in which ranks differ ("step: 41 on rank 2, 42 on the others; ..."), "" = none.

    values: what each rank says, by rank.
    """
    everyone = range(len(values))
    return "; ".join(tell(name, everyone, values) for name in names if len({facts[name] for facts in values}) > 1)


def tell(name: str, ranks: Sequence[int], values: Sequence[Mapping[str, str]]) -> str:
    """ "step: 41 on rank 2, 42 on the others", of some ranks."""
    counted = Counter(values[rank][name] for rank in ranks)
    usual = counted.most_common(1)[0][0]
    pairs = enumerate(zip(min(counted), max(counted), strict=False))
    common = next((i for i, (a, b) in pairs if a != b), len(min(counted)))  # characters that all values begin with
    parts = []
    for value in sorted(counted, key=lambda value: value == usual):
        who = [rank for rank in ranks if values[rank][name] == value]
        on = name_ranks(who) if value != usual or len(who) == 1 else "the others"
        parts.append(f"{_excerpt(value, common)} on {on}")
    return f"{name}: {', '.join(parts)}"


def name_ranks(ranks: Sequence[int]) -> str:
    """ "rank 2, 5"; of many ranks the first ones."""
    more = " and more" if len(ranks) > _MOST_RANKS else ""
    return f"rank {', '.join(map(str, ranks[:_MOST_RANKS]))}{more}"


def _excerpt(value: str, common: int) -> str:
    """What fits a message of a value that is the same as another for `common` characters: the part ("; " between
    parts) in which they begin to differ."""
    start = value.rfind("; ", 0, common) + 2 if "; " in value[:common] else 0
    if common - start < _MOST_DETAIL // 2:
        shown = value[start : start + _MOST_DETAIL]
    else:
        shown = f"{value[start : start + 30]} ... {value[common - 30 : common + _MOST_DETAIL // 2]}"
    return shown + (" ..." if not value.endswith(shown[-10:]) else "")


__all__ = ["name_ranks", "tell", "tell_differing"]
