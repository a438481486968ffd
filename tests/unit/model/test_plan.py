"""The attention plan: pure, global layer numbers, no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moba_kernels.spec import Full, MoBA
from moba_train.config.schema import FullLayers, ModelConfig, StageConfig
from moba_train.model.plan import attention_plan, count_parameters, full_layer_numbers, layers_of_pipeline_rank

MODEL = ModelConfig(num_layers=6)


def test_first_last_and_every_nth_layers_stay_full() -> None:
    assert full_layer_numbers(FullLayers(first=1), 6) == {0}
    assert full_layer_numbers(FullLayers(last=2), 6) == {4, 5}
    assert full_layer_numbers(FullLayers(every=3), 6) == {2, 5}
    assert full_layer_numbers(FullLayers(first=1, last=1, every=2), 6) == {0, 1, 3, 5}
    assert full_layer_numbers(FullLayers(), 6) == frozenset()


def test_more_full_layers_than_layers_means_all_layers() -> None:
    assert full_layer_numbers(FullLayers(last=9), 3) == {0, 1, 2}


def test_a_moba_stage_runs_moba_except_in_its_full_layers() -> None:
    stage = StageConfig(chunk_size=64, topk=4, select="group", full_layers=FullLayers(last=1))
    assert attention_plan(MODEL, stage) == (MoBA(64, 4, "group"),) * 5 + (Full(),)


def test_a_full_stage_runs_full_attention_and_can_still_be_evaluated_under_moba() -> None:
    stage = StageConfig(attention="full", chunk_size=64, topk=4, full_layers=FullLayers(first=2))
    assert attention_plan(MODEL, stage) == (Full(),) * 6
    assert attention_plan(MODEL, stage, "moba") == (Full(),) * 2 + (MoBA(64, 4),) * 4


@pytest.mark.parametrize("attention", ["moba", "full"])
def test_modes_override_the_stage(attention: str) -> None:
    stage = StageConfig(attention=attention, chunk_size=8, topk=2)  # type: ignore[arg-type]
    assert attention_plan(MODEL, stage, "full") == (Full(),) * 6
    assert attention_plan(MODEL, stage, "moba") == attention_plan(MODEL, stage, "random") == (MoBA(8, 2),) * 6


def test_pipeline_ranks_hold_consecutive_layers_and_together_all() -> None:
    shares = [list(layers_of_pipeline_rank(6, 3, rank)) for rank in range(3)]
    assert shares == [[0, 1], [2, 3], [4, 5]]


def test_parameters_of_llama_3_1_8b_are_counted() -> None:
    llama = ModelConfig(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
        tied_head=False,
    )
    assert count_parameters(llama) == 8_030_261_248  # the published size


def test_the_plan_imports_no_torch() -> None:
    code = "import sys, moba_train.model.plan; sys.exit('torch' in sys.modules)"
    paths = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    assert subprocess.run([sys.executable, "-c", code], env=paths, check=False, timeout=60).returncode == 0
