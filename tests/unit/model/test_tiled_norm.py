from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moba_train.model import tiled_norm
from moba_train.model.tiled_norm import tiled_rms_norm

EPS = 1e-5


def results(x: Tensor, weight: Tensor, dout: Tensor, norm: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()]
    out = norm(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, weight.shape, weight, EPS)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(37, 1, 24), (37, 3, 24), (0, 1, 24)])
def test_tiles_are_as_exact_as_the_whole_norm(monkeypatch: pytest.MonkeyPatch, dtype, shape) -> None:
    monkeypatch.setattr(tiled_norm, "MIN_TILE_TOKENS", 8)
    generator = torch.Generator().manual_seed(0)
    x = (5 * torch.randn(shape, generator=generator)).to(dtype)
    weight = torch.rand(24, generator=generator).to(dtype)
    dout = torch.randn(shape, generator=generator).to(dtype)
    exact = results(x.double(), weight.double(), dout.double(), plain)
    same_precision = results(x, weight, dout, plain)
    found = results(x, weight, dout, lambda x, weight: tiled_rms_norm(x, weight, EPS))
    for name, one, near, reference in zip(("out", "dx", "dweight"), found, same_precision, exact, strict=True):
        assert one.dtype == dtype and one.shape == reference.shape, name
        if shape[0]:
            assert error(one, reference) <= 2 * error(near, reference), name


def test_nothing_of_the_size_of_the_input_is_kept_besides_the_input() -> None:
    x, weight = torch.randn(40, 1, 24, requires_grad=True), torch.ones(24, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        tiled_rms_norm(x, weight, EPS)
    assert [tuple(t.shape) for t in kept] == [(40, 1, 24), (24,), (40, 1, 1)] and kept[0].data_ptr() == x.data_ptr()
