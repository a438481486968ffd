"""Checkpoints of a run: write, publish, prune, load.

    RUN/checkpoints/step_00000120/    __0_0.distcp ... .metadata common.pt metadata.json   Megatron's torch_dist format
                                      state.json    progress, identity, whether a stage ends here
                                      config.toml   the resolved configuration
                                      manifest.json size and SHA-256 of every other file
    RUN/checkpoints/latest            name of the newest folder

The main thread copies the state to host memory and goes on training. A thread then writes into `step_XXXXXXXX.tmp`:

    every rank: its file, fsync, hash      all ranks agree      rank 0: manifest, fsync, folder, fsync
    -> rename, fsync of the parent         -> `latest`: aside, fsync, rename, fsync of the parent       -> prune

A folder without its suffix is therefore complete; one that was damaged later is found out by its manifest. Nothing is
deleted before the pointer to its successor is on the disk. The run folder must be on a file system that all ranks
share, and one job at a time may write there (run_lock.py). There is no random state to keep: rows are a pure function
of (seed, stage, index) and the model has no dropout.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from moba_train.config.schema import StageConfig
from moba_train.engine.base import Engine
from moba_train.errors import CheckpointError, UserError
from moba_train.parallel import ranks
from moba_train.parallel.watch import is_broken_exchange
from moba_train.train.manifest import find_damage, fsync_path, seal_files, write_durably, write_manifest
from moba_train.train.progress import Identity, Progress, check_identity, progress_from_state, rows_fingerprint
from moba_train.train.run_folder import (
    CONFIG,
    FOLDER,
    LATEST,
    NAME,
    STATE,
    delete_checkpoint,
    list_checkpoints,
    list_leftovers,
    not_kept,
    read_state,
    remove_tree,
    set_aside_after,
    step_name,
    write_latest,
)
from moba_train.train.save_task import SaveTask

if TYPE_CHECKING:
    from moba_train.train.megatron_io import HostBuffers, HostState  # megatron.core takes a second to import

BREAK_OFF_S = 30.0
"""When training breaks off by an error of our own, a save in flight may still take this long to be published."""
_MOST_CAUSES = 4
"""Ranks that a message names."""


class CheckpointStore:
    """Writes the checkpoints of one run. `save` and `finish` are collective over all ranks.

        with CheckpointStore(...) as store:
            store.save(engine, progress, stage_end=False)      # training may go on at once
            store.finish()                                     # all is published, or CheckpointError

    Args:
        run_dir: the run folder, on a file system that all ranks share.
        identity: whose run it is.
        config_toml: the resolved configuration, copied into every checkpoint.
        stages: the schedule's; the rows of the current one must not change on resume.
        sources_of: stage index -> what `rows_fingerprint` wants to know of its sources; asked for on rank 0.
        keep_last: newest checkpoints that are kept, besides those at the end of a stage.
        keep_every: checkpoints whose step is a multiple of this are kept; 0 = none.
        asynchronous: write in a thread; False = `save` returns when all is published.
        check_lock: called on rank 0 before anything is renamed or deleted; raises if the run folder is another job's.
    """

    def __init__(
        self,
        run_dir: Path,
        identity: Identity,
        config_toml: str,
        stages: tuple[StageConfig, ...],
        keep_last: int,
        *,
        sources_of: Callable[[int], Mapping[str, Any]] = lambda index: {},
        keep_every: int = 0,
        asynchronous: bool = False,
        check_lock: Callable[[], None] = lambda: None,
    ) -> None:
        self.run_dir = run_dir
        self._identity = identity
        self._config_toml = config_toml
        self._stages = stages
        self._sources_of = sources_of
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._asynchronous = asynchronous
        self._check_lock = check_lock
        self._task: SaveTask | None = None
        self._longest_s = 0.0
        self._buffers: HostBuffers | None = None
        self._lines: deque[str] = deque()
        self._untold: deque[SaveTask] = deque()
        self._unmeasured: deque[SaveTask] = deque()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Training broke off: a save in flight counts if it ends soon. What it meets must not hide `error`.

        All ranks meet a UserError (the data of the next stage are damaged), so the save can end and is waited for;
        the watchdog's limit for saves holds. Nobody waits when ranks were lost, since it cannot end then, nor after a
        second signal.
        """
        if self._task is not None and isinstance(error, Exception) and not is_broken_exchange(error):
            self._task.wait(None if isinstance(error, UserError) else BREAK_OFF_S)

    @property
    def has_failed(self) -> bool:
        """This rank knows of a save that failed."""
        return self._task is not None and self._task.failed

    @property
    def save_time_s(self) -> float:
        """The longest save so far, from the call to the publication."""
        return max(self._longest_s, self._task.save_s if self._task is not None else 0.0)

    @property
    def in_flight_s(self) -> float | None:
        """For how long the save that is being written has been under way; None = there is none."""
        return None if self._task is None or self._task.is_over else self._task.age_s

    def news(self) -> list[str]:
        """Lines for the log since the last call."""
        while self._untold and self._untold[0].is_over:
            task = self._untold.popleft()
            if task.error is None:
                told = f"saved {self.run_dir / FOLDER / task.name} in {task.save_s:.1f} s"
                self._lines.append(f"{told} (training waited {task.wait_s:.1f} s)")
                self._lines.extend(task.notes)
            else:
                self._lines.append(_failure_line(task.name, task.error))
        lines = list(self._lines)
        self._lines.clear()
        return lines

    def figures(self) -> dict[str, float]:
        """Numbers of the last save that has ended since the last call, for the record of a step; {} = there is none."""
        numbers: dict[str, float] = {}
        while self._unmeasured and self._unmeasured[0].is_over:
            task = self._unmeasured.popleft()
            if task.error is None:
                numbers = {"perf/save_s": task.save_s, "perf/save_wait_s": task.wait_s}
        return numbers

    def save(self, engine: Engine, progress: Progress, *, stage_end: bool) -> Path:
        """Copy the state and write it; with `asynchronous`, in a thread, once the save before has ended.

        Args:
            engine: its `sharded_state_dict` is saved.
            progress: position to resume from.
            stage_end: the last step ended a stage; such a checkpoint is never pruned.

        Returns:
            The folder, which is there once the save has been published.

        Raises:
            CheckpointError: the save before failed, or (not `asynchronous`) this one: a disk refused. Nothing is
                published then, and `latest` still names the one before.
        """
        from moba_train.train.megatron_io import HostBuffers, take_state  # megatron.core takes a second to import

        begun_s, watch, doing = time.perf_counter(), engine.topology.watch, f"saving step {progress.step}"
        self.finish()
        watch.begin(doing, limit="save")  # the wait was for the save before, which has a limit of its own
        is_first = self._buffers is None
        self._buffers = self._buffers or HostBuffers()
        state = take_state(engine.sharded_state_dict(is_loading=False), self._buffers, validate=is_first)
        final = self.run_dir / FOLDER / step_name(progress.step)
        group = engine.topology.save_group
        self._task = SaveTask(
            final.name,
            watch.background(doing, limit="save")(lambda: self._write(final, state, progress, stage_end, group)),
            on_failure=partial(_say_failure, final.name),
            begun_s=begun_s,
        )
        self._untold.append(self._task)
        self._unmeasured.append(self._task)
        self._task.start(in_thread=self._asynchronous)
        return final

    def finish(self) -> None:
        """Wait until all is published.

        Raises:
            CheckpointError: a save failed.
            Exception: whatever else the saving thread met: ranks that were lost, or an error of our own.
        """
        if self._task is None:
            return
        self._task.wait()
        self._task.raise_failure()
        self._longest_s = self.save_time_s
        self._task = None

    def _write(
        self, final: Path, state: HostState, progress: Progress, stage_end: bool, group: dist.ProcessGroup
    ) -> list[str]:
        """All that follows the copy; collective over `group`. Returns lines for the log."""
        from moba_train.train.megatron_io import write_state

        aside = final.with_name(final.name + ".tmp")
        with _disk_errors(final):
            ranks.from_rank_0(lambda: self._prepare(aside), group)
            write_state(state, aside, group)
            mine = ranks.on_all_ranks(lambda: _seal_own(aside, final), group)
            entries = {name: entry for part in ranks.gather_all(mine, group) for name, entry in part.items()}
            return ranks.from_rank_0(lambda: self._publish(aside, final, entries, progress, stage_end), group)

    def _prepare(self, aside: Path) -> None:
        """Rank 0: room for the new checkpoint. What interrupted saves left behind may be what fills the disk."""
        self._check_lock()
        for path in list_leftovers(self.run_dir):
            remove_tree(path)
        aside.mkdir(parents=True)

    def _publish(
        self, aside: Path, final: Path, entries: dict[str, dict[str, Any]], progress: Progress, stage_end: bool
    ) -> list[str]:
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
        index = progress.stage_index
        rows = rows_fingerprint(self._stages[index], self._sources_of(index))
        state = {**asdict(progress), "stage_end": stage_end, "stage_rows": rows, **asdict(self._identity)}
        write_durably(aside / STATE, (json.dumps(state, indent=1) + "\n").encode())
        write_durably(aside / CONFIG, self._config_toml.encode())
        rest = sorted(path for path in aside.iterdir() if path.name not in entries)
        write_manifest(aside, entries | seal_files(rest))
        self._check_lock()
        if final.exists():  # the same step again, after a resume from an older or repaired checkpoint
            os.replace(final, final.with_name(final.name + ".old"))
        os.replace(aside, final)
        fsync_path(final.parent)
        fsync_path(self.run_dir)  # the first checkpoint has made the folder
        write_latest(self.run_dir, final.name)
        return self._prune()

    def _prune(self) -> list[str]:
        """Delete what no rule keeps; a disk that refuses is told of, since the new checkpoint is whole already."""
        found = list_checkpoints(self.run_dir)
        try:
            for path in not_kept(found, keep_last=self._keep_last, keep_every=self._keep_every):
                delete_checkpoint(path)
            for path in list_leftovers(self.run_dir):
                remove_tree(path)
        except OSError as error:
            return [f"WARNING: an old checkpoint cannot be deleted: {error}"]
        return []


