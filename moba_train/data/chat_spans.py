"""What the assistant says in a rendered conversation, for chat templates that do not mark it themselves.

Of message i these are the words that `render(messages[:i + 1])` adds to `render(messages[:i])` with the prompt to
answer, up to the end of the turn. A template may render the same message otherwise when others follow it (Qwen3 drops
what was thought in earlier turns). Then the message is found by rendering the whole conversation once more with a mark
in its place: all else must stay as it is, letter for letter, else the conversation is refused. Nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

MARK: Final = "\ufdd0"
"""Stands for the words of the assistant: a letter that no text may hold."""
MAX_MESSAGES: Final = 2_000
"""The work grows with their square: two minutes for these, with Qwen3's template."""
_WORDS: Final = ("tool_calls", "reasoning_content", "thinking", "reasoning")  # fields that are said, like the content


class Render(Protocol):
    """Messages to text; with `prompt`, the prompt to answer stands behind them. ValueError: the template refuses."""

    def __call__(self, part: Sequence[Mapping[str, Any]], prompt: bool = False) -> str: ...


def assistant_spans(
    messages: Sequence[Mapping[str, Any]], text: str, render: Render, specials: Sequence[str]
) -> list[tuple[int, int]]:
    """Characters (start, end) of the assistant's words in `text`, the whole conversation rendered; rising and apart.

    A span ends behind the last special token of the turn; if there is none, behind all that belongs to the turn. If
    something else than white space stands behind it, the turn does not end there.

    Args:
        specials: how special tokens are spelled.

    Raises:
        ValueError: what an assistant's message adds cannot be told from the rest, or there are too many messages.
    """
    if len(messages) > MAX_MESSAGES:
        raise ValueError(
            f"it has {len(messages):,} messages: more than {MAX_MESSAGES:,} need a chat template with "
            "{% generation %} blocks, since without them each part of the conversation is rendered by itself"
        )
    spans: list[tuple[int, int]] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        span = _added(messages, i, text, render, specials) or _replaced(messages, i, text, render, specials)
        if span is None or span[0] < (spans[-1][1] if spans else 0):
            raise ValueError(
                f"what messages[{i}] adds cannot be told from the rest: the chat template has no {{% generation %}} "
                "blocks, and renders the conversation otherwise when a message is cut off or replaced"
            )
        if span[0] < span[1]:
            spans.append(span)
    return spans


def _added(
    messages: Sequence[Mapping[str, Any]], i: int, text: str, render: Render, specials: Sequence[str]
) -> tuple[int, int] | None:
    """The span of message i, if the template renders what is before it, and it, as it does in the whole text."""
    before = _or_none(render, messages[:i], prompt=True)
    if before is None or not text.startswith(before):
        return None
    through = text if i == len(messages) - 1 else _or_none(render, messages[: i + 1])
    if through is None or not text.startswith(through) or len(through) < len(before):
        return None
    words = through[len(before) :]
    end = _last_special(words, specials)
    if end and words[end:].strip():  # the turn does not end there, or it is another's
        return None
    return len(before), len(before) + (end or len(words))


def _replaced(
    messages: Sequence[Mapping[str, Any]], i: int, text: str, render: Render, specials: Sequence[str]
) -> tuple[int, int] | None:
    """The span of message i, if a mark in its place changes nothing else of the text."""
    marked = {key: value for key, value in messages[i].items() if key not in _WORDS} | {"content": MARK}
    whole = _or_none(render, [*messages[:i], marked, *messages[i + 1 :]])
    alone = _or_none(render, [*messages[:i], marked])
    if whole is None or alone is None or whole.count(MARK) != 1 or alone.count(MARK) != 1:
        return None
    head, tail = whole.split(MARK)
    if not (text.startswith(head) and text.endswith(tail) and len(head) + len(tail) <= len(text)):
        return None
    # Of what the template puts behind a last message, the part that it puts behind this one too is its own.
    behind = alone.split(MARK)[1]
    shared = behind[: _same(behind, tail)]
    end = _last_special(shared, specials)
    if _has_letters(behind, specials) if end else shared != behind:
        return None
    return len(head), len(text) - len(tail) + (end or len(shared))


def _same(left: str, right: str) -> int:
    """Characters in which two texts agree at their beginning."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(left), len(right)))


def _last_special(words: str, specials: Sequence[str]) -> int:
    """Where the last special token ends; 0, if there is none."""
    return max((words.rfind(special) + len(special) for special in specials if special in words), default=0)


def _has_letters(words: str, specials: Sequence[str]) -> bool:
    """Is there more than special tokens and white space?"""
    for special in specials:
        words = words.replace(special, "")
    return bool(words.strip())


def _or_none(render: Render, part: Sequence[Mapping[str, Any]], prompt: bool = False) -> str | None:
    try:
        return render(part, prompt)
    except ValueError:  # a part of a conversation may be none for the template
        return None
