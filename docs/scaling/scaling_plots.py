"""The pictures of docs/scaling.md: what steps are made of, bytes, balance, memory. One function a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from scaling_memory import Memory
from scaling_steps import Step

Place = Literal["outside lower left", "outside lower center", "outside lower right"]
INK, SOFT = "#1B2430", "#5B6675"
PARTS = (
    # attribute of Step, label, colour
    ("matrix_s", "matrix products", "#8A94A3"),
    ("attention_s", "attention", "#0B9E77"),
    ("wait_s", "uneven attention", "#B6E3D4"),
    ("cp_s", "CP exchanges, exposed", "#E4572E"),
    ("tp_s", "TP exchanges", "#F3A712"),
    ("once_s", "gradients and weights", "#7A4FD0"),
)
MEMORY_PARTS: tuple[tuple[Callable[[Memory], float], str, str], ...] = (
    (lambda memory: memory.plan.weights, "weights", "#2F6FDE"),
    (lambda memory: memory.plan.gradients, "gradients", "#7FA8EE"),
    (lambda memory: memory.plan.optimizer, "optimizer", "#BFD4F7"),
    (lambda memory: memory.plan.kept + memory.plan.data + memory.picks, "checkpoints, picks, data", "#F3A712"),
    (lambda memory: memory.attention, "a layer's attention", "#0B9E77"),
    (lambda memory: memory.exchanged, "gathered keys and values", "#E4572E"),
)
TRANSPORT_COLOURS = {
    "all_gather": "#1B2430",
    "a2a": "#2F6FDE",
    "a2a+all_gather": "#7FA8EE",
    "pull": "#0B9E77",
    "route_queries": "#E4572E",
}
KIND_COLOURS = {"uniform": "#2F6FDE", "zipf": "#E4572E", "recency": "#0B9E77"}


def draw_steps(
    by_gpus: Mapping[int, Step], lines: Mapping[str, Mapping[bool, Mapping[int, float]]], path: Path
) -> None:
    """Left: shares of the step's time by part, over GPUs. Right: tokens/s and GPU, by row length, MoBA and full."""
    figure, (left, right) = _figure(2, "Llama-3.1-8B, MoBA 4096/12 with 3 full layers, H100 (calculated)")
    x = np.arange(len(by_gpus))
    bottom = np.zeros(len(x))
    for name, label, colour in PARTS:
        share = np.array([100 * getattr(step, name) / step.total_s for step in by_gpus.values()])
        left.bar(x, share, bottom=bottom, width=0.72, color=colour, label=label)
        bottom += share
    for i, step in enumerate(by_gpus.values()):
        left.text(i, 101.5, f"{step.total_s:.3g} s", ha="center", va="bottom", fontsize=8, color=INK)
    left.set(xticks=x, xticklabels=[str(gpus) for gpus in by_gpus], xlabel="GPUs", ylim=(0, 111))
    left.set_ylabel("share of the step's time, %")
    left.set_title("1M tokens: where a step of 4M tokens spends its time", fontsize=9.5)
    for (name, points), colour in zip(lines.items(), ("#0B9E77", "#2F6FDE", "#E4572E"), strict=True):
        for moba, style in ((True, "-o"), (False, "--s")):
            label = f"{name}, {'MoBA' if moba else 'all layers full'}"
            right.plot(list(points[moba]), list(points[moba].values()), style, color=colour, ms=3.5, label=label)
    right.set(xlabel="GPUs", ylabel="tokens/s and GPU")
    right.set_title("Throughput of the fastest mesh that fits", fontsize=9.5)
    _log_gpus(right)
    _log_values(right, [30, 100, 300, 1000, 3000])
    right.grid(axis="y", color="#E3E8EE", lw=0.8)
    _save(figure, path, legends=(left, right), columns=3)


def draw_bytes(panels: Mapping[str, Mapping[str, Mapping[int, float]]], path: Path) -> None:
    """A panel per kind of layer: bytes of the busiest rank over N, a line a transport."""
    figure, axes = _figure(len(panels), "One layer, one row of 1M tokens, forward, recomputed forward and backward")
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for name, points in lines.items():
            axis.plot(list(points), list(points.values()), "-o", ms=3.5, label=name)
            axis.lines[-1].set_color(TRANSPORT_COLOURS[name])
        axis.set(xlabel="context-parallel ranks", ylabel="GB received by the busiest rank")
        axis.set_title(title, fontsize=9.5)
        _log_gpus(axis)
        _log_values(axis, [2, 5, 10, 20, 50])
        axis.set_ylim(2, 60)
        axis.grid(color="#E3E8EE", lw=0.8)
    _save(figure, path, legends=axes[:1], columns=5)


