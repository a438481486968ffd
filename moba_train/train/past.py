"""May a run go on from a checkpoint with this schedule?

stages that are over      are as they were trained: the checkpoint's config.toml tells
the stage under way       draws the rows that it began with: row i is a function of the whole stage and of the
                          documents of its sources; its attention, say, may change, which the log tells
stages still to come      may change
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moba_train.errors import CheckpointError
from moba_train.train.manifest import read_small
from moba_train.train.progress import Progress, progress_from_state, rows_fingerprint
from moba_train.train.run_folder import CONFIG
from moba_train.train.schedule import Schedule

_RESTORE = "Restore these stages as the checkpoint's config.toml has them; to train longer, append one."
_CONFIG_BYTES = 1 << 20
_NOT_TRAINED = ("tokens", "until", "mesh")
"""Fields of a stage that need not stay: lengths are compared in steps, and neither what ended a stage nor the mesh that
it ran on is part of what was learned."""
_BY_SOURCE = ("mix", "lengths")
"""Tables whose keys are names of sources: one that is missing is a difference."""


def check_schedule(
    state: Mapping[str, Any], schedule: Schedule, path: Path, sources_of: Callable[[int], Mapping[str, Any]]
) -> tuple[str, ...]:
    """Refuse a schedule whose past is not the checkpoint's; stages that have not begun may change.

    The stage in which the run goes on must draw the same rows, so its length, rows, mix and data may not change either.
    To train longer than planned, append a stage.

    Args:
        state: decoded state.json.
        schedule: the configuration's, with stages at their greatest lengths.
        path: the checkpoint.
        sources_of: stage index -> what `rows_fingerprint` wants to know of its sources.

    Returns:
        Lines for the log: what changes within the stage under way.

    Raises:
        CheckpointError: names what differs.
        DataError: a source of the stage under way is missing.
    """
    saved = progress_from_state(state)
    schedule = schedule.with_decided(saved.decided)
    if saved.step == 0:
        return ()
    _check_position(saved, schedule, path)
    trained, index = _trained_stages(path), saved.stage_index
    is_under_way = saved.step < schedule.total_steps and schedule.place(saved.step).stage_index == index
    _check_past(trained, saved, schedule, path, num_over=index if is_under_way else index + 1)
    if is_under_way:
        _check_rows(state["stage_rows"], saved, schedule, path, sources_of(index))
    if len(trained) <= index:
        return (f"{CONFIG} of the checkpoint does not tell how its stages were trained: that is not compared",)
    stage = schedule.stages[index]
    changes = [f"{key} {was!r} -> {now!r}" for key, was, now in _changes(trained[index], asdict(stage))]
    return (f"stage '{stage.name}' changes from step {saved.step + 1}: {', '.join(changes)}",) if changes else ()


def _check_position(saved: Progress, schedule: Schedule, path: Path) -> None:
    """The checkpoint's step must lie where the schedule has it, after as many tokens."""
    told = f"step {saved.step} is step {saved.step_in_stage} of stage {saved.stage_index + 1}, {saved.tokens} tokens"
    if saved.step > schedule.total_steps:
        what, got = "the stages are shorter than the checkpoint is old", f"{schedule.total_steps} steps in all"
        raise CheckpointError(what, where=str(path), got=got, allowed=told, fix=_RESTORE)
    for index, stage in enumerate(schedule.stages):
        steps = saved.decided.get(index, 0)
        if steps * stage.tokens_per_step > stage.tokens:
            what = "a stage is shorter than it was when `until` ended it"
            got, allowed = f"stages.{index}.tokens = {stage.tokens}", f">= {steps * stage.tokens_per_step}"
            raise CheckpointError(what, where=str(path), got=got, allowed=allowed, fix=_RESTORE)
    last = schedule.place(saved.step - 1)
    tokens = schedule.tokens_after(saved.step)
    if (last.stage_index, last.step_in_stage + 1, tokens) != (saved.stage_index, saved.step_in_stage, saved.tokens):
        got = f"step {saved.step} is step {last.step_in_stage + 1} of stage {last.stage_index + 1}, {tokens} tokens"
        what = "the stages up to the checkpoint are not those that it was trained with"
        raise CheckpointError(what, where=str(path), got=got, allowed=told, fix=_RESTORE)


