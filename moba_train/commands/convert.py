"""`moba-train convert from-hf | to-hf`: Hugging Face checkpoints in and out. One process, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import tomli_w
import torch
from torch import Tensor

from moba_train import __version__
from moba_train.commands.companions import (
    copy_companions,
    find_companions,
    is_loadable,
    origins,
    source_settings,
    token_ids,
    vocabularies,
    write_companions,
)
from moba_train.config.load import decode_toml, plain, read_text
from moba_train.config.schema import ModelConfig
from moba_train.data.files import disk_errors
from moba_train.errors import CheckpointError, ConfigError
from moba_train.model.hf.config import HfModel, read_config
from moba_train.model.hf.export import hf_config
from moba_train.model.hf.names import places, stored_shape
from moba_train.model.hf.read import HfWeights
from moba_train.model.hf.write import plan_files, write_files
from moba_train.model.plan import count_parameters
from moba_train.train.manifest import fsync_path, seal_files, write_durably, write_manifest
from moba_train.train.resume import resolve_checkpoint
from moba_train.train.run_folder import CONFIG, STATE, read_state
from moba_train.train.weights import WeightReader, WeightWriter, weights_state

_STARTING_STEPS: Final = 100
_MOST_GIB: Final = 1 << 20
_HEADER: Final = """\
# Written by `moba-train convert from-hf`: the model, and one stage with its position embedding and longest sequence.
# Under attention = "full" it computes what the original computes. This file is part of the weights, and its hash is
# compared with theirs: copy it, set data and stages in the copy as you need them, then
#   moba-train train COPY
# Weights are read from model.init_from at step 0; a run that has saved goes on from its own checkpoints.

"""


def run_from_hf(source: Path, out: Path) -> int:
    """Read a Hugging Face checkpoint and write its weights as ours; returns the exit code.

    Args:
        source: folder with config.json and safetensors files.
        out: folder to make.

    Raises:
        CheckpointError: the model cannot be represented, its files are not whole, or the folder cannot be written.
    """
    found = read_config(source)
    weights = HfWeights(source, found.model)
    print(f"read {source}: {found.family}, {_described(found.model, weights.dtype)}, {weights.num_files} file(s)")
    with _made_whole(out) as aside:
        writer = WeightWriter(aside)
        for place in places(found.model):
            shape = stored_shape(place, found.model)
            writer.write(place.key, weights.assembled(place), shape=shape, layer=place.layer)
        writer.close()
        copy_companions(source, aside, also=("config.json",))
        tokenizers = vocabularies(aside)
        write_durably(aside / CONFIG, _starting_config(found, weights.dtype, out, tokenizers).encode())
        versions = {"moba-train": __version__, "torch": version("torch"), "megatron-core": version("megatron-core")}
        write_durably(aside / STATE, _json(weights_state(found.model, list(tokenizers.values()), versions)))
        write_manifest(aside, seal_files(sorted(aside.iterdir())))
    print(f"written {out}: the weights, and {CONFIG} to start from (copy it; data and stages are yours to set)")
    if not tokenizers:
        print(f"{source} holds no tokenizer: name the model's own in data.tokenizer")
    print("next: moba-train train COPY, or model.init_from in a configuration of yours")
    return 0


def run_to_hf(checkpoint: Path, out: Path, *, tokenizer: Path | None, drop: bool, max_file_gib: float) -> int:
    """Write a checkpoint in Hugging Face's form; returns the exit code.

    Args:
        checkpoint: run folder (its newest intact checkpoint) or checkpoint folder.
        out: folder to make.
        tokenizer: folder whose tokenizer files are taken; None = those that the model came with or was trained with.
        drop: leave out what the family cannot hold, although the model then computes something else.
        max_file_gib: size of a file of weights.

    Raises:
        CheckpointError: no family holds the model, its tokenizer is not there, or the folder cannot be written.
        ConfigError: max_file_gib is not positive.
    """
    if not 0 < max_file_gib < _MOST_GIB:
        allowed = f"more than 0, less than {_MOST_GIB}"
        raise ConfigError("no such size of a file", where="--max-file-gib", got=max_file_gib, allowed=allowed)
    if tokenizer is not None:
        _refuse_no_tokenizer(tokenizer)
    path = resolve_checkpoint(checkpoint).path
    assert path is not None
    state, config = read_state(path), decode_toml(read_text(path / CONFIG), source=str(path / CONFIG))
    model, stages = config.model, config.stages[: state["stage_index"] + 1]
    _refuse_loss(model, path, drop=drop)
    known = {str(sha256) for sha256 in state.get("tokenizers") or [state["tokenizer"]]} - {""}
    began_with, vocabulary = origins(path, config.model.init_from), Path(config.data.tokenizer)
    folder = tokenizer or find_companions(began_with, vocabulary.parent, known)
    source = source_settings(began_with)
    reader = WeightReader(path)
    dtype = _one_dtype(reader, model, path)
    longest = source.get("max_position_embeddings")
    tree = hf_config(
        model,
        stages[-1].rope,
        max_seq_len=max([stage.seq_len for stage in stages] + ([longest] if type(longest) is int else [])),
        dtype=_name(dtype),
        token_ids=source or source_settings([folder] if folder else []) or token_ids(vocabulary, known),
    )
    files = plan_files(
        [part for place in places(model) for part in place.parts], dtype, max_bytes=round(max_file_gib * 2**30)
    )
    with _made_whole(out) as aside:
        told = write_companions(aside, folder, vocabulary, known)
        write_files(aside, files, dtype, _taken_apart(reader, model))
        write_durably(aside / "config.json", _json(tree))
    print(f"read {path}: {_described(model, dtype)}, step {state['step']:,}, stage '{stages[-1].name}'")
    print(f"written {out}: {tree['architectures'][0]}, {len(files)} file(s) of weights, {told}")
    print("it attends to everything: MoBA has no weights, and other programs do not know it")
    return 0


def _taken_apart(reader: WeightReader, model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in Hugging Face's form, in the order of `places`."""
    for place in places(model):
        whole = reader.read(place.key, shape=stored_shape(place, model), layer=place.layer)
        for part in place.parts:
            runs = [whole[target : target + rows] for _, target, rows in place.rows(part)]
            yield part.name, runs[0] if len(runs) == 1 else torch.cat(runs)


