"""Where a run begins: from nothing, from the newest intact checkpoint of its folder, or from one that is named.

auto    the newest intact checkpoint, saying what was skipped and why; from nothing if the run has none at all, which
        is said as well
never   from nothing, and only in a folder without a previous run
PATH    a run folder (its newest intact checkpoint) or one checkpoint folder
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moba_train.config.until_rules import rule_of
from moba_train.engine.base import Engine
from moba_train.errors import CheckpointError
from moba_train.parallel import ranks
from moba_train.train.checkpoint import load_checkpoint, shared_damage
from moba_train.train.manifest import MANIFEST
from moba_train.train.past import check_schedule
from moba_train.train.progress import Identity, Progress
from moba_train.train.run_folder import (
    FOLDER,
    LATEST,
    NAME,
    STATE,
    list_abandoned,
    list_checkpoints,
    list_leftovers,
    newest_progress,
    read_latest,
    read_state,
    restore_replaced,
    set_aside_after,
    step_of,
)
from moba_train.train.schedule import Schedule


@dataclass(frozen=True)
class StartingPoint:
    """Where a run begins.

    Attributes:
        path: the checkpoint to load; None = from nothing.
        notes: lines for the log: what was chosen, what was skipped and why.
        progress: position of the checkpoint, once `begin` has loaded it.
    """

    path: Path | None
    notes: tuple[str, ...]
    progress: Progress = field(default_factory=Progress)


@dataclass(frozen=True)
class _Survey:
    """What a run folder holds, as rank 0 sees it.

    Attributes:
        checkpoints: oldest first.
        lost: where there is no checkpoint, what tells that there was one.
        notes: leftovers and a stray pointer, for the log.
    """

    checkpoints: tuple[Path, ...]
    abandoned: tuple[Path, ...]
    lost: tuple[str, ...]
    notes: tuple[str, ...]


def find_start(run_dir: Path, resume: str) -> StartingPoint:
    """Resolve `--resume`, and verify what it names; collective (rank 0 looks, all ranks share the hashing).

    Raises:
        CheckpointError: `never` in a folder that holds a run; checkpoints, but none intact; a PATH without any.
    """
    if resume == "never":
        ranks.from_rank_0(lambda: _refuse_used_folder(run_dir))
        return StartingPoint(None, ("starting from nothing (--resume never)",))
    if resume != "auto":
        return _named(Path(resume), "--resume")
    found = ranks.from_rank_0(lambda: _survey(run_dir))
    if found.checkpoints:
        return _newest_intact(run_dir, found)
    if found.abandoned:
        raise CheckpointError(
            "the run has no checkpoint but some that were set aside, so where it stands is not clear",
            where=str(run_dir / FOLDER),
            got=", ".join(path.name for path in found.abandoned),
            fix=f"Name the one to go on from (--resume {found.abandoned[-1]}), or start over in another --run-dir.",
        )
    if found.lost:
        raise CheckpointError(
            "the run had a checkpoint, but it is gone, and nothing is trained again unasked",
            where=str(run_dir / FOLDER),
            got="; ".join(found.lost),
            fix=f"Restore the checkpoint, or delete {run_dir / FOLDER} to start over.",
        )
    return StartingPoint(None, (*found.notes, f"starting from nothing: no checkpoint in {run_dir / FOLDER}"))


def resolve_checkpoint(path: Path, *, argument: str = "RUN_OR_CHECKPOINT") -> StartingPoint:
    """The intact checkpoint that a run folder or checkpoint folder stands for (for evaluations); collective.

    Args:
        argument: what named the path, for messages.

    Raises:
        CheckpointError: there is none, or none is intact.
    """
    return _named(path, argument)


def locate_checkpoint(path: Path, *, argument: str) -> Path:
    """What `resolve_checkpoint` would look at first: whether its files are whole is not asked. Not collective.

    Raises:
        CheckpointError: there is none.
    """
    found = _look_at(path, argument)
    return path if found is None else found.checkpoints[-1]


def newest_step(run_dir: Path, resume: str) -> int:
    """Finished steps of the newest checkpoint that `--resume` may come to stand for (`newest_progress`)."""
    return newest_progress(run_dir, resume).step


def _survey(run_dir: Path) -> _Survey:
    """Look into a run folder."""
    checkpoints, latest = list_checkpoints(run_dir), read_latest(run_dir)
    newest = step_of(checkpoints[-1]) if checkpoints else -1
    notes = []
    for path in list_leftovers(run_dir):
        if path.suffix == ".tmp" and step_of(path) > newest:
            notes.append(f"skipped {path.name}: its save was cut short")
    if latest and latest not in [path.name for path in checkpoints]:
        notes.append(f"{FOLDER}/{LATEST} names {latest[:100]!r}, which is not there; the folders themselves count")
    lost = [] if checkpoints else [path.name for path in list_leftovers(run_dir) if path.suffix == ".old"]
    if latest and not checkpoints:
        lost.append(f"{LATEST} names {latest[:100]!r}")
    return _Survey(tuple(checkpoints), tuple(list_abandoned(run_dir)), tuple(lost), tuple(notes))


def _newest_intact(run_dir: Path, found: _Survey) -> StartingPoint:
    """The newest checkpoint whose files match their manifest; collective.

    Raises:
        CheckpointError: every checkpoint is damaged; the message says how.
    """
    skipped: list[str] = []
    for path in reversed(found.checkpoints):
        damage = _damage(path)
        if not damage:
            notes = (*found.notes, *(f"skipped {text}" for text in skipped), f"resuming from {path}")
            return StartingPoint(path, notes)
        skipped.append(f"{path.name}: {damage}")
    raise CheckpointError(
        "no checkpoint of the run is intact",
        where=str(run_dir / FOLDER),
        got="; ".join(skipped),
        fix="Restore a checkpoint, or start over in another --run-dir.",
    )


def begin(
    run_dir: Path,
    resume: str,
    engine: Engine,
    identity: Identity,
    schedule: Schedule,
    *,
    sources_of: Callable[[int], Mapping[str, Any]] = lambda index: {},
) -> StartingPoint:
    """Put the engine where the run begins; collective over all ranks.

    Checkpoints of this run beyond that point (damaged, or of a branch that `--resume PATH` leaves) are set aside.

    Args:
        schedule: the configuration's, with stages at their greatest lengths.
        sources_of: stage index -> what `rows_fingerprint` wants to know of its sources; asked for on rank 0, and only
            of a stage that is under way: data of those that are over may be gone.

    Returns:
        The starting point with its `progress` filled in and notes for the log. The run's schedule is `schedule` with
        what that progress says was decided.

    Raises:
        CheckpointError: see `find_start`, `load_checkpoint` and `check_schedule`.
    """
    restored = ranks.from_rank_0(lambda: restore_replaced(run_dir))
    start = find_start(run_dir, resume)
    path = start.path
    if path is None:
        return start
    state: dict[str, Any] = ranks.from_rank_0(lambda: read_state(path))
    changes = ranks.from_rank_0(lambda: check_schedule(state, schedule, path, sources_of))
    saved = load_checkpoint(path, engine, identity, is_verified=True)
    left = ranks.from_rank_0(lambda: set_aside_after(run_dir, saved.step))
    notes = [
        *(f"restored {name}: it was being replaced by one of the same step" for name in restored),
        *start.notes,
        *changes,
        *(f"set aside {name}.abandoned: it lies beyond step {saved.step}" for name in left),
    ]
    stage = schedule.stages[min(saved.stage_index, len(schedule.stages) - 1)]
    if saved.watched and saved.watched != rule_of(stage.until) and saved.stage_index not in saved.decided:
        notes.append(f"stage '{stage.name}' does not watch {saved.watched} any more: its numbers so far do not count")
        saved = replace(saved, watched="", watched_values=())
    return StartingPoint(path, tuple(notes), saved)


def _named(path: Path, argument: str) -> StartingPoint:
    """The intact checkpoint that `argument` of the command line names; collective."""
    found = ranks.from_rank_0(lambda: _look_at(path, argument))
    if found is not None:
        return _newest_intact(path, found)
    damage = _damage(path)
    if damage:
        raise CheckpointError(
            "the checkpoint is damaged",
            where=str(path),
            got=damage,
            fix="Name the run folder instead, to take its newest intact checkpoint, or restore the file.",
        )
    return StartingPoint(path, (f"resuming from {path}",))


def _look_at(path: Path, argument: str) -> _Survey | None:
    """What a run folder holds; None = the path is one checkpoint."""
    if not path.is_dir():
        raise CheckpointError(
            "there is no such folder",
            where=argument,
            got=str(path),
            allowed="a run folder or a checkpoint folder",
            fix="Check the path.",
        )
    if NAME.fullmatch(path.name) or (path / MANIFEST).exists() or (path / STATE).exists():
        return None
    found = _survey(path.parent if path.name == FOLDER else path)
    if not found.checkpoints:
        raise CheckpointError(
            "the folder holds no checkpoint",
            where=str(path),
            got="an empty folder" if not any(path.iterdir()) else f"no {FOLDER}/step_XXXXXXXX in it",
            allowed="a run folder or a checkpoint folder",
            fix="Name a folder that a run has saved to, or use --resume auto to start from nothing.",
        )
    return found


def _damage(path: Path) -> str:
    """ "" for an intact checkpoint, else why it is not; collective, the same on every rank."""
    return shared_damage(path) or ranks.from_rank_0(lambda: _unreadable(path))


def _unreadable(path: Path) -> str:
    try:
        read_state(path)
    except CheckpointError as error:
        return f"{error.what} ({error.got})"
    return ""


def _refuse_used_folder(run_dir: Path) -> None:
    used = [path for path in (run_dir / "metrics.jsonl", run_dir / FOLDER / LATEST) if path.exists()]
    used += list_checkpoints(run_dir)
    if used:
        raise CheckpointError(
            "--resume never starts afresh, but the run folder already holds a run",
            where=str(run_dir),
            got=used[0].name,
            allowed="a folder without metrics and checkpoints",
            fix="Choose another --run-dir, remove the old run, or continue it with --resume auto.",
        )
