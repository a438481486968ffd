"""Conversations to ids by a chat template, as `transformers.apply_chat_template` makes them, and what of them the
assistant says: the loss is on that alone.

A template is a program of a stranger. It runs in jinja2's sandbox, sees nothing but the conversation and the names of a
few tokens, and gives the same text every day: `strftime_now` answers TODAY.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.meta
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray

from moba_train.data.chat_spans import assistant_spans
from moba_train.data.records import Conversation
from moba_train.data.tokenizer_hf import HfTokenizer
from moba_train.errors import DataError

TEMPLATE_NAME: Final = "chat_template.jinja"
"""Name of a template beside its tokenizer.json, here and in transformers."""
TODAY: Final = datetime(2024, 7, 26)
"""The day of every conversation: the one that Llama 3.x writes where it is told none."""
OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Stand around what the assistant says while a template with {% generation %} runs: letters that no text may hold."""
_MAX_PRODUCT: Final = 1_000_000  # letters, items or bits
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")  # names that models have for one thing


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, not compiled.

    Attributes:
        source: the template.
        origin: the file it came from.
        names: (bos_token, "<s>") and so on: what it may call by name.
    """

    source: str
    origin: str
    names: tuple[tuple[str, str], ...]

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the template."""
        return hashlib.sha256(self.source.encode()).hexdigest()


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as a document.

    Attributes:
        ids: of the rendered text, then the end of the document.
        spans_N2: int64 [N, 2], tokens (start, end) that are the assistant's, rising and apart.
        stops: at least one of them ends in a special token.
    """

    ids: list[int]
    spans_N2: NDArray[np.int64]
    stops: bool


def find_template(tokenizer: HfTokenizer, file: Path | None, *, eod: str = "") -> ChatTemplate | None:
    """The template of `file`, else of chat_template.jinja beside the tokenizer.json, else the one that
    tokenizer_config.json names (of several, that called "default"); None if there is none.

    Args:
        eod: what ends a document instead of the tokenizer's eos_token.

    Raises:
        DataError: the file cannot be read, or the template writes an eos_token that is not the one of the data.
    """
    beside = tokenizer.path.parent / TEMPLATE_NAME
    names = {"eos_token": eod} | tokenizer.named_tokens if eod else tokenizer.named_tokens
    if file is None and not beside.is_file():
        source, origin = _of_settings(tokenizer.own_chat_template), str(tokenizer.path.parent / "tokenizer_config.json")
    else:
        origin = str(beside if file is None else file)
        source = _read(Path(origin))
    return None if source is None else ChatTemplate(source, origin, tuple(sorted(names.items())))


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        allowed = "a file with a jinja template, in UTF-8"
        raise DataError("cannot read the chat template", where=str(path), got=str(error), allowed=allowed) from error


def _of_settings(value: object) -> str | None:
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


class ChatEncoder:
    """Encodes conversations by one template.

    Args:
        template: the template; compiled here.
        tokenizer: its special tokens are those that the template writes.

    Raises:
        DataError: the template is not one, or it writes an eos_token that --eod has replaced.
    """

    def __init__(self, template: ChatTemplate, tokenizer: HfTokenizer) -> None:
        self._tokenizer = tokenizer
        self._specials = tokenizer.specials()
        environment = _environment()
        try:
            self._template = environment.from_string(template.source)
            used = jinja2.meta.find_undeclared_variables(environment.parse(template.source))
        except (jinja2.TemplateError, RecursionError) as error:
            line = getattr(error, "lineno", None)
            where = f"{template.origin}, line {line}" if line else template.origin
            raise DataError("the chat template is not a jinja template", where=where, got=str(error)) from error
        self._marks = _Generation.of(environment)
        self._names = dict(template.names)
        end = tokenizer.piece(tokenizer.eod_id)
        if "eos_token" in used and self._names.get("eos_token", end) != end:
            raise DataError(
                "the chat template writes the eos_token, and --eod makes that another token",
                where=template.origin,
                got=f"eos_token {self._names['eos_token']}, --eod {end}",
                fix="Leave --eod out, or write the token itself into a copy of the template: --chat-template FILE.",
            )

    def encode(self, conversation: Conversation) -> EncodedChat:
        """Ids of a conversation, and which are the assistant's.

        A token that lies across the edge of a span counts, as in transformers; a special token only if it begins in it.

        Raises:
            ValueError: why the conversation cannot be used: it forges special tokens, the template refuses it or fails,
                or what the assistant says cannot be told from the rest.
        """
        self._check_forgery(conversation)
        messages = [_with_reasoning(message) for message in conversation.messages]

        def render(part: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
            return self._render(part, conversation.tools, prompt)

        text = render(messages)
        if self._marks.used:
            self._marks.shown = True
            try:
                marked = render(messages)
            finally:
                self._marks.shown = False
            spans = _marked_spans(marked, text)
        else:
            spans = assistant_spans(messages, text, render, self._specials)
        return self._tokenized(text, spans)

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, prompt: bool) -> str:
        described = None if tools is None else list(tools)
        try:
            return self._template.render(
                messages=list(messages),
                tools=described,
                documents=None,
                add_generation_prompt=prompt,
                **self._names,
            )
        except Exception as error:  # a template is a program: whatever stops it makes the record one that it refuses
            name = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            raise ValueError(f"the chat template refuses it: {name}{error}"[:400]) from error

    def _check_forgery(self, conversation: Conversation) -> None:
        for index, message in enumerate(conversation.messages):
            for text in _strings(message):
                self._check_text(text, f"messages[{index}]")
        for text in _strings(conversation.tools or ()):
            self._check_text(text, "tools")

    def _check_text(self, text: str, place: str) -> None:
        special = self._tokenizer.spelled_special(text)
        if special:
            raise ValueError(f"{place} spells the special token {special}, with which it could forge a turn")
        if OPEN in text or CLOSE in text:
            raise ValueError(f"{place} holds U+FDD0 or U+FDD1, which are no letters")

    def _tokenized(self, text: str, spans: list[tuple[int, int]]) -> EncodedChat:
        ids, offsets = self._tokenizer.encode_with_specials(text)
        starts, ends = (np.array(side, dtype=np.int64) for side in zip(*offsets, strict=True)) if ids else ((), ())
        found: list[tuple[int, int]] = []
        for start, end in spans:
            first = int(np.searchsorted(ends, start, side="right"))
            stop = int(np.searchsorted(starts, end, side="left"))
            if first < stop and starts[first] < start and self._tokenizer.is_control(ids[first]):
                first += 1
            first = max(first, found[-1][1] if found else 0)
            if first < stop:
                found.append((first, stop))
        stops = any(self._tokenizer.is_control(ids[stop - 1]) for _, stop in found)
        if not ids or ids[-1] != self._tokenizer.eod_id:
            ids = [*ids, self._tokenizer.eod_id]
        return EncodedChat(ids, np.array(found, dtype=np.int64).reshape(-1, 2), stops)


def _marked_spans(marked: str, text: str) -> list[tuple[int, int]]:
    """Where the marks of {% generation %} stand in the text without them."""
    spans: list[tuple[int, int]] = []
    depth = start = 0
    for count, mark in enumerate(re.finditer(f"[{OPEN}{CLOSE}]", marked)):
        at = mark.start() - count
        depth += 1 if mark[0] == OPEN else -1
        if mark[0] == OPEN and depth == 1:
            start = at
        elif depth == 0 and start < at:
            spans.append((start, at))
    if depth or marked.replace(OPEN, "").replace(CLOSE, "") != text:
        raise ValueError("the chat template changes the text of its own {% generation %} blocks")
    return spans


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """What a model thought, under the names that templates look for (as transformers does it)."""
    found = next((message[name] for name in _REASONING if name in message), None)
    if found is None:
        return dict(message)
    return {"thinking": found, **message, "reasoning_content": found}


def _strings(value: object) -> Iterator[str]:
    """All strings of a JSON tree, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


