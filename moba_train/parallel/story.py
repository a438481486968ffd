"""What the ranks of a job that ends said of themselves, as one message that fits a screen (sentry.py collects it)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_MOST_TOLD = 4
"""Ranks of a kind that a message names; of a thousand that waited, a few say it all."""


@dataclass(frozen=True)
class Line:
    """What a rank says: "broke off", "hung", "failed", "waits" or "busy", and the rest of the sentence."""

    kind: str
    text: str


def story(
    rank: int, world_size: int, own: Line, lines: Mapping[int, Line], answer_s: float, unreachable: str = ""
) -> str:
    """The message of one rank: itself, then who is gone, who failed, who was elsewhere, who waited.

    Args:
        own: what this rank has to say.
        lines: what ranks left on the board.
        unreachable: why the board could not be read.
    """
    what = "the watchdog ends the run" if own.kind == "hung" else "ranks lost each other"
    told = [f"{what}; rank {rank} of {world_size} {own.kind}: {own.text}"]
    if unreachable:
        told.append(
            f"  unknown: which rank is to blame; the job's key-value store is out of reach ({unreachable}), and so may "
            "be the process that keeps it: the launcher, or rank 0"
        )
    else:
        gone = [r for r in range(world_size) if r != rank and r not in lines]
        told += _some(gone, f"gone: it has not answered for {answer_s:.0f} s, so its process has died or hangs")
    for kind in ("failed", "busy", "hung", "broke off", "waits"):
        of_kind = [r for r in sorted(lines) if lines[r].kind == kind and r != rank]
        told += [f"  rank {r}: {_PHRASE[kind]} {lines[r].text}" for r in of_kind[:_MOST_TOLD]]
        if len(of_kind) > _MOST_TOLD:
            told.append(f"  and {len(of_kind) - _MOST_TOLD} more ranks likewise")
    told.append("  fix: read the log of a rank that is gone, failed or was elsewhere, then resume with --resume auto")
    return "\n".join(told)


_PHRASE = {
    "failed": "failed by itself:",
    "busy": "alive, but in no exchange of attention; it was in",
    "hung": "over a limit of the watchdog too:",
    "broke off": "broke off too:",
    "waits": "waited in",
}


def _some(ranks: list[int], what: str) -> list[str]:
    if not ranks:
        return []
    names = ", ".join(str(r) for r in ranks[: 4 * _MOST_TOLD])
    more = f" and {len(ranks) - 4 * _MOST_TOLD} more" if len(ranks) > 4 * _MOST_TOLD else ""
    return [f"  rank {names}{more}: {what}"]


__all__ = ["Line", "story"]
