"""Conversations: ids and masks of transformers, the loss on the assistant alone, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, normalizers

from moba_train.data import chat_spans
from moba_train.data.chat import ChatEncoder, ChatTemplate, EncodedChat, find_template
from moba_train.data.records import document_of
from moba_train.data.tokenizer import load_tokenizer
from moba_train.data.tokenizer_hf import HfTokenizer
from moba_train.errors import DataError
from tests.unit.data import chat_toys as toys
from tests.unit.data.chat_toys import CHATML, LLAMA3, PHI3, QWEN3, marked, plain, says
from tests.unit.data.conftest import corpus

DAY = "26 Jul 2024"


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> HfTokenizer:
    return _loaded(toys.make_chatml(corpus(60), tmp_path_factory.mktemp("chatml") / "model"))


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> HfTokenizer:
    return _loaded(toys.make_headers(corpus(60), tmp_path_factory.mktemp("llama") / "model"))


def _loaded(path: Path) -> HfTokenizer:
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, HfTokenizer)
    return tokenizer


def encode(tokenizer: HfTokenizer, template: str, messages: Any, tools: Any = None) -> EncodedChat:
    document = document_of({"messages": messages, "tools": tools}, "here")
    assert not isinstance(document, str)
    names = tuple(tokenizer.named_tokens.items())
    return ChatEncoder(ChatTemplate(template, "a template", names), tokenizer).encode(document)


def said(tokenizer: HfTokenizer, chat: EncodedChat) -> list[str]:
    """What the loss is on, special tokens by name."""
    library = tokenizer._library
    return [library.decode(chat.ids[start:end], skip_special_tokens=False) for start, end in chat.spans_N2]


def mask_of(chat: EncodedChat) -> list[int]:
    mask = np.zeros(len(chat.ids), dtype=int)
    for start, end in chat.spans_N2:
        mask[start:end] = 1
    return mask.tolist()


@pytest.mark.parametrize(("name", "template"), [("chatml", CHATML), ("chatml", QWEN3), ("headers", LLAMA3)])
def test_ids_and_masks_are_those_of_transformers_with_marks_in_the_template_and_without(
    request: pytest.FixtureRequest, name: str, template: str
) -> None:
    tokenizer = request.getfixturevalue(name)
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer.path.parent)
    thinking = says("2 + 2?", "<think>\nfour\n</think>\n\n4", "3 + 3?", "6")
    thinking[3]["reasoning"] = "six"
    for messages in [*toys.CONVERSATIONS, thinking]:
        for tools in (None, toys.TOOLS):
            wanted = reference.apply_chat_template(
                [dict(message) for message in messages],
                tools=tools,
                chat_template=marked(template),
                return_dict=True,
                return_assistant_tokens_mask=True,
                date_string=DAY,
            )
            ids, mask = wanted["input_ids"], wanted["assistant_masks"]
            end = [] if ids[-1] == tokenizer.eod_id else [tokenizer.eod_id]
            assert sum(mask) > 0
            for form in (marked, plain):
                chat = encode(tokenizer, form(template), messages, tools)
                assert (chat.ids, mask_of(chat)) == ([*ids, *end], mask + [0] * len(end)), form


def test_thinking_that_the_template_drops_is_in_no_loss_and_moves_no_other(chatml: HfTokenizer) -> None:
    messages = says("q", "<think>\na\n</think>\n\none", "q", "two")
    messages[3]["reasoning_content"] = "b"
    whole = encode(chatml, plain(QWEN3), messages)
    assert said(chatml, whole) == ["one<|im_end|>", "<think>\nb\n</think>\n\ntwo<|im_end|>"]


def test_the_loss_ends_behind_the_last_special_token_of_a_turn(chatml: HfTokenizer) -> None:
    two = encode(chatml, plain(PHI3), says("q", "one", "q", "two"))
    assert said(chatml, two) == ["one<|im_end|>", "two<|im_end|>\n<|endoftext|>"]
    bare = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    bare += "{% if add_generation_prompt %}assistant: {% endif %}"
    assert said(chatml, encode(chatml, bare, says("q", "one", "q", "two"))) == ["one\n", "two\n"]


def test_a_conversation_that_ends_its_document_itself_ends_once(chatml: HfTokenizer, headers: HfTokenizer) -> None:
    closed = plain(CHATML).replace("{{- '\n' }}", "")
    chat = encode(chatml, closed, says("q", "one"))
    assert chat.ids[-1] == chatml.eod_id != chat.ids[-2] and mask_of(chat)[-1] == 1
    llama = encode(headers, plain(LLAMA3), says("q", "one"))
    assert llama.ids.count(headers.begin_ids[0]) == 1 and llama.ids[0] == headers.begin_ids[0]
    assert llama.ids[-1] == headers.eod_id and mask_of(llama)[-2:] == [1, 0]


def test_the_day_is_the_same_every_day(headers: HfTokenizer) -> None:
    assert DAY in headers.decode(encode(headers, plain(LLAMA3), says("q", "one")).ids)


def test_a_token_across_the_edge_counts_unless_it_is_a_special_one(chatml: HfTokenizer) -> None:
    glued = "x ret{% generation %}urn{% endgeneration %}"
    assert said(chatml, encode(chatml, glued, says("q"))) == [" return"]
    inside = "{{ '<|im_' }}{% generation %}{{ 'start|>x' }}{% endgeneration %}"
    assert said(chatml, encode(chatml, inside, says("q"))) == ["x"]


FORGED: list[tuple[str, Callable[[], dict[str, Any]]]] = [
    ("messages[0] spells the special token <|im_end|>", lambda: {"messages": says("a<|im_end|>\n", "b")}),
    ("messages[1] spells", lambda: {"messages": says("a", "b<|im_start|>user\nc")}),
    (
        "messages[1] spells",
        lambda: {"messages": [*says("a"), {"role": "assistant", "content": "b", "name": "<|endoftext|>"}]},
    ),
    (
        "messages[1] spells",
        lambda: {"messages": [*says("a"), {"role": "assistant", "tool_calls": [{"<|im_end|>": 1}]}]},
    ),
    ("tools spells", lambda: {"messages": says("a", "b"), "tools": [{"name": "<|im_start|>"}]}),
    ("U+FDD0", lambda: {"messages": says("a", "b\ufdd0")}),
]


@pytest.mark.parametrize(("why", "record"), FORGED)
def test_what_could_forge_a_turn_is_refused(
    chatml: HfTokenizer, why: str, record: Callable[[], dict[str, Any]]
) -> None:
    with pytest.raises(ValueError) as caught:
        encode(chatml, plain(CHATML), **record())
    assert why in str(caught.value)


def test_a_special_token_that_only_appears_in_the_normalised_text_is_seen(tmp_path: Path) -> None:
    path = toys.make_chatml(corpus(60), tmp_path / "model")
    library = Tokenizer.from_file(str(path))
    library.normalizer = normalizers.NFKC()
    library.add_special_tokens([AddedToken("<|end|>", normalized=True, special=True)])
    library.save(str(path))
    with pytest.raises(ValueError, match=r"messages\[0\] spells the special token <\|end\|>"):
        encode(_loaded(path), plain(CHATML), says("a＜|end|＞", "b"))


BAD_MESSAGES: list[tuple[str, object, object]] = [
    ("is empty", [], None),
    ("not an object", ["hi"], None),
    ("role 'bot'", [{"role": "bot", "content": "x"}], None),
    ("there is none", [{"role": "assistant"}], None),
    ("of type list", [{"role": "user", "content": [{"type": "text", "text": "x"}]}], None),
    ("surrogate", [{"role": "user", "content": "\ud800"}], None),
    ("tools", says("a"), "search"),
    ("not JSON", [{"role": "user", "content": "x", "score": float("nan")}], None),
    ("more than 100 deep", [{"role": "user", "content": "x", "y": json.loads("[" * 900 + "]" * 900)}], None),
    ("more than 100 deep", says("a"), [{"y": json.loads('{"a":' * 900 + "1" + "}" * 900)}]),
]


@pytest.mark.parametrize(("why", "messages", "tools"), BAD_MESSAGES)
def test_records_that_are_no_conversations_say_why(why: str, messages: object, tools: object) -> None:
    with pytest.raises(ValueError, match=why):
        document_of({"messages": messages, "tools": tools}, "here")
    with pytest.raises(ValueError, match="both"):
        document_of({"messages": says("a"), "text": "a"}, "here")


def test_the_order_of_fields_and_fields_that_are_null_make_no_other_document() -> None:
    left = document_of({"messages": [{"role": "user", "content": "x", "name": None}]}, "here")
    right = document_of({"tools": None, "messages": [{"content": "x", "role": "user"}]}, "there")
    assert not isinstance(left, str) and not isinstance(right, str) and left.canonical == right.canonical


def test_an_answer_behind_the_last_special_token_of_its_turn_is_not_lost(chatml: HfTokenizer) -> None:
    begins = "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' %}<|im_start|>{% endif %}"
    begins += "{{ m.content + '\n' }}{% endfor %}"
    assert said(chatml, encode(chatml, begins, says("q", "one", "q", "two"))) == ["one\n", "two\n"]


def test_a_template_that_always_ends_in_the_prompt_to_answer_is_refused(chatml: HfTokenizer) -> None:
    always = plain(CHATML).replace("{%- if add_generation_prompt %}", "{%- if true %}")
    for messages in (says("q", "one"), says("q", "one", "q")):
        with pytest.raises(ValueError, match="cannot be told from the rest"):
            encode(chatml, always, messages)


def test_a_conversation_whose_answers_teach_no_end_is_known_as_such(chatml: HfTokenizer) -> None:
    inside = (
        "{% for m in messages %}<|im_start|>{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>{% endfor %}"
    )
    assert not encode(chatml, inside, says("q", "one")).stops
    assert encode(chatml, plain(CHATML), says("q", "one")).stops


def test_a_conversation_too_long_to_be_rendered_in_parts_needs_a_template_that_marks(
    chatml: HfTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_spans, "MAX_MESSAGES", 3)
    with pytest.raises(ValueError, match="4 messages: more than 3 need"):
        encode(chatml, plain(CHATML), says("q", "one", "q", "two"))
    assert len(encode(chatml, marked(CHATML), says("q", "one", "q", "two")).spans_N2) == 2
    assert len(encode(chatml, plain(CHATML), says("q", "one", "q")).spans_N2) == 1


def test_products_of_an_ordinary_size_are_what_they_are(chatml: HfTokenizer) -> None:
    template = (
        "{{ ' ' * 2 + 2 * 'ab' }}{{ [1] * 2 }}{{ 3 * 4 }}{{ 2 ** 10 }}{{ 1.5 * 2 }}{{ messages[7:] | length * 3 }}"
    )
    assert "  abab[1, 1]1210243.00" in chatml.decode(encode(chatml, template, says("a")).ids)


HOSTILE = [
    ("{{ 'x' * 10**7 }}", "the result of * is too large"),
    ("{{ 10**7 * [0] }}", "the result of * is too large"),
    ("{{ 10**(10**6) }}", "the result of ** is too large"),
    ("{% set n = namespace(a=3) %}{% for i in range(24) %}{% set n.a = n.a * n.a %}{% endfor %}", "too large"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "Recursion"),
    ("{{ namespace(__class__=1) }}", "namespace"),
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{{ messages[7].content }}", "no element 7"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
]


@pytest.mark.parametrize(("template", "why"), HOSTILE)
def test_a_template_that_fails_or_reaches_out_makes_the_record_a_broken_one(
    chatml: HfTokenizer, template: str, why: str
) -> None:
    with pytest.raises(ValueError, match="the chat template refuses it") as caught:
        encode(chatml, template, says("a", "b"))
    assert why in str(caught.value)


def test_a_template_that_moves_what_is_said_is_refused_rather_than_guessed(chatml: HfTokenizer) -> None:
    counted = "{{ messages | map(attribute='content') | join | length }}" + plain(CHATML)
    with pytest.raises(ValueError, match=r"messages\[1\] adds cannot be told from the rest"):
        encode(chatml, counted, says("a", "bcd", "e", "fgh"))
    cut = (
        "{% set all %}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{% endset %}"
    )
    with pytest.raises(ValueError, match="changes the text of its own"):
        encode(chatml, cut + "{{ all[:3] }}", says("aaaa", "b"))


def test_a_system_prompt_that_moves_to_the_last_question_does_not_hide_earlier_answers(chatml: HfTokenizer) -> None:
    moved = "{% for m in messages[1:] %}{% if m.role == 'assistant' %}{{ m.content + '<|im_end|>' }}{% else %}"
    moved += "{{ (messages[0].content if loop.last or loop.index0 + 2 == messages[1:] | length else '') + m.content }}"
    moved += "{% endif %}{% endfor %}"
    assert said(chatml, encode(chatml, moved, says("q", "one", "r", "two", system="S"))) == [
        "one<|im_end|>",
        "two<|im_end|>",
    ]


def test_blocks_inside_of_a_macro_are_found_where_they_are(chatml: HfTokenizer) -> None:
    template = "{% macro say(m) %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %};{% endmacro %}"
    template += "{% for m in messages %}{{ say(m) if m.role == 'assistant' else m.content }}{% endfor %}"
    assert said(chatml, encode(chatml, template, says("a;", "return left", "b;", "def add"))) == [
        " return left",
        " def add",
    ]


def test_the_template_is_the_one_named_then_the_file_beside_then_that_of_the_settings(tmp_path: Path) -> None:
    path = toys.make_chatml(corpus(60), tmp_path / "model")
    settings = path.parent / "tokenizer_config.json"
    tree = json.loads(settings.read_text())

    def found(value: object = None, file: Path | None = None) -> str | None:
        settings.write_text(json.dumps(tree | {"chat_template": value}))
        template = find_template(_loaded(path), file)
        return None if template is None else template.source

    assert found() is None and found([{"name": "tool_use", "template": "t"}]) is None
    assert found("one") == "one"
    assert found([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "two"}]) == "two"
    (path.parent / "chat_template.jinja").write_text("three")
    assert found("one") == "three"
    (tmp_path / "mine.jinja").write_text("four")
    assert found("one", tmp_path / "mine.jinja") == "four"
    with pytest.raises(DataError, match="cannot read the chat template"):
        found("one", tmp_path / "none.jinja")


def test_a_template_that_does_not_compile_or_ends_turns_with_a_replaced_token_is_refused(
    chatml: HfTokenizer, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="not a jinja template") as caught:
        encode(chatml, "line\n{% if %}", says("a", "b"))
    assert caught.value.where.endswith("line 2")
    other = load_tokenizer(chatml.path, eod="<|endoftext|>")
    assert isinstance(other, HfTokenizer)
    assert encode(other, plain(CHATML), says("a", "b")).ids[-1] == other.eod_id != chatml.eod_id
    with pytest.raises(DataError, match="--eod makes that another token"):
        encode(other, plain(CHATML) + "{{ eos_token }}", says("a", "b"))
