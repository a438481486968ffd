"""The loss of each token."""

from __future__ import annotations

import pytest
import torch

from moba_train.model.loss import token_losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_the_negative_log_softmax_in_fp32_and_leaves_the_logits_alone(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(6, 1, 9, generator=generator) * 20).to(dtype).requires_grad_()
    before, labels = logits.detach().clone(), torch.tensor([[0], [8], [3], [3], [1], [7]])
    losses = token_losses(logits, labels, tp=1)
    weights = torch.arange(6.0)[:, None]
    (losses * weights).sum().backward()
    exact = before.double().requires_grad_()
    expected = -exact.log_softmax(-1).gather(-1, labels[:, :, None])[:, :, 0]
    (expected * weights).sum().backward()
    assert losses.dtype == torch.float32 and losses.shape == (6, 1) and torch.equal(logits, before)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-5)
    assert logits.grad is not None and exact.grad is not None
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)
