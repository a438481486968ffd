"""Reading and writing Megatron's sharded state, in this process and without trusting what a file says.

Megatron's own `torch_dist` writer forks worker processes and spawns a queue server that imports the main script again.
That costs seconds, needs a main guard, and forks a process that holds gloo or CUDA threads. Here every rank writes its
one file itself, through PyTorch's `FileSystemWriter`: `take_state` copies the state to host memory, on the thread that
trains; `write_state` may then run on another thread, over a group of its own. The format stays `torch_dist` as 0.16
writes it: what is no tensor goes to `common.pt`, which 0.19 reads too. (0.19 itself would write that part as a pickled
object among the shards, and read it with `weights_only=False`.)

Tensors are read with `weights_only=True` and `common.pt` likewise. Two doors remain through which a file could run
code: the pickled `.metadata`, and pickled objects among the shards. The first is opened with an allow-list before
PyTorch sees it; checkpoints with the second are refused (ours hold tensors only). What the files claim (shapes, places,
sizes) is checked before anything is read by it (shard_checks.py).
"""

from __future__ import annotations

import io
import json
import pickle
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum, EnumMeta
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.state_dict_saver import save

from moba_train.errors import CheckpointError
from moba_train.model import megatron_cpu
from moba_train.parallel import ranks
from moba_train.train.manifest import (
    MANIFEST,
    decode_json,
    open_regular,
    read_manifest,
    read_small,
    read_small_bytes,
    write_durably,
)
from moba_train.train.shard_checks import SuspectFile, check_archive, check_places, check_program, check_tensors, shown

with megatron_cpu.quiet_imports():
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies.torch import (
        MCoreSavePlanner,
        _replace_state_dict_keys_with_sharded_keys,
        mcore_to_pyt_state_dict,
    )

METADATA = ".metadata"
COMMON = "common.pt"
FORMAT = "metadata.json"
KNOWN_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
METADATA_BYTES = 1 << 30
"""The most that `.metadata` may hold: some five million pieces of tensors."""
TENSOR_NAMES = ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
MISFITS = (KeyError, IndexError, ValueError, TypeError, AttributeError, pickle.UnpicklingError)
"""What tables of another shape than expected lead to. No RuntimeError: that is how ranks lose each other."""
Places = dict[str, list[tuple[int, int, int]]]
"""File name -> (offset, length of the archive, size of the tensor in it), all in bytes, of its pieces, rising."""
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
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name not in CHECKPOINT_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not part of a checkpoint")
        return super().find_class(module, name)


def _member(of: Any, name: Any) -> Enum:
    """A member of an enumeration, which Python 3.11.0 to 3.11.3 write as getattr(class, name). Other attributes are
    nobody's business."""
    if isinstance(of, EnumMeta) and isinstance(name, str) and name in of.__members__:
        member: Enum = of.__members__[name]
        return member
    raise pickle.UnpicklingError(f"it asks for an attribute {name!r} that is no member of an enumeration")


@contextmanager
def disk_named() -> Iterator[None]:
    """OSError where torch.save to a stream meets one, closes its archive and complains of that."""
    try:
        yield
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from error


class _ShardWriter(FileSystemWriter):
    """A disk that refuses in the middle of a shard is reported as such."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        """As the base."""
        with disk_named():
            return super().write_data(plan, planner)


@dataclass(frozen=True)
class HostState:
    """What this rank writes into a checkpoint. It shares no memory with the model or the optimizer.

    Attributes:
        tensors: shards of which this rank holds the main replica, in PyTorch's form, on the host.
        common: `common.pt`, which rank 0 writes.
    """

    tensors: dict[str, Any]
    common: bytes


class HostBuffers:
    """Host memory for a copy of the shards; it is used again by the next copy, so one save has to end before."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int], torch.Tensor] = {}

    def move(self, shards: dict[str, list[Any]]) -> None:
        """Let every shard's `data` be its copy on the host. On return the copies are complete."""
        devices = set()
        for key, parts in shards.items():
            for i, part in enumerate(parts):
                source = part.data.detach()
                held = self._held.get((key, i))
                if held is None or held.shape != source.shape or held.dtype != source.dtype:
                    held = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
                    self._held[key, i] = held
                held.copy_(source, non_blocking=True)
                part.data = held
                if source.is_cuda:
                    devices.add(source.device)
        for device in devices:  # the copies stand in the stream that computes, before the next step
            torch.cuda.current_stream(device).synchronize()


