"""The log on rank 0: a line every n steps, and a progress bar where somebody is watching a terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moba_train.engine.phases import Phase
from moba_train.model.transport_plan import format_bytes, format_seconds
from moba_train.train.metrics import Record

# What the evaluation line shows: title, key without "eval/" and attention, format.
_EVALUATIONS: Final = (
    ("held-out", "loss", ".3f"),
    ("trailing", "trailing_loss", ".3f"),
    ("bits/byte", "bits_per_byte", ".3f"),
    ("needle", "niah", ".2f"),
)
_ATTENTIONS: Final = (("moba", "MoBA"), ("full", "full"))
# A step that takes longer says where it is, this often where there is no terminal.
_PHASE_LINE_S: Final = 10.0


class Log(Protocol):
    """Takes whole lines, where a step is, and how long the run is. Ranks other than 0 have one that says nothing."""

    def line(self, text: str) -> None: ...

    def phase(self, phase: Phase) -> None: ...

    def total_steps(self, steps: int) -> None: ...


class SilentLog:
    """The log of every rank but 0."""

    def line(self, text: str) -> None:
        """Say nothing."""

    def phase(self, phase: Phase) -> None:
        """Say nothing."""

    def total_steps(self, steps: int) -> None:
        """Say nothing."""


class ConsoleLogger:
    """A log line every `log_every` steps; also a metric sink.

    Args:
        log_every: steps between lines; the first and the last step, every stage's first step, bad steps and steps
            with an evaluation get one too.
        total_steps: steps of the run, for the ETA; the most there can be, until stages with `until` are decided.
        resume_step: finished steps at the start.
        console: where to write; None = standard output.
        clock: seconds.
    """

    def __init__(
        self,
        *,
        log_every: int,
        total_steps: int,
        resume_step: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log_every = max(1, log_every)
        self._total_steps = total_steps
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._stage = ""
        self._step = resume_step
        self._clock = clock
        self._step_begin_s = self._phase_line_s = clock()
        self._window_s: list[float] = []
        self._smooth_s = 0.0  # for the ETA, which should not jump
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("training", total=total_steps, completed=resume_step)
            self._bar.start()

    def line(self, text: str) -> None:
        """Write one line above the progress bar."""
        self._console.print(text, markup=False)

    def phase(self, phase: Phase) -> None:
        """Show where the step is: in the bar of a terminal, elsewhere as a line now and then in a long step."""
        now_s = self._clock()
        if phase.part == "data":
            self._step_begin_s = self._phase_line_s = now_s
        if self._bar is not None:
            self._bar.update(self._task, description=f"step {self._step + 1}: {phase}")
        elif now_s - self._phase_line_s >= _PHASE_LINE_S:
            self._phase_line_s = now_s
            elapsed = format_duration(now_s - self._step_begin_s)
            self.line(f"  in step {self._step + 1}/{self._total_steps} since {elapsed}: {phase}")

    def total_steps(self, steps: int) -> None:
        """The run has as many steps, now that the end of a stage is decided."""
        if steps != self._total_steps:
            self._total_steps = steps
            if self._bar is not None:
                self._bar.update(self._task, total=steps)

    def amend(self, record: Record) -> None:
        """Print what was evaluated now of a step of an earlier process."""
        self.line(f"step {record['step']}/{self._total_steps} | {record['stage']}\n  {format_evaluation(record)}")

    def write(self, record: Record) -> None:
        """Note a step; print its line if it is due."""
        self._step = step = int(record["step"])
        self._window_s.append(float(record["perf/step_time_s"]))
        new_stage = record["stage"] != self._stage
        self._stage = str(record["stage"])
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=self._stage)
        evaluated = any(key.startswith("eval/") for key in record)
        due = step % self._log_every == 0 or step == self._total_steps or new_stage or evaluated
        if due or "train/bad" in record:
            mean_s = sum(self._window_s) / len(self._window_s)
            self._smooth_s = mean_s if not self._smooth_s else 0.5 * (self._smooth_s + mean_s)
            self._window_s.clear()
            remaining_s = (self._total_steps - step) * self._smooth_s
            self.line(format_step(record, total_steps=self._total_steps, mean_step_s=mean_s, remaining_s=remaining_s))

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.stop()


def format_step(record: Record, *, total_steps: int, mean_step_s: float, remaining_s: float) -> str:
    """The log line of a step; throughput and MFU are the mean of the steps since the last line."""
    step = int(record["step"])
    faster = record["perf/step_time_s"] / mean_step_s if mean_step_s else 1.0
    mfu = f"{100.0 * record['perf/mfu'] * faster:.1f}%" if "perf/mfu" in record else "n/a"
    parts = [
        f"step {step:>{len(str(total_steps))}}/{total_steps}",
        str(record["stage"]),
        f"loss {_number(record['train/loss'], '.4f')}",
        f"lr {record['train/lr']:.2e}",
        f"grad {_number(record['train/grad_norm'], '.3f')}",
        f"{record['perf/tokens_per_s'] * faster:,.0f} tok/s "
        f"({record['perf/tokens_per_s_per_rank'] * faster:,.0f}/rank)",
        f"MFU {mfu}",
        f"mem {record['memory/peak_gib']:.2f} GiB",
        *([_exchanged(record)] if "comm/received_bytes" in record else []),
        f"density {record['train/density']:.3f}",
        f"ETA {format_duration(remaining_s)}",
    ]
    if "train/bad" in record:
        parts.append("NOT FINITE, step skipped")
    if "train/empty" in record:
        parts.append("no token counts, step skipped")
    scores = format_evaluation(record)
    return " | ".join(parts) + (f"\n  {scores}" if scores else "")


def _exchanged(record: Record) -> str:
    """Bytes between context-parallel ranks, and how long computing stood still for them."""
    waited = f", waited {format_seconds(record['perf/comm_waited_s'])}" if "perf/comm_waited_s" in record else ""
    return f"comm {format_bytes(record['comm/received_bytes'])}{waited}"


def format_evaluation(record: Record) -> str:
    """The line below an evaluated step, "" for any other: what a person compares; metrics.jsonl has all numbers."""
    parts = []
    for title, key, spec in _EVALUATIONS:
        values = [(name, record.get(f"eval/{key}_{attention}")) for attention, name in _ATTENTIONS]
        known = ", ".join(f"{_number(value, spec)} {name}" for name, value in values if value is not None)
        if known:
            parts.append(f"{title} {known}")
        if known and key == "bits_per_byte" and "eval/bits_per_byte_unigram" in record:
            parts[-1] += f" (unigram {_number(record['eval/bits_per_byte_unigram'], spec)})"
    if "until/value" in record:
        fall = f", fall {_number(record['until/fall'], '.4g')}" if "until/fall" in record else ""
        parts.append(f"until {_number(record['until/value'], '.4f')}{fall}")
    return " | ".join(["eval", *parts]) if parts else ""


def format_duration(seconds: float) -> str:
    """12s, 3m05s, 2h07m, 4d03h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def _number(value: float, spec: str) -> str:
    """NaN must be seen, so it is written in capitals and never left out."""
    return format(value, spec) if math.isfinite(value) else str(value).upper()
