from __future__ import annotations

import torch
from torch import nn

from moba_train.model.compat import mark_tensor_parallel


def test_a_parameter_is_marked_with_the_dim_that_ranks_share() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3))
    mark_tensor_parallel(parameter, 1)
    assert (parameter.tensor_model_parallel, parameter.partition_dim) == (True, 1)  # type: ignore[attr-defined]


def test_a_mark_that_megatron_has_set_stays() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3))
    mark_tensor_parallel(parameter, 1)
    mark_tensor_parallel(parameter, 0)
    assert parameter.partition_dim == 1  # type: ignore[attr-defined]
