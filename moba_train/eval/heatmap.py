"""niah.png: one panel per attention, context length to the right, depth downwards, scores in the cells.

Colours and axes are those of LLMTest_NeedleInAHaystack (github.com/gkamradt): #F0496E at 0, #EBB839 at 0.5 and
#0CD79F at 1. Hatched cells are dense by construction (context_length <= topk * chunk_size): there MoBA is full
attention and the cell says nothing about routing.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from moba_train.errors import DataError
from moba_train.eval.cells import ATTENTION_TITLES, Cell, mean_score

SCORE_COLOURS = ("#F0496E", "#EBB839", "#0CD79F")
INK, SOFT_INK = "#1B2430", "#5B6675"
_CELL_W, _CELL_H = 0.86, 0.5
"""Inches of a cell while the grid is small; large grids shrink theirs."""
_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "hatch.linewidth": 0.7,
    "hatch.color": "#FFFFFF",
    "svg.hashsalt": "niah",
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def format_length(length: int) -> str:
    """A context length as people write it: 512, 2K, 128K, 1M; lengths that are no multiple stay as they are."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if length >= unit and length % unit == 0:
            return f"{length // unit}{name}"
    return str(length)


def format_share(share: float) -> str:
    """A share of 0..1 in whole percent; tenths below one percent."""
    return f"{100 * share:.1f}%" if 0 < share < 0.01 else f"{100 * share:.0f}%"


def _score_map() -> LinearSegmentedColormap:
    return LinearSegmentedColormap.from_list("niah", SCORE_COLOURS)


def _draw_panel(
    axes: Axes, cells: Sequence[Cell], lengths: Sequence[int], depths: Sequence[float], *, font: float
) -> None:
    """One attention: a rectangle per cell, its score, and under it the share of heads that found the needle's chunk."""
    colours = _score_map()
    for cell in cells:
        x, y = lengths.index(cell.context_length), depths.index(cell.depth_percent)
        corner = (x + 0.02, y + 0.03)
        axes.add_patch(Rectangle(corner, 0.96, 0.94, facecolor=colours(cell.score), linewidth=0))
        if cell.dense:
            axes.add_patch(Rectangle(corner, 0.96, 0.94, fill=False, edgecolor="#FFFFFF", hatch="//", lw=0, alpha=0.55))
        if font >= 5:
            two_lines = cell.routed is not None and not cell.dense and font >= 7
            up = 0.4 if two_lines else 0.5
            score = f"{cell.score:.2f}"
            axes.text(x + 0.5, y + up, score, ha="center", va="center", fontsize=font, fontweight="bold")
            if two_lines and cell.routed is not None:
                note = f"routed {format_share(cell.routed)}"
                axes.text(x + 0.5, y + 0.74, note, ha="center", va="center", fontsize=font * 0.62)
    axes.set_xlim(0, len(lengths))
    axes.set_ylim(len(depths), 0)
    axes.set_xticks([i + 0.5 for i in range(len(lengths))], [format_length(length) for length in lengths])
    axes.tick_params(length=0, labelsize=8.5)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _panel_subtitle(cells: Sequence[Cell]) -> str:
    sparse = [cell for cell in cells if not cell.dense]
    known = [(c.routed, c.routed_expected) for c in sparse if c.routed is not None and c.routed_expected is not None]
    text = f"mean score {mean_score(cells, cells[0].attention):.2f}"
    if sparse and len(sparse) < len(cells):
        text += f" (not dense: {mean_score(sparse, cells[0].attention):.2f})"
    if known:
        share, chance = (sum(part) / len(known) for part in zip(*known, strict=True))
        text += f"\nrouted {format_share(share)} (chance {format_share(chance)})"
    return text