def _one_dtype(reader: WeightReader, model: ModelConfig, path: Path) -> torch.dtype:
    dtypes = {reader.dtype(place.key, stored_shape(place, model)) for place in places(model)}
    if len(dtypes) > 1:
        got, what = ", ".join(sorted(map(_name, dtypes))), "the checkpoint holds weights of several dtypes"
        raise CheckpointError(what, where=str(path), got=got, allowed="one dtype")
    return dtypes.pop()


def _refuse_loss(model: ModelConfig, path: Path, *, drop: bool) -> None:
    """Refuse to leave out the key convolution, unless asked to."""
    if not model.key_conv:
        return
    count = model.num_layers * model.num_kv_heads * model.head_dim * model.key_conv
    cost = (
        f"{count:,} parameters: without them keys no longer know the {model.key_conv - 1} tokens before, in every "
        "layer. The model was trained with that and will not work as it did; expect to have to train it again"
    )
    if drop:
        print(f"WARNING: the key convolution is left out, {cost}")
        return
    raise CheckpointError(
        "no family of Hugging Face models has a key convolution",
        where=str(path),
        got=f"model.key_conv = {model.key_conv}, {cost}",
        allowed="model.key_conv = 0",
        fix="Serve the model with this program, train one without key_conv, or leave it out with --drop.",
    )


def _refuse_no_tokenizer(folder: Path) -> None:
    if not is_loadable(folder):
        raise CheckpointError(
            "the folder holds no tokenizer that transformers can load",
            where="--tokenizer",
            got=str(folder),
            allowed="a folder with tokenizer.json or tokenizer_config.json",
            fix="Save it there with transformers: tokenizer.save_pretrained(folder).",
        )


@contextmanager
def _made_whole(out: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `out` when all has been written, and vanishes when something fails.

    Raises:
        CheckpointError: `out` is there and not empty, or the disk refuses.
    """
    refused = partial(disk_errors, out, what="the folder cannot be written", kind=CheckpointError)
    with refused(fix="Name a new folder; remove what an interrupted conversion has left."):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FileExistsError(f"{out} is there already")
        whole = out.absolute()  # "." has no name of its own
        aside = whole.with_name(whole.name + ".tmp")
        aside.mkdir(parents=True)
    try:
        with refused(fix="Check free space and permissions."):
            yield aside
            fsync_path(aside)
            aside.replace(whole)
            fsync_path(whole.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _starting_config(found: HfModel, dtype: torch.dtype, out: Path, tokenizers: Mapping[str, str]) -> str:
    """A configuration that says what must be kept of the model, with placeholders for data."""
    model, rope = plain(found.model), plain(found.rope)
    left_out = ("preset", "init_std", "init_from")
    tokenizer = out / next(iter(tokenizers)) if tokenizers else Path("data/tokenizer.model")
    tree = {
        "run": {"dir": f"runs/{out.name}"},
        "model": {"init_from": str(out)} | {name: value for name, value in model.items() if name not in left_out},
        "engine": {"precision": "bf16" if dtype == torch.bfloat16 else "fp32"},
        "optimizer": {"lr": 1e-5},
        "data": {
            "tokenizer": str(tokenizer),
            "sources": {"text": {"path": "data/text"}},
            "valid": {"path": "data/valid"},
        },
        "stages": [
            {
                "name": "full",
                "tokens": _STARTING_STEPS * found.max_seq_len,
                "tokens_per_step": found.max_seq_len,
                "seq_len": found.max_seq_len,
                "attention": "full",
                "mix": {"text": 1.0},
                "rope": rope,
            }
        ],
    }
    return _HEADER + tomli_w.dumps(tree)


def _described(model: ModelConfig, dtype: torch.dtype) -> str:
    padding = model.vocab_padding * model.hidden_size * (1 if model.tied_head else 2)
    return f"{count_parameters(model) - padding:,} parameters, {_name(dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _json(tree: Mapping[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2) + "\n").encode()
