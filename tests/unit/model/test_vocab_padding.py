"""Rows of the vocabulary that stand for no token: as if they were not there."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from moba_train.model.tiled_loss import Head, token_losses, token_scores
from tests.distributed import run_ranks

NUM_TOKENS, PADDED = 11, 16


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, a head whose padding would win everywhere, labels."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 8, generator=generator)
    weight = torch.randn(PADDED, 8, generator=generator)
    weight[NUM_TOKENS:] *= 100
    return hidden, weight, torch.randint(0, NUM_TOKENS, (12,), generator=generator)


def results(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, head: Head) -> list[torch.Tensor]:
    losses = token_losses(hidden.requires_grad_(), labels, head)
    (losses * torch.arange(12)).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return [losses.detach(), hidden.grad, weight.grad, *token_scores(hidden, labels, head)]


@pytest.mark.parametrize("tile_rows", [1, 5, 12])
def test_losses_scores_and_gradients_are_those_without_the_padding(tile_rows: int) -> None:
    hidden, weight, labels = inputs()
    padded = weight.clone().requires_grad_()
    found = results(hidden.clone(), padded, labels, Head(padded, tile_rows=tile_rows, padding=PADDED - NUM_TOKENS))
    plain = weight[:NUM_TOKENS].clone().requires_grad_()
    expected = results(hidden.clone(), plain, labels, Head(plain))
    expected[2] = torch.cat([expected[2], torch.zeros(PADDED - NUM_TOKENS, 8)])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def on_a_rank(rank: int, n: int) -> list[torch.Tensor]:
    hidden, weight, labels = inputs()
    own = weight.chunk(n)[rank].clone().requires_grad_()
    head = Head(own, dist.group.WORLD, padding=PADDED - NUM_TOKENS)
    return results(hidden.chunk(n)[rank].clone(), own, labels, head)


def test_ranks_that_hold_nothing_but_padding_change_nothing() -> None:
    hidden, weight, labels = inputs()
    whole = weight.clone().requires_grad_()
    losses, dhidden, dweight, scores, best = results(hidden, whole, labels, Head(whole, padding=PADDED - NUM_TOKENS))
    found = run_ranks(on_a_rank, 4)
    for rank, (its_losses, its_dhidden, its_dweight, its_scores, its_best) in enumerate(found):
        torch.testing.assert_close(its_losses, losses)
        torch.testing.assert_close(its_dhidden, dhidden.chunk(4)[rank])
        torch.testing.assert_close(its_dweight, dweight.chunk(4)[rank])
        torch.testing.assert_close(its_scores, scores)
        assert torch.equal(its_best, best)
