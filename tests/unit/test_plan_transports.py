"""`moba-train plan` says how keys and values will travel, for a machine that it names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moba_train.config.load import load_config
from moba_train.config.schema import HardwareConfig, RunConfig
from moba_train.parallel.hardware import PRESETS
from moba_train.plan_view import build_plan, render_plan

CONFIGS = Path(__file__).parents[2] / "configs"


def text_of(config: RunConfig) -> str:
    return render_plan(build_plan(config), config)


def test_one_context_parallel_rank_shows_no_transports() -> None:
    config = load_config(CONFIGS / "smoke.toml")
    assert config.parallel.cp == 1
    assert "transport" not in text_of(config)


def test_every_stage_and_kind_of_layer_has_a_line() -> None:
    config = load_config(CONFIGS / "llama_8b_1m.toml", ["--parallel.transport", "all_gather"])
    lines = text_of(config).splitlines()
    rows = [line.split() for line in lines if " layers (" in line]
    assert [(row[0], row[1], row[3], row[4]) for row in rows] == [
        *((stage, "full", "(32)", "all_gather") for stage in ("128k", "256k", "512k", "1m")),
        ("moba_1m", "MoBA", "(29)", "all_gather"),
        ("moba_1m", "full", "(3)", "all_gather"),
    ]
    # 15 other shards of 65,536 tokens, 2 KV heads of 128, K and V: twice bf16 forward (recompute), once back, fp32 back
    of_full = 15 * 65_536 * 2 * 256 * (2 + 2 + 2 + 4)
    assert rows[-1][5:7] == [f"{of_full / 1e9:.3g}", "GB"]


def test_the_machine_is_named_and_said_to_be_assumed_where_the_run_decides() -> None:
    config = load_config(CONFIGS / "llama_8b_1m.toml")
    assert 'hardware h100, assumed: parallel.hardware.preset = "auto"' in text_of(config)
    given = replace(config, parallel=replace(config.parallel, hardware=HardwareConfig("h200", cross_gb_s=20.0)))
    assert "(hardware h200 (adjusted))" in text_of(given)
    on_cpu = replace(config, engine=replace(config.engine, device="cpu"))
    assert "hardware cpu, assumed" in text_of(on_cpu)


def test_an_automatic_choice_shows_what_comes_next_and_what_cannot_serve() -> None:
    text = text_of(load_config(CONFIGS / "llama_8b_1m.toml"))
    of_full = [line for line in text.splitlines() if " full layers (" in line]
    assert len(of_full) == 5
    for line in of_full:
        overheads = [float(other.split()[1]) for other in line.split("others: ")[1].split(", ")]
        assert len(overheads) == 2 and overheads == sorted(overheads)
    assert text.count("  a2a cannot serve: ") == 1  # for MoBA and full layers alike: 8 query heads, 16 ranks
    assert "  route_queries cannot serve: " in text
    read_ms = 1e3 * PRESETS["h100"].host_read_s
    assert f"pull and route_queries hold a host read a MoBA layer, {read_ms:.3g} ms of what is exposed" in " ".join(
        text.split()
    )
