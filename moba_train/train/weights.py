"""Weights without the rest of a run's state: written and read tensor by tensor, and as the beginning of a new run.

    FOLDER/    __0_0.distcp ... .metadata common.pt metadata.json   Megatron's torch_dist format, weights alone
               state.json      whose weights they are, and that there is no optimizer state ("weights_only")
               config.toml     a configuration to start from
               manifest.json   size and SHA-256 of every other file

It is a checkpoint folder like any other, so that whatever finds, verifies or names checkpoints does so here too; any
mesh loads it. What a run saves can be read the same way.
"""

from __future__ import annotations

import io
import json
import pickle
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from moba_train.config.schema import ModelConfig
from moba_train.engine.gpt_engine import sharded_parameters
from moba_train.errors import CheckpointError
from moba_train.model import megatron_cpu
from moba_train.model.gpt import Gpt
from moba_train.parallel.topology import Topology
from moba_train.quiet import quiet_imports
from moba_train.train.manifest import open_regular, write_durably
from moba_train.train.megatron_io import COMMON, FORMAT, METADATA, disk_named, load_sharded, read_metadata
from moba_train.train.progress import Progress, model_fingerprint, saved_model
from moba_train.train.shard_checks import SuspectFile, check_archive

with quiet_imports():
    from megatron.core.dist_checkpointing.core import CheckpointingConfig

FILE_BYTES = 1 << 32
"""A shard is closed once it has grown to this: ranks share the hashing of files."""


