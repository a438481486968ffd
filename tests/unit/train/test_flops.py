from __future__ import annotations

import pytest

from moba_kernels import Full, MoBA, Pack
from moba_train.config.schema import FullLayers, ModelConfig, StageConfig
from moba_train.model.plan import attention_plan
from moba_train.train.flops import (
    PairCounts,
    document_gate_scores,
    document_pairs,
    matmul_parameters,
    peak_tflops,
    row_pairs,
    step_flops,
)

MODEL = ModelConfig(
    num_layers=3, hidden_size=8, ffn_hidden_size=16, num_heads=4, num_kv_heads=2, head_dim=2, vocab_size=32
)


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 16])
@pytest.mark.parametrize("topk", [1, 2, 3, 9])
def test_pairs_of_a_document_are_those_counted_query_by_query(chunk_size: int, topk: int) -> None:
    for length in range(30):
        attended, scores = 0, 0
        for t in range(length):
            own = t // chunk_size
            attended += t % chunk_size + 1 + min(own, topk - 1) * chunk_size
            scores += own
        assert document_pairs(length, chunk_size=chunk_size, topk=topk) == attended
        assert document_gate_scores(length, chunk_size=chunk_size) == scores


@pytest.mark.parametrize("attention", ["moba", "full"])
def test_pairs_of_a_row_are_what_the_operator_plans(attention: str) -> None:
    stage = StageConfig(attention=attention, chunk_size=4, topk=2, full_layers=FullLayers(last=1))  # type: ignore[arg-type]
    cu_seqlens = (0, 1, 1, 14, 37, 50)
    pack = Pack(cu_seqlens)
    pairs = row_pairs(MODEL, stage, cu_seqlens)
    assert pairs.attended == sum(pack.planned_pairs(spec) for spec in attention_plan(MODEL, stage))
    assert pairs.causal == 3 * pack.planned_pairs(Full())
    assert pairs.density == (1.0 if attention == "full" else pytest.approx(pairs.attended / pairs.causal))
    if attention == "moba":
        assert pairs.density == pytest.approx((2 * pack.density(MoBA(4, 2)) + 1) / 3)
        assert pairs.gate == 2 * sum(document_gate_scores(length, chunk_size=4) for length in (1, 0, 13, 23, 13))


def test_a_row_without_documents_counts_as_dense() -> None:
    assert row_pairs(MODEL, StageConfig(), (0,)).density == 1.0


def test_flops_match_a_count_by_hand() -> None:
    # projections: q 8*8, k and v 8*4 each, out 8*8 = 192; MLP 3*8*16 = 384; head 8*32 = 256
    assert matmul_parameters(MODEL) == 3 * (192 + 384) + 256 == 1984
    pairs = PairCounts(attended=100, causal=250, gate=10)
    flops = step_flops(MODEL, num_tokens=50, pairs=pairs, full_recompute=False)
    assert flops.model == 6 * 1984 * 50 + 12 * 2 * 4 * 100
    assert flops.dense_equivalent == 6 * 1984 * 50 + 12 * 2 * 4 * 250
    assert flops.gate == 2 * 2 * 4 * 10
    assert flops.with_recompute == 6 * 1984 * 50 + 2 * 256 * 50 + 14 * 2 * 4 * 100 + flops.gate  # logits twice
    again = step_flops(MODEL, num_tokens=50, pairs=pairs, full_recompute=True)
    assert again.with_recompute - flops.with_recompute == 2 * (1984 - 256) * 50 + 4 * 2 * 4 * 100
    assert again.model == flops.model


def test_group_selection_gates_once_per_key_value_head() -> None:
    pairs = row_pairs(MODEL, StageConfig(chunk_size=4, topk=2, select="group"), (0, 16))
    assert (pairs.gate, pairs.gate_group) == (0, 3 * document_gate_scores(16, chunk_size=4))
    assert step_flops(MODEL, num_tokens=16, pairs=pairs, full_recompute=False).gate == 2 * 2 * 2 * pairs.gate_group


def test_the_peak_of_an_unknown_device_is_unknown() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bf16") == 989.4
    assert peak_tflops("NVIDIA H100 PCIe", "bf16") == 756.0
    assert peak_tflops("NVIDIA A100-SXM4-40GB", "fp32") == 19.5
    assert peak_tflops("AMD EPYC 7763", "fp32") is None