def _figure(cells: Sequence[Cell], title: str) -> Figure:
    attentions = list(dict.fromkeys(cell.attention for cell in cells))
    lengths = sorted({cell.context_length for cell in cells})
    depths = sorted({cell.depth_percent for cell in cells})
    cell_w = min(_CELL_W, max(0.34, 5.2 / len(lengths)))
    cell_h = min(_CELL_H, max(0.3, 4.2 / len(depths)))
    font = 9.5 if cell_w >= 0.75 else 7.5 if cell_w >= 0.5 else 5.5
    panel_w, panel_h = max(2.5, cell_w * len(lengths)), max(1.6, cell_h * len(depths))
    left, right, top, bottom, gap = 0.75, 1.05, 1.36, 1.0, 0.35
    width = left + len(attentions) * panel_w + (len(attentions) - 1) * gap + right
    height = top + panel_h + bottom
    figure = Figure(figsize=(width, height), facecolor="white")
    for i, attention in enumerate(attentions):
        box = ((left + i * (panel_w + gap)) / width, bottom / height, panel_w / width, panel_h / height)
        axes = figure.add_axes(box)
        members = [cell for cell in cells if cell.attention == attention]
        _draw_panel(axes, members, lengths, depths, font=font)
        heading = ATTENTION_TITLES.get(attention, attention)
        above = 1 + 0.38 / panel_h
        axes.text(0, above, heading, transform=axes.transAxes, fontsize=11, fontweight="bold", va="bottom")
        below = 1 + 0.34 / panel_h
        axes.text(0, below, _panel_subtitle(members), transform=axes.transAxes, fontsize=7.5, va="top", linespacing=1.3)
        axes.set_xlabel("context length (tokens)", fontsize=8.5)
        ticks = [f"{depth:g}%" for depth in depths] if i == 0 else []
        axes.set_yticks([j + 0.5 for j in range(len(depths))] if i == 0 else [], ticks)
        if i == 0:
            axes.set_ylabel("depth of the needle", fontsize=8.5)
    bar = figure.add_axes(((width - right + 0.3) / width, bottom / height, 0.14 / width, panel_h / height))
    colour_bar = figure.colorbar(ScalarMappable(Normalize(0, 1), _score_map()), cax=bar, ticks=[0, 0.5, 1])
    colour_bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_ylabel("exact match", fontsize=8.5)
    bar.tick_params(length=0, labelsize=8.5)
    figure.text(left / width, 1 - 0.16 / height, "Needle in a haystack", fontsize=13, fontweight="bold", va="top")
    figure.text(left / width, 1 - 0.4 / height, title, fontsize=8.5, color=SOFT_INK, va="top")
    _legend(figure, cells, left)
    return figure


def _legend(figure: Figure, cells: Sequence[Cell], left: float) -> None:
    """What hatching and "routed" mean, only where they occur, below the panels; `left` in inches."""
    width, height = figure.get_size_inches()
    samples = sorted({cell.num_samples for cell in cells})
    count = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
    note = f"{count} samples per cell."
    if any(cell.routed is not None for cell in cells):
        note += " routed: share of (MoBA layer, head) pairs whose answer queries picked the needle's chunk."
    lines = wrap(note, int((width - left) / 0.058))
    figure.text(left / width, 0.1 / height, "\n".join(lines), fontsize=7, color=SOFT_INK, va="bottom")
    if any(cell.dense for cell in cells):
        patch = Patch(facecolor="#9AA5B1", edgecolor="#FFFFFF", hatch="///", linewidth=0)
        label = "dense by construction: length <= topk x chunk_size"
        figure.legend(
            [patch],
            [label],
            loc="lower left",
            bbox_to_anchor=(left / width, (0.13 + 0.12 * len(lines)) / height),
            frameon=False,
            fontsize=7,
            borderpad=0,
            borderaxespad=0,
            handleheight=1.2,
        )


def render_niah(cells: Sequence[Cell], *, title: str, kind: str) -> bytes:
    """The heatmap as the bytes of a "png" or "svg" file.

    Raises:
        DataError: there is no cell to draw.
    """
    if not cells:
        raise DataError("there are no needle scores to draw", fix="run `moba-train eval niah` first")
    buffer = io.BytesIO()
    with rc_context(_RC):
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        _figure(cells, title).savefig(buffer, format=kind, dpi=200, metadata=metadata)
    return buffer.getvalue()


def draw_niah(cells: Sequence[Cell], path: Path, *, title: str) -> None:
    """Write the heatmap to `path` (a PNG), aside and renamed; see `render_niah`."""
    content = render_niah(cells, title=title, kind="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_bytes(content)
    os.replace(aside, path)
