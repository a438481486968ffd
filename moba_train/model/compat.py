"""Where releases of megatron-core differ: 0.16 (the last for Python 3.11) to 0.19 are known to work."""

from __future__ import annotations

from torch import nn

from moba_train.quiet import quiet_imports

with quiet_imports():
    from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes


def mark_tensor_parallel(parameter: nn.Parameter, dim: int) -> None:
    """Say that tensor-parallel ranks share `parameter` along `dim`; Megatron's gradient norm reads it.

    With perform_initialization = False, 0.18 and later mark the parameters of their own layers while they build them,
    and refuse to mark one twice; earlier releases mark none.
    """
    if not hasattr(parameter, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(parameter, True, dim, 1)


__all__ = ["mark_tensor_parallel"]
