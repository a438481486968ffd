"""A checkpoint that an attacker made, or a disk damaged: what the tests of hostile files share.

Where files contradict the manifest, the manifest is what refuses (test_checkpoint.py); here it was made to agree, as an
attacker would.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch.distributed.checkpoint.metadata import Metadata

from moba_train.config.schema import ParallelConfig
from moba_train.errors import CheckpointError
from moba_train.parallel.topology import Topology, close_topology, init_topology
from moba_train.train.checkpoint import CheckpointStore, load_checkpoint
from moba_train.train.progress import Progress
from tests.unit.train.toy import STAGES, ToyEngine, identity

WEIGHT, MOMENTUM = [1.5, -2.0], [0.25, 7.0]
SHARD = "__0_0.distcp"
FUZZ = settings(max_examples=100, deadline=None, derandomize=True)
SLACK_BYTES = 512 << 20
"""Address space that a load may take; every lie below asks for more."""


@dataclass
class Hostile:
    """A whole checkpoint, and a folder in which copies of it are changed."""

    files: dict[str, bytes]
    path: Path
    topology: Topology
    engine: type[ToyEngine] = ToyEngine

    def write(self, *, reseal: bool = True, **changed: bytes) -> Path:
        """Lay the files out again; a name is given with _ for its dots and dashes."""
        shutil.rmtree(self.path.parent, ignore_errors=True)
        self.path.mkdir(parents=True)
        for name, content in self.files.items():
            (self.path / name).write_bytes(changed.pop(as_word(name), content))
        assert not changed, f"no file {changed.keys()}"
        if reseal:
            self.reseal()
        return self.path

    def reseal(self) -> None:
        """Let the manifest agree with the files; unlike `write_manifest`, without waiting for the disk."""
        contents = {file.name: file.read_bytes() for file in self.path.iterdir() if file.name != "manifest.json"}
        files = {name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in contents.items()}
        (self.path / "manifest.json").write_text(json.dumps({"files": files}))

    def load(self, *, same_values: bool = True) -> Progress:
        """Load into a new engine; what it holds then must be what was saved, or at least of that kind."""
        engine = self.engine(self.topology)
        progress = load_checkpoint(self.path, engine, identity())
        for loaded, saved in ((engine.weight, WEIGHT), (engine.momentum, MOMENTUM)):
            assert (loaded.dtype, loaded.shape) == (torch.float64, (2,))
            assert loaded.tolist() == saved or not same_values
        return progress

    def refusal(self) -> CheckpointError:
        """The error of a load, which must come before memory is taken for a lie."""
        with little_memory(), pytest.raises(CheckpointError) as caught:
            self.load()
        assert str(self.path) in caught.value.where and caught.value.fix
        assert "memory" not in caught.value.message().lower()
        assert len(caught.value.message()) < 2000
        return caught.value


def as_word(name: str) -> str:
    return name.replace(".", "_").replace("-", "_")


@contextmanager
def little_memory() -> Iterator[None]:
    """Beyond SLACK_BYTES more than now, reserving memory fails."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SLACK_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hostile]:
    topology = init_topology(ParallelConfig(), device=torch.device("cpu"), timeout_s=60.0)
    engine = ToyEngine(topology)
    engine.weight = torch.tensor(WEIGHT, dtype=torch.float64)
    engine.momentum = torch.tensor(MOMENTUM, dtype=torch.float64)
    run_dir = tmp_path_factory.mktemp("whole")
    store = CheckpointStore(run_dir, identity(), "[run]\nseed = 7\n", STAGES, 2)
    store.save(engine, Progress(3, 0, 3, 48), stage_end=False)
    store.finish()
    path = run_dir / "checkpoints" / "step_00000003"
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    yield Hostile(files, tmp_path_factory.mktemp("run") / "checkpoints" / path.name, topology)
    close_topology()


def metadata_of(hostile: Hostile) -> Metadata:
    metadata = pickle.loads(hostile.files[".metadata"])  # ours, made a moment ago
    assert isinstance(metadata, Metadata)
    return metadata


def place(metadata: Metadata, name: str) -> Any:
    return next(place for index, place in metadata.storage_data.items() if index.fqn == name)


class Malice:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("import pathlib; pathlib.Path('pwned').touch()",)