class WeightWriter:
    """Writes tensors, one after another, in the form in which Megatron's checkpoints hold them.

    Args:
        folder: an existing, empty folder.
        file_bytes: size at which the next file is begun.
    """

    def __init__(self, folder: Path, *, file_bytes: int = FILE_BYTES) -> None:
        self._folder = folder
        self._file_bytes = file_bytes
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._stream: BinaryIO | None = None
        self._num_files = 0

    def write(self, key: str, tensor: Tensor, *, shape: Sequence[int], layer: int | None) -> None:
        """Write one tensor.

        Args:
            key: name of the stored tensor.
            tensor: on the host; all of the stored tensor, or one entry of its dim 0.
            shape: of the stored tensor.
            layer: which entry of dim 0 it is; None = it is the stored tensor.
        """
        piece = tensor if layer is None else tensor[None]
        offset = torch.Size([0] * piece.dim() if layer is None else [layer, *([0] * tensor.dim())])
        known = self._tensors.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(shape), [])
        )
        stream = self._next_file() if self._stream is None else self._stream
        start = stream.tell()
        with disk_named():
            torch.save(piece, stream)
        name, end = Path(stream.name).name, stream.tell()
        self._places[MetadataIndex(key, offset, len(known.chunks))] = _StorageInfo(name, start, end - start)
        known.chunks.append(ChunkStorageMetadata(offset, piece.shape))
        if end >= self._file_bytes:
            self._close_file()

    def close(self) -> None:
        """Write what says where everything is."""
        self._close_file()
        meta = StorageMeta(save_id=str(uuid.uuid4()))
        metadata = Metadata({**self._tensors}, storage_data=self._places, storage_meta=meta)
        write_durably(self._folder / METADATA, pickle.dumps(metadata))
        common = io.BytesIO()  # of a path torch.save says no error of the disk
        torch.save({}, common)
        write_durably(self._folder / COMMON, common.getvalue())
        write_durably(self._folder / FORMAT, json.dumps(asdict(CheckpointingConfig("torch_dist", 1))).encode())

    def _next_file(self) -> BinaryIO:
        self._stream = (self._folder / f"__0_{self._num_files}.distcp").open("wb")
        self._num_files += 1
        return self._stream

    def _close_file(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


class WeightReader:
    """Reads tensors, one after another, out of a checkpoint of any mesh.

    Args:
        folder: the checkpoint; its files have been compared with their manifest.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._metadata = read_metadata(folder)

    def dtype(self, key: str, shape: Sequence[int]) -> torch.dtype:
        """dtype of a stored tensor. CheckpointError when there is none of that name and shape."""
        known = self._metadata.state_dict_metadata.get(key)
        if not isinstance(known, TensorStorageMetadata) or tuple(known.size) != tuple(shape):
            raise CheckpointError(
                "the checkpoint does not hold the tensor that its configuration says",
                where=str(self._folder),
                got=f"{key} {list(known.size) if isinstance(known, TensorStorageMetadata) else 'is missing'}",
                allowed=f"{key} {list(shape)}",
                fix="Take another checkpoint of the run.",
            )
        return known.properties.dtype

    def read(self, key: str, *, shape: Sequence[int], layer: int | None) -> Tensor:
        """A tensor without the dim of the layers, put together from the shards that ranks wrote.

        In memory are the tensor and one shard; just the shard, where it is the tensor. Arguments as for
        `WeightWriter.write`; CheckpointError as in `dtype`.
        """
        dtype = self.dtype(key, shape)
        known = self._metadata.state_dict_metadata[key]
        assert isinstance(known, TensorStorageMetadata)
        whole_shape = torch.Size(shape if layer is None else [1, *shape[1:]])
        first = 0 if layer is None else layer
        whole: Tensor | None = None
        for index, chunk in enumerate(known.chunks):
            begin = max(first, chunk.offsets[0])
            end = min(first + whole_shape[0], chunk.offsets[0] + chunk.sizes[0])
            if begin >= end:
                continue
            stored = self._stored(MetadataIndex(key, chunk.offsets, index), chunk.sizes, dtype)
            stored = stored.narrow(0, begin - chunk.offsets[0], end - begin)
            if stored.shape == whole_shape:
                whole = stored
                break
            if whole is None:
                whole = torch.empty(whole_shape, dtype=dtype)
            target = whole.narrow(0, begin - first, end - begin)
            for dim in range(1, target.dim()):
                target = target.narrow(dim, chunk.offsets[dim], chunk.sizes[dim])
            target.copy_(stored)
            del stored
        assert whole is not None
        return whole if layer is None else whole[0]

    def _stored(self, index: MetadataIndex, sizes: torch.Size, dtype: torch.dtype) -> Tensor:
        """One shard of a tensor, as a rank wrote it."""
        place = self._metadata.storage_data[index]
        path = self._folder / place.relative_path
        try:
            with open_regular(path) as stream:
                check_archive(stream, place.offset, place.length)
                view = _create_file_view(cast(io.IOBase, stream), place.offset, place.length)
                stored = torch.load(cast(IO[bytes], view), map_location="cpu", weights_only=True)
            if not isinstance(stored, Tensor) or (stored.shape, stored.dtype) != (sizes, dtype):
                raise SuspectFile("it holds another tensor than the checkpoint's list says")
        except (OSError, SuspectFile, RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                "a file of the checkpoint cannot be read",
                where=f"{path}: {index.fqn}",
                got=str(error)[:300],
                fix="Take another checkpoint of the run.",
            ) from error
        return stored


def weights_state(model: ModelConfig, tokenizers: Sequence[str], versions: Mapping[str, str]) -> dict[str, Any]:
    """state.json of a folder that holds weights alone.

    Args:
        model: whose weights they are.
        tokenizers: SHA-256 of every file that holds their vocabulary; empty = unknown.
        versions: package name -> version, for the reader.
    """
    return {
        **asdict(Progress()),
        "weights_only": True,
        "stage_end": False,
        "stage_rows": {},
        "model": model_fingerprint(model),
        "tokenizer": tokenizers[0] if tokenizers else "",
        "tokenizers": list(tokenizers),
        "seed": 0,
        "versions": dict(versions),
    }


@dataclass(frozen=True)
class InitialWeights:
    """Weights for a new model, out of a verified checkpoint. Called with the model, collectively, it fills them in.

    Attributes:
        path: checkpoint folder.
        topology: of the ranks that hold the model.
        remarks: more lines for the log.
    """

    path: Path
    topology: Topology
    remarks: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the log."""
        return f"initial weights: {self.path}", *self.remarks

    def __call__(self, gpt: Gpt) -> None:
        with megatron_cpu.cuda_calls_on_cpu():
            parameters = sharded_parameters(gpt, {"dp_cp_group": self.topology.dp_cp_group})
            loaded = load_sharded({"model": parameters}, self.path)["model"]
            empty = {name: None for name in gpt.state_dict() if name.endswith("_extra_state")}
            gpt.load_state_dict({**loaded, **empty})


def check_weights(path: Path, state: Mapping[str, Any], model: Mapping[str, Any], tokenizer: str) -> None:
    """Refuse weights of another model, or of another vocabulary.

    Args:
        path: the checkpoint.
        state: its decoded state.json.
        model: `model_fingerprint` of the model that is to begin with them.
        tokenizer: SHA-256 of its tokenizer.

    Raises:
        CheckpointError: names what differs, in terms of the configuration.
    """
    theirs = saved_model(state)
    different = [key for key in model if theirs.get(key) != model[key]]
    if different:
        raise CheckpointError(
            "the weights belong to another model",
            where=f"model.init_from: {path}",
            got="; ".join(f"model.{key} = {model[key]!r} in this run" for key in different),
            allowed="; ".join(f"model.{key} = {theirs.get(key)!r} in the checkpoint" for key in different),
            fix=f"Copy [model] from {path / 'config.toml'}.",
        )
    known = state.get("tokenizers") or [state["tokenizer"]]
    if any(known) and tokenizer not in known:
        raise CheckpointError(
            "the weights know another vocabulary",
            where=f"model.init_from: {path}",
            got=f"tokenizer sha256 {tokenizer[:16]}... (data.tokenizer)",
            allowed=", ".join(f"sha256 {str(sha256)[:16]}..." for sha256 in known),
            fix="Prepare the data with the tokenizer of the model, and name it in data.tokenizer.",
        )


__all__ = ["InitialWeights", "WeightReader", "WeightWriter", "check_weights", "weights_state"]
