"""What one rank sees of its machine before a run: versions, device, free memory, clock, and whether it can write.

Everything here is local; `preflight_rules` judges what all ranks have seen.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import secrets
import socket
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from moba_train import __version__
from moba_train.config.load import to_toml
from moba_train.config.schema import CheckpointConfig, RunConfig
from moba_train.train.manifest import fsync_path
from moba_train.train.run_folder import list_checkpoints, list_leftovers, not_kept, step_name, step_of

_PACKAGES = ("torch", "megatron-core", "numpy", "sentencepiece")
_SOURCES = ("moba_train", "moba_kernels")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Control groups, version 2 and 1: limit, what is taken, and what of that is cache of files, which the kernel drops when
# memory is asked for. Data that were read twice stand in the active part: a job that is started again finds it full.
_GROUP_FILES = (
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)


def versions_of(config: RunConfig) -> dict[str, str]:
    """Versions of packages, and digests of the code and of the configuration."""
    found = {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    code, settings = code_digest(), hashlib.sha256(to_toml(config).encode()).hexdigest()[:12]
    return {**found, "moba-train": __version__, "code": code, "configuration": settings}


def code_digest() -> str:
    """Of all sources of this program, as they lie on this machine: a checkout that was forgotten shows."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        spec = importlib.util.find_spec(name)
        folders = list(spec.submodule_search_locations or ()) if spec is not None else []
        for path in sorted(path for folder in folders for path in Path(folder).rglob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def machine_id() -> str:
    """Host name and, where there is one, the id of its boot."""
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    return f"{socket.gethostname()} {boot}"


def device_name(device: torch.device) -> str:
    """What a person calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


def free_device_memory(device: torch.device) -> int | None:
    """Bytes of the device that no process has taken, and what this one holds in reserve; None on CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free_host_memory(root: Path = Path("/")) -> int | None:
    """Bytes that processes may still take: of the machine and, if that is less, of any control group above this one.

    Schedulers and containers limit a job by control groups; one that takes more is killed although the machine has
    memory left. None where the system does not say (not Linux).

    Args:
        root: where proc and sys are (tests have their own).
    """
    meminfo = root / "proc" / "meminfo"
    if not meminfo.exists():
        return None
    lines = (line.split() for line in meminfo.read_text().splitlines())
    free = [1024 * int(words[1]) for words in lines if words and words[0] == "MemAvailable:"]
    return min([*free, *_left_in_groups(root)], default=None)


def _left_in_groups(root: Path) -> Iterator[int]:
    listing = root / "proc" / "self" / "cgroup"
    for line in listing.read_text().splitlines() if listing.exists() else ():
        number, kinds, path = line.split(":", 2)
        if number != "0" and "memory" not in kinds.split(","):
            continue
        top = root / "sys" / "fs" / "cgroup" / ("" if number == "0" else "memory")
        folder = top / path.strip("/")
        for group in (folder, *folder.parents):
            yield from (_left_in_group(group, *files) for files in _GROUP_FILES if (group / files[0]).exists())
            if group == top:
                break


def _left_in_group(group: Path, limit: str, taken: str, cache: tuple[str, ...]) -> int:
    """Bytes; more than any machine has where there is no limit."""
    text = (group / limit).read_text().strip()
    if text == "max":
        return 1 << 62
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(text) - int((group / taken).read_text()) + sum(int(stat.get(name, 0)) for name in cache)


def nearest_existing(path: Path) -> Path:
    """The path itself, or the first above it that exists: where a folder of this name would be made."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if os.path.exists(place))


def free_disk(folder: Path, run_dir: Path) -> int:
    """Bytes that this user may still write to the file system of `folder` (quotas are not known).

    What interrupted saves left in the run folder counts as free: it goes before the next one is written.
    """
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize + _bytes_in(list_leftovers(run_dir))


def reclaimed_disk(run_dir: Path, checkpoint: CheckpointConfig) -> int:
    """Bytes of the checkpoints that go once the next one is published."""
    present = list_checkpoints(run_dir)
    after_next = [*present, run_dir / step_name(1 + max(map(step_of, present), default=0))]
    return _bytes_in(not_kept(after_next, keep_last=checkpoint.keep_last, keep_every=checkpoint.keep_every))


def _bytes_in(folders: Iterable[Path]) -> int:
    """Of their files. Folders may vanish meanwhile: this job does not hold the lock of the run yet, another one may."""
    total = 0
    for folder in folders:
        with suppress(OSError):
            for file in folder.iterdir():
                with suppress(OSError):
                    total += file.lstat().st_size
    return total


@dataclass(frozen=True)
class Probe:
    """A small file that one rank has left in the run folder, for rank 0 to find."""

    path: Path
    text: str

    def is_there(self) -> bool:
        """Does this machine see it, as it was written?"""
        try:
            return self.path.read_text() == self.text
        except OSError:
            return False


def remove(*paths: Path) -> None:
    """Delete files that may not be there, on a disk that may not allow it."""
    for path in paths:
        with suppress(OSError):
            path.unlink()


def leave_probe(folder: Path, rank: int) -> Probe:
    """Write a file aside, fsync it, rename it, fsync the folder: what a save does. OSError, with the step that failed
    as its `strerror`."""
    text = secrets.token_hex(8)
    path = folder / f".preflight-{rank}-{text}"
    aside = path.with_suffix(".tmp")
    doing = "write"
    try:
        with open(aside, "w") as stream:
            stream.write(text)
            stream.flush()
            doing = "fsync"
            os.fsync(stream.fileno())
        doing = "rename"
        os.replace(aside, path)
        doing = "fsync of the folder"
        fsync_path(folder)
    except OSError as error:
        remove(aside, path)
        raise OSError(error.errno, f"{doing}: {error.strerror}") from error
    return Probe(path, text)
