"""One rank: clipping, bad numbers, stages, recompute, evaluation modes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moba_train.config.schema import EngineConfig, OptimizerConfig
from moba_train.engine.megatron import choose_device
from moba_train.errors import BackendError
from moba_train.model import attention as attention_module
from tests.integration.engine_case import (
    CASES,
    FULL_STAGE,
    MIXED,
    MOBA_STAGE,
    PLAIN_ENGINE,
    RECOMPUTED,
    engine_of,
    gradients,
    moments,
    one_thread,
    packed_row,
    relative_l2,
    same,
    weights,
)


@pytest.fixture(autouse=True)
def single_thread() -> None:
    one_thread()


@pytest.mark.parametrize("distributed", [True, False])
def test_a_step_is_adamw_with_clipping_and_no_decay_on_norms(distributed: bool) -> None:
    case = replace(
        MIXED,
        engine=EngineConfig(device="cpu", distributed_optimizer=distributed),
        optimizer=OptimizerConfig(clip_grad=0.25, weight_decay=0.3, beta1=0.8, beta2=0.9, eps=1e-6),
    )
    engine = engine_of(case)
    parameters = {name: torch.nn.Parameter(torch.from_numpy(value)) for name, value in weights(engine).items()}
    plain = torch.optim.AdamW(
        [
            {"params": [p for p in parameters.values() if p.dim() > 1], "weight_decay": 0.3},
            {"params": [p for p in parameters.values() if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(0.8, 0.9),
        eps=1e-6,
        lr=0.0,
    )
    unclipped = engine_of(replace(MIXED, optimizer=OptimizerConfig(clip_grad=0.0)))
    for step in range(3):
        row, lr = packed_row(step), 1e-3 * (step + 1)
        unclipped._gpt.load_state_dict(engine._gpt.state_dict())
        norm = unclipped.train_step([row], lr=0.0).grad_norm
        assert norm > 0.25
        for name, gradient in gradients(unclipped).items():
            parameters[name].grad = torch.from_numpy(gradient) * (0.25 / (norm + 1e-6))
        for group in plain.param_groups:
            group["lr"] = lr
        plain.step()
        assert engine.train_step([row], lr=lr).grad_norm == pytest.approx(norm, rel=1e-6)
        for name, found in weights(engine).items():
            np.testing.assert_allclose(found, parameters[name].detach().numpy(), atol=2e-6, err_msg=name)


def poison_mask(engine: Any) -> dict[str, Any]:
    return {"loss_mask_S": np.full(61, np.nan, np.float32)}


def poison_gradient(engine: Any) -> dict[str, Any]:
    engine._gpt.decoder.final_layernorm.weight.register_hook(lambda gradient: gradient * np.inf)
    return {}


def count_nothing(engine: Any) -> dict[str, Any]:
    return {"loss_mask_S": np.zeros(61, np.float32)}


@pytest.mark.parametrize("poison", [poison_mask, poison_gradient, count_nothing])
def test_a_step_that_is_not_finite_changes_neither_weights_nor_optimizer(poison: Callable[..., Any]) -> None:
    engine = engine_of(MIXED)
    engine.train_step([packed_row(0)], lr=1e-2)
    before, state = weights(engine), moments(engine)
    bad = replace(packed_row(1), **poison(engine))
    result = engine.train_step([bad], lr=1e-2)
    assert result.skipped
    assert same(weights(engine), before)
    assert all(np.array_equal(a, b) for a, b in zip(moments(engine), state, strict=True))


def test_training_goes_on_after_a_skipped_step() -> None:
    engine = engine_of(MIXED)
    assert engine.train_step([replace(packed_row(1), **poison_mask(engine))], lr=1e-2).skipped
    assert not engine.train_step([packed_row(1)], lr=1e-2).skipped


def test_a_stage_change_keeps_weights_and_optimizer_state_and_changes_attention() -> None:
    engine = engine_of(MIXED)
    engine.train_step([packed_row(0)], lr=1e-2)
    before, state = weights(engine), moments(engine)
    under_moba = engine.score(packed_row(1)).log_prob_S
    engine.set_stage(1)
    assert same(weights(engine), before)
    assert all(np.array_equal(a, b) for a, b in zip(moments(engine), state, strict=True))
    assert not np.array_equal(engine.score(packed_row(1)).log_prob_S, under_moba)
    np.testing.assert_array_equal(engine.score(packed_row(1), attention="moba").log_prob_S, under_moba)
    assert engine.train_step([packed_row(0)], lr=1e-2, collect_routing=True).routing == {}
    with pytest.raises(IndexError):
        engine.set_stage(2)


def test_a_stage_changes_the_rotary_base() -> None:
    stages = (FULL_STAGE, replace(FULL_STAGE, rope=replace(FULL_STAGE.rope, base=500.0)))
    engine = engine_of(replace(MIXED, stages=stages))
    before = engine.score(packed_row(1)).log_prob_S
    engine.set_stage(1)
    assert not np.allclose(engine.score(packed_row(1)).log_prob_S, before, atol=1e-4)


def test_recompute_gives_the_same_gradient_and_never_routes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = engine_of(replace(RECOMPUTED, engine=PLAIN_ENGINE))
    plain.train_step([packed_row(0), packed_row(1)], lr=0.0)
    expected = gradients(plain)
    given: list[bool] = []
    attend = attention_module.context_attend

    def watched(*args: Any, routing: Any, **kwargs: Any) -> Any:
        given.append(routing is not None)
        return attend(*args, routing=routing, **kwargs)

    monkeypatch.setattr(attention_module, "context_attend", watched)
    engine = engine_of(RECOMPUTED)
    engine.train_step([packed_row(0), packed_row(1)], lr=0.0)
    assert given == [False, False, True, True] * 2  # two layers forward, two again, for each row
    for name, gradient in gradients(engine).items():
        assert relative_l2(gradient, expected[name]) < 1e-6, name


def test_modes_that_mean_the_same_score_the_same_and_random_picks_score_otherwise() -> None:
    engine = engine_of(replace(MIXED, stages=(MOBA_STAGE,)))
    row = packed_row(4)
    stage = engine.score(row).log_prob_S
    np.testing.assert_array_equal(engine.score(row, attention="moba").log_prob_S, stage)
    full, random = (engine.score(row, attention=mode).log_prob_S for mode in ("full", "random"))
    assert not np.allclose(full, stage, atol=1e-4) and not np.allclose(random, stage, atol=1e-4)
    np.testing.assert_array_equal(engine.score(row, attention="random").log_prob_S, random)
    short = slice(0, 12 + 1)  # document 1 begins at token 1; its first topk * chunk_size tokens are dense in any case
    np.testing.assert_allclose(full[short], stage[short], atol=1e-5)


def test_picks_are_those_of_the_queried_positions_in_the_order_asked_for() -> None:
    engine = engine_of(MIXED)
    row = packed_row(5)
    picks = engine.score(row, query_positions=[52, 0, 30]).picks
    assert set(picks) == {0}  # layer 1 is full
    assert picks[0].shape == (3, 4, 3) and picks[0].dtype == np.int32
    # chunks: document 0 has chunk 0; document 1 (23 tokens) 1..6; the empty one none; document 3 (29 tokens) 7..14
    assert picks[0][:, 0, 0].tolist() == [14, 0, 8]
    assert (picks[0][1, :, 1:] == -1).all()
    assert (picks[0][2, :, 1] == 7).all() and (picks[0][2, :, 2] == -1).all()
    assert ((picks[0][0, :, 1:] >= 7) & (picks[0][0, :, 1:] < 14)).all()
    with pytest.raises(IndexError, match=r"0\.\.60"):
        engine.score(row, query_positions=[61])


def test_a_document_scores_the_same_wherever_in_the_row_it_lies() -> None:
    engine = engine_of(CASES["grouped"])
    document, filler = packed_row(6, (0, 40, 41)), packed_row(7, (0, 24, 25))
    ahead, behind = [], []
    for tokens in (document.tokens_S[:40], document.labels_S[:40]):
        ahead.append(np.concatenate([tokens, filler.tokens_S[:24]]))
        behind.append(np.concatenate([filler.tokens_S[:24], tokens]))
    first = replace(document, tokens_S=ahead[0], labels_S=ahead[1], loss_mask_S=np.ones(64, np.float32))
    last = replace(document, tokens_S=behind[0], labels_S=behind[1], loss_mask_S=np.ones(64, np.float32))
    a = engine.score(replace(first, cu_seqlens=(0, 40, 64))).log_prob_S[:40]
    b = engine.score(replace(last, cu_seqlens=(0, 24, 64))).log_prob_S[24:]
    np.testing.assert_allclose(a, b, atol=2e-6)


def test_routing_numbers_come_with_a_step_that_asks_for_them() -> None:
    engine = engine_of(replace(MIXED, stages=(MOBA_STAGE,)))
    result = engine.train_step([packed_row(0)], lr=0.0, collect_routing=True)
    assert 0.0 < result.routing["entropy"] <= 1.0
    assert sum(v for k, v in result.routing.items() if k.startswith("distance_")) == pytest.approx(1.0)
    assert engine.train_step([packed_row(0)], lr=0.0).routing == {}


def test_bf16_trains_close_to_fp32() -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        settings = EngineConfig(device="cpu", precision=precision)  # type: ignore[arg-type]
        engine = engine_of(replace(MIXED, engine=settings, optimizer=OptimizerConfig()))
        losses[precision] = [engine.train_step([packed_row(0)], lr=3e-3).loss for _ in range(6)]
    assert losses["bf16"][-1] < losses["bf16"][0] - 0.3
    np.testing.assert_allclose(losses["bf16"], losses["fp32"], atol=0.15)


def test_the_reference_backend_gives_the_same_scores() -> None:
    plain = replace(PLAIN_ENGINE, attention_backend="reference")
    found = engine_of(replace(MIXED, engine=plain)).score(packed_row(0)).log_prob_S
    np.testing.assert_allclose(found, engine_of(MIXED).score(packed_row(0)).log_prob_S, atol=1e-5)


def test_a_backend_that_cannot_serve_the_run_is_named_with_its_reasons() -> None:
    unbuilt = replace(PLAIN_ENGINE, attention_backend="triton")  # type: ignore[arg-type]
    engine = engine_of(replace(MIXED, engine=unbuilt))
    with pytest.raises(BackendError, match=r"triton.*\n.*attention_backend = \"auto\""):
        engine.score(packed_row(0))


def test_cuda_is_refused_where_there_is_none() -> None:
    if torch.cuda.is_available():
        assert choose_device("cuda").type == "cuda"
    else:
        with pytest.raises(BackendError, match=r"engine\.device"):
            choose_device("cuda")
    assert choose_device("cpu").type == "cpu"
