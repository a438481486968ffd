"""A Hugging Face tokenizer.json, read with the library `tokenizers`, which transformers uses too.

Ids are those of `transformers`, called with split_special_tokens=True: a text that spells a special token ("</s>") is a
text like any other. Which tokens end a document and pad is said by tokenizer_config.json and special_tokens_map.json in
the same folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from moba_train.data.tokenizer_base import Tokenizer
from moba_train.errors import DataError

if TYPE_CHECKING:
    import tokenizers

SETTINGS: Final = "tokenizer_config.json"
_SETTINGS_FILES: Final = ("special_tokens_map.json", SETTINGS)  # the later one has the last word, as in transformers
_SPACE: Final = "▁"
_BYTE: Final = re.compile(r"<0x[0-9A-F]{2}>")
_PIECEWISE: Final = frozenset({"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"})
_NAMES: Final = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_ID: Final = re.compile(r"[0-9]{1,9}")
_SAVE_AGAIN: Final = "load the tokenizer with transformers and save it: tokenizer.save_pretrained(folder)"
_SHOWN: Final = 8  # special tokens that a message lists


class HfTokenizer(Tokenizer):
    """A loaded tokenizer.json.

    Args:
        path: the file; its folder may hold tokenizer_config.json and special_tokens_map.json.
        content: the bytes of the file.
        eod: the token that ends a document; "" = the eos_token of those files.

    Raises:
        DataError: not a tokenizer.json, one that encodes at random or cannot be decoded, one that the files beside it
            contradict, or nothing says what ends a document.

    Attributes:
        named_tokens: what the files beside it call bos_token, eos_token and so on; the last is not replaced by `eod`.
        own_chat_template: `chat_template` of tokenizer_config.json, whatever it is.
    """

    def __init__(self, path: Path, content: bytes, *, eod: str = "") -> None:
        self.path = path
        self.fingerprint = hashlib.sha256(content).hexdigest()
        tree = _json_object(path, content)
        self._library = _loaded(path, content)
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True
        self._bytes = _is_bytewise(path, tree)
        self._alphabet = _alphabet()
        settings = _read_settings(path.parent)
        named = {key: _text_of(settings.get(key)) for key in _NAMES}
        self.named_tokens = {key: text for key, text in named.items() if text is not None}
        self.own_chat_template = settings.get("chat_template")
        self._settings = settings | ({"eos_token": eod} if eod else {})
        self._added = {i: token.content for i, token in self._library.get_added_tokens_decoder().items()}
        self._check_added()
        self.vocab_size = 1 + max(self._library.get_vocab(with_added_tokens=True).values())
        eod_id = self._named("eos_token")
        if eod_id is None:
            raise self._unknown_eod()
        self.eod_id = eod_id
        pad_id = self._named("pad_token")
        self.pad_id = eod_id if pad_id is None else pad_id
        self._controls = self._mark_controls()
        self._spellings = self.specials()
        added = self._library.get_added_tokens_decoder()
        self._folds = any(added[i].normalized for i in self._controls)
        # What the algorithm writes for letters that it does not know is its own business.
        unknown = tree["model"].get("unk_token")
        self._never = self._controls - {self._library.token_to_id(unknown) if isinstance(unknown, str) else None}
        self.begin_ids = self._before_documents()

    def encode(self, text: str) -> list[int]:
        encoding = self._library.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if self._never.isdisjoint(ids):
            return ids
        # Some vocabularies can put a special token together from its letters. Then it is taken letter by letter.
        kept: list[int] = []
        for token, (start, end) in zip(ids, encoding.offsets, strict=True):
            kept += [token] if token not in self._never else self._letters(text[start:end])
        return kept

    def encode_with_specials(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text in which a special token is made of what spells it, and of each id the characters start..end-1
        of the text that it stands for."""
        self._library.encode_special_tokens = False
        try:
            encoding = self._library.encode(text, add_special_tokens=False)
        finally:
            self._library.encode_special_tokens = True
        return encoding.ids, encoding.offsets

    def specials(self) -> tuple[str, ...]:
        """How the special tokens are spelled."""
        return tuple(self._added[i] for i in sorted(self._controls))

    def spelled_special(self, text: str) -> str:
        """A special token that `encode_with_specials` would make of a text; "" if there is none."""
        found = next((special for special in self._spellings if special in text), "")
        if found or not self._folds:
            return found
        # Special tokens are looked for in the normalised text: another spelling may become one.
        ids = self.encode_with_specials(text)[0]
        return next((self._added[i] for i in ids if i in self._controls), "")

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        return str(self._library.decode([int(i) for i in ids], skip_special_tokens=True))

    def files(self) -> dict[str, bytes]:
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **self._settings}
        text = json.dumps(settings, ensure_ascii=False, indent=2) + "\n"
        return {"tokenizer.json": self.path.read_bytes(), SETTINGS: text.encode()}

    def piece(self, token: int) -> str:
        piece = self._library.id_to_token(int(token))
        return f"<id {token}>" if piece is None else str(piece)

    def is_control(self, token: int) -> bool:
        return token in self._controls

    def _byte_length(self, token: int) -> int:
        piece = self._library.id_to_token(token)
        if piece is None or token in self._controls:
            return 0
        if self._bytes:
            return len(piece) if self._alphabet.issuperset(piece) else len(piece.encode())
        return 1 if _BYTE.fullmatch(piece) else len(piece.replace(_SPACE, " ").encode())

    def _letters(self, text: str) -> list[int]:
        """Ids of a text, each letter by itself, as they stand inside a line."""
        before = self._library.encode("\n", add_special_tokens=False).ids
        ids: list[int] = []
        for letter in text:
            ids += self._library.encode("\n" + letter, add_special_tokens=False).ids[len(before) :]
        if not self._never.isdisjoint(ids):
            raise DataError(
                "a text cannot be kept from becoming a special token",
                where=str(self.path),
                got=repr(text),
                allowed="special tokens of two letters and more",
            )
        return ids

    def _named(self, key: str) -> int | None:
        """Id of a token that the settings name, such as eos_token; None where they do not."""
        text = _text_of(self._settings.get(key))
        if text is None:
            return None
        found = [i for i, content in self._added.items() if content == text]
        if not found:
            raise DataError(
                f"the {key} is not one of the added tokens",
                where=str(self.path),
                got=repr(text),
                allowed=self._listed(),
                fix=f"Name one of them, or {_SAVE_AGAIN}.",
            )
        return found[0]

    def _mark_controls(self) -> frozenset[int]:
        """Ids that stand for no text. What the files beside it call special is made so in the library too."""
        settings = self._settings
        named = {_text_of(settings.get(key)) for key in ("eos_token", "pad_token", "bos_token")}
        named |= {
            _text_of(token) for token in settings.get("added_tokens_decoder", {}).values() if token.get("special")
        }
        tokens = self._library.get_added_tokens_decoder()
        controls = {i: token for i, token in tokens.items() if token.special or token.content in named}
        self._library.add_special_tokens(list(controls.values()))
        return frozenset(controls)

    def _before_documents(self) -> tuple[int, ...]:
        """What the file's own rule puts before a text; add_bos_token says nothing where there is a tokenizer.json."""
        plain, whole = (self._library.encode("a", add_special_tokens=add).ids for add in (False, True))
        starts = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
        return tuple(whole[: starts[0]]) if starts else ()

    def _check_added(self) -> None:
        """Do the settings add tokens that the file lacks? transformers would, and the fingerprint would not know."""
        named = self._settings.get("added_tokens_decoder", {})
        for token, entry in named.items():
            text = _text_of(entry)
            if text is None or self._added.get(int(token)) != text:
                raise DataError(
                    f"{SETTINGS} adds a token that tokenizer.json does not have",
                    where=str(self.path),
                    got=f"{text!r} as id {token}",
                    allowed=f"{self._added[int(token)]!r} as id {token}" if int(token) in self._added else "",
                    fix=f"If the token is wanted, {_SAVE_AGAIN}; else take it out.",
                )

    def _listed(self) -> str:
        tokens = [content for _, content in sorted(self._added.items())]
        more = f" and {len(tokens) - _SHOWN} more" if len(tokens) > _SHOWN else ""
        return (" ".join(tokens[:_SHOWN]) or "there are none") + more

    def _unknown_eod(self) -> DataError:
        return DataError(
            "what ends a document is not known",
            where=str(self.path),
            got=f"no eos_token in {' or '.join(_SETTINGS_FILES)} beside it",
            allowed=f"one of the added tokens: {self._listed()}",
            fix="Name it: `moba-train prep ... --eod TOKEN`, and take the tokenizer.json that prep writes.",
        )


