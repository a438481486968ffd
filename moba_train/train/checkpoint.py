"""Checkpoints of a run: write, find, read, prune.

    RUN/checkpoints/step_00000120/    __0_0.distcp ... .metadata common.pt metadata.json   Megatron's torch_dist format
                                      state.json    progress, identity, whether a stage ends here
                                      config.toml   the resolved configuration
                                      manifest.json size and SHA-256 of every other file
    RUN/checkpoints/latest            name of the newest folder

Order of publication: write into `step_XXXXXXXX.tmp`, flush, hash, manifest, rename, replace `latest`, prune. A folder
without its suffix is therefore complete; one that was damaged later is found out by its manifest. The folder must be on
a file system that all ranks share. There is no random state to keep: rows are a pure function of (seed, stage, index)
and the model has no dropout.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moba_train.config.schema import StageConfig
from moba_train.engine.base import Engine
from moba_train.errors import CheckpointError
from moba_train.parallel import ranks
from moba_train.train.manifest import find_damage, fsync_path, replace_text, seal_files, write_manifest
from moba_train.train.progress import Identity, Progress, progress_from_state, rows_fingerprint

FOLDER = "checkpoints"
LATEST = "latest"
STATE = "state.json"
CONFIG = "config.toml"
NAME = re.compile(r"step_(\d{8,})")
LEFTOVER = re.compile(r"step_\d{8,}\.(tmp|old)")


def step_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Published checkpoint folders of a run, oldest first."""
    folder = run_dir / FOLDER
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def read_state(path: Path) -> dict[str, Any]:
    """Decoded state.json of a checkpoint folder.

    Raises:
        CheckpointError: it is missing or does not decode.
    """
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
        missing = {"stage_rows", "stage_end", "model", "tokenizer", "seed"} - state.keys()
        if missing:
            raise KeyError(sorted(missing)[0])
        progress_from_state(state)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{STATE} of the checkpoint cannot be read",
            where=str(path),
            got=f"{type(error).__name__}: {error}",
            fix="Resume from another checkpoint of the run.",
        ) from error
    return state


@dataclass(frozen=True)
class CheckpointStore:
    """Writes the checkpoints of one run.

    Attributes:
        run_dir: the run folder, on a file system that all ranks share.
        identity: whose run it is.
        config_toml: the resolved configuration, copied into every checkpoint.
        stages: the schedule's; the rows of the current one must not change on resume.
        keep_last: newest checkpoints that are kept, besides those at the end of a stage.
    """

    run_dir: Path
    identity: Identity
    config_toml: str
    stages: tuple[StageConfig, ...]
    keep_last: int
    save_time_s: float = 0.0
    has_failed: bool = False

    def finish(self) -> None:
        """Nothing is left to wait for."""

    def news(self) -> list[str]:
        """Lines for the log since the last call."""
        return []

    def save(self, engine: Engine, progress: Progress, *, stage_end: bool) -> Path:
        """Write and publish a checkpoint; collective over all ranks.

        Args:
            engine: its `sharded_state_dict` is saved.
            progress: position to resume from.
            stage_end: the last step ended a stage; such a checkpoint is never pruned.

        Returns:
            The published folder.

        Raises:
            CheckpointError: the disk refused; nothing is published then and `latest` still names the previous one.
        """
        from moba_train.train.megatron_io import save_sharded  # megatron.core takes a second to import

        final = self.run_dir / FOLDER / step_name(progress.step)
        aside = final.with_name(final.name + ".tmp")
        with _disk_errors(final):
            ranks.from_rank_0(lambda: _fresh_folder(aside))
            save_sharded(engine.sharded_state_dict(is_loading=False), aside)
            mine = ranks.on_all_ranks(lambda: seal_files(sorted(aside.glob(f"__{ranks.rank()}_*.distcp"))))
            entries = {name: entry for part in ranks.gather_all(mine) for name, entry in part.items()}
            ranks.from_rank_0(lambda: self._publish(aside, final, entries, progress, stage_end))
        return final

    def _publish(
        self, aside: Path, final: Path, entries: dict[str, dict[str, Any]], progress: Progress, stage_end: bool
    ) -> None:
        """Rank 0's part: the small files, the manifest, the rename, the pointer, the pruning."""
        unseen = [name for name in entries if not (aside / name).is_file()]
        if unseen:
            raise CheckpointError(
                "not all ranks see the same run folder",
                where=str(aside),
                got=f"rank 0 cannot see {unseen[0]}, which another rank has written",
                allowed="a folder on a file system that all ranks share",
                fix="Point run.dir at shared storage.",
            )
        rows = rows_fingerprint(self.stages[progress.stage_index])
        state = {**asdict(progress), "stage_end": stage_end, "stage_rows": rows, **asdict(self.identity)}
        (aside / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        (aside / CONFIG).write_text(self.config_toml, encoding="utf-8")
        rest = sorted(path for path in aside.iterdir() if path.name not in entries)
        write_manifest(aside, entries | seal_files(rest))
        if final.exists():  # the same step again, after a resume from an older or repaired checkpoint
            os.replace(final, _emptied(final.with_name(final.name + ".old")))
        os.replace(aside, final)
        fsync_path(final.parent)
        replace_text(final.parent / LATEST, final.name + "\n")
        self._prune(final)

    def _prune(self, newest: Path) -> None:
        """Delete leftovers of interrupted saves and what keep_last does not cover."""
        for path in newest.parent.iterdir():
            if LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path)
        kept = set(list_checkpoints(self.run_dir)[-max(1, self.keep_last) :]) | {newest}
        for path in list_checkpoints(self.run_dir):
            if path not in kept and not _is_stage_end(path):
                old = _emptied(path.with_name(path.name + ".old"))
                os.replace(path, old)  # a half deleted folder must not look like a checkpoint
                shutil.rmtree(old)


