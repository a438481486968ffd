"""`--scale tiny`: the miniature of a run, and what it runs on, made once.

    miniature/
      miniature.json            what made the folder
      tokenizer/                tokenizer.json (byte-level BPE) and tokenizer_config.json, with a chat template
      text/                     Python's own library, as `moba-train prep` prepares it: modules, and parts of modules
      chat-<longest>/           functions, and questions about them, answered by their docstrings; loss on the answers
                                alone; conversations of at most so many tokens
      weights-<shape>-hf/       random weights of a shape in Hugging Face's form
      weights-<shape>/          the same, as `moba-train convert from-hf` takes them in

Everything goes the way of real data and real weights. Each part appears whole or not at all. Ranks that start at once
wait for the first of them; runs whose folders lie side by side share what is there.
"""

from __future__ import annotations

import ast
import fcntl
import io
import json
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from moba_train.config.scale import NUM_TOKENS, describe_scale, scaled
from moba_train.config.schema import RunConfig
from moba_train.config.validate import validate
from moba_train.data.prep import PrepReport, prepare
from moba_train.data.prep_options import PrepOptions
from moba_train.data.tokenizer import load_tokenizer
from moba_train.data.tokenizer_hf import train_bytewise
from moba_train.errors import ConfigError
from moba_train.train.manifest import find_damage

if TYPE_CHECKING:
    import torch

_VERSION: Final = 1
_MARKER: Final = "miniature.json"
_ASIDE: Final = ".new"
_SEED: Final = 1234
_INIT_STD: Final = 0.02
_TEXT_MIB: Final = 1.0
_TOKENIZER_MIB: Final = 1.0
_CONVERSATIONS: Final = 200
_HELD_OUT: Final = 0.1
_OF_A_MESSAGE: Final = 12  # tokens that the template puts around one, at most
_SPECIAL: Final = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def in_miniature(config: RunConfig, *, make: bool) -> RunConfig:
    """The configuration that `--scale tiny` runs in place of `config`, announced on rank 0.

    Args:
        config: full-sized and validated.
        make: make its material too, where that is not there yet.

    Raises:
        ConfigError: as `make_material`.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    tiny = scaled(config, world_size)
    validate(tiny)
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(describe_scale(config, tiny, world_size)), flush=True)
    if make:
        make_material(tiny)
    return tiny


def make_material(tiny: RunConfig) -> None:
    """Make what a configuration from `moba_train.config.scale.scaled` names and is not there yet; prints what.

    Raises:
        ConfigError: the folder is something else, was made by another version, or cannot be written.
    """
    tokenizer = Path(tiny.data.tokenizer)
    weights, source = Path(tiny.model.init_from), Path(f"{tiny.model.init_from}-hf")
    root = tokenizer.parent.parent
    try:
        with _alone_in(root):
            _make(tokenizer.parent, _make_tokenizer)
            for folder in dict.fromkeys(
                Path(pair.path).parent for pair in (*tiny.data.sources.values(), tiny.data.valid)
            ):
                _make(folder, partial(_make_text if folder.name == "text" else _make_chat, tokenizer))
            if tiny.model.init_from:
                _make(source, partial(_make_hf, tiny))
                _take_in(source, weights)
    except OSError as error:
        fix = "choose another --run-dir; the material of the miniature lies beside it"
        raise ConfigError("the miniature cannot be made", where=str(root), got=str(error), fix=fix) from error


@contextmanager
def _alone_in(root: Path) -> Iterator[None]:
    """The folder, for this process alone. It is checked to be a miniature of this version, and marked as one."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        marker, mark = root / _MARKER, json.dumps({"miniature": _VERSION}) + "\n"
        if not marker.exists() and [path.name for path in root.iterdir()] == ["lock"]:
            marker.write_text(mark, encoding="utf-8")
        if not marker.exists() or marker.read_text("utf-8") != mark:
            what = "the folder is not a miniature, or another version has made it"
            raise ConfigError(what, where=str(root), fix="remove it, or choose a --run-dir in another folder")
        yield


def _make(folder: Path, make: Callable[[Path], str]) -> None:
    """Make a part aside, in a folder of the same name, and rename it, unless it is there."""
    if folder.exists():
        return
    shutil.rmtree(folder.parent / _ASIDE, ignore_errors=True)  # of a process that was ended
    aside = folder.parent / _ASIDE / folder.name
    aside.mkdir(parents=True)
    told = make(aside)
    os.replace(aside, folder)
    aside.parent.rmdir()
    print(f"made {folder}: {told}", flush=True)


# ------------------------------------------------------------------------------------------------------ text and chat


def _make_tokenizer(folder: Path) -> str:
    texts = _at_most(_TOKENIZER_MIB, (text for _, text in _modules()))
    train_bytewise(texts, folder, vocab_size=NUM_TOKENS, special=_SPECIAL, template=_TEMPLATE)
    return f"a tokenizer of {load_tokenizer(folder / 'tokenizer.json').vocab_size:,} ids"