def load_checkpoint(path: Path, engine: Engine, identity: Identity, *, is_verified: bool = False) -> Progress:
    """Restore model and optimizer from a checkpoint folder; collective over all ranks. The mesh may have changed.

    Args:
        is_verified: its hashes have been compared already (`find_start` does); otherwise they are now.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another model, vocabulary or seed.
    """
    from moba_train.train.megatron_io import MISFITS, load_sharded, misfit  # megatron.core takes a second to import

    state: dict[str, Any] = ranks.from_rank_0(lambda: read_state(path))
    check_identity(path, state, identity)
    damage = "" if is_verified else shared_damage(path)
    if damage:
        raise CheckpointError(
            "the checkpoint is damaged",
            where=str(path),
            got=damage,
            fix="Resume with --resume auto, which takes the newest intact checkpoint, or restore the file.",
        )
    loaded = load_sharded(engine.sharded_state_dict(is_loading=True), path)
    try:
        engine.load_state_dict(loaded)
    except MISFITS as error:  # values that are no tensors, which nobody has looked at yet
        raise misfit(path, error) from error
    return progress_from_state(state)


def shared_damage(path: Path) -> str:
    """`find_damage`, the hashing shared by all ranks; collective. The same line on every rank."""
    found = ranks.gather_all(find_damage(path, part=ranks.rank(), parts=ranks.world_size()))
    return next((text for text in found if text), "")


