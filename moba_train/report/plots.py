"""The report's pictures: matplotlib figures as SVG, one function per picture, each None where there is nothing to draw.

All charts over steps share one look: stages are shaded (MoBA green, full attention blue) and named at the top; a strong
line stands where the end of a stage was decided.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moba_train.report.run_data import RunData, StageSpan, Step, last_number, number, series

INK, SOFT_INK, GRID = "#1B2430", "#5B6675", "#E3E8EE"
COLOURS = {"train": "#8A94A3", "moba": "#0B9E77", "full": "#2F6FDE", "unigram": "#A0522D", "other": "#7A4FD0"}
SHADES = {"moba": "#DDF6EE", "full": "#E2ECFC", "": "#EEF0F3"}
_DISTANCES = LinearSegmentedColormap.from_list("distances", ("#BDEBDB", "#0B9E77", "#2F6FDE", "#1B2430"))
WIDTHS = {"moba": 2.8, "full": 1.3}
"""Where both coincide (a dense pattern), the thin line lies on the thick one and both are seen."""
MAX_POINTS = 1200
"""Points of a drawn line; longer series are averaged in equal pieces."""
_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "svg.hashsalt": "report",
    "text.parse_math": False,
    "axes.edgecolor": "#B9C2CC",
    "axes.labelcolor": SOFT_INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SOFT_INK,
    "ytick.color": SOFT_INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def _svg(draw: Callable[[], Figure]) -> bytes:
    buffer = io.BytesIO()
    with rc_context(_RC):
        draw().savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def human(value: float, _: object = None) -> str:
    """1234567 -> 1.23M: three digits and a unit."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.4g}"


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points: means over equal pieces."""
    if len(x) <= MAX_POINTS:
        return list(x), list(y)
    pieces = MAX_POINTS
    return (
        [float(part.mean()) for part in np.array_split(np.asarray(x, dtype=np.float64), pieces)],
        [float(part.mean()) for part in np.array_split(np.asarray(y, dtype=np.float64), pieces)],
    )


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Mean over the last `span` values (fewer at the start)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - span)
    return [float(mean) for mean in (sums[ends] - sums[starts]) / (ends - starts)]


def _chart(
    stages: Sequence[StageSpan], *, width: float = 9.6, height: float = 3.2, label: str = ""
) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.xaxis.set_major_formatter(FuncFormatter(human))
    axes.yaxis.set_major_formatter(FuncFormatter(human))
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    first, last = stages[0].first_step - 1, stages[-1].last_step
    axes.set_xlim(first, last + 0.012 * (last - first))
    letter = 0.085 / width * (last - first)  # width of a letter in steps
    for stage in stages:
        start, end = stage.first_step - 1, stage.last_step
        axes.axvspan(start, end, color=SHADES.get(stage.attention, SHADES[""]), alpha=0.75, linewidth=0, zorder=0)
        if stage.decided:
            axes.axvline(end, color=INK, linewidth=1.1, zorder=1, gid=f"decided-{end}")
        if start > first:
            axes.axvline(start, color="#B9C2CC", linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
        if end - start > letter * len(stage.name):
            axes.text(
                (start + end) / 2,
                1.01,
                stage.name,
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=7.5,
                color=SOFT_INK,
            )
    return figure, axes


def _line(
    axes: Axes, x: Sequence[float], y: Sequence[float], *, colour: str, label: str = "", width: float = 1.5
) -> None:
    """A thinned line with a marker where it has few points."""
    marker = "o" if len(x) <= 40 else ""
    x, y = thin(x, y)
    axes.plot(x, y, color=colour, label=label or "_", marker=marker, markersize=3, linewidth=width)


def _few_sigma(axes: Axes, values: Sequence[float]) -> None:
    """Let single spikes leave the picture: the axis ends a little above the 99.5th percentile of long series."""
    if len(values) >= 200:
        low, high = float(np.min(values)), float(np.percentile(values, 99.5))
        axes.set_ylim(low - 0.05 * (high - low), high + 0.08 * (high - low) + 1e-12)


def plot_loss(run: RunData) -> bytes | None:
    """Training loss, its moving mean, and held-out loss under MoBA and under full attention."""
    x, y = series(run.steps, "train/loss")
    if not x:
        return None

    def draw() -> Figure:
        figure, axes = _chart(run.stages, height=3.6, label="loss (nats per token)")
        _line(axes, x, y, colour=COLOURS["train"], label="training", width=0.6)
        for i, stage in enumerate(run.stages):  # the mean starts anew with every stage: its data may be other data
            steps, losses = series(stage.steps, "train/loss")
            smoothed = smooth(losses, max(5, len(y) // 60))
            label = "training, moving mean" if i == 0 else ""
            if len(losses) >= 20:
                axes.plot(*thin(steps, smoothed), color=INK, linewidth=1.4, label=label)
        for attention, name in (("moba", "held-out, MoBA"), ("full", "held-out, full attention")):
            when, losses = series(run.steps, f"eval/loss_{attention}")
            if when:
                _line(axes, when, losses, colour=COLOURS[attention], label=name, width=WIDTHS[attention])
        _few_sigma(axes, y)
        axes.legend(loc="upper right", ncols=2)
        return figure

    return _svg(draw)


def plot_metric(run: RunData, key: str, label: str, *, from_zero: bool = False) -> bytes | None:
    """One number over the steps, half as wide as the page."""
    x, y = series(run.steps, key)
    if not x:
        return None

    def draw() -> Figure:
        figure, axes = _chart(run.stages, width=4.7, height=2.3, label=label)
        _line(axes, x, y, colour=INK, width=1.1)
        _few_sigma(axes, y)
        if from_zero:
            axes.set_ylim(bottom=0)
        return figure

    return _svg(draw)


def plot_routing(run: RunData) -> bytes | None:
    """Routing entropy and the most-picked chunk's share, both in 0..1."""
    lines = [("moba/entropy", "entropy of picks (share of the maximum)"), ("moba/top_chunk_share", "top chunk's share")]
    known = [(name, series(run.steps, key)) for key, name in lines if series(run.steps, key)[0]]
    if not known:
        return None

    def draw() -> Figure:
        figure, axes = _chart(run.stages, width=4.7, height=2.5)
        for (name, (x, y)), colour in zip(known, (COLOURS["moba"], COLOURS["other"]), strict=False):
            _line(axes, x, y, colour=colour, label=name, width=1.2)
        axes.set_ylim(0, 1.18)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
        axes.legend(loc="upper left")
        return figure

    return _svg(draw)


