"""Figures as people read them: a table on a terminal, plain lines in a log, Markdown and a picture in results/."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .figures import GIB, MODES, Mode, figures_of
from .records import Environment, Record, replace_text
from .targets import Verdict

BUSY = 1.0
"""A run's own threads make a load; so much more is somebody else's."""
COMMON = (
    "shape",
    "pair ratio",
    "ours",
    "dense",
    "paper",
    "over dense",
    "of ratio",
    "of floor",
    "over paper",
    "TFLOP/s",
)
HEADER: dict[Mode, tuple[str, ...]] = {"forward": COMMON, "both": (*COMMON, "peak GiB")}
LEGEND = """\
- *pair ratio*: causal pairs over attended pairs, what sparsity alone could gain. *ours*, *dense*, *paper*: median
  seconds; dense is the fastest of PyTorch's causal kernels (named), paper the flash backend, the algorithm of arXiv
  2502.13189. Ours includes pooling and gate.
- *over dense*: dense / ours. *of ratio*: over dense / pair ratio. *of floor*: the time of pairs and gate at the dense
  kernel's rate (FLOPs: forward 4 D, backward 10 D a pair and head; gate 2 D a query head and candidate chunk) / ours.
- *TFLOP/s*: pairs and gate over our time. *peak GiB*: forward and backward, beyond the inputs (q, k, v, dout) / in all.
- `-`: not measured; nothing is extrapolated.
- Inputs are standard normal, so queries spread over all chunks: the hard case for locality.
"""


@dataclass(frozen=True)
class Page:
    """What a results file says besides its figures."""

    environment: Environment
    commands: tuple[str, ...]
    gates: Sequence[Record]
    shapes: Sequence[Record]
    verdicts: Sequence[Verdict]
    left_out: Sequence[str]
    """Shapes that the time budget did not allow."""
    backend: str
    toy: bool


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.3g}{unit}"


def cells(record: Record, mode: Mode) -> tuple[str, ...]:
    """One line of the table, as HEADER names the columns."""
    f = figures_of(record, mode)
    dense = _time(f.dense_s) + (f" ({f.dense})" if f.dense not in (None, "dense") else "")
    line = (
        f.shape.name,
        _number(f.ratio, "x"),
        _time(f.ours_s),
        dense,
        _time(f.paper_s),
        _number(f.speedup, "x"),
        _number(f.share_of_ratio),
        _number(f.share_of_floor),
        _number(f.over_paper, "x"),
        _number(f.tflops),
    )
    memory = record["memory"]
    return (*line, f"{memory['beyond'] / GIB:.2f} / {memory['total'] / GIB:.2f}") if mode == "both" else line


def rows(records: Sequence[Record], mode: Mode) -> list[tuple[str, ...]]:
    return [cells(record, mode) for record in records if not record.get("failed")]


def show(records: Sequence[Record]) -> None:
    """On a terminal with rich a table, elsewhere plain lines."""
    for mode, title in MODES.items():
        lines = rows(records, mode)
        if not (sys.stdout.isatty() and _show_rich(title, HEADER[mode], lines)):
            print(f"\n{title}")
            for line in aligned([HEADER[mode], *lines]):
                print(line)


def _show_rich(title: str, header: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return False
    table = Table(title=title)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right")
    for line in lines:
        table.add_row(*line)
    Console().print(table)
    return True


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, the first one flush left."""
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return [
        "  ".join((line[0].ljust(first), *(cell.rjust(w) for cell, w in zip(line[1:], others, strict=True))))
        for line in lines
    ]


def markdown(page: Page) -> str:
    """The results file."""
    e = page.environment
    parts = [f"# {e.device}{' (toy shapes: they say nothing about speed)' if page.toy else ''}\n"]
    versions = f"Python {e.python}, torch {e.torch}, triton {e.triton}, numpy {e.numpy}, CPU threads: {e.threads}"
    commands = "\n".join(page.commands)
    parts.append(f"Commit `{e.commit}`, tree {e.tree}, digest of the kernels' code {e.source}. {versions}.\n")
    parts.append(f"Measured: the {page.backend} backend.\n")
    parts.append(f"```\n{commands}\n```\n")
    green = sum(gate["ok"] for gate in page.gates)
    parts.append(f"Parity gate: {green} of {len(page.gates)} green.\n")
    if page.verdicts:
        parts.append("## Targets\n\n```\n" + "\n".join(map(str, page.verdicts)) + "\n```\n")
    for mode, title in MODES.items():
        lines = ["| " + " | ".join(line) + " |" for line in (HEADER[mode], *rows(page.shapes, mode))]
        lines.insert(1, "|---" + "|---:" * (len(HEADER[mode]) - 1) + "|")
        parts.append(f"## {title.capitalize()}\n\n" + "\n".join(lines) + "\n")
    parts.append(LEGEND)
    notes = notes_of(page)
    if notes:
        parts.append("Notes:\n\n" + "\n".join(f"- {note}" for note in notes) + "\n")
    parts.append("<details><summary>Parity gate</summary>\n\n```\n" + "\n".join(map(gate_line, page.gates)) + "\n```\n")
    parts.append("</details>\n")
    return "\n".join(parts)


def gate_line(gate: Record) -> str:
    return f"{gate['name']}: {gate['verdict']}"


def notes_of(page: Page) -> list[str]:
    """What is missing from the tables, and why."""
    notes = []
    for record in page.shapes:
        name = record["name"]
        if record.get("failed"):
            notes.append(f"{name}: failed, {record['failed']}")
            continue
        if not record["shape"]["dense"]:
            notes.append(f"{name}: dense attention was not run (it would take too long); no speed-up is stated")
        if record["load"] > page.environment.threads + BUSY:
            notes.append(f"{name}: the machine was busy before it was measured (load {record['load']:.1f})")
        notes += [f"{name}: {contestant}: {reason}" for contestant, reason in record["unable"].items()]
    return notes + [f"{name}: not measured, the time budget was spent" for name in page.left_out]


def write(page: Page, path: Path) -> None:
    replace_text(path, markdown(page))


def draw(records: Sequence[Record], path: Path, title: str) -> str | None:
    """Speed-up against pair ratio as a PNG. Returns why there is none, or None."""
    try:
        import matplotlib
    except ImportError:
        return "no picture: matplotlib is not installed"
    points = {
        mode: [f for r in records if not r.get("failed") for f in [figures_of(r, mode)] if f.speedup] for mode in MODES
    }
    if not any(points.values()):
        return "no picture: dense attention was timed at no shape"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.8))
    highest = 1.3 * max(f.ratio for group in points.values() for f in group)
    for slope, label in ((1.0, "pair ratio"), (0.6, "0.6 of it")):
        style = "--" if slope < 1 else "-"
        axes.plot([0.9, highest], [0.9 * slope, highest * slope], color="0.7", ls=style, label=label)
    for (mode, group), marker in zip(points.items(), "os", strict=True):
        axes.scatter([f.ratio for f in group], [f.speedup or 0.0 for f in group], marker=marker, label=MODES[mode])
    axes.set(xscale="log", yscale="log", xlabel="causal pairs / attended pairs", ylabel="speed-up over dense attention")
    axes.set_title(title)
    axes.legend()
    aside = path.with_name(path.name + ".part")
    figure.savefig(aside, dpi=150, format="png", bbox_inches="tight")
    pyplot.close(figure)
    aside.replace(path)
    return None
