"""The plan says what a run will do, in numbers that were worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from moba_kernels.spec import Full, MoBA
from moba_train.config.load import load_config
from moba_train.plan_view import build_plan, describe_attention, render_plan, row_density

CONFIGS = Path(__file__).parents[2] / "configs"


def dense_mask_density(seq_len: int, chunk_size: int, topk: int) -> float:
    """Attended share of the causal pairs of one document, query by query."""
    attended = 0
    for t in range(seq_len):
        chunk, place = divmod(t, chunk_size)
        attended += place + 1 + chunk_size * min(chunk, topk - 1)
    return attended / (seq_len * (seq_len + 1) / 2)


@pytest.mark.parametrize(
    ("seq_len", "chunk_size", "topk"), [(64, 16, 1), (64, 16, 3), (70, 16, 2), (7, 16, 3), (64, 1, 5)]
)
def test_density_counts_every_pair_of_one_document(seq_len: int, chunk_size: int, topk: int) -> None:
    assert row_density([MoBA(chunk_size, topk)], seq_len) == pytest.approx(
        dense_mask_density(seq_len, chunk_size, topk)
    )


def test_density_is_the_mean_over_layers() -> None:
    sparse = dense_mask_density(64, 16, 2)
    assert row_density([MoBA(16, 2), Full(), Full()], 64) == pytest.approx((sparse + 2) / 3)


def test_density_is_one_where_topk_covers_the_row() -> None:
    assert row_density([MoBA(16, 4)], 64) == 1.0


@pytest.mark.parametrize(
    ("specs", "text"),
    [
        ([Full()], "L0 full"),
        ([MoBA(64, 3)] * 3 + [Full()] * 2, "L0-2 MoBA 64/3, L3-4 full"),
        ([Full(), MoBA(8, 2, "group"), Full()], "L0 full, L1 MoBA 8/2 per group, L2 full"),
    ],
)
def test_attention_is_described_in_runs_of_layers(specs: list[Full | MoBA], text: str) -> None:
    assert describe_attention(specs) == text


def test_the_smoke_plan_has_the_right_numbers() -> None:
    plan = build_plan(load_config(CONFIGS / "smoke.toml"))
    # embedding 1024 * 64; a layer: q, k, v, o 4 * 64 * 64, MLP 3 * 64 * 192, two norms, key conv 64 * 3; final norm
    assert plan.num_parameters == 1024 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 192 + 2 * 64 + 64 * 3) + 64
    assert (plan.total_tokens, plan.total_steps) == (30_720, 30)
    moba, full = plan.stages
    assert (moba.steps, moba.rows_per_step, moba.seq_len) == (20, 2, 512)
    assert moba.attention == "L0 MoBA 16/3, L1 full"
    assert moba.density == pytest.approx((dense_mask_density(512, 16, 3) + 1) / 2)
    assert moba.mix == "text 50%, needle_64 50%"
    assert (full.attention, full.density, full.steps) == ("L0-1 full", 1.0, 10)


def test_the_million_token_plan_shows_the_paper_s_layers_and_mesh() -> None:
    config = load_config(CONFIGS / "llama_8b_1m.toml")
    text = render_plan(build_plan(config), config)
    assert "8,030,261,248" in text
    assert "tp 4 x cp 16 x pp 1 x dp 1 (64 ranks), zigzag" in text
    assert "L0-28 MoBA 4096/12, L29-31 full" in text
    row = next(line for line in text.splitlines() if line.startswith("moba_1m "))
    assert row.split()[1:5] == ["100,663,296,000", "24,000", "4", "1,048,576"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_has_a_plan(path: Path) -> None:
    config = load_config(path)
    text = render_plan(build_plan(config), config)
    for stage in config.stages:
        assert any(line.startswith(stage.name + " ") for line in text.splitlines())
    assert max(map(len, text.splitlines())) <= 160


def test_the_plan_tells_the_position_embedding_of_each_stage() -> None:
    config = load_config(CONFIGS / "llama_8b_1m.toml")
    lines = render_plan(build_plan(config), config).splitlines()
    begin = lines.index("position embedding (RoPE) of each stage")
    assert [line.split(maxsplit=1) for line in lines[begin + 1 : begin + 6]] == [
        ["128k", "base 500,000, llama3 scaling, factor 8 from 8,192 tokens"],
        ["256k", "base 500,000, llama3 scaling, factor 64 from 8,192 tokens"],
        *([name, "as above"] for name in ("512k", "1m", "moba_1m")),
    ]
