"""Reading and writing Megatron's sharded state, in this process and without trusting what a file says.

Megatron's own `torch_dist` writer forks worker processes and spawns a queue server that imports the main script again.
That costs seconds, needs a main guard, and forks a process that holds gloo or CUDA threads. A save here is synchronous
anyway, so every rank writes its one file itself, through PyTorch's `FileSystemWriter`. The format stays `torch_dist` as
0.16 writes it: what is no tensor goes to `common.pt`, which 0.19 reads too. (0.19 itself would write that part as a
pickled object among the shards, and read it with `weights_only=False`.)

Tensors are read with `weights_only=True` and `common.pt` likewise. Two doors remain through which a file could run
code: the pickled `.metadata`, and pickled objects among the shards. The first is opened with an allow-list before
PyTorch sees it; checkpoints with the second are refused (ours hold tensors only).
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.state_dict_saver import save

from moba_train.errors import CheckpointError
from moba_train.model import megatron_cpu

with megatron_cpu.quiet_imports():
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies.torch import (
        MCoreSavePlanner,
        _replace_state_dict_keys_with_sharded_keys,
        mcore_to_pyt_state_dict,
    )

METADATA = ".metadata"
COMMON = "common.pt"
CHECKPOINT_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "BytesStorageMetadata",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "collections": {"OrderedDict"},
}


class _AllowListUnpickler(pickle.Unpickler):
    """Resolves the names that checkpoint metadata is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in CHECKPOINT_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not part of a checkpoint")
        return super().find_class(module, name)


def save_sharded(state: dict[str, Any], folder: Path) -> None:
    """Write Megatron's sharded state into an existing, empty folder; collective over all ranks.

    Every rank writes the shards of which it holds the main replica, so no tensor is written twice.
    """
    sharded, common = save_preprocess(state)
    is_first_rank = dist.get_rank() == 0
    if is_first_rank:
        torch.save(common, folder / COMMON)
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
    save(
        mcore_to_pyt_state_dict(by_key, False),
        storage_writer=FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1),
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
    )
    if is_first_rank:
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    dist.barrier()


def read_metadata(folder: Path) -> Metadata:
    """Decode `.metadata` through the allow-list.

    Raises:
        CheckpointError: it does not decode, asks for foreign names, or lists pickled objects among the shards.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as stream:
            metadata = _AllowListUnpickler(stream).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, OSError, ValueError) as error:
        raise CheckpointError(
            "the checkpoint's metadata cannot be read",
            where=str(path),
            got=f"{type(error).__name__}: {error}",
            fix="Resume from another checkpoint of the run.",
        ) from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError("this is not checkpoint metadata", where=str(path), got=type(metadata).__name__)
    objects = [key for key, item in metadata.state_dict_metadata.items() if isinstance(item, BytesStorageMetadata)]
    if objects:
        raise CheckpointError(
            "the checkpoint holds pickled objects, which could run code when they are read",
            where=str(path),
            got=objects[0],
            allowed="tensors",
            fix="Resume from a checkpoint that moba_train wrote.",
        )
    return metadata


def load_sharded(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Read what `state` (a sharded state dict made with `is_loading=True`) asks for; collective over all ranks.

    Raises:
        CheckpointError: metadata that cannot be trusted, a tensor that the checkpoint does not have or that has
            another shape, or a file that does not read.
    """
    read_metadata(folder)
    try:
        with warnings.catch_warnings():  # about how Megatron calls PyTorch, each rank for itself
            warnings.filterwarnings("ignore", message=".*load_state_dict.*deprecated.*", category=FutureWarning)
            warnings.filterwarnings("ignore", message="The argument order of load has been changed")
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            loaded: dict[str, Any] = dist_checkpointing.load(state, str(folder))
    except (CheckpointException, CheckpointingException, OSError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            "the checkpoint does not fit this model or does not read",
            where=str(folder),
            got=_last_line(error),
            fix="Resume with the configuration that the checkpoint holds in config.toml, or from another checkpoint.",
        ) from error
    return loaded


def _last_line(error: BaseException) -> str:
    """The innermost message: PyTorch wraps failures of all ranks, with tracebacks, into one text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:400] if lines else type(error).__name__
