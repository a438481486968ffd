"""Tables that tell a kernel's programs which tile of which run of rows is theirs, made on the device: no host sync."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TileTable:
    """Runs of rows cut into tiles: tile t of run r = run_of_tile[t] holds rows (t - ends[r]) * block_m and on."""

    ends: Tensor
    """int32 [runs + 1]: run r has tiles ends[r] .. ends[r + 1] - 1."""
    run_of_tile: Tensor
    """int32 [bound]; what lies beyond ends[-1] is not a tile."""
    bound: int
    """A number of tiles that the host knows to be enough."""


def max_tiles(num_runs: int, block_m: int, max_rows: int) -> int:
    """Tiles that so many runs of max_rows rows in all can have."""
    return max_rows // block_m + min(num_runs, max_rows)


def tile_table(rows_of_run: Tensor, block_m: int, max_rows: int) -> TileTable:
    """rows_of_run: integers [runs], adding up to max_rows at most."""
    num_runs = rows_of_run.numel()
    bound = max_tiles(num_runs, block_m, max_rows)
    ends = torch.zeros(num_runs + 1, dtype=torch.int32, device=rows_of_run.device)
    torch.cumsum((rows_of_run + (block_m - 1)) // block_m, 0, dtype=torch.int32, out=ends[1:])
    tile = torch.arange(bound, dtype=torch.int32, device=rows_of_run.device)
    return TileTable(ends, torch.searchsorted(ends[1:], tile, right=True, out_int32=True), bound)
