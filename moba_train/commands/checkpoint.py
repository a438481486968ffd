"""`moba-train checkpoint ls | verify | prune RUN`: what a run has saved, whether it is whole, what may go. No torch."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from moba_train.data.files import disk_errors
from moba_train.errors import CheckpointError
from moba_train.train.manifest import OnBytes, damages, read_manifest
from moba_train.train.run_folder import (
    CONFIG,
    FOLDER,
    delete_checkpoint,
    is_stage_end,
    list_abandoned,
    list_checkpoints,
    list_leftovers,
    not_kept,
    read_latest,
    read_state,
    remove_tree,
    step_name,
    step_of,
)
from moba_train.train.run_lock import locked

_HEAD = ("checkpoint", "step", "stage", "tokens", "size", "mesh", "engine", "written", "files")
_RIGHT = (1, 3, 4)
"""Columns of numbers."""


def run_ls(run: Path) -> int:
    """Print a table of what is there; presence and sizes of files are compared, contents are not. Returns 0."""
    run_dir = _run_folder(run)
    latest = read_latest(run_dir)
    rows = [_row(path, path.name == latest) for path in list_checkpoints(run_dir)]
    rows += [_row(path, False) for path in list_abandoned(run_dir)]
    rows += [
        (
            path.name,
            "",
            "",
            "",
            _size_text(path),
            "",
            "",
            _written(path),
            "being written or deleted, or cut short in that",
        )
        for path in list_leftovers(run_dir)
    ]
    if not rows:
        print(f"no checkpoint in {run_dir / FOLDER}")
        return 0
    print("\n".join(_table(_HEAD, rows)))
    if latest and latest not in [path.name for path in list_checkpoints(run_dir)]:
        print(f"{FOLDER}/latest names {latest[:100]!r}, which is not there (nothing depends on it)")
    print("presence and sizes of files; `moba-train checkpoint verify` compares their contents as well")
    return 0


def run_verify(run: Path, *, step: int | None, every: bool) -> int:
    """Compare contents with the manifest: of the newest checkpoint, of that after `step`, or of all. Returns 0.

    Raises:
        CheckpointError: one is damaged, or there is none.
    """
    run_dir = _run_folder(run)
    paths = list_checkpoints(run_dir)
    if step is not None:
        paths = [path for path in paths if step_of(path) == step]
    if not paths:
        wanted = f"no {step_name(step)}" if step is not None else "no checkpoint"
        raise CheckpointError("there is nothing to verify", where=str(run_dir / FOLDER), got=wanted)
    paths = paths if every else paths[-1:]
    damaged = []
    for path in paths:
        found = _verify(path)
        if found and not path.is_dir():
            print(f"{path.name}: deleted meanwhile, by the job that writes to this run")
            continue
        for line in found:
            print(f"{path.name}: DAMAGED: {line}")
        if found:
            damaged.append(path.name)
        else:
            print(f"{path.name}: whole, {len(read_manifest(path)[0])} files, {_size_text(path)}")
    if damaged:
        raise CheckpointError(
            f"{len(damaged)} of {len(paths)} checkpoints are damaged",
            where=str(run_dir / FOLDER),
            got=", ".join(damaged),
            fix="Restore the files. `--resume auto` takes the newest checkpoint that is whole.",
        )
    return 0


def run_prune(run: Path, *, keep_last: int, keep_every: int, stage_ends: bool, abandoned: bool, dry_run: bool) -> int:
    """Delete checkpoints that no rule keeps, and what interrupted saves left behind. Returns 0.

    The newest checkpoint whose contents are whole is never deleted.

    Args:
        keep_every: 0 = as the run itself has it (checkpoint.keep_every).
        stage_ends: delete ends of stages too.
        abandoned: delete checkpoints that were set aside too.
        dry_run: only say what would be deleted.

    Raises:
        CheckpointError: a job is writing to the run folder, or the disk refuses.
    """
    run_dir = _run_folder(run)
    if not keep_every and (keep_every := _keep_every_of(run_dir)):
        print(f"multiples of {keep_every} steps are kept, as in the run's config.toml (--keep-every M for others)")
    with locked(run_dir):
        paths = list_checkpoints(run_dir)
        whole = next((path for path in reversed(paths) if not _verify(path)), None)
        going = not_kept(
            paths,
            keep_last=keep_last,
            keep_every=keep_every,
            is_kept=lambda path: path == whole or (not stage_ends and is_stage_end(path)),
        )
        others = [*list_leftovers(run_dir), *(list_abandoned(run_dir) if abandoned else [])]
        freed = 0
        for path in [*going, *others]:
            size = _size(path)
            print(f"{'would delete' if dry_run else 'deleting'} {path.name}, {_bytes(size)}", flush=True)
            if not dry_run:
                refused = "a checkpoint cannot be deleted"
                with disk_errors(path, what=refused, kind=CheckpointError, fix="Check permissions."):
                    remove_tree(path) if path in others else delete_checkpoint(path)
            freed += size
    kept = len(paths) - len(going)
    print(f"{'would free' if dry_run else 'freed'} {_bytes(freed)}; {kept} checkpoints are kept")
    return 0


def _keep_every_of(run_dir: Path) -> int:
    """checkpoint.keep_every in the run's config.toml; 0 where that does not say."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return int(tomllib.loads((run_dir / CONFIG).read_text("utf-8"))["checkpoint"]["keep_every"])
    return 0


