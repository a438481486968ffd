"""Indexed row updates whose result does not depend on the order in which threads run."""

from __future__ import annotations

from torch import Tensor


def add_rows_(into: Tensor, index: Tensor, rows: Tensor) -> None:
    """into[index[i]] += rows[i] along dim 0; an index may stand more than once.

    On CPU `index_add_` walks the index in order. On CUDA it uses float atomics, whose order varies from run to run;
    `index_put_` with accumulate sorts first and adds in a fixed order.
    """
    if into.device.type == "cpu":
        into.index_add_(0, index, rows)
    else:
        into.index_put_((index,), rows, accumulate=True)
