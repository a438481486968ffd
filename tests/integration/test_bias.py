"""Biases of the query, key and value projections do not decay, as norms do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moba_train.config.schema import OptimizerConfig
from tests.integration.engine_case import CASES, engine_of, one_thread, packed_row

LR, DECAY = 0.01, 0.9


@pytest.mark.parametrize("distributed", [False, True], ids=["plain optimizer", "distributed optimizer"])
def test_biases_do_not_decay(distributed: bool) -> None:
    one_thread()
    case = CASES["grouped"]
    optimizer = OptimizerConfig(weight_decay=DECAY, clip_grad=0.0)
    engine = engine_of(
        replace(case, engine=replace(case.engine, distributed_optimizer=distributed), optimizer=optimizer)
    )
    biases = [p for name, p in engine._gpt.named_parameters() if name.endswith("bias")]
    assert len(biases) == case.model.num_layers
    embedding = engine._gpt.embedding.word_embeddings.weight
    with torch.no_grad():
        for parameter in (*biases, embedding):
            parameter.fill_(10.0)
    engine._optimizer.reload_model_params()
    engine.train_step([packed_row(0)], lr=LR)
    for parameter in biases:  # AdamW's first step is no longer than lr; decay would take nine times as much
        assert (parameter - 10.0).abs().max() < 1.1 * LR
    assert (embedding - 10.0).abs().min() > 7 * LR