def train_bytewise(
    texts: Iterable[str], folder: Path, *, vocab_size: int, special: Sequence[str], template: str
) -> None:
    """Train byte-level BPE in the manner of Llama 3, and write tokenizer.json and tokenizer_config.json.

    The same texts give the same bytes.

    Args:
        folder: an existing folder.
        vocab_size: ids, special tokens included; fewer where the texts give no more.
        special: special tokens: the first stands before every document, the second ends it.
        template: chat template (Jinja).
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    begin = [(special[0], library.token_to_id(special[0]))]
    library.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=begin)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special[0],
        "eos_token": special[1],
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
    }
    library.save(str(folder / "tokenizer.json"))
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _loaded(path: Path, content: bytes) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Library

    try:
        return Library.from_buffer(content)
    except Exception as error:  # older versions of the library raise nothing more exact
        raise _no_tokenizer(path, str(error)) from error


def _no_tokenizer(path: Path, got: str) -> DataError:
    return DataError(
        "not a tokenizer.json", where=str(path), got=got, fix="give a file that transformers or tokenizers has written"
    )


def _json_object(path: Path, content: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _no_tokenizer(path, str(error)) from error
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        raise _no_tokenizer(path, "no object with a model")
    if tree["model"].get("dropout"):
        raise DataError(
            "the tokenizer encodes at random",
            where=str(path),
            got=f"model.dropout = {tree['model']['dropout']}",
            allowed="null: the same text always has the same ids",
            fix="Set it to null; the model then knows the file by its new hash.",
        )
    return tree


def _read_settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in _SETTINGS_FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            tree = json.loads(path.read_bytes())
            added = tree.get("added_tokens_decoder") or {}
            if not all(_ID.fullmatch(token) and isinstance(entry, dict) for token, entry in added.items()):
                raise ValueError("added_tokens_decoder does not map ids to tokens")
        except (ValueError, AttributeError, RecursionError) as error:
            fix = f"To mend it, {_SAVE_AGAIN}."
            raise DataError("cannot read the tokenizer's settings", where=str(path), got=str(error), fix=fix) from error
        settings |= {key: value for key, value in tree.items() if value is not None}
    return settings


def _text_of(value: object) -> str | None:
    """The text of a token as settings hold it: a string, or an object with its content."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) and text else None


