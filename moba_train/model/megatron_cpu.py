"""Lets megatron-core (0.16 to 0.19) run on a machine without CUDA.

Megatron-core names the CUDA device literally: `torch.zeros(1, device="cuda")`, `torch.cuda.current_device()`,
`param.type() == "torch.cuda.FloatTensor"`. None of that is needed for its results, so on a machine without CUDA

1. the name `torch` *inside megatron.core's modules* is replaced by a view of torch whose factories read "cuda" as "cpu"
   and whose `torch.cuda` answers with the CPU (`adapt_megatron`). torch itself and every other library stay as they
   are;
2. where Megatron asks a tensor about CUDA (building the optimizer, checkpoints), a `TorchFunctionMode` answers
   (`cuda_calls_on_cpu`). A mode costs microseconds in every operation, hence it is entered there and not in the step.

Where CUDA exists every function here does nothing.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from moba_train.quiet import quiet_imports

_FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn")
_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}


def needed() -> bool:
    """True on a machine without CUDA."""
    return not torch.cuda.is_available()


def adapt_megatron() -> None:
    """Adapt the modules of megatron.core that are loaded so far; call again after importing more. Idempotent."""
    if not needed():
        return
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = _TORCH_ON_CPU  # type: ignore[attr-defined]
    random = sys.modules.get("megatron.core.tensor_parallel.random")
    if random is not None:  # recompute saves and restores "the CUDA generator"; here that is the CPU's, saved beside it
        random._get_cuda_rng_state = _get_rng_state  # type: ignore[attr-defined]
        random._set_cuda_rng_state = _set_rng_state  # type: ignore[attr-defined]


@contextmanager
def cuda_calls_on_cpu() -> Iterator[None]:
    """For building optimizers and for dist_checkpointing save/load: tensors answer CUDA questions from the CPU."""
    if not needed():
        yield
        return
    adapt_megatron()
    with _CudaCallsOnCpu():
        yield


class _CudaCallsOnCpu(TorchFunctionMode):
    """Tensor methods and factories that name CUDA, answered on the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _TYPE_NAMES.get(args[0].dtype) or func(*args)
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


class _View(types.ModuleType):
    """A module seen through some replaced attributes."""

    def __init__(self, seen: types.ModuleType, replaced: dict[str, Any]) -> None:
        super().__init__(seen.__name__, seen.__doc__)
        self.__dict__.update(replaced)
        self.__dict__["_seen"] = seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_seen"], name)


def _is_cuda(device: object) -> bool:
    return str(device).startswith("cuda")


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def create(*args: Any, device: Any = None, **kwargs: Any) -> Any:
        return factory(*args, device="cpu" if _is_cuda(device) else device, **kwargs)

    return create


# both stand for torch.cuda's function (a device alone) and for Megatron's (all these arguments)
def _get_rng_state(device: object = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()  # a copy in any case


def _set_rng_state(new_state: torch.Tensor, device: object = "cuda", graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


_CUDA_ON_CPU = _View(
    torch.cuda,
    {
        "current_device": lambda: torch.device("cpu"),
        "current_stream": _nothing,  # 0.19's gradient reduction asks for it; it waits with it for CUDA graphs alone
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "manual_seed": _nothing,
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
    },
)
_TORCH_ON_CPU = _View(torch, {"cuda": _CUDA_ON_CPU, **{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}})


__all__ = ["adapt_megatron", "cuda_calls_on_cpu", "needed", "quiet_imports"]
