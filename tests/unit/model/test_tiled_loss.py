"""The tiled output head: losses, gradients and scores of any tiling are those of the whole product."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from moba_train.model.tiled_loss import Head, token_losses, token_scores
from tests.distributed import run_ranks

L, M, V = 90, 48, 120


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [L,M], weight [V,M], labels [L], and the gradient of each loss [L] with zeros among it."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(L, M, generator=generator).to(dtype)
    weight = (0.5 * torch.randn(V, M, generator=generator)).to(dtype)
    labels = torch.randint(V, (L,), generator=generator)
    labels[:4] = torch.tensor([0, V - 1, V // 2, V // 2 - 1])  # first and last of a rank's share
    return hidden, weight, labels, torch.rand(L, generator=generator).round(decimals=1)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = hidden @ weight.t()
    return functional.cross_entropy(
        logits if logits.dtype == torch.float64 else logits.float(), labels, reduction="none"
    )


def with_gradients(losses: Tensor, dloss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [losses.detach(), *torch.autograd.grad(losses, leaves, dloss.to(losses.dtype))]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def expected(dtype: torch.dtype) -> tuple[list[Tensor], list[float]]:
    """Loss, dhidden and dweight in fp64, and the error of the same-precision whole product against them."""
    hidden, weight, labels, dloss = inputs(dtype)
    results = []
    for precision in (torch.float64, dtype):
        leaves = [x.to(precision).requires_grad_() for x in (hidden, weight)]
        results.append(with_gradients(plain(*leaves, labels), dloss, *leaves))
    return results[0], [error(found, exact) for found, exact in zip(results[1], results[0], strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 90, 0])
def test_any_tiling_is_as_exact_as_the_whole_product(dtype: torch.dtype, rows: int) -> None:
    hidden, weight, labels, dloss = inputs(dtype)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    losses = token_losses(hidden, labels, Head(weight, tile_rows=rows))
    assert losses.dtype == torch.float32
    exact, allowed = expected(dtype)
    names = ("loss", "dhidden", "dweight")
    for name, found, reference, limit in zip(
        names, with_gradients(losses, dloss, *leaves), exact, allowed, strict=True
    ):
        assert error(found, reference) <= 2 * limit, name


def test_large_logits_neither_overflow_nor_vanish() -> None:
    hidden, weight, labels, _ = inputs(torch.float32)
    losses = token_losses(100 * hidden, labels, Head(weight, tile_rows=16))
    torch.testing.assert_close(
        losses.double(), plain(100 * hidden.double(), weight.double(), labels), rtol=1e-5, atol=1e-3
    )


def test_logits_of_more_than_a_tile_never_exist() -> None:
    hidden, weight, labels, _ = inputs(torch.float32)
    hidden.requires_grad_()
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                largest = max(largest, x.numel() if isinstance(x, Tensor) else 0)
            return out

    with Sizes():
        token_losses(hidden, labels, Head(weight, tile_rows=8)).sum().backward()
        token_scores(hidden, labels, Head(weight, tile_rows=8))
    assert largest == V * M > 8 * V  # the gradient of the weight; all logits would be L * V


def test_scores_are_losses_and_the_lowest_of_the_most_probable_tokens() -> None:
    hidden, weight, labels, _ = inputs(torch.float32)
    weight[70] = weight[11]  # a tie
    hidden[5] = 3 * weight[11]
    losses, best = token_scores(hidden, labels, Head(weight, tile_rows=13))
    torch.testing.assert_close(losses, plain(hidden, weight, labels), rtol=1e-6, atol=1e-5)
    assert torch.equal(best, (hidden @ weight.t()).argmax(1)) and best[5] == 11


def test_every_tile_is_told_of() -> None:
    hidden, weight, labels, _ = inputs(torch.float32)
    told: list[tuple[str, int, int]] = []
    head = Head(weight.requires_grad_(), tile_rows=40, on_tile=lambda *tile: told.append(tile))
    token_losses(hidden, labels, head).sum().backward()
    assert told == [(direction, tile, 3) for direction in ("forward", "backward") for tile in range(3)]


def on_a_rank(rank: int, n: int) -> list[list[Tensor]]:
    """For each precision: loss, this rank's part of dhidden and dweight, and scores with a tie between ranks."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, labels, dloss = inputs(dtype)
        weight[V - 1] = weight[11]
        own = [x.chunk(n)[rank].clone().requires_grad_() for x in (hidden, weight)]
        head = Head(own[1], dist.group.WORLD, tile_rows=7)
        losses = token_losses(own[0], labels, head)
        scores = token_scores(own[0].detach(), labels, head)
        found.append([*with_gradients(losses, dloss, *own), *scores])
    return found


@pytest.mark.parametrize("n", [2, 3])
def test_ranks_that_share_the_vocabulary_and_the_tokens_give_what_one_rank_gives(n: int) -> None:
    of_ranks = run_ranks(on_a_rank, n)
    for i, dtype in enumerate((torch.float32, torch.bfloat16)):
        hidden, weight, labels, dloss = inputs(dtype)
        weight[V - 1] = weight[11]
        results = []
        for precision in (torch.float64, dtype):
            leaves = [x.to(precision).requires_grad_() for x in (hidden, weight)]
            results.append(with_gradients(plain(*leaves, labels), dloss, *leaves))
        exact, same_precision = results
        parts = [of_rank[i] for of_rank in of_ranks]
        for part in parts:
            assert torch.equal(part[0], parts[0][0]) and torch.equal(part[3], part[0])
            assert torch.equal(part[4], parts[0][4])
        assert (parts[0][4] == (hidden @ weight.t()).argmax(1)).float().mean() > (0.99 if i == 0 else 0.9)
        assert V - 1 not in parts[0][4]  # of equals the lowest, although another rank holds it
        gathered = (parts[0][0], *(torch.cat([part[j] for part in parts]) for j in (1, 2)))
        for name, found, reference, near in zip(
            ("loss", "dhidden", "dweight"), gathered, exact, same_precision, strict=True
        ):
            assert error(found, reference) <= 2 * error(near, reference), (name, dtype)
