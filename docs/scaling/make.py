"""Write docs/scaling.md and its pictures: `make scaling` (or `python docs/scaling/make.py`). No GPU, some minutes.

    scaling_counts   runs the framework's attention over threads and counts bytes        measured
    scaling_loads    balance over ranks from the chance that a query picks a chunk       calculated
    scaling_memory   the plan's memory estimate, transports' buffers added               calculated
    scaling_steps    step time from the cost model                                       calculated
    scaling_tables, scaling_plots, scaling_text   the page

Same inputs, same page.
"""

from __future__ import annotations

from pathlib import Path

import torch

from moba_kernels.spec import AttentionSpec, Full
from moba_train.parallel.hardware import PRESETS
from moba_train.parallel.rules import TRANSPORT_NAMES
from scaling_loads import KINDS, peak_to_mean
from scaling_memory import Mesh
from scaling_plots import draw_balance, draw_bytes, draw_memory, draw_steps
from scaling_steps import Step, best_step, llama_job, step_on
from scaling_tables import (
    BALANCE_HEAD,
    BYTES_HEAD,
    COUNT_HEAD,
    COUNT_LOAD_HEAD,
    LAYOUTS,
    MEMORY_HEAD,
    PLAN_HEAD,
    SPEC,
    STEP_HEAD,
    TRY_HEAD,
    K,
    M,
    balance_loads,
    balance_rows,
    bytes_of,
    bytes_rows,
    count_load_rows,
    count_rows,
    longest_rows,
    memory_row,
    plan_rows,
    ring_comparison,
    step_row,
    table,
    try_rows,
)
from scaling_text import Facts, page

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = (128 * K, M, 10 * M)
GPUS = (8, 16, 32, 64, 128, 256, 512)
BYTES_GPUS = (8, 64, 512)
BALANCE_RANKS = (8, 64, 512)
COUNT_RANKS = (8, 32, 128, 512)
COUNT_LOAD_RANKS = (8, 32, 128)
IMAGES = ROOT / "docs" / "images"

Steps = dict[tuple[str, int, bool], dict[int, Step | None]]


def all_steps() -> Steps:
    """(hardware, row length, MoBA?) -> GPUs -> the fastest step that fits."""
    return {
        (name, seq_len, moba): {gpus: best_step(llama_job(seq_len, moba=moba), gpus, PRESETS[name]) for gpus in GPUS}
        for name in ("h100", "h200")
        for seq_len in LENGTHS
        for moba in (True, False)
    }


def tables(steps: Steps) -> dict[str, str]:
    """Name of a table in the text -> the table."""
    h100 = PRESETS["h100"]
    found = {
        "counts": table(COUNT_HEAD, count_rows(COUNT_RANKS)),
        "count_loads": table(COUNT_LOAD_HEAD, count_load_rows(COUNT_LOAD_RANKS)),
        "plans": table(PLAN_HEAD, plan_rows(BALANCE_RANKS)),
        "balance": table(BALANCE_HEAD, [row for n in (M, 10 * M) for row in balance_rows(n, BALANCE_RANKS)]),
        "tries": table(TRY_HEAD, try_rows(llama_job(M), Mesh(1, 16, 4), h100)),
    }
    rows = []
    for seq_len in LENGTHS:
        for gpus in BYTES_GPUS:
            step = steps["h100", seq_len, True][gpus]
            rows += [] if step is None else bytes_rows(gpus, step, h100)
    found["bytes"] = table(BYTES_HEAD, rows)
    for name in ("h100", "h200"):
        for seq_len in LENGTHS:
            of_gpus, dense = steps[name, seq_len, True], steps[name, seq_len, False]
            key = f"{name}_{seq_len // K}k"
            found[f"steps_{key}"] = table(STEP_HEAD, [step_row(n, of_gpus[n], dense[n]) for n in GPUS])
            found[f"memory_{key}"] = table(MEMORY_HEAD, [memory_row(n, of_gpus[n]) for n in GPUS])
    return found


def draw(steps: Steps) -> None:
    """All pictures."""
    h100 = PRESETS["h100"]
    lines = {}
    for seq_len, name in zip(LENGTHS, ("128K", "1M", "10M"), strict=True):
        lines[name] = {
            moba: {gpus: step.tokens_s for gpus, step in steps["h100", seq_len, moba].items() if step is not None}
            for moba in (True, False)
        }
    main = {gpus: step for gpus, step in steps["h100", M, True].items() if step is not None}
    draw_steps(main, lines, IMAGES / "scaling_steps.png")
    kinds: tuple[tuple[str, AttentionSpec], ...] = (("MoBA layers, 4096/12", SPEC), ("full layers", Full()))
    panels = {}
    for title, spec in kinds:
        panels[title] = {
            name: {
                cp: received / 1e9
                for cp in GPUS
                if (received := bytes_of(name, spec, llama_job(M), Mesh(1, cp, 1), h100)) is not None
            }
            for name in TRANSPORT_NAMES
            if not (name == "route_queries" and spec == Full())
        }
    draw_bytes(panels, IMAGES / "scaling_bytes.png")
    loads = balance_loads(M, GPUS)
    draw_balance(
        {
            title: {
                (kind, layout): {n: peak_to_mean(getattr(loads[n, layout, kind], name)) for n in GPUS}
                for kind in KINDS
                for layout in LAYOUTS
            }
            for title, name in (
                ("route_queries: attended pairs, where the keys are", "pairs_of_keys_N"),
                ("route_queries: queries received", "queries_N"),
            )
        },
        IMAGES / "scaling_balance.png",
    )
    draw_memory(
        {name: steps["h100", seq_len, True] for seq_len, name in zip(LENGTHS, ("128K", "1M", "10M"), strict=True)},
        h100.memory_bytes / 1e9,
        IMAGES / "scaling_memory.png",
    )


def text(steps: Steps) -> str:
    """The page."""
    facts = Facts(
        best=_fitting(steps["h100", M, True][64]),
        config=_fitting(step_on(llama_job(M), Mesh(4, 16, 1), PRESETS["h100"])),
        far={seq_len: _fitting(steps["h100", seq_len, True][512]) for seq_len in (M, 10 * M)},
        ring=ring_comparison(),
        longest=longest_rows(),
        offload_share=max(step.offload_share for of_gpus in steps.values() for step in of_gpus.values() if step),
    )
    return page(tables(steps), facts)


def main() -> None:
    torch.set_num_threads(1)
    IMAGES.mkdir(parents=True, exist_ok=True)
    steps = all_steps()
    (ROOT / "docs" / "scaling.md").write_text(text(steps), encoding="utf-8")
    draw(steps)
    print("wrote docs/scaling.md and docs/images/scaling_{steps,bytes,balance,memory}.png")


def _fitting(step: Step | None) -> Step:
    assert step is not None, "the page speaks of a step that no longer fits"
    return step


if __name__ == "__main__":
    main()
