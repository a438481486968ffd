"""The needle grid as a table for the terminal: rich on a TTY, aligned plain text otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moba_train.eval.cells import ATTENTION_TITLES, NiahRecord, mean_by_length, mean_score, summarise
from moba_train.eval.heatmap import SCORE_COLOURS, format_share

_TITLES = {"moba": "MoBA", "full": "full", "random": "random routing"}
HEADER = ("attention", "length", "score", "95% interval", "worst", "log p", "routed", "chance")


def niah_rows(records: Sequence[NiahRecord]) -> list[tuple[str, ...]]:
    """One row per (attention, context length), over all depths; `HEADER` names the columns. "dense" marks lengths
    at which MoBA attends to everything."""
    cells = summarise(records)
    rows: list[tuple[str, ...]] = []
    for (attention, length), (score, low, high, _) in sorted(
        mean_by_length(records).items(), key=lambda item: ([c.attention for c in cells].index(item[0][0]), item[0][1])
    ):
        members = [cell for cell in cells if (cell.attention, cell.context_length) == (attention, length)]
        worst = min(members, key=lambda cell: cell.score)
        routed = [c.routed for c in members if c.routed is not None]
        chance = [c.routed_expected for c in members if c.routed_expected is not None]
        dense = members[0].dense
        rows.append(
            (
                _TITLES.get(attention, attention),
                str(length),
                f"{score:.3f}",
                f"{low:.2f}-{high:.2f}",
                f"{worst.score:.2f} at {worst.depth_percent:g}%",
                f"{sum(cell.log_prob for cell in members) / len(members):.2f}",
                "dense" if dense else format_share(sum(routed) / len(routed)) if routed else "-",
                "dense" if dense else format_share(sum(chance) / len(chance)) if chance else "-",
            )
        )
    return rows


def print_niah_table(records: Sequence[NiahRecord], console: Console) -> None:
    """Print the grid's table and the mean score per attention to `console`."""
    cells = summarise(records)
    style = box.SIMPLE_HEAD if console.is_terminal else None
    table = Table(box=style, title=None, header_style="bold", pad_edge=False, show_edge=False)
    for name in HEADER:
        table.add_column(name, justify="left" if name == "attention" else "right", no_wrap=True)
    for row in niah_rows(records):
        score = float(row[2])
        colour = SCORE_COLOURS[0 if score < 0.5 else 1 if score < 0.9 else 2]
        table.add_row(*row[:2], Text(row[2], style=colour), *row[3:])
    console.print(table)
    for attention in dict.fromkeys(cell.attention for cell in cells):
        title = ATTENTION_TITLES.get(attention, attention)
        console.print(f"mean over cells, {title}: {mean_score(cells, attention):.3f}", highlight=False)