def _is_bytewise(path: Path, tree: Mapping[str, Any]) -> bool:
    """Are the pieces written in the letters of byte-level BPE (else in text, with a mark for spaces)?"""
    decoders = list(_decoders(tree.get("decoder")))
    kinds = {str(decoder.get("type")) for decoder in decoders}
    if kinds == {"ByteLevel"}:
        return True
    marks = [decoder.get("replacement") for decoder in decoders if decoder.get("type") == "Metaspace"]
    swaps = [(d.get("pattern"), d.get("content")) for d in decoders if d.get("type") == "Replace"]
    keeps = all(mark == _SPACE for mark in marks) and all(swap == ({"String": _SPACE}, " ") for swap in swaps)
    if kinds & {"Replace", "Metaspace"} and kinds <= _PIECEWISE and keeps:
        return False
    raise DataError(
        "this kind of tokenizer.json is not known to give a text back",
        where=f"{path}, decoder",
        got=", ".join(sorted(kinds)) or "none",
        allowed="ByteLevel (Llama 3, Qwen), or Replace or Metaspace with ByteFallback, Fuse, Strip (Llama 2)",
        fix="Take the tokenizer of a known family, or one that `moba-train prep` trains.",
    )


def _decoders(tree: object) -> Iterator[Mapping[str, Any]]:
    if isinstance(tree, Mapping) and tree.get("type") == "Sequence":
        for part in tree.get("decoders", []):
            yield from _decoders(part)
    elif isinstance(tree, Mapping):
        yield tree


def _alphabet() -> frozenset[str]:
    """The 256 letters that byte-level BPE writes bytes in."""
    from tokenizers.pre_tokenizers import ByteLevel

    return frozenset(ByteLevel.alphabet())
