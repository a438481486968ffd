"""What a run folder holds, read once and tolerantly: only metrics.jsonl must exist, everything else may be missing."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moba_train.errors import DataError
from moba_train.eval.cells import NiahRecord
from moba_train.eval.records import latest_records, read_records
from moba_train.train.manifest import content_name
from moba_train.train.run_folder import STATE, list_abandoned, list_checkpoints

Step = Mapping[str, Any]
"""One object of metrics.jsonl."""


@dataclass(frozen=True)
class StageSpan:
    """The steps of one stage that metrics.jsonl holds.

    Attributes:
        index: of the stage in the schedule.
        settings: its table in config.toml; empty if that is missing.
        steps: its steps, in order; never empty.
    """

    index: int
    name: str
    settings: Mapping[str, Any]
    steps: tuple[Step, ...]

    @property
    def attention(self) -> str:
        """ "moba", "full", or "" where config.toml does not say."""
        return str(self.settings.get("attention", ""))

    @property
    def first_step(self) -> int:
        return int(self.steps[0]["step"])

    @property
    def last_step(self) -> int:
        return int(self.steps[-1]["step"])

    @property
    def decided(self) -> Step | None:
        """The step whose evaluation ended the stage (`until`); None = it has a fixed length, or goes on."""
        return next((step for step in self.steps if number(step, "until/decided")), None)


@dataclass(frozen=True)
class RunData:
    """A run folder.

    Attributes:
        steps: metrics.jsonl in order of the steps, at least one.
        stages: the same steps by stage.
        config, config_text: config.toml decoded and as written; empty if missing.
        niah: the needle records of the newest evaluated weights.
        state: state.json of the newest checkpoint; empty if there is none.
        missing: what could not be shown and why, one sentence each.
    """

    run_dir: Path
    steps: tuple[Step, ...]
    stages: tuple[StageSpan, ...]
    config: Mapping[str, Any]
    config_text: str
    niah: tuple[NiahRecord, ...]
    state: Mapping[str, Any]
    missing: tuple[str, ...]


def number(step: Step, key: str) -> float | None:
    """`step[key]` if it is a finite number, else None (absent, null, NaN)."""
    value = step.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def series(steps: Iterable[Step], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) at which `key` is a finite number."""
    pairs = [(int(step["step"]), number(step, key)) for step in steps]
    known = [(step, value) for step, value in pairs if value is not None]
    return [step for step, _ in known], [value for _, value in known]


def last_number(steps: Iterable[Step], key: str) -> float | None:
    """The newest finite value of `key`."""
    _, values = series(steps, key)
    return values[-1] if values else None


def mean_number(steps: Iterable[Step], key: str) -> float | None:
    """The mean of the finite values of `key`."""
    _, values = series(steps, key)
    return sum(values) / len(values) if values else None


def _read_metrics(path: Path) -> tuple[Step, ...]:
    """Complete lines of metrics.jsonl; a cut last line (the run was killed, or is going on) is left out."""
    if not path.is_file():
        raise DataError(
            "the run folder has no metrics",
            where=str(path),
            got="no such file",
            allowed="a folder that `moba-train train` wrote",
            fix="check the path, or train first",
        )
    content = path.read_bytes()
    steps: list[Step] = []
    for line_number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        where = f"{path}, line {line_number}"
        try:
            value: Any = json.loads(line)
        except ValueError as error:
            fix = "remove the line; every other step can still be shown"
            raise DataError("a line of metrics.jsonl is not JSON", where=where, got=str(error), fix=fix) from error
        if not isinstance(value, dict) or not isinstance(value.get("step"), int):
            fix = "remove the line; it was not written by `moba-train train`"
            raise DataError("a line of metrics.jsonl has no step", where=where, got=line[:80].decode(), fix=fix)
        steps.append(value)
    if not steps:
        raise DataError(
            "metrics.jsonl holds no finished step", where=str(path), fix="wait until the run has finished a step"
        )
    return tuple(sorted(steps, key=lambda step: int(step["step"])))


def _read_config(path: Path, missing: list[str]) -> tuple[dict[str, Any], str]:
    if not path.is_file():
        missing.append("config.toml is not in the run folder: no settings of the stages are shown.")
        return {}, ""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return tomllib.loads(text), text
    except tomllib.TOMLDecodeError as error:
        missing.append(f"config.toml could not be read ({error}): no settings of the stages are shown.")
        return {}, text


def _read_state(run_dir: Path, missing: list[str]) -> dict[str, Any]:
    """state.json of the newest checkpoint that has one."""
    for path in (folder / STATE for folder in reversed(list_checkpoints(run_dir))):
        try:
            value: Any = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            missing.append(f"{path.relative_to(run_dir)} could not be read ({error}).")
            continue
        if isinstance(value, dict):
            return value
    missing.append("There is no checkpoint yet: versions and mesh are not known.")
    return {}


def _weights_left(run_dir: Path) -> set[str]:
    """`NiahRecord.weights` of checkpoints of branches that the run has left."""
    weights = set()
    for folder in list_abandoned(run_dir):
        with suppress(OSError):  # damaged, or just pruned
            weights.add(content_name(folder))
    return weights


def _stages(steps: tuple[Step, ...], config: Mapping[str, Any]) -> tuple[StageSpan, ...]:
    settings = config.get("stages", [])
    groups: dict[int, list[Step]] = {}
    for step in steps:
        groups.setdefault(int(step.get("stage_index", 0)), []).append(step)
    return tuple(
        StageSpan(
            index=index,
            name=str(groups[index][0].get("stage", f"stage {index}")),
            settings=settings[index] if isinstance(settings, list) and index < len(settings) else {},
            steps=tuple(groups[index]),
        )
        for index in sorted(groups)
    )


def load_run(run_dir: Path) -> RunData:
    """Read a run folder.

    Raises:
        DataError: there is no metrics.jsonl with at least one step, or a line before its last one is damaged.
    """
    steps = _read_metrics(run_dir / "metrics.jsonl")
    missing: list[str] = []
    config, text = _read_config(run_dir / "config.toml", missing)
    state = _read_state(run_dir, missing)
    niah: tuple[NiahRecord, ...] = ()
    try:
        records = read_records(run_dir / "niah.jsonl")
        niah = latest_records(records, last_step=int(steps[-1]["step"]), left=_weights_left(run_dir))
    except DataError as error:
        missing.append(f"niah.jsonl could not be read: {error.what}.")
    else:
        if not niah:
            missing.append("The needle grid was not measured: run `moba-train eval niah` on this run folder.")
    return RunData(run_dir, steps, _stages(steps, config), config, text, niah, state, tuple(missing))
