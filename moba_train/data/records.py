"""What a record of a source holds: a text, or a conversation that a chat template is to render."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, ValuesView
from dataclasses import dataclass
from typing import Any, Final

ROLES: Final = ("system", "user", "assistant", "tool")
"""Of messages."""
MAX_RECORD_MIB: Final = 256
"""Of one record of a file, unpacked."""
_MAX_DEPTH: Final = 100  # of objects and lists in one another


@dataclass(frozen=True)
class Conversation:
    """One conversation, as JSON trees.

    Attributes:
        messages: objects with a role, and a content wherever there are no tool_calls; none of their fields is null.
        tools: descriptions of tools, as objects; None = the record has none.
        where: file and record, for messages.
        canonical: the same as JSON with sorted keys: what its hash and its size are taken of.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None
    where: str
    canonical: str


Document = str | Conversation


def document_of(record: object, where: str) -> Document:
    """The document of a record: its field `messages`, if that is a list, else its field `text`.

    Raises:
        ValueError: what is wrong with the record.
    """
    if not isinstance(record, Mapping):
        raise ValueError('no field "text" or "messages": it is not an object')
    text, messages = record.get("text"), record.get("messages")
    if isinstance(messages, list):
        if isinstance(text, str):
            raise ValueError('both "text" and "messages": keep the one that is meant')
        return _conversation(messages, record.get("tools"), where)
    if not isinstance(text, str):
        raise ValueError('no field "text" that holds a string and no field "messages" that holds a list')
    _check_letters(text)
    return text


def document_hash(document: Document) -> bytes:
    """sha256 of a document; its first 8 bytes decide whether it is held out, the next 8 whether it is sampled.

    Of a conversation, that of its canonical JSON: the same in every format and with every chat template.
    """
    return hashlib.sha256(_measured(document).encode()).digest()


def size_bytes(document: Document) -> int:
    """UTF-8 bytes of a text; of a conversation, those of its canonical JSON."""
    return len(_measured(document).encode())


def size_letters(document: Document) -> int:
    """About the same, at no cost."""
    return len(_measured(document))


def _measured(document: Document) -> str:
    return document.canonical if isinstance(document, Conversation) else document


def _conversation(messages: list[object], tools: object, where: str) -> Conversation:
    kept = tuple(_message(message, i) for i, message in enumerate(messages))
    if not kept:
        raise ValueError('"messages" is empty')
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError('"tools" is not a list of objects')
    described = None if tools is None else tuple(tools)
    _check_depth((kept, described), _MAX_DEPTH)
    try:
        tree = {"messages": kept, "tools": described}
        canonical = json.dumps(tree, ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a field is not JSON: {error}") from error
    _check_letters(canonical)
    return Conversation(kept, described, where, canonical)


def _message(message: object, index: int) -> dict[str, Any]:
    """A message without the fields that are null: transformers drops them too, and in a table absent ones are null."""
    if not isinstance(message, Mapping):
        raise ValueError(f"messages[{index}] is not an object with role and content")
    kept = {key: value for key, value in message.items() if value is not None}
    role, content = kept.get("role"), kept.get("content")
    if role not in ROLES:
        raise ValueError(f"messages[{index}]: role {role!r} is none of {', '.join(ROLES)}")
    if content is None and kept.get("tool_calls"):
        return kept
    if not isinstance(content, str):
        found = "there is none" if content is None else f"it is of type {type(content).__name__}"
        raise ValueError(f"messages[{index}]: content must be a string, {found}")
    return kept


def _check_depth(tree: object, left: int) -> None:
    if left < 0:
        raise ValueError(f"objects and lists lie more than {_MAX_DEPTH} deep in one another")
    if isinstance(tree, Mapping):
        tree = tree.values()
    if isinstance(tree, list | tuple | ValuesView):
        for item in tree:
            _check_depth(item, left - 1)


def _check_letters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair: {error}") from error
