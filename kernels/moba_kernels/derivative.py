"""Functions whose gradient is worked out by hand are differentiable once, and say so."""

from __future__ import annotations

import torch


def refuse_second_derivative(name: str) -> None:
    """First thing in the backward of a Function whose gradient is worked out by hand and has no graph of its own.

    torch's `once_differentiable` complains only when the incoming gradient has a graph; else it returns a constant, and
    a penalty on the gradient's norm, say, would silently lose this term.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} is differentiable once; fix: leave out create_graph=True")
