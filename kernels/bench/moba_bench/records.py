"""What was measured, kept in a JSON-lines file beside the results: a rerun on the same code and device resumes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import KERNELS

Record = dict[str, Any]


@dataclass(frozen=True)
class Environment:
    """Where figures come from. Two runs whose environments are equal may share a results file."""

    device: str
    threads: int
    commit: str
    tree: str
    """"clean": as committed, results aside; "not clean"; "unknown" where there is no git."""
    source: str
    """Digest of the operator's and the benchmark's code: tells edits apart where there is no clean commit."""
    python: str
    torch: str
    triton: str
    numpy: str

    @property
    def slug(self) -> str:
        """The device as a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")

    def as_json(self) -> Record:
        return asdict(self)


def environment_of(device: str, threads: int) -> Environment:
    """device: "cpu" or "cuda"."""
    import platform

    try:
        import triton

        triton_version = str(triton.__version__)
    except ImportError:
        triton_version = "not installed"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{_cpu_name()}, {threads} thread{'s' * (threads > 1)}"
    commit, tree = _git_state()
    return Environment(
        device=name,
        threads=threads,
        commit=commit,
        tree=tree,
        source=source_digest(),
        python=platform.python_version(),
        torch=str(torch.__version__),
        triton=triton_version,
        numpy=np.__version__,
    )


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", path.read_text()) if path.exists() else []
    return str(names[0]) if names else "CPU"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=KERNELS, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _git_state() -> tuple[str, str]:
    """(commit, state of the tree); MOBA_COMMIT names the commit on a machine that has the files without git."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return os.environ.get("MOBA_COMMIT", "unknown, no git here"), "unknown"
    changes = _git("status", "--porcelain", "--", ":/", ":(top,exclude)kernels/bench/results")
    return commit, "clean" if changes == "" else "not clean"


def source_digest() -> str:
    """Of all code that figures depend on."""
    digest = hashlib.sha256()
    for path in sorted([*(KERNELS / "moba_kernels").rglob("*.py"), *(KERNELS / "bench").rglob("*.py")]):
        digest.update(path.relative_to(KERNELS).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def replace_text(path: Path, text: str) -> None:
    """Atomically: a reader, or a run that is cut off, never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(text)
    aside.replace(path)


class Store:
    """The records of one run, one a line; every record has a "kind" and a "name".

    `run` says what the records belong to (environment and settings); those of another run are dropped.
    """

    def __init__(self, path: Path, run: Record, *, fresh: bool = False) -> None:
        self.path = path
        self.run = run
        self.records: list[Record] = []
        if not fresh:
            self.reload()

    def reload(self) -> None:
        """What is on disk, another process's additions included."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        known = [json.loads(line) for line in lines if line.strip()]
        self.records = [record for record in known if record["run"] == self.run]

    def find(self, kind: str, name: str) -> Record | None:
        """The newest record of this name."""
        return next((r for r in reversed(self.records) if r["kind"] == kind and r["name"] == name), None)

    def of_kind(self, kind: str) -> list[Record]:
        return [record for record in self.records if record["kind"] == kind]

    def add(self, kind: str, name: str, fields: Record) -> Record:
        """Kept in place of an older one of this name, and on disk when this returns."""
        record = {"kind": kind, "name": name, **fields, "run": self.run}
        self.records = [r for r in self.records if (r["kind"], r["name"]) != (kind, name)]
        self.records.append(record)
        self.write()
        return record

    def write(self) -> None:
        replace_text(self.path, "".join(json.dumps(record) + "\n" for record in self.records))
