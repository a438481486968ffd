"""The short table at the end of a run: losses per stage, the needle's mean score, where the report is."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moba_train.eval.cells import mean_score, summarise
from moba_train.report.run_data import RunData, last_number, load_run
from moba_train.report.stages import STAGE_HEADER, stage_rows

_COLUMNS = ("stage", "attention", "train loss, end", "held-out MoBA", "held-out full")
_SHORT = ("stage", "attention", "train loss", "held-out MoBA", "held-out full")


def niah_line(run: RunData) -> str:
    """Mean needle score per attention over the measured grid, or that it was not measured."""
    cells = summarise(run.niah)
    known = [(a, mean_score(cells, a)) for a in dict.fromkeys(cell.attention for cell in cells)]
    if not known:
        return "not measured"
    return ", ".join(f"{attention} {score:.3f}" for attention, score in known if score is not None)


def bits_line(run: RunData) -> str:
    """Bits per byte on held-out text, the newest under each attention, beside the unigram baseline."""
    names = ("moba", "full", "unigram")
    known = [(name, last_number(run.steps, f"eval/bits_per_byte_{name}")) for name in names]
    return ", ".join(f"{name} {value:.3f}" for name, value in known if value is not None) or "not measured"


def summary_table(run_dir: Path) -> RenderableType:
    """A rich renderable for the terminal.

    Raises:
        DataError: see `load_run`.
    """
    run = load_run(run_dir)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in _SHORT:
        table.add_column(name, justify="left" if name in ("stage", "attention") else "right", overflow="fold")
    places = [STAGE_HEADER.index(name) for name in _COLUMNS]
    for row in stage_rows(run):
        table.add_row(*(Text(row[place]) for place in places))
    report = run_dir / "report.html"
    lines = [
        ("needle in a haystack, mean", niah_line(run)),
        ("bits per byte, held-out", bits_line(run)),
        ("report", str(report) if report.is_file() else f"not written yet: moba-train report {run_dir}"),
    ]
    return Group(table, Text(), *(Text(f"{name}: {value}") for name, value in lines))
