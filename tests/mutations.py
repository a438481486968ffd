"""Small damage to a file, as hypothesis draws it: what disks, cut copies and attackers do to bytes.

@given(changes=mutations())
def test_...(changes):
    path.write_bytes(mutated(original, changes))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

EXTREMES = tuple(
    value.to_bytes(size, "little")
    for size in (1, 2, 4, 8)
    for value in (0, 1, (1 << 8 * size - 1) - 1, 1 << 8 * size - 1, (1 << 8 * size) - 1)
)
"""0, 1, the largest, the smallest and -1 of every width of a two's complement integer, little-endian."""


@dataclass(frozen=True)
class Mutation:
    """One change.

    Attributes:
        kind: "flip" a bit, "put" bytes over others, "insert" bytes, "cut" the rest off, "copy" a piece elsewhere.
        at: where, as a share of the file, 0 <= at < 1.
        source: where a copy is taken from, likewise.
        content: the bytes, or for "flip" and "copy" one byte: which bit, how many bytes.
    """

    kind: str
    at: float
    source: float
    content: bytes


def mutations() -> st.SearchStrategy[list[Mutation]]:
    """One to three changes."""
    share = st.floats(0, 1, exclude_max=True)
    some = st.sampled_from(EXTREMES) | st.binary(min_size=1, max_size=9)
    flip = st.builds(Mutation, st.just("flip"), share, share, st.binary(min_size=1, max_size=1))
    other = st.builds(Mutation, st.sampled_from(["put", "insert", "cut", "copy"]), share, share, some)
    return st.lists(flip | other, min_size=1, max_size=3)


def mutated(content: bytes, changes: Sequence[Mutation]) -> bytes:
    """`content` after the changes."""
    for change in changes:
        at, source = int(change.at * len(content)), int(change.source * len(content))
        piece = change.content
        if change.kind == "flip" and content:
            piece = bytes([content[at] ^ 1 << piece[0] % 8])
        elif change.kind == "copy":
            piece = content[source : source + 1 + piece[0]]
        if change.kind == "cut":
            content = content[:at]
        else:
            content = content[:at] + piece + content[at + len(piece) * (change.kind != "insert") :]
    return content
