"""`build_report`: the sections of the report, in the order in which a reader asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from moba_train.data.files import published
from moba_train.eval.cells import by_chunk_offset, mean_score, summarise
from moba_train.eval.heatmap import format_share, render_niah
from moba_train.eval.table import HEADER as NIAH_HEADER
from moba_train.eval.table import niah_rows
from moba_train.report import page, plots
from moba_train.report.communication import communication
from moba_train.report.run_data import RunData, last_number, load_run, number
from moba_train.report.stages import (
    STAGE_HEADER,
    UNKNOWN,
    UNTIL_HEADER,
    fixed,
    mean_rate,
    stage_rows,
    switches,
    until_rows,
)
from moba_train.train.figures import memory_rows, take_memory


def _tiles(run: RunData) -> str:
    """Key figures; the ones that are not known are left out."""
    cells = summarise(run.niah)
    seconds = sum(number(step, "perf/step_time_s") or 0.0 for step in run.steps)
    numbers = [
        (last_number(run.steps, "train/loss"), "training loss, last step", 3),
        (last_number(run.steps, "eval/loss_moba"), "held-out loss, MoBA", 3),
        (last_number(run.steps, "eval/loss_full"), "held-out loss, full attention", 3),
        (last_number(run.steps, "eval/bits_per_byte_full"), "bits per byte, full attention", 3),
        (last_number(run.steps, "eval/bits_per_byte_unigram"), "bits per byte, unigram baseline", 3),
        (mean_score(cells, "moba"), "needle score, MoBA", 2),
        (mean_score(cells, "full"), "needle score, full attention", 2),
        (mean_score(cells, "random"), "needle score, random routing", 2),
    ]
    values = [(fixed(value, digits), name) for value, name, digits in numbers if value is not None]
    tokens = last_number(run.steps, "tokens")
    if tokens is not None:
        values.append((plots.human(tokens), "tokens"))
    if seconds:
        values.append((duration(seconds), "time in steps"))
    return page.tiles(values)


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _pair(*pictures: str) -> str:
    return f'<div class="pair">{"".join(pictures)}</div>'


def _stages(run: RunData) -> list[str]:
    text = (
        "MoBA c/k: chunks of c tokens, k of them per query, its own included. Density: attended pairs / causal pairs."
    )
    parts = [page.paragraph(text), page.table(STAGE_HEADER, stage_rows(run), text_columns=2)]
    watched = until_rows(run)
    if not watched:
        return parts
    pictures = []
    for stage in run.stages:  # each on a scale of its own: a loss and a gap have nothing in common
        alone, caption = replace(run, steps=stage.steps, stages=(stage,)), f"What stage {stage.name} watches"
        content = plots.plot_metric(alone, "until/value", "nats per token")
        pictures.append(page.picture(content, caption, caption=caption))
    note = (
        "A stage with `until` ends at the evaluation after which the number it watches has not fallen enough; a strong "
        "line marks where that was decided, here and in every chart."
    )
    return [*parts, page.paragraph(note), page.table(UNTIL_HEADER, watched, text_columns=2), _pair(*pictures)]


def _loss(run: RunData) -> list[str]:
    note = (
        "Green stages run MoBA, blue ones full attention. Held-out text is scored under both, whatever the stage runs."
    )
    return [page.paragraph(note), page.picture(plots.plot_loss(run), "loss over the steps")]


def _needle(run: RunData) -> list[str]:
    cells = summarise(run.niah)
    if not cells:
        return []
    one = run.niah[0]
    title = f"stage {one.stage}, step {one.step}: chunk_size {one.chunk_size}, topk {one.topk}"
    alt = "needle in a haystack: score by length and depth"
    heatmap = page.picture(render_niah(cells, title=title, kind="svg"), alt)
    parts = [
        page.paragraph(
            "One sentence is hidden in held-out text and asked for at the end. Every answer token must be the arg-max "
            "(teacher-forced). Random routing is the control: MoBA with uniformly random picks."
        ),
        f'<div class="scroll wide">{heatmap}</div>',
        page.table(NIAH_HEADER, niah_rows(run.niah)),
    ]
    offsets = by_chunk_offset(run.niah, "moba")
    if offsets:
        rows = [
            (
                "across two chunks"
                if cell.depth_percent == 100
                else f"{cell.depth_percent:g} to {cell.depth_percent + 25:g} % of the chunk",
                f"{cell.score:.3f}",
                f"{cell.low:.2f}-{cell.high:.2f}",
                UNKNOWN if cell.routed is None else format_share(cell.routed),
                UNKNOWN if cell.routed_expected is None else format_share(cell.routed_expected),
                str(cell.num_samples),
            )
            for cell in offsets
        ]
        header = ("needle begins at", "score", "95% interval", "routed", "chance", "samples")
        parts += ["<h3>By place in the chunk (MoBA, cells that are not dense)</h3>", page.table(header, rows)]
    return parts


def _needle_in_training(run: RunData) -> list[str]:
    picture = plots.plot_pair(run, "eval/niah", "needle score", unit_range=True)
    parts = [page.picture(picture, "needle score over the steps", caption="Needle score during training")]
    for switch in switches(run):
        names = (
            f"{switch.before.name} ({switch.before.attention or '?'})",
            f"{switch.after.name} ({switch.after.attention or '?'})",
        )
        heading = page.table(
            (f"step {switch.before.last_step}", f"before: {names[0]}", f"after: {names[1]}"), switch.rows
        )
        parts.append(heading)
    if len(run.stages) > 1 or picture is not None:
        return parts
    return []


def _held_out(run: RunData) -> list[str]:
    bits = plots.plot_pair(run, "eval/bits_per_byte", "bits per byte", baseline="eval/bits_per_byte_unigram")
    trailing = plots.plot_pair(run, "eval/trailing_loss", "loss, trailing sixteenth")
    position = plots.plot_position_loss(run)
    if bits is None and trailing is None and position is None:
        return []
    note = (
        "Position counts inside the document, as attention sees it. A loss that falls along the document shows that "
        "far context is used; the trailing sixteenth is where sparse attention loses first."
    )
    return [
        page.picture(bits, "bits per byte over the steps", caption="Bits per byte of held-out text"),
        page.picture(trailing, "trailing loss over the steps", caption="Loss on the trailing sixteenth"),
        "<h3>Loss by position</h3>" + page.paragraph(note) if position is not None else "",
        page.picture(position, "loss by position in the document"),
    ]


def _routing(run: RunData) -> list[str]:
    routing, distance = plots.plot_routing(run), plots.plot_distance(run)
    if routing is None and distance is None:
        return []
    note = (
        "How MoBA's picks spread: entropy 1 = all chunks alike. Distance is counted in chunks before the query's own."
    )
    return [
        page.paragraph(note),
        _pair(
            page.picture(routing, "routing entropy", caption="Spread of the picks"),
            page.picture(distance, "share of picks by distance", caption="Picks by distance"),
        ),
    ]


def _memory(run: RunData) -> list[str]:
    largest: dict[str, float] = {}
    for step in run.steps:
        take_memory(largest, {key: value for key in step if (value := number(step, key)) is not None})
    rows = [(name, how, f"{gib:.3f}") for name, gib, how in memory_rows(largest)]
    note = (
        "GiB of the rank that needs most. What is counted lives as long as the run; attention, mlp, loss, reduce and "
        "step follow one another, so that the components add up to more than the peak."
    )
    return [page.paragraph(note), page.table(("component", "how it was got", "GiB"), rows, text_columns=2)]


_METRICS = (
    ("train/lr", "learning rate", "Learning rate", True),
    ("train/grad_norm", "norm", "Gradient norm before clipping", True),
    ("perf/tokens_per_s", "tokens/s", "Throughput", True),
    ("train/density", "density", "Density of attention", True),
    ("perf/mfu", "share", "Model FLOPs utilisation", True),
    ("memory/peak_gib", "GiB", "Peak memory", True),
)


def _course(run: RunData) -> list[str]:
    drawn = [
        page.picture(plots.plot_metric(run, key, label, from_zero=zero), caption, caption=caption)
        for key, label, caption, zero in _METRICS
    ]
    return [_pair(*(picture for picture in drawn if picture))] if any(drawn) else []


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """A nested mapping as (dotted name, text)."""
    if isinstance(value, Mapping):
        return [pair for key, part in value.items() for pair in _flat(part, f"{name}.{key}" if name else str(key))]
    return [(name, str(value))]


def _configuration(run: RunData) -> list[str]:
    parts = []
    known = {key: run.state[key] for key in ("versions", "mesh", "step", "tokens", "seed") if key in run.state}
    if known:
        parts.append(page.facts(_flat(known)))
    if run.config_text:
        parts.append(f"<details open><summary>config.toml</summary><pre>{escape(run.config_text)}</pre></details>")
    return parts


def _missing(run: RunData, sections: Mapping[str, list[str]]) -> list[str]:
    absent = {
        "training": "No needle evaluation ran inside the loop, and there is one stage only.",
        "held-out": "No held-out evaluation has run yet (eval.every_steps, or the end of a stage).",
        "routing": "No routing was recorded: every layer ran full attention, or no log step has passed.",
    }
    notes = [*run.missing, *(text for name, text in absent.items() if not sections[name])]
    bad = sum(1 for step in run.steps if "train/loss" in step and number(step, "train/loss") is None)
    if bad:
        notes.append(f"{bad} of {len(run.steps)} steps have no finite loss; they are left out of the pictures.")
    return notes


def build_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a run folder as one HTML file without outside references.

    Args:
        run_dir: a run folder; only its metrics.jsonl must exist, the report says what else it did not find.
        out: the file to write; None = run_dir/report.html.

    Returns:
        The file's path.

    Raises:
        DataError: there is no metrics.jsonl with a finished step, or the file cannot be written.
    """
    run = load_run(run_dir)
    titles = {
        "stages": "Stages",
        "needle": "Needle in a haystack",
        "loss": "Loss",
        "training": "What the switch did",
        "held-out": "Held-out text",
        "routing": "Routing",
        "memory": "Peak memory by component",
        "communication": "Bytes between context-parallel ranks",
        "course": "Course of the training",
        "configuration": "Configuration and versions",
    }
    makers = (
        *(_stages, _needle, _loss, _needle_in_training, _held_out, _routing),
        *(_memory, communication, _course, _configuration),
    )
    sections = {name: make(run) for name, make in zip(titles, makers, strict=True)}
    body = [_tiles(run), *(page.section(name, titles[name], parts) for name, parts in sections.items() if any(parts))]
    notes = _missing(run, sections)
    if notes:
        body.append(
            page.section("missing", "Not in this report", [f"<ul class='missing'>{''.join(map(_item, notes))}</ul>"])
        )
    name = run.run_dir.resolve().name
    first, last = run.steps[0]["step"], run.steps[-1]["step"]
    count = len(run.stages)
    subtitle = f"{count} stage{'s' if count > 1 else ''}, steps {first} to {last}; mean throughput "
    rate = mean_rate(run.steps)
    subtitle += f"{plots.human(rate)} tokens/s" if rate is not None else "not known"
    links = [(anchor, titles[anchor]) for anchor, parts in sections.items() if any(parts)]
    path = out if out is not None else run_dir / "report.html"
    with published(path) as aside:
        aside.write_text(page.document(f"Training report: {name}", subtitle, links, body), encoding="utf-8")
    return path


def _item(text: str) -> str:
    return f"<li>{escape(text)}</li>"
