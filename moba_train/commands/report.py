"""`moba-train report`: the run's HTML report, and the short table on the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from moba_train.report import build_report, summary_table


def run_report(run_dir: Path, *, out: Path | None) -> int:
    """Write RUN/report.html (or `out`) and print the summary; returns the exit code. Raises DataError without a run."""
    path = build_report(run_dir, out)
    console = Console(highlight=False, soft_wrap=True)
    console.print(summary_table(run_dir))
    if out is not None:
        console.print(f"written: {path}", markup=False)
    return 0
