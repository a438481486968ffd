"""What a run leaves behind about itself: metrics.jsonl and TensorBoard. Written by rank 0 alone.

One JSON object per step in full precision. A value that is not finite becomes null and the record carries
`"train/bad": true`, because NaN is not JSON. After a resume no step stands twice: lines beyond the step that the run
resumes from are dropped, atomically, before the first new one is written. The step itself may have been stopped before
its evaluation: its line is completed then, atomically too, as if it had never been stopped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from moba_train.errors import UserError
from moba_train.train.manifest import replace_text

Record = Mapping[str, Any]


class MetricSink(Protocol):
    """Something that wants to know about every finished step."""

    def write(self, record: Record) -> None:
        """Take the record of one step."""
        ...

    def amend(self, record: Record) -> None:
        """Take what was evaluated now of the step that the run resumed from: more numbers for its record."""
        ...

    def flush(self) -> None:
        """Make everything written so far durable (called before a checkpoint is published)."""
        ...

    def close(self) -> None:
        """Release files and terminals."""
        ...


class Records:
    """All sinks of a rank.

    A disk that refuses is kept in mind, since the other ranks do not see it: the run saves and ends after the next
    step, on all ranks alike.
    """

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        self._sinks = sinks
        self._error: OSError | None = None
        self._is_told = False

    @property
    def failed(self) -> bool:
        return self._error is not None

    def write(self, record: Record) -> None:
        for sink in self._sinks:
            with self._kept_in_mind():
                sink.write(record)

    def amend(self, record: Record) -> None:
        for sink in self._sinks:
            with self._kept_in_mind():
                sink.amend(record)

    def flush(self) -> None:
        for sink in self._sinks:
            with self._kept_in_mind():
                sink.flush()

    def news(self) -> list[str]:
        """Lines for the log since the last call."""
        if self._error is None or self._is_told:
            return []
        self._is_told = True
        return [f"ERROR: metrics cannot be written: {self._error}; the run saves and ends"]

    def raise_failure(self) -> None:
        """UserError if something could not be written."""
        if self._error is not None:
            raise UserError(
                "the metrics could not be written; the run has saved its state and ends",
                where="metrics.jsonl or tensorboard/ in the run folder",
                got=str(self._error),
                fix="Check free space and permissions, then resume with --resume auto.",
            ) from self._error

    @contextmanager
    def _kept_in_mind(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # whoever read our output has gone
            raise
        except OSError as error:
            self._error = self._error or error


class JsonlWriter:
    """metrics.jsonl.

    Args:
        path: the file.
        resume_step: finished steps of the checkpoint that the run continues from; 0 = a new run.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        truncate_after(path, resume_step)
        self._path = path
        self._stream = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self._stream.write(to_json_line(record))
        self._stream.flush()

    def amend(self, record: Record) -> None:
        """Complete the last line, if it is that of the step; where it was lost, `record` stands for it.

        An earlier process may have done so, and died before the next checkpoint: what it said was evaluated and decided
        goes, since on other ranks, or by another rule, it may not be so any more.
        """
        lines = self._path.read_text("utf-8").splitlines(keepends=True)
        known = json.loads(lines[-1]) if lines else {}
        if known.get("step") == record["step"]:
            lines.pop()
            known = {key: value for key, value in known.items() if not key.startswith(("eval/", "until/"))}
        else:
            known = {}
        line = json.dumps(known | json.loads(to_json_line(record))) + "\n"
        replace_text(self._path, "".join((*lines, line)))
        stream = self._path.open("a", encoding="utf-8")
        self._stream.close()
        self._stream = stream

    def flush(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self.flush()
        self._stream.close()


class TensorBoardWriter:
    """The same numbers for TensorBoard; a list (loss by position) becomes one series per entry.

    Args:
        folder: log folder.
        resume_step: as in `JsonlWriter`; later points of an earlier process are hidden.
    """

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, needed by rank 0 only

        self._writer: Any = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)

    def write(self, record: Record) -> None:
        for key, value in record.items():
            if "/" not in key or key.endswith("position_edges"):
                continue
            for tag, number in _series(key, value):
                self._writer.add_scalar(tag, number, record["step"])

    def amend(self, record: Record) -> None:
        """The points that the step did not have. They stand before what `purge_step` hides."""
        self.write(record)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _series(key: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, (list, tuple)):
        return [(f"{key}/{index}", float(item)) for index, item in enumerate(value) if item is not None]
    return [(key, float(value))] if isinstance(value, (int, float)) else []


def to_json_line(record: Record) -> str:
    """One line of metrics.jsonl: floats in full precision, values that are not finite as null."""
    clean = {key: _finite(value) for key, value in record.items()}
    if "train/empty" not in record and any(clean[key] != record[key] for key in record):
        clean["train/bad"] = True
    return json.dumps(clean, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def truncate_after(path: Path, step: int) -> None:
    """Keep the lines of metrics.jsonl up to `step`; a torn last line (a crash while writing) goes too."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return
    kept = []
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            try:
                if int(json.loads(line)["step"]) <= step:
                    kept.append(line if line.endswith("\n") else line + "\n")
            except (ValueError, KeyError, TypeError):
                break
    replace_text(path, "".join(kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete records of a metrics.jsonl, in order."""
    records: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


def open_sinks(run_dir: Path, *, resume_step: int, console: MetricSink) -> Sequence[MetricSink]:
    """The three sinks of rank 0: metrics.jsonl, TensorBoard and the console."""
    return (
        JsonlWriter(run_dir / "metrics.jsonl", resume_step=resume_step),
        TensorBoardWriter(run_dir / "tensorboard", resume_step=resume_step),
        console,
    )