def _make_text(tokenizer: Path, folder: Path) -> str:
    report = _prepare(tokenizer, folder, ({"text": text} for text in _at_most(_TEXT_MIB, _texts())))
    return f"{sum(report.documents.values()):,} documents, {sum(report.tokens.values()):,} tokens"


def _make_chat(tokenizer: Path, folder: Path) -> str:
    longest, ids = int(folder.name.rpartition("-")[2]), load_tokenizer(tokenizer)

    def is_fitting(messages: list[dict[str, str]]) -> bool:
        tokens = sum(len(ids.encode(message["content"])) + _OF_A_MESSAGE for message in messages)
        return longest // 4 <= tokens < longest

    records = ({"messages": messages} for messages in islice(filter(is_fitting, _conversations()), _CONVERSATIONS))
    report = _prepare(tokenizer, folder, records)
    assert report.chat is not None
    loss = f"{report.chat.loss_tokens:,} of their {report.chat.tokens:,} tokens"
    return f"{report.chat.documents:,} conversations, loss on {loss}"


def _prepare(tokenizer: Path, folder: Path, records: Iterable[dict[str, Any]]) -> PrepReport:
    """Records to data, as `moba-train prep` makes it."""
    file = folder / "source.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    options = PrepOptions(out=folder, sources=(str(file),), tokenizer=str(tokenizer), held_out=_HELD_OUT, seed=_SEED)
    return prepare(options)


def _texts() -> Iterator[str]:
    """Every other module, and the functions and classes of those between: documents of a few tokens up to thousands."""
    for i, (_, text) in enumerate(_modules()):
        if i % 2 == 0:
            yield text
        else:
            lines = text.splitlines()
            yield from ("\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in ast.parse(text).body)


def _conversations() -> Iterator[list[dict[str, str]]]:
    """Questions about functions of the standard library, with and without their source, and the first lines of their
    docstrings."""
    for name, text in _modules():
        lines = text.splitlines()
        body = ast.parse(text).body
        body += [method for node in body if isinstance(node, ast.ClassDef) for method in node.body]
        for node in body:
            if isinstance(node, ast.FunctionDef) and (told := ast.get_docstring(node)):
                question, answer = f"What does {name}.{node.name} do?", told.partition("\n")[0]
                source = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                for prompt in (f"{source}\n\n{question}", question):
                    yield [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _modules() -> Iterator[tuple[str, str]]:
    """(name, source) of the standard library's own modules, in order."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.stem, path.read_text("utf-8")


def _at_most(mib: float, texts: Iterable[str]) -> Iterator[str]:
    left = mib * 2**20
    for text in texts:
        if left < 0:
            return
        left -= len(text)
        yield text


# ------------------------------------------------------------------------------------------------------------- weights


def _make_hf(tiny: RunConfig, folder: Path) -> str:
    """A checkpoint as it would come from elsewhere: safetensors, config.json, tokenizer."""
    import torch

    from moba_train.model.hf.export import hf_config
    from moba_train.model.hf.names import places
    from moba_train.model.hf.write import plan_files, write_files

    model, first = tiny.model, tiny.stages[0]
    parts = [part for place in places(model) for part in place.parts]
    generator = torch.Generator().manual_seed(_SEED)
    tensors = (
        (part.name, torch.ones(part.shape) if part.name.endswith("norm.weight") else _drawn(part.shape, generator))
        for part in parts
    )
    write_files(folder, plan_files(parts, torch.float32, max_bytes=2**30), torch.float32, tensors)
    tokenizer = load_tokenizer(tiny.data.tokenizer)
    ids = {"bos_token_id": tokenizer.begin_ids[0], "eos_token_id": tokenizer.eod_id}
    tree = hf_config(model, first.rope, max_seq_len=first.seq_len, dtype="float32", token_ids=ids)
    (folder / "config.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    for file in Path(tiny.data.tokenizer).parent.iterdir():
        shutil.copyfile(file, folder / file.name)
    return f"{tree['architectures'][0]} with random weights"


def _drawn(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    import torch

    return _INIT_STD * torch.randn(shape, generator=generator)


def _take_in(source: Path, weights: Path) -> None:
    """As the command does, which makes its folder whole itself; what it prints is for those who called it.

    Nobody keeps a copy of these weights: damaged ones are made again.
    """
    from moba_train.commands.convert import run_from_hf

    if weights.exists():
        damage = find_damage(weights)
        if not damage:
            return
        print(f"making {weights} anew: {damage}", flush=True)
        shutil.rmtree(weights)
    shutil.rmtree(weights.with_name(weights.name + ".tmp"), ignore_errors=True)  # of a process that was ended
    with redirect_stdout(io.StringIO()):
        run_from_hf(source, weights)
    print(f"made {weights}: these weights, by moba-train convert from-hf", flush=True)