# --------------------------------------------------------------------------- the environment, that of transformers 5


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: what is between them are the assistant's words.

    Attributes:
        used: a template has such blocks.
        shown: put marks around them.
    """

    tags = {"generation"}  # noqa: RUF012 (jinja2's)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.used = self.shown = False

    @classmethod
    def of(cls, environment: jinja2.Environment) -> _Generation:
        """The one of an environment."""
        return next(extension for extension in environment.extensions.values() if isinstance(extension, cls))

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        self.used = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        words = caller()
        return f"{OPEN}{words}{CLOSE}" if self.shown else words


class _Namespace(jinja2.utils.Namespace):
    """Without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace with an attribute {name!r}")


class _Dict:
    """`dict` without the class behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Sequence[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Environment(ImmutableSandboxedEnvironment):
    """Without products that no conversation needs: `"x" * 10**10` would be made while the template is compiled."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if _product_size(operator, left, right) > _MAX_PRODUCT:
            raise jinja2.exceptions.SecurityError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


def _product_size(operator: str, left: object, right: object) -> int:
    """Letters, items or bits of a product or a power, at most; 0 where neither can grow."""
    if isinstance(left, int):
        left, right = (right, left) if isinstance(right, str | list | tuple) else (left, right)
    if not isinstance(right, int):
        return 0
    if isinstance(left, str | list | tuple):
        return len(left) * right
    if isinstance(left, int):
        return left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
    return 0


def _environment() -> jinja2.Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=TODAY.strftime, dict=_Dict(), namespace=_Namespace
    )
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
