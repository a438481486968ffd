"""How many tokens a tile holds, where a layer's inner width is many times the hidden size. Imports no torch.

On a GPU the inner values of a tile take as much memory as the hidden states of the shard, of which a layer holds
several in any case: smaller tiles would gain little, and each costs a pass over the gradient of its weights. A CPU is
fastest with tiles that stay in its caches (head of 4096 x 128, one thread: 59 us a token with 1024 tokens, 75 us with
4096 and with 16384).
"""

from __future__ import annotations

MIN_TILE_TOKENS = 1024
"""Nothing shorter is cut: a multiplication of fewer rows no longer fills a GPU."""


def tile_rows(num_rows: int, hidden_size: int, inner_size: int, *, num_ranks: int, cpu: bool) -> int:
    """Rows that a tensor-parallel rank puts into a tile: at least 1, and the same on all of them.

    Args:
        num_rows: tokens of the shard that this rank holds.
        inner_size: values per token inside the tile, on this rank.
        num_ranks: tensor-parallel ranks; a tile holds the rows of all of them.
    """
    tokens = MIN_TILE_TOKENS if cpu else max(MIN_TILE_TOKENS, num_rows * num_ranks * hidden_size // inner_size)
    return -(-tokens // num_ranks)


__all__ = ["MIN_TILE_TOKENS", "tile_rows"]
