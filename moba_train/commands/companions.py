"""Files beside the weights of a Hugging Face checkpoint: vocabulary, chat template, defaults of generation.

They are copied as they are, in and out. A model that was trained from nothing has the tokenizer of its data alone: a
sentencepiece model is rewritten as a tokenizer.json.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from moba_train.config.load import decode_toml, read_text
from moba_train.data.tokenizer import load_tokenizer
from moba_train.errors import CheckpointError
from moba_train.model.hf.settings import read_json
from moba_train.model.hf.tokenizer import tokenizer_files
from moba_train.train.manifest import sha256_of, write_durably
from moba_train.train.run_folder import CONFIG

COMPANIONS: Final = (
    *("generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
)
VOCABULARIES: Final = ("tokenizer.json", "tokenizer.model")
"""Those of them that data.tokenizer may name; the first also says what begins a document."""


def copy_companions(source: Path, target: Path, *, also: tuple[str, ...] = ()) -> None:
    """Copy what `source` has of these files, and of `also`, into an existing folder; links are followed."""
    for name in (*COMPANIONS, *also):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def vocabularies(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of each file that holds the vocabulary: what `data.tokenizer.fingerprint` will be."""
    return {name: sha256_of((folder / name).resolve()) for name in VOCABULARIES if (folder / name).is_file()}


def find_companions(began_with: Iterable[Path], data_folder: Path, known: set[str]) -> Path | None:
    """The first folder whose tokenizer transformers can load, and which the model was trained with.

    Args:
        began_with: what the run began with; in such a folder all files are of one model, so one that is known will do.
        data_folder: where data.tokenizer lies; there every vocabulary must be known.
        known: SHA-256 of the tokenizer that the checkpoint was trained with; empty = the model came without one that
            data.tokenizer could name.
    """
    for folder in began_with:
        if is_loadable(folder) and (not known or known & set(vocabularies(folder).values())):
            return folder
    found = set(vocabularies(data_folder).values())
    return data_folder if is_loadable(data_folder) and found and found <= known else None


def is_loadable(folder: Path) -> bool:
    """Does the folder hold what transformers makes a tokenizer of?"""
    return (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file()


def write_companions(target: Path, folder: Path | None, model_file: Path, known: set[str]) -> str:
    """Put tokenizer files beside exported weights; returns what was done, for the reader.

    Args:
        target: folder of the exported model.
        folder: what `find_companions` found.
        model_file: data.tokenizer of the run; taken where no folder was found.
        known: as for `find_companions`.

    Raises:
        CheckpointError: the checkpoint knows its tokenizer, and that is nowhere to be found.
    """
    if folder is not None:
        copy_companions(folder, target)
        return f"tokenizer files of {folder}"
    if _is_ours(model_file, known) and model_file.suffix == ".json":
        for name, content in load_tokenizer(model_file).files().items():
            write_durably(target / name, content)
        return f"tokenizer.json of {model_file}"
    if _is_ours(model_file, known):
        for name, tree in tokenizer_files(model_file).items():
            write_durably(target / name, (json.dumps(tree, ensure_ascii=False, indent=1) + "\n").encode())
        shutil.copyfile(model_file, target / "tokenizer.model")
        return f"tokenizer.json made of {model_file}"
    if known:
        raise CheckpointError(
            "the tokenizer of the model is not where it was",
            where=f"data.tokenizer: {model_file}",
            allowed=f"a file with sha256 {min(known)[:16]}...",
            fix="Name a folder with its tokenizer.json: --tokenizer DIR.",
        )
    return "no tokenizer: the checkpoint came without one"


def origins(path: Path, init_from: str) -> list[Path]:
    """A checkpoint, and what its run began with, and what that began with, as far as these folders are still there.

    Args:
        path: the checkpoint.
        init_from: model.init_from of its configuration.
    """
    folders = [path]
    while init_from and Path(init_from) not in folders:
        folders.append(Path(init_from))
        config = folders[-1] / CONFIG
        init_from = decode_toml(read_text(config), source=str(config)).model.init_from if config.is_file() else ""
    return folders


def token_ids(model_file: Path, known: set[str]) -> dict[str, int]:
    """Ids that a config.json names, of the tokenizer that a checkpoint was trained with; {} if that is not there."""
    if not _is_ours(model_file, known):
        return {}
    tokenizer = load_tokenizer(model_file)
    begin = {"bos_token_id": tokenizer.begin_ids[0]} if tokenizer.begin_ids else {}
    return begin | {"eos_token_id": tokenizer.eod_id, "pad_token_id": tokenizer.pad_id}


def _is_ours(model_file: Path, known: set[str]) -> bool:
    """Is this the tokenizer that the checkpoint was trained with?"""
    return model_file.is_file() and sha256_of(model_file.resolve()) in known


def source_settings(candidates: Iterable[Path]) -> Mapping[str, Any]:
    """config.json of the model that a run began with, from the first folder that has one, else {}."""
    return next((read_json(folder / "config.json") for folder in candidates if (folder / "config.json").is_file()), {})