def distance_keys(steps: Sequence[Step]) -> list[str]:
    """The `moba/distance_*` keys of a run, nearest first."""
    keys = {key for step in steps for key in step if key.startswith("moba/distance_")}
    return sorted(keys, key=lambda key: [int(part) for part in key.split("_") if part.isdigit()] or [1 << 62])


def plot_distance(run: RunData) -> bytes | None:
    """Share of picks by distance in chunks, stacked."""
    keys = distance_keys(run.steps)
    steps = [step for step in run.steps if any(number(step, key) is not None for key in keys)]
    if not steps:
        return None
    shares = np.array([[number(step, key) or 0.0 for step in steps] for key in keys])
    x = [int(step["step"]) for step in steps]

    def draw() -> Figure:
        figure, axes = _chart(run.stages, width=4.7, height=2.5, label="share of picks")
        names = [key.removeprefix("moba/distance_").replace("_", "-") for key in keys]
        colours = [to_hex(part) for part in _DISTANCES(np.linspace(0.15, 0.95, len(keys)))]
        if len(x) == 1:
            bottom = np.concatenate([[0.0], np.cumsum(shares[:, 0])])
            for i, name in enumerate(names):
                axes.bar(x[0] - 0.5, shares[i, 0], bottom=bottom[i], width=0.4, color=colours[i], label=name)
        else:
            axes.stackplot(x, shares, labels=names, colors=colours, alpha=0.9, linewidth=0)
        axes.set_ylim(0, 1)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title="chunks back", title_fontsize=7.5, reverse=True)
        return figure

    return _svg(draw)