def set_aside_after(run_dir: Path, step: int) -> list[str]:
    """Rename checkpoints beyond `step` to `NAME.abandoned`, so that a branch that was left is not resumed by chance.

    Returns:
        The names that were set aside. Nothing is deleted (but an older `.abandoned` of the same name).
    """
    names = []
    for path in list_checkpoints(run_dir):
        if int(path.name.removeprefix("step_")) > step:
            os.replace(path, _emptied(path.with_name(path.name + ".abandoned")))
            names.append(path.name)
    if names:
        left = list_checkpoints(run_dir)
        if left:
            replace_text(run_dir / FOLDER / LATEST, left[-1].name + "\n")
        else:
            (run_dir / FOLDER / LATEST).unlink(missing_ok=True)
    return names


def load_checkpoint(path: Path, engine: Engine, identity: Identity) -> Progress:
    """Restore model and optimizer from a checkpoint folder; collective over all ranks. The mesh may have changed.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another model, vocabulary or seed.
    """
    from moba_train.train.megatron_io import load_sharded  # megatron.core takes a second to import

    state: dict[str, Any] = ranks.from_rank_0(lambda: read_state(path))
    check_identity(path, state, identity)
    found = ranks.gather_all(find_damage(path, part=ranks.rank(), parts=ranks.world_size()))
    damage = next((text for text in found if text), "")
    if damage:
        raise CheckpointError(
            "the checkpoint is damaged",
            where=str(path),
            got=damage,
            fix="Resume with --resume auto, which takes the newest intact checkpoint, or restore the file.",
        )
    engine.load_state_dict(load_sharded(engine.sharded_state_dict(is_loading=True), path))
    return progress_from_state(state)


def check_identity(path: Path, state: dict[str, Any], identity: Identity) -> None:
    """Refuse a checkpoint of another model, vocabulary or data order.

    Raises:
        CheckpointError: names the first thing that differs, in terms of the configuration.
    """
    theirs = state.get("model", {})
    different = [key for key in identity.model if theirs.get(key) != identity.model[key]]
    if different:
        raise CheckpointError(
            "the checkpoint belongs to another model",
            where=str(path),
            got="; ".join(f"model.{key} = {theirs.get(key)!r} in the checkpoint" for key in different),
            allowed="; ".join(f"model.{key} = {identity.model[key]!r} in this run" for key in different),
            fix="Resume with the checkpoint's config.toml, or choose another --run-dir for the new model.",
        )
    if state.get("tokenizer") != identity.tokenizer:
        raise CheckpointError(
            "the checkpoint was trained with another vocabulary",
            where=str(path),
            got=f"tokenizer sha256 {str(state.get('tokenizer'))[:16]}... in the checkpoint",
            allowed=f"tokenizer sha256 {identity.tokenizer[:16]}... (data.tokenizer)",
            fix="Point data.tokenizer and data.sources at the data that the run began with.",
        )
    if state.get("seed") != identity.seed:
        raise CheckpointError(
            "run.seed is not the checkpoint's, so rows would be repeated and left out",
            where=str(path),
            got=f"run.seed = {identity.seed}",
            allowed=f"run.seed = {state.get('seed')}",
            fix="Use the seed that the run began with.",
        )


@contextmanager
def _disk_errors(final: Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises into a message; BaseException subclasses of PyTorch included."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (OSError, CheckpointException) as error:
        raise CheckpointError(
            "the checkpoint could not be written; the previous one is untouched",
            where=str(final),
            got=str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__,
            fix="Check free space and permissions, then resume with --resume auto.",
        ) from error


def _fresh_folder(path: Path) -> None:
    _emptied(path).mkdir(parents=True)


def _emptied(path: Path) -> Path:
    """Remove what a crash left at `path`."""
    if path.exists():
        shutil.rmtree(path)
    return path


def _is_stage_end(path: Path) -> bool:
    """Unreadable state counts as ordinary, so that pruning gets rid of it."""
    try:
        return bool(read_state(path).get("stage_end", False))
    except CheckpointError:
        return False