def _seal_own(aside: Path, final: Path) -> dict[str, dict[str, Any]]:
    """This rank's file, flushed and hashed."""
    with _disk_errors(final, rank=ranks.rank()):
        return seal_files(sorted(aside.glob(f"__{ranks.rank()}_*.distcp")))


@contextmanager
def _disk_errors(final: Path, *, rank: int = 0) -> Iterator[None]:
    """Turn what a full or read-only disk raises into a message that names the ranks whose disk it is.

    Args:
        rank: on which a bare OSError arose: rank 0, where all ranks raise what befell it.
    """
    from torch.distributed.checkpoint.api import CheckpointException  # no Exception, but a BaseException

    try:
        yield
    except (OSError, CheckpointException) as error:
        failures = error.failures if isinstance(error, CheckpointException) else {rank: (error, None)}
        causes = [f"rank {failed}: {_text(cause)}" for failed, (cause, _) in sorted(failures.items())]
        raise CheckpointError(
            "the checkpoint could not be written; the one before is untouched",
            where=str(final),
            got="; ".join(causes[:_MOST_CAUSES]) + (f"; {len(causes)} ranks in all" * (len(causes) > _MOST_CAUSES)),
            fix="Check free space and permissions, then resume with --resume auto.",
        ) from error


def _text(error: BaseException) -> str:
    text = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:400]


def _failure_line(name: str, error: BaseException) -> str:
    """One line of the log about a save that failed."""
    if isinstance(error, CheckpointError):
        return f"ERROR: {name} was not saved: {error.what} ({error.got})"
    if is_broken_exchange(error):
        return f"{name} was not saved: ranks lost each other"
    return f"ERROR: {name} was not saved: {_text(error)}"


def _say_failure(name: str, error: BaseException) -> None:
    """At once, on standard error of rank 0 and of the ranks that are to blame: a step may take long."""
    rank = ranks.rank()
    if rank == 0 or not isinstance(error, CheckpointError) or f"rank {rank}: " in str(error.got):
        print(f"moba-train (rank {rank}): {_failure_line(name, error)}", file=sys.stderr, flush=True)


__all__ = [
    "FOLDER",
    "LATEST",
    "NAME",
    "STATE",
    "CheckpointStore",
    "list_checkpoints",
    "load_checkpoint",
    "read_state",
    "set_aside_after",
    "shared_damage",
    "step_name",
]
