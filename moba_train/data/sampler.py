"""Which rows a data-parallel rank takes in a step: pure integers.

Row i of a stage is the same whatever the mesh; ranks slice the step's rows. So a run may go on with another number of
ranks and neither lose nor repeat a row.
"""

from __future__ import annotations

from moba_train.errors import ConfigError


def rows_of_step(step_in_stage: int, *, rows_per_step: int, dp_rank: int, dp: int) -> range:
    """Row indices of one rank in one step (counted from 0 in the stage), in order.

    Raises:
        ConfigError: rows_per_step is no multiple of dp (every rank must accumulate the same number of rows).
    """
    if rows_per_step % dp:
        raise ConfigError(
            "rows per step must be a multiple of the data-parallel ranks",
            where="tokens_per_step / seq_len",
            got=f"{rows_per_step} rows on {dp} ranks",
            fix="change tokens_per_step or the number of ranks",
        )
    share = rows_per_step // dp
    first = step_in_stage * rows_per_step + dp_rank * share
    return range(first, first + share)
