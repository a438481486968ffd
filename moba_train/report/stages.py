"""What the report says in numbers: one row per stage, and what each switch between stages did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moba_train.report.plots import human
from moba_train.report.run_data import RunData, StageSpan, Step, last_number, mean_number, number, series
from moba_train.train.figures import time_per_token_us

NEAR_STEPS = 10
"""Steps before and after a switch over which its training loss is averaged."""
UNKNOWN = "-"


@dataclass(frozen=True)
class Switch:
    """The boundary between two stages.

    Attributes:
        before, after: the stages.
        rows: (what, before, after), formatted.
    """

    before: StageSpan
    after: StageSpan
    rows: tuple[tuple[str, str, str], ...]


def fixed(value: float | None, digits: int = 3) -> str:
    """A number with `digits` decimals, or UNKNOWN."""
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def settings_text(stage: StageSpan) -> str:
    """A stage's attention in a few words."""
    attention, settings = stage.attention, stage.settings
    if attention != "moba":
        return {"full": "full"}.get(attention, UNKNOWN)
    kept: Any = settings.get("full_layers", {})
    named = [f"{name} {kept[name]}" for name in ("first", "last", "every") if isinstance(kept, dict) and kept.get(name)]
    text = f"MoBA {settings.get('chunk_size', '?')}/{settings.get('topk', '?')}"
    return f"{text}, full: {', '.join(named)}" if named else text


UNTIL_HEADER = ("stage", "ends when", "watched, last", "fall, last", "ended", "tokens, at most")


def until_rows(run: RunData) -> list[tuple[str, ...]]:
    """One formatted row per stage that watches a number, in the order of `UNTIL_HEADER`."""
    rows: list[tuple[str, ...]] = []
    for stage in run.stages:
        value, fall = (last_number(stage.steps, f"until/{name}") for name in ("value", "fall"))
        if value is None:
            continue
        most: Any = stage.settings.get("tokens", UNKNOWN)
        # The end of a stage is always saved: where the run stands there, its last stage is over too.
        is_over = stage is not run.stages[-1] or (
            run.state.get("stage_end") is True and run.state.get("step") == stage.last_step
        )
        ended = "at its greatest length" if is_over else "not yet"
        ended = f"by decision, step {stage.last_step}" if stage.decided else ended
        most = f"{most:,}" if isinstance(most, int) else UNKNOWN
        rows.append((stage.name, _until_text(stage), fixed(value, 4), fixed(fall, 4), ended, most))
    return rows


def _until_text(stage: StageSpan) -> str:
    until: Any = stage.settings.get("until", {})
    until = until if isinstance(until, dict) else {}
    rules = [f"{name} falls by less than {until[name]}" for name in ("loss_plateau", "trailing_gap") if until.get(name)]
    return f"{rules[0]} in {until.get('evaluations', '?')} evaluations" if rules else UNKNOWN


STAGE_HEADER = (
    "stage",
    "attention",
    "seq_len",
    "steps",
    "tokens",
    "density",
    "train loss, start",
    "train loss, end",
    "held-out MoBA",
    "held-out full",
    "needle MoBA",
    "needle full",
    "tokens/s, median step",
    "us per token, median step",
)


def stage_rows(run: RunData) -> list[tuple[str, ...]]:
    """One formatted row per stage, in the order of `STAGE_HEADER`."""
    rows: list[tuple[str, ...]] = []
    tokens_before = 0.0
    for stage in run.stages:
        tokens_after = last_number(stage.steps, "tokens")
        _, rates = series(stage.steps, "perf/tokens_per_s")
        time_us = time_per_token_us(rates) if rates else None
        _, losses = series(stage.steps, "train/loss")
        near = min(NEAR_STEPS, max(1, len(losses) // 2))
        start, end = losses[:near], losses[-near:]
        rows.append(
            (
                stage.name,
                settings_text(stage),
                str(stage.settings.get("seq_len", UNKNOWN)),
                f"{stage.first_step} to {stage.last_step}" + (" (decided)" if stage.decided else ""),
                UNKNOWN if tokens_after is None else human(tokens_after - tokens_before),
                fixed(mean_number(stage.steps, "train/density")),
                fixed(sum(start) / len(start) if start else None),
                fixed(sum(end) / len(end) if end else None),
                fixed(last_number(stage.steps, "eval/loss_moba")),
                fixed(last_number(stage.steps, "eval/loss_full")),
                fixed(last_number(stage.steps, "eval/niah_moba"), 2),
                fixed(last_number(stage.steps, "eval/niah_full"), 2),
                UNKNOWN if time_us is None else human(1e6 / time_us),
                fixed(time_us, 2),
            )
        )
        tokens_before = tokens_after if tokens_after is not None else tokens_before
    return rows


def mean_rate(steps: Sequence[Step]) -> float | None:
    """Tokens per second of all steps together: fast steps do not count more than the time they take."""
    known = [(number(step, "perf/tokens_per_s"), number(step, "perf/step_time_s")) for step in steps]
    timed = [(rate * seconds, seconds) for rate, seconds in known if rate is not None and seconds is not None]
    total = sum(seconds for _, seconds in timed)
    return sum(tokens for tokens, _ in timed) / total if total else None


def _at(steps: Sequence[Step], key: str, *, newest: bool, digits: int) -> str:
    known = [(number(step, key), int(step["step"])) for step in steps if number(step, key) is not None]
    if not known:
        return UNKNOWN
    value, step = known[-1] if newest else known[0]
    return f"{fixed(value, digits)} (step {step})"


def switches(run: RunData) -> list[Switch]:
    """Every boundary between stages: the last numbers before it and the first after it, under both attentions."""
    found = []
    for before, after in zip(run.stages, run.stages[1:], strict=False):
        old, new = before.steps[-NEAR_STEPS:], after.steps[:NEAR_STEPS]
        rows = [
            (
                f"training loss, mean of {NEAR_STEPS} steps",
                fixed(mean_number(old, "train/loss")),
                fixed(mean_number(new, "train/loss")),
            ),
            (
                f"largest gradient norm of {NEAR_STEPS} steps",
                fixed(max(series(old, "train/grad_norm")[1], default=None)),
                fixed(max(series(new, "train/grad_norm")[1], default=None)),
            ),
        ]
        for name, key, digits in (
            ("needle score under MoBA", "eval/niah_moba", 2),
            ("needle score under full attention", "eval/niah_full", 2),
            ("needle's chunk picked under MoBA", "eval/niah_routed_moba", 2),
            ("held-out loss under MoBA", "eval/loss_moba", 3),
            ("held-out loss under full attention", "eval/loss_full", 3),
            ("trailing sixteenth under MoBA", "eval/trailing_loss_moba", 3),
            ("trailing sixteenth under full attention", "eval/trailing_loss_full", 3),
        ):
            pair = (
                _at(before.steps, key, newest=True, digits=digits),
                _at(after.steps, key, newest=False, digits=digits),
            )
            if pair != (UNKNOWN, UNKNOWN):
                rows.append((name, *pair))
        found.append(Switch(before, after, tuple(row for row in rows if row[1:] != (UNKNOWN, UNKNOWN))))
    return found
