"""The engine on one rank against the plain PyTorch model: scores, the loss of a step, and its gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moba_train.model.plan import attention_plan
from tests.integration.engine_case import CASES, engine_of, gradients, one_thread, packed_row, relative_l2
from tests.integration.reference_gpt import reference_logits, reference_loss


@pytest.fixture(autouse=True)
def single_thread() -> None:
    one_thread()


@pytest.mark.parametrize("name", ["mixed", "grouped", "full"])
def test_scores_are_those_of_the_plain_model(name: str) -> None:
    case = CASES[name]
    engine = engine_of(case)
    row = packed_row(0)
    plan = attention_plan(case.model, case.stages[0])
    parameters = {key: p.detach() for key, p in engine._gpt.named_parameters()}
    log_probs = reference_logits(parameters, case.model, plan, row).log_softmax(-1)
    scores = engine.score(row)
    expected = log_probs.gather(1, torch.from_numpy(row.labels_S)[:, None])[:, 0]
    np.testing.assert_allclose(scores.log_prob_S, expected.numpy(), atol=1e-4)
    assert np.mean(scores.argmax_S == log_probs.argmax(-1).numpy()) == 1.0
    assert engine.num_parameters == sum(p.numel() for p in engine._gpt.parameters())


@pytest.mark.parametrize("name", ["mixed", "grouped", "full", "recomputed"])
def test_loss_and_gradient_of_a_step_are_token_averages_over_its_rows(name: str) -> None:
    case = CASES[name]
    engine = engine_of(case)
    rows = [packed_row(1), packed_row(2, (0, 40, 43)), packed_row(3, (0, 3, 20))]
    plan = attention_plan(case.model, case.stages[0])
    parameters = {key: p.detach().clone().requires_grad_() for key, p in engine._gpt.named_parameters()}
    loss = reference_loss(parameters, case.model, plan, rows)
    loss.backward()
    result = engine.train_step(rows, lr=0.0)
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert result.num_loss_tokens == sum(int(row.loss_mask_S.sum()) for row in rows)
    assert not result.skipped
    found = gradients(engine)
    norm = 0.0
    for key, parameter in parameters.items():
        assert parameter.grad is not None
        assert relative_l2(found[key], parameter.grad.numpy()) < 1e-4, key
        norm += float(parameter.grad.double().square().sum())
    assert result.grad_norm == pytest.approx(norm**0.5, rel=1e-5)