def _trained_stages(path: Path) -> list[Mapping[str, Any]]:
    """The stages in the checkpoint's config.toml as they stand there: another version may have written them. [] if they
    cannot be read."""
    try:
        stages = tomllib.loads(read_small(path / CONFIG, _CONFIG_BYTES)).get("stages")
    except (OSError, ValueError, RecursionError):  # a checkpoint whose state is sound is not refused for this
        return []
    return stages if isinstance(stages, list) and all(isinstance(stage, Mapping) for stage in stages) else []


def _check_past(
    trained: Sequence[Mapping[str, Any]], saved: Progress, schedule: Schedule, path: Path, *, num_over: int
) -> None:
    """Stages that are over must be as they were trained: the run's config.toml and report tell what they say."""
    names, got, allowed = [], [], []
    for index, (was, stage) in enumerate(zip(trained, schedule.stages[:num_over], strict=False)):
        now = asdict(stage)
        changes = list(_changes(was, now))
        # Where the last one ends is known by the position. Earlier ones could have changed their lengths between them.
        if index < saved.stage_index and index not in saved.decided and was.get("tokens", stage.tokens) != stage.tokens:
            changes.append(("tokens", was["tokens"], stage.tokens))
        names += [repr(was.get("name", stage.name))] if changes else []
        got += [f"stages.{index}.{key} = {value!r}" for key, _, value in changes]
        allowed += [f"stages.{index}.{key} = {value!r}" for key, value, _ in changes]
    if names:
        raise CheckpointError(
            f"the configuration changes stages that are over: {', '.join(names)}",
            where=str(path),
            got="; ".join(got),
            allowed="; ".join(allowed),
            fix=f"Restore them as the checkpoint's {CONFIG} has them; to train otherwise, append a stage, or start a "
            "new run (another --run-dir).",
        )


def _changes(was: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, was, now) of what differs. A key that only one of two versions of the program knows is not compared."""
    for key, value in now.items():
        if key not in was or (not path and key in _NOT_TRAINED):
            continue
        if isinstance(value, Mapping) and isinstance(was[key], Mapping) and key not in _BY_SOURCE:
            yield from _changes(was[key], value, f"{path}{key}.")
        elif _is_other(key, was[key], value):
            yield f"{path}{key}", was[key], value


def _check_rows(
    theirs: Mapping[str, Any], saved: Progress, schedule: Schedule, path: Path, sources: Mapping[str, Any]
) -> None:
    """The stage under way must draw the rows that it began with."""
    index = saved.stage_index
    stage = schedule.stages[index]
    what, fix = "the stage in which the run goes on would draw other rows than it began with", _RESTORE
    ours, theirs = rows_fingerprint(stage, sources), {"lengths": {}, **theirs}  # older checkpoints do not have it
    of_stage = [key for key in ours if key != "sources" and _is_other(key, theirs.get(key), ours[key])]
    got, allowed = ([f"stages.{index}.{key} = {rows.get(key)!r}" for key in of_stage] for rows in (ours, theirs))
    of_sources = list(_other_sources(theirs.get("sources"), sources))
    if of_sources:
        end = saved.step_in_stage * stage.tokens_per_step
        fix = (
            f"Restore what has changed (data may lie elsewhere); or end the stage here (stages.{index}.tokens = {end}) "
            "and let one with the new data or settings follow; or start a new run (another --run-dir)."
        )
        got += [now for now, _ in of_sources]
        allowed += [was for _, was in of_sources]
    if got:
        raise CheckpointError(what, where=str(path), got="; ".join(got), allowed="; ".join(allowed), fix=fix)


def _other_sources(theirs: object, ours: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(now, then) of all that differs. What an older checkpoint does not tell is not compared."""
    if not isinstance(theirs, Mapping):
        return
    for name, facts in ours.items():
        told = theirs.get(name)
        for key, now in facts.items():
            if isinstance(told, Mapping) and key in told and told[key] != now:
                yield _describe(name, key, now), _describe(name, key, told[key])


def _describe(name: str, key: str, value: object) -> str:
    """A fact of a source as a setting; documents by the beginning of their digest."""
    if key == "documents":
        return f"documents of data.sources.{name} = sha256 {str(value)[:16]}..."
    return f"data.sources.{name}.{key} = {value!r}"


def _is_other(key: str, was: object, now: Any) -> bool:
    """Is a field of a stage another one? The order of a mix counts: of two rows that are due at once, the first is that
    of the source named first."""
    return bool(was != now) or (key == "mix" and list(was) != list(now))  # type: ignore[call-overload]