def draw_balance(panels: Mapping[str, Mapping[tuple[str, str], Mapping[int, float]]], path: Path) -> None:
    """A panel per load: max/mean over N, a line per (routing, layout)."""
    figure, axes = _figure(len(panels), "Load of the busiest rank / mean, 1M tokens, MoBA 4096/12 (calculated)")
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for (kind, layout), points in lines.items():
            style = "-o" if layout == "zigzag" else "--s"
            axis.plot(list(points), list(points.values()), style, ms=3.5, label=f"{kind}, {layout}")
            axis.lines[-1].set_color(KIND_COLOURS[kind])
        axis.set(xlabel="context-parallel ranks", ylabel="max / mean over ranks")
        axis.set_title(title, fontsize=9.5)
        _log_gpus(axis)
        _log_values(axis, [1, 2, 4, 8, 16, 32])
        axis.set_ylim(0.9, 32)
        axis.grid(color="#E3E8EE", lw=0.8)
    _save(figure, path, legends=axes[:1], columns=3)


def draw_memory(panels: Mapping[str, Mapping[int, Step | None]], limit_gb: float, path: Path) -> None:
    """A panel per row length: GB of one GPU at the attention of a layer's backward pass, by component."""
    figure, axes = _figure(
        len(panels), "Memory of one GPU during a layer's attention, fastest mesh that fits (calculated)"
    )
    for axis, (title, steps) in zip(axes, panels.items(), strict=True):
        x = np.arange(len(steps))
        bottom = np.zeros(len(x))
        for size_of, label, colour in MEMORY_PARTS:
            size = np.array([0.0 if step is None else size_of(step.memory) / 1e9 for step in steps.values()])
            axis.bar(x, size, bottom=bottom, width=0.72, color=colour, label=label)
            bottom += size
        axis.axhline(limit_gb, color=INK, lw=0.9, ls=":")
        axis.text(-0.5, limit_gb + 0.7, f"{limit_gb:.0f} GB", fontsize=7.5, color=INK)
        names = [f"{gpus}\n{_mesh_lines(step)}" for gpus, step in steps.items()]
        axis.set(xticks=x, ylabel="GB", ylim=(0, 1.1 * limit_gb))
        axis.set_title(f"{title} tokens", fontsize=9.5)
        axis.set_xticks(x, names, fontsize=7)
        axis.set_xlabel("GPUs / tp x cp x dp", fontsize=8.5)
    _save(figure, path, legends=axes[:1], columns=6)


def _mesh_lines(step: Step | None) -> str:
    """The mesh under a bar, and whether checkpoints wait in host memory."""
    if step is None:
        return "does\nnot fit"
    return f"{step.mesh}".replace(" ", "") + ("\nhost" if step.offload else "")


def _figure(panels: int, title: str) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(4.9 * panels, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=9.5, color=SOFT)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, colors=SOFT)
        axis.xaxis.label.set_fontsize(8.5)
        axis.yaxis.label.set_fontsize(8.5)
    return figure, list(axes)


def _log_gpus(axis: Axes) -> None:
    """Powers of two on the x axis."""
    axis.set_xscale("log", base=2)
    axis.set_xticks([8, 16, 32, 64, 128, 256, 512])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())


def _log_values(axis: Axes, ticks: Sequence[float]) -> None:
    """A logarithmic y axis with plain numbers."""
    axis.set_yscale("log")
    axis.set_yticks(ticks)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def _save(figure: Figure, path: Path, *, legends: Sequence[Axes], columns: int) -> None:
    """Legends of these panels go below: beside each other if there are several, else in the middle."""
    sides: tuple[Place, ...] = ("outside lower left", "outside lower right")
    middle: tuple[Place, ...] = ("outside lower center",)
    for axis, place in zip(legends, sides if len(legends) == 2 else middle, strict=True):
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc=place, ncols=columns, fontsize=7.5, frameon=False, columnspacing=1.2)
    figure.savefig(path, dpi=110, metadata={"Software": None})


__all__ = ["draw_balance", "draw_bytes", "draw_memory", "draw_steps"]
