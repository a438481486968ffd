"""Checkpoints in host memory on a real GPU: the same gradients, and the memory of one checkpoint instead of all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moba_train.model.offload import CudaLink, checkpoints_through

pytestmark = pytest.mark.gpu

SHAPE = (8192, 1, 1024)
LAYERS = 8


def step(offload: bool) -> tuple[list[Tensor], int]:
    """Gradients of a stack of recomputed layers, and how much its forward pass left on the GPU, in bytes."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    layers = [torch.nn.Linear(SHAPE[-1], SHAPE[-1], device=device) for _ in range(LAYERS)]
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    before = torch.cuda.memory_allocated()
    link = CudaLink(device)
    hidden = x * 1.0
    with checkpoints_through(link, SHAPE if offload else (0, 0, 0)):
        for layer in layers:
            hidden = checkpoint(lambda y, layer=layer: torch.tanh(layer(y)), hidden, use_reentrant=True)
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    hidden.square().sum().backward()
    assert x.grad is not None
    return [x.grad, *(layer.weight.grad for layer in layers if layer.weight.grad is not None)], kept


def test_checkpoints_that_wait_in_host_memory_give_the_same_gradients_and_leave_the_gpu() -> None:
    (expected, kept), (found, kept_offloaded) = step(False), step(True)
    assert len(found) == LAYERS + 1
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    size = 4 * SHAPE[0] * SHAPE[2]
    assert kept >= LAYERS * size and kept_offloaded <= 3 * size  # the last output, and the last one under way
