"""docs/scaling.md is what its script prints, and the script's expectations are what the framework counts."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moba_kernels.spec import MoBA
from moba_train.parallel.cut import cut_row
from moba_train.parallel.hardware import PRESETS
from moba_train.parallel.parts import pairs_of_keys, parts_of, pulled_tokens, sent_queries
from scaling_counts import HEADS, CountCase, count
from scaling_loads import KINDS, expected_loads, peak_to_mean, pick_chances
from scaling_memory import Mesh
from scaling_steps import best_step, llama_job, step_on
from scaling_tables import (
    SPEC,
    M,
    balance_rows,
    bytes_rows,
    count_load_rows,
    count_rows,
    longest_rows,
    memory_row,
    plan_rows,
    ring_comparison,
    step_row,
    try_rows,
)

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
H100 = PRESETS["h100"]


def assert_on_page(rows: Sequence[str]) -> None:
    stale = [row for row in rows if row not in PAGE.splitlines()]
    assert not stale, f"docs/scaling.md is stale (make scaling); it does not have:\n{chr(10).join(stale)}"


@pytest.mark.parametrize("seq_len", (M // 8, M))
def test_the_page_has_the_steps_bytes_and_memory_that_the_model_gives(seq_len: int) -> None:
    for num_gpus in (8, 64):
        step, full = (best_step(llama_job(seq_len, moba=moba), num_gpus, H100) for moba in (True, False))
        assert step is not None
        assert_on_page([step_row(num_gpus, step, full), memory_row(num_gpus, step), *bytes_rows(num_gpus, step, H100)])


def test_the_page_has_the_balance_and_the_sensitivity_that_the_model_gives() -> None:
    assert_on_page(balance_rows(M, (8,)))
    assert_on_page(try_rows(llama_job(M), Mesh(1, 16, 4), H100))


def test_the_page_has_what_the_transports_count() -> None:
    assert_on_page([*count_rows((8,)), *count_load_rows((8,)), *plan_rows((8,))])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_page_is_what_its_script_writes() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "scaling" / "make.py"))
    assert script["text"](script["all_steps"]()) == PAGE


def test_the_page_compares_itself_with_published_systems_by_the_model() -> None:
    full, moba = ring_comparison()
    assert f"{full.total_s:,.0f} s, {full.memory.total / 1e9:.0f} GB, and" in PAGE
    assert f"{moba.total_s:.1f} s, {moba.memory.total / 1e9:.0f} GB" in PAGE
    assert all(size == 0 or f"{size / 1e6:.1f}M" in PAGE for size in longest_rows().values())


@pytest.mark.parametrize("kind", KINDS)
def test_chances_add_up_to_the_picks_and_grow_with_the_weights(kind: str) -> None:
    chance_CC = pick_chances(kind, 256, 11)  # type: ignore[arg-type]
    assert np.allclose(chance_CC.sum(1), np.minimum(11, np.arange(256)), atol=1e-9)
    assert chance_CC.min() >= 0 and chance_CC.max() <= 1 and not np.triu(chance_CC).any()
    if kind == "recency":
        assert (np.diff(chance_CC[200, :200]) > 0).all()


@pytest.mark.parametrize("layout", ("zigzag", "contiguous"))
def test_uniform_loads_are_those_of_the_cost_model(layout: str) -> None:
    loads = expected_loads(
        pick_chances("uniform", 256, SPEC.num_picks),
        SPEC,
        num_tokens=M,
        num_ranks=64,
        layout=layout,  # type: ignore[arg-type]
        heads_per_kv=4,
    )
    parts = parts_of(cut_row(M, 64, layout), (0, M), SPEC)  # type: ignore[arg-type]
    assert np.allclose(loads.pairs_of_keys_N, pairs_of_keys(parts))
    assert np.allclose(loads.pulled_N, pulled_tokens(parts, 4).sum(0))
    # there, several chunks of a rank are missed together exactly; here, independently
    assert np.allclose(loads.queries_N, sent_queries(parts).sum(0), rtol=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_expected_loads_are_what_ranks_count(kind: str) -> None:
    spec, num_tokens, num_ranks = MoBA(64, 4), 2048, 24  # every chunk straddles shards
    loads = expected_loads(
        pick_chances(kind, 32, spec.num_picks),  # type: ignore[arg-type]
        spec,
        num_tokens=num_tokens,
        num_ranks=num_ranks,
        layout="contiguous",
        heads_per_kv=2,
    )
    case = CountCase("route_queries", num_ranks, spec, num_tokens, kind=kind, layout="contiguous")  # type: ignore[arg-type]
    routed, pulled = count(case), count(replace(case, transport="pull"))
    by_key = routed.pairs_N / HEADS.num_heads
    bytes_of_query = HEADS.head_dim * HEADS.element_bytes + 4 + 2 * spec.num_picks  # values, place, picks
    queries = routed.received["forward/queries"] / bytes_of_query / HEADS.num_heads
    kv_rows = pulled.received["forward/kv"] / HEADS.kv_bytes / HEADS.num_kv_heads
    assert np.allclose(by_key, loads.pairs_of_keys_N, rtol=0.15)
    assert np.allclose(queries, loads.queries_N, rtol=0.1)
    assert np.allclose(kv_rows, loads.pulled_N, rtol=0.1, atol=16)
    assert np.isclose(peak_to_mean(by_key), peak_to_mean(loads.pairs_of_keys_N), rtol=0.05)


def test_a_mesh_that_does_not_fit_gives_no_step() -> None:
    assert step_on(llama_job(M), Mesh(1, 16, 1), replace(H100, memory_bytes=40e9)) is None
    assert step_on(llama_job(M), Mesh(1, 16, 1), H100) is not None
