"""What the operator is to torch.compile and to tools that record graphs: one call, which they do not look into."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.jit import is_tracing  # type: ignore[attr-defined]

P = ParamSpec("P")
R = TypeVar("R")


def opaque(function: Callable[P, R]) -> Callable[P, R]:
    """Under torch.compile `function` runs as it is, between two graphs.

    Dynamo would step into the host's tables, break its graph there a dozen times and compile anew for every row. It is
    told not to while it looks: a decorator of its own would import it, which costs every process a second.

    Raises RuntimeError while make_fx, torch.export or torch.jit.trace record: who attends to whom follows from the
    data, and a graph has no node for what a compiled kernel does; it would be recorded without that work, or with the
    choices of one input.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_dynamo_compiling():
            # Handed over as they are: what Dynamo unpacks, it guards, and compiles this function again for each change.
            result: R = torch.compiler.disable(_run)(function, args, kwargs)  # type: ignore[no-untyped-call]
            return result
        if get_proxy_mode() is not None or is_tracing():  # type: ignore[no-untyped-call]
            raise RuntimeError(
                f"{function.__name__} cannot be recorded by make_fx, torch.export or torch.jit.trace; fix: keep it out "
                "of what is recorded, or use torch.compile, which calls it between two graphs"
            )
        return function(*args, **kwargs)

    return call


def _run(function: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
    return function(*args, **kwargs)


__all__ = ["opaque"]
