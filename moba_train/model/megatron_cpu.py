"""Lets megatron-core (0.16 to 0.19) compute on the CPU, on a machine without CUDA or with it.

Megatron-core names the CUDA device literally: `torch.zeros(1, device="cuda")`, `torch.cuda.current_device()`,
`param.type() == "torch.cuda.FloatTensor"`. None of that is needed for its results, so on the CPU

1. the name `torch` *inside megatron.core's modules* is replaced by a view of torch whose factories read "cuda" as "cpu"
   and whose `torch.cuda` answers with the CPU (`adapt_megatron`). torch itself and every other library stay as they
   are;
2. where Megatron asks a tensor about CUDA (building the optimizer, checkpoints), a `TorchFunctionMode` answers
   (`cuda_calls_on_cpu`). A mode costs microseconds in every operation, hence it is entered there and not in the step.

Until `compute_on` says where this process computes, it is the CPU on a machine without CUDA, and CUDA on one with it.
On CUDA every function here does nothing.
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


_device_type: str | None = None
_random_on_cuda: dict[str, Any] = {}
"""What Megatron's module of this name had before it was adapted."""


def compute_on(device: torch.device) -> None:
    """From now on this process computes there: models on the CPU of a machine with GPUs too, one kind at a time."""
    global _device_type
    _device_type = device.type
    adapt_megatron()


def needed() -> bool:
    """True where this process computes on the CPU."""
    return not torch.cuda.is_available() if _device_type is None else _device_type == "cpu"


def adapt_megatron() -> None:
    """Adapt the modules of megatron.core that are loaded so far, or give them back what they had; call again after
    importing more. Idempotent.
    """
    on_cpu = needed()
    others, wanted = (torch, _TORCH_ON_CPU) if on_cpu else (_TORCH_ON_CPU, torch)
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is others:
            module.torch = wanted  # type: ignore[attr-defined]
    random = sys.modules.get("megatron.core.tensor_parallel.random")
    if random is None:
        return
    # Recompute saves and restores "the CUDA generator"; on the CPU that is the CPU's, saved beside it.
    for name, of_cpu in (("_get_cuda_rng_state", _get_rng_state), ("_set_cuda_rng_state", _set_rng_state)):
        before = _random_on_cuda.setdefault(name, getattr(random, name))
        setattr(random, name, of_cpu if on_cpu else before)


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


__all__ = ["adapt_megatron", "compute_on", "cuda_calls_on_cpu", "needed", "quiet_imports"]
