"""What `RUN/checkpoints` holds, by names; who is kept; what a checkpoint says of itself. Imports no torch.

The names:

    step_00000120             a checkpoint
    step_00000120.tmp         a save that is being written, or was cut short
    step_00000120.old         a checkpoint that is being deleted, or replaced by one of the same step
    step_00000120.abandoned   a checkpoint beyond the point from which the run was resumed
    latest                    name of the newest checkpoint
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from moba_train.errors import CheckpointError
from moba_train.train.manifest import damages, decode_json, fsync_path, read_small, replace_text
from moba_train.train.progress import Progress, progress_from_state, wrong_fields

FOLDER = "checkpoints"
LATEST = "latest"
STATE = "state.json"
CONFIG = "config.toml"
NAME = re.compile(r"step_([0-9]{8,20})")
LEFTOVER = re.compile(r"step_[0-9]{8,20}\.(tmp|old)")
ABANDONED = re.compile(r"step_[0-9]{8,20}\.abandoned")
_STATE_BYTES = 1 << 20
_LATEST_BYTES = 4096


def step_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Finished steps of a checkpoint folder, by its name."""
    return int(path.name.removeprefix("step_").partition(".")[0])


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Published checkpoint folders of a run, oldest first."""
    return [path for path in _folders(run_dir, NAME) if path.name == step_name(step_of(path))]


def list_leftovers(run_dir: Path) -> list[Path]:
    """What interrupted saves and deletions left behind, oldest first."""
    return _folders(run_dir, LEFTOVER)


def list_abandoned(run_dir: Path) -> list[Path]:
    """Checkpoints of branches that were left, oldest first."""
    return _folders(run_dir, ABANDONED)


def read_state(path: Path) -> dict[str, Any]:
    """Decoded state.json of a checkpoint folder.

    Raises:
        CheckpointError: it is missing or does not decode.
    """
    try:
        state: dict[str, Any] = decode_json(read_small(path / STATE, _STATE_BYTES))
        missing = {"stage_rows", "stage_end", "model", "tokenizer", "seed"} - state.keys()
        if missing:
            raise KeyError(sorted(missing)[0])
        wrong = [key for key in ("stage_rows", "model") if not isinstance(state[key], dict)]
        wrong += wrong_fields(state)
        if wrong:
            raise ValueError(f"{wrong[0]} is {str(state[wrong[0]])[:40]!r}")
        if NAME.fullmatch(path.name) and state["step"] != step_of(path):
            raise ValueError(f"it is of step {state['step']}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{STATE} of the checkpoint cannot be read",
            where=str(path),
            got=f"{type(error).__name__}: {str(error)[:200]}",
            fix="Resume from another checkpoint of the run.",
        ) from error
    return state


def newest_progress(run_dir: Path, resume: str) -> Progress:
    """Position of the newest checkpoint that `--resume` may come to stand for, by what it says of itself alone.

    Whether its files are whole is for `resume.begin` to find out. That of a new run where there is none, or nothing to
    be read: `begin` says what is wrong with it.
    """
    if resume == "never":
        return Progress()
    path = run_dir if resume == "auto" else Path(resume)
    with suppress(CheckpointError, OSError):
        if NAME.fullmatch(path.name) or (path / STATE).exists():
            return progress_from_state(read_state(path))
    folder = path.parent if path.name == FOLDER else path
    for checkpoint in reversed(list_checkpoints(folder)):
        with suppress(CheckpointError):
            return progress_from_state(read_state(checkpoint))
    return Progress()


def read_latest(run_dir: Path) -> str:
    """What the pointer says; "" = there is none. Never raises: nothing depends on it."""
    try:
        return read_small(run_dir / FOLDER / LATEST, _LATEST_BYTES).strip()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError):
        return "(unreadable)"


def write_latest(run_dir: Path, name: str) -> None:
    """Move the pointer; durable on return."""
    replace_text(run_dir / FOLDER / LATEST, name + "\n")


def is_stage_end(path: Path) -> bool:
    """Unreadable state counts as ordinary, so that pruning gets rid of it."""
    try:
        return bool(read_state(path)["stage_end"])
    except CheckpointError:
        return False


def not_kept(
    paths: Sequence[Path], *, keep_last: int, keep_every: int, is_kept: Callable[[Path], bool] = is_stage_end
) -> list[Path]:
    """Those of `paths` (oldest first) that no rule keeps.

    Args:
        keep_last: the newest that are kept; at least one is.
        keep_every: steps that are a multiple of it are kept; 0 = none.
        is_kept: True for others that are kept.
    """
    older = paths[: -max(1, keep_last)]
    return [path for path in older if not (keep_every and step_of(path) % keep_every == 0) and not is_kept(path)]


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint so that a half deleted one does not look like one. OSError when the disk refuses."""
    old = path.with_name(path.name + ".old")
    remove_tree(old)
    os.replace(path, old)
    fsync_path(path.parent)
    remove_tree(old)


def remove_tree(path: Path) -> None:
    """Remove a folder, or the link to one, if it is there."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def set_aside_after(run_dir: Path, step: int) -> list[str]:
    """Rename checkpoints beyond `step` to `NAME.abandoned`, so that a branch that was left is not resumed by chance.

    The pointer names the newest that is left, also where a save was cut short before it had moved.

    Returns:
        The names that were set aside. Nothing is deleted (but an older `.abandoned` of the same name).
    """
    beyond = [path for path in list_checkpoints(run_dir) if step_of(path) > step]
    for path in beyond:
        aside = path.with_name(path.name + ".abandoned")
        remove_tree(aside)
        os.replace(path, aside)
    if beyond:
        fsync_path(run_dir / FOLDER)
    left = list_checkpoints(run_dir)
    if left and read_latest(run_dir) != left[-1].name:
        write_latest(run_dir, left[-1].name)
    elif beyond and not left:
        (run_dir / FOLDER / LATEST).unlink(missing_ok=True)
    return [path.name for path in beyond]


def restore_replaced(run_dir: Path) -> list[str]:
    """Give a checkpoint its name back that was to be replaced by one of the same step, when the job died in between.

    It is newer than all others, and complete by its manifest; one that was being deleted is older. The caller holds the
    lock of the run folder.

    Returns:
        Its name, if there was one.
    """
    known = list_checkpoints(run_dir)
    newest = step_of(known[-1]) if known else -1
    for path in reversed(list_leftovers(run_dir)):
        if path.suffix == ".old" and step_of(path) > newest and not any(damages(path, hashes=False)):
            os.replace(path, path.with_suffix(""))
            fsync_path(path.parent)
            return [path.stem]
    return []


def _folders(run_dir: Path, names: re.Pattern[str]) -> list[Path]:
    folder = run_dir / FOLDER
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if names.fullmatch(path.name) and path.is_dir()), key=step_of)