def take_state(state: dict[str, Any], buffers: HostBuffers | None = None, *, validate: bool = True) -> HostState:
    """Copy Megatron's sharded state to host memory; collective over all ranks when `validate` is set.

    Args:
        state: it is taken apart by this.
        buffers: memory of an earlier copy, which ends with this one.
        validate: ranks compare their shards: do they cover every tensor, once? They are the same in every save.
    """
    sharded, common = save_preprocess(state, validate_access_integrity=validate)
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
    (buffers or HostBuffers()).move(
        {key: [part for part in parts if isinstance(part, ShardedTensor)] for key, parts in by_key.items()}
    )
    stream = io.BytesIO()
    if ranks.rank() == 0:
        torch.save(common, stream)
    return HostState(mcore_to_pyt_state_dict(by_key, False), stream.getvalue())


def write_state(state: HostState, folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Write a copied state into an existing, empty folder and flush the files; collective over `group`, of all ranks.

    Every rank writes the shards of which it holds the main replica, so no tensor is written twice.

    Raises:
        OSError, CheckpointException: a rank could not write; all ranks raise it.
    """

    def common_files() -> None:
        write_durably(folder / COMMON, state.common)
        write_durably(folder / FORMAT, json.dumps(asdict(CheckpointingConfig("torch_dist", 1))).encode())

    ranks.from_rank_0(common_files, group)
    save(
        state.tensors,
        storage_writer=_ShardWriter(
            folder,
            single_file_per_rank=True,
            sync_files=True,
            thread_count=1,
            per_thread_copy_ahead=0,  # shards are on the host; the look-ahead would ask CUDA for this thread's device
        ),
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        process_group=group,
    )


def save_sharded(state: dict[str, Any], folder: Path) -> None:
    """Write Megatron's sharded state into an existing, empty folder; collective over all ranks."""
    write_state(take_state(state), folder)
    dist.barrier()


def read_metadata(folder: Path) -> Metadata:
    """Decode `.metadata` through the allow-list, and check what it claims.

    Raises:
        CheckpointError: it does not decode, asks for foreign names, lists pickled objects among the shards, or
            describes shards that cannot be.
    """
    return _checked(folder)[0]


def _checked(folder: Path) -> tuple[Metadata, Places]:
    """`.metadata` and the places of the pieces in the shards."""
    path = folder / METADATA
    try:
        content = read_small_bytes(path, METADATA_BYTES)
        check_program(content)
        metadata = _AllowListUnpickler(io.BytesIO(content)).load()
        if not isinstance(metadata, Metadata):
            raise SuspectFile(f"it holds a {type(metadata).__name__}")
        _refuse_objects(metadata, path)
        return metadata, check_places(metadata, check_tensors(metadata), folder, _listed(folder))
    except CheckpointError:
        raise
    except Exception as error:  # a program that is none of ours, or a table without its columns, fails in many ways
        raise CheckpointError(
            "the checkpoint's metadata cannot be trusted",
            where=str(path),
            got=f"{type(error).__name__}: {str(error)[:300]}",
            allowed="what moba_train wrote, unchanged",
            fix="Resume from another checkpoint of the run.",
        ) from error


def _listed(folder: Path) -> Collection[str]:
    """The files that may be read: those of the manifest, which is what has been compared with its hashes."""
    if not (folder / MANIFEST).exists():  # not from outside: a checkpoint is refused without one
        return [path.name for path in folder.iterdir()]
    listed, trouble = read_manifest(folder)
    if trouble:
        raise SuspectFile(trouble)
    return listed


def _refuse_objects(metadata: Metadata, path: Path) -> None:
    objects = [key for key, item in metadata.state_dict_metadata.items() if isinstance(item, BytesStorageMetadata)]
    if objects:
        raise CheckpointError(
            "the checkpoint holds pickled objects, which could run code when they are read",
            where=str(path),
            got=shown(objects[0]),
            allowed="tensors",
            fix="Resume from a checkpoint that moba_train wrote.",
        )


def _check_files(folder: Path, places: Places) -> None:
    """Look into this rank's share of the pieces, and into the other files, before Megatron and PyTorch do.

    Raises:
        CheckpointError: names the file that moba_train did not write.
    """
    for path, check in ((folder / FORMAT, _check_format), (folder / COMMON, _check_common)):
        if path.exists():  # Megatron says so where one is missing
            check(path)
    for name, pieces in sorted(places.items()):
        try:
            with open_regular(folder / name) as stream:
                for offset, length, num_bytes in pieces[ranks.rank() :: ranks.world_size()]:
                    _check_archive(stream, offset, length, num_bytes)
        except (OSError, SuspectFile) as error:
            raise _untrusted(folder / name, str(error)) from error


def _check_format(path: Path) -> None:
    try:
        found = decode_json(read_small(path, 4096))
    except (OSError, ValueError) as error:
        raise _untrusted(path, f"{type(error).__name__}: {error}") from error
    if not isinstance(found, dict) or "sharded_backend" not in found or not found.items() <= KNOWN_FORMAT.items():
        raise _untrusted(path, f"it does not name the format {KNOWN_FORMAT}")


def _check_common(path: Path) -> None:
    try:
        num_bytes = path.lstat().st_size
        with open_regular(path) as stream:
            _check_archive(stream, 0, num_bytes)
        is_table = isinstance(torch.load(path, map_location="cpu", weights_only=True), dict)
    except Exception as error:  # damage that shows only now, in whatever way
        raise _untrusted(path, _last_line(error)) from error
    if not is_table:
        raise _untrusted(path, "it holds no table")


def _check_archive(stream: BinaryIO, offset: int, length: int, num_bytes: int | None = None) -> None:
    """SuspectFile for an archive that torch.save did not write, or with another tensor than one of `num_bytes`."""
    names, found_bytes = check_archive(stream, offset, length)
    foreign = sorted(name for name in names if not _is_tensor_name(name))
    if foreign:
        raise SuspectFile(f"it asks for {foreign[0][:200]}, which is not part of a tensor")
    if num_bytes is not None and found_bytes < num_bytes:
        raise SuspectFile(f"a piece of a tensor holds {found_bytes} bytes instead of {num_bytes}")


def _is_tensor_name(name: str) -> bool:
    """What torch.save asks for to make a tensor."""
    module, _, attribute = name.rpartition(".")
    if module == "torch":
        return attribute.endswith("Storage") or isinstance(getattr(torch, attribute, None), torch.dtype)
    return name in TENSOR_NAMES


def _untrusted(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        "a file of the checkpoint cannot be trusted",
        where=str(path),
        got=reason[:300],
        allowed="tensors and plain values, as moba_train wrote them",
        fix="Resume from another checkpoint of the run.",
    )


def load_sharded(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Read what `state` (a sharded state dict made with `is_loading=True`) asks for; collective over all ranks.

    Raises:
        CheckpointError: metadata that cannot be trusted, a tensor that the checkpoint does not have or that has
            another shape, or a file that does not read.
    """
    places = ranks.from_rank_0(lambda: _checked(folder)[1])
    ranks.on_all_ranks(lambda: _check_files(folder, places))
    try:
        with warnings.catch_warnings():  # about how Megatron calls PyTorch, each rank for itself
            warnings.filterwarnings("ignore", message=".*load_state_dict.*deprecated.*", category=FutureWarning)
            warnings.filterwarnings("ignore", message="The argument order of load has been changed")
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            loaded: dict[str, Any] = dist_checkpointing.load(state, str(folder))
    except (CheckpointException, CheckpointingException, OSError, *MISFITS) as error:
        raise misfit(folder, error) from error
    return loaded


def misfit(folder: Path, error: BaseException) -> CheckpointError:
    """The error of a checkpoint whose contents are not what an engine of this configuration saves."""
    return CheckpointError(
        "the checkpoint does not fit this model or does not read",
        where=str(folder),
        got=_last_line(error),
        fix="Resume with the configuration that the checkpoint holds in config.toml (engine.distributed_optimizer is "
        "part of it), or from another checkpoint.",
    )


def _last_line(error: BaseException) -> str:
    """The innermost message: PyTorch wraps failures of all ranks, with tracebacks, into one text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:400] if lines else type(error).__name__
