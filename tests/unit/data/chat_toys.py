"""Chat templates as those of the known families are, and conversations to render with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Library

from tests.unit.data.hf_toys import make_llama3, make_qwen

CHATML = """{%- if tools %}
<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        OPEN
        {{- message.content }}
        {%- for call in message.tool_calls %}
            {{- '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        CLOSE
        {{- '\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday Date: " + date_string + "\n\n" }}
{{- system_message + "<|eot_id|>" }}
{%- if tools is not none %}
    {{- "<|start_header_id|>user<|end_header_id|>\n\n" }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) + "\n\n" }}
    {%- endfor %}
    {{- "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        OPEN
        {{- '{"name": "' + message.tool_calls[0].function.name + '"}<|eot_id|>' }}
        CLOSE
    {%- elif message.role == "tool" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" + (message.content | tojson) + "<|eot_id|>" }}
    {%- elif message.role == "assistant" %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        OPEN
        {{- message.content | trim + '<|eot_id|>' }}
        CLOSE
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
QWEN3 = """{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set ns.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set thought = message.reasoning_content or '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        OPEN
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {{- '<|im_end|>' }}
        CLOSE
        {{- '\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
PHI3 = """{% for message in messages %}
{% if message['role'] == 'assistant' %}
{{ '<|im_start|>assistant\n' }}OPEN{{ message['content'] + '<|im_end|>' }}CLOSE{{ '\n' }}
{%- else %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}
"""


def plain(template: str) -> str:
    """A template that does not say what the assistant says."""
    return template.replace("OPEN", "").replace("CLOSE", "")


def marked(template: str) -> str:
    """The same with {% generation %} blocks."""
    return template.replace("OPEN", "{%- generation %}").replace("CLOSE", "{%- endgeneration %}")


TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "wetter", "parameters": {"properties": {"stadt": {"type": "string"}}}}}
]
CALL = {"type": "function", "function": {"name": "wetter", "arguments": {"stadt": "Köln", "tage": 3}}}


def says(*turns: str, system: str = "") -> list[dict[str, Any]]:
    """User and assistant by turns."""
    roles = ("user", "assistant")
    begin = [{"role": "system", "content": system}] if system else []
    return [*begin, *({"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns))]


CONVERSATIONS: list[list[dict[str, Any]]] = [
    says("add left and right", "def add(left, right):\n    return left + right\n"),
    says("Hi 🙂", " 漢字 and emoji 🙂🙂", "again\n", "\nÜnïcödé ", system="Be short."),
    [
        {"role": "user", "content": "Wie ist das Wetter?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "15 °C"},
        {"role": "assistant", "content": "Kühl: 15 °C.", "name": None},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": ""},
    ],
]


def make_chatml(lines: list[str], folder: Path) -> Path:
    """A tokenizer.json with the tokens of ChatML; eos_token is <|im_end|>."""
    make_qwen(lines, folder)
    return folder / "tokenizer.json"


def make_headers(lines: list[str], folder: Path) -> Path:
    """A tokenizer.json with the tokens of Llama 3."""
    make_llama3(lines, folder)
    path = folder / "tokenizer.json"
    library = Library.from_file(str(path))
    library.add_special_tokens(["<|start_header_id|>", "<|end_header_id|>"])
    library.save(str(path))
    return path