def plot_pair(run: RunData, prefix: str, label: str, *, baseline: str = "", unit_range: bool = False) -> bytes | None:
    """`prefix`_moba and `prefix`_full over the steps, with an optional baseline key (the unigram model)."""
    pairs = [
        (name, colour, series(run.steps, f"{prefix}_{name}")) for name, colour in COLOURS.items() if name != "train"
    ]
    known = [(name, colour, xy) for name, colour, xy in pairs if name in ("moba", "full") and xy[0]]
    if not known:
        return None
    level = last_number(run.steps, baseline) if baseline else None

    def draw() -> Figure:
        figure, axes = _chart(run.stages, height=2.7, label=label)
        for name, colour, (x, y) in known:
            _line(axes, x, y, colour=colour, label="MoBA" if name == "moba" else "full attention", width=WIDTHS[name])
        if level is not None:
            axes.axhline(
                level, color=COLOURS["unigram"], linewidth=1.2, linestyle=(0, (4, 3)), label="unigram baseline"
            )
        if unit_range:
            axes.set_ylim(-0.04, 1.04)
        axes.legend(loc="best")
        return figure

    return _svg(draw)


def _position_evaluations(stage: StageSpan) -> list[tuple[str, Step]]:
    """The first and the last step of a stage that hold a loss by position."""
    known = [
        s for s in stage.steps if any(isinstance(s.get(f"eval/position_loss_{a}"), list) for a in ("moba", "full"))
    ]
    if not known:
        return []
    first, last = known[0], known[-1]
    return [("first", first), ("last", last)] if first is not last else [("last", last)]


def plot_position_loss(run: RunData) -> bytes | None:
    """Held-out loss by position in the document: a panel per stage, first and last evaluation, MoBA and full."""
    panels = [(stage, found) for stage in run.stages if (found := _position_evaluations(stage))]
    if not panels:
        return None

    def draw() -> Figure:
        figure = Figure(figsize=(9.6, 3.4 * ((len(panels) + 2) // 3)), layout="constrained")
        columns = min(3, len(panels))
        for i, (stage, found) in enumerate(panels):
            axes = figure.add_subplot((len(panels) + columns - 1) // columns, columns, i + 1)
            axes.grid(axis="y", color=GRID, linewidth=0.8)
            axes.set_title(stage.name, fontsize=9, color=INK, loc="left", fontweight="bold")
            axes.set_xlabel("position in the document")
            axes.xaxis.set_major_formatter(FuncFormatter(human))
            for when, step in found:
                _position_lines(axes, when, step)
            if i % columns == 0:
                axes.set_ylabel("held-out loss")
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2, fontsize=7)
        return figure

    return _svg(draw)


def _position_lines(axes: Axes, when: str, step: Step) -> None:
    for attention, title in (("moba", "MoBA"), ("full", "full")):
        losses, edges = step.get(f"eval/position_loss_{attention}"), step.get("eval/position_edges")
        if not isinstance(losses, list) or not isinstance(edges, list) or len(edges) != len(losses) + 1:
            continue
        points = [
            ((edges[j] + edges[j + 1]) / 2, loss) for j, loss in enumerate(losses) if isinstance(loss, int | float)
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                color=COLOURS[attention],
                linestyle="-" if when == "last" else (0, (2, 2)),
                linewidth=WIDTHS[attention] if when == "last" else 1.0,
                marker="o",
                markersize=2.6,
                label=f"{title}, step {step['step']}",
            )