def _run_folder(path: Path) -> Path:
    """RUN, or RUN/checkpoints. CheckpointError when there is no such folder."""
    if not path.is_dir():
        raise CheckpointError("there is no such run folder", where="RUN", got=str(path), fix="Check the path.")
    return path.parent if path.name == FOLDER else path


def _row(path: Path, is_latest: bool) -> tuple[str, ...]:
    name = path.name + (" <- latest" if is_latest else "")
    found = list(damages(path, hashes=False))
    files = "all there" if not found else found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")
    try:
        state = read_state(path)
    except CheckpointError as error:
        files = files if found else error.what
        return (name, str(step_of(path)), "?", "?", _size_text(path), "?", "?", _written(path), files)
    mesh = state.get("mesh")
    degrees = " ".join(f"{key}{value}" for key, value in mesh.items()) if isinstance(mesh, dict) else "?"
    stage = _plain(state["stage_rows"].get("name", "?")) + (" (end)" if state["stage_end"] else "")
    stage += "" if state.get("evaluated", True) else ", not evaluated yet"
    told = (_plain(state["step"]), stage, f"{int(state['tokens']):,}", _size_text(path), _plain(degrees))
    return (name, *told, _plain(state.get("engine", "megatron")), _written(path), files)


def _plain(value: object) -> str:
    """What a file says, fit for a terminal."""
    return "".join(char if char.isprintable() else "?" for char in str(value)[:60])


def _verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint, contents included; a progress bar on a terminal meanwhile."""
    total = sum(entry["bytes"] for entry in read_manifest(path)[0].values())
    with _progress(path.name, total) as on_bytes:
        found = list(damages(path, on_bytes=on_bytes))
    if not found:
        try:
            read_state(path)
        except CheckpointError as error:
            found.append(f"{error.what} ({error.got})")
    return found


@contextmanager
def _progress(name: str, total: int) -> Iterator[OnBytes]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"hashing {name}", total=total)
        yield lambda count: progress.advance(task, count)


def _size(path: Path) -> int:
    """Bytes of the files of a folder, which may be vanishing."""
    total = 0
    with suppress(OSError):
        for file in path.iterdir():
            with suppress(OSError):
                total += file.lstat().st_size
    return total


def _size_text(path: Path) -> str:
    return _bytes(_size(path))


def _bytes(size: int) -> str:
    """1.23 GB, 45.6 MB, 789 KB, 16 B (powers of 1000)."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size} B"


def _written(path: Path) -> str:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M:%S")
    except OSError:
        return "gone meanwhile"  # published or deleted, by the job that writes to this run


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = []
    for row in (head, *rows):
        cells = [cell.rjust(widths[i]) if i in _RIGHT else cell.ljust(widths[i]) for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return lines
