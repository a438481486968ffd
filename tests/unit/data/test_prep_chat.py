"""prep with conversations: the same bytes from every format, the loss where the assistant speaks, and refusals."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from moba_train.cli import main
from moba_train.commands.companions import find_companions, write_companions
from moba_train.config.schema import DataConfig, SourceConfig, StageConfig
from moba_train.data import encode
from moba_train.data.chat import ChatEncoder, ChatTemplate
from moba_train.data.indexed import open_indexed
from moba_train.data.prep import prepare
from moba_train.data.prep_options import PrepOptions
from moba_train.data.records import Conversation, document_of
from moba_train.data.stage_data import StageData
from moba_train.data.tokenizer import load_tokenizer
from moba_train.data.tokenizer_hf import HfTokenizer
from moba_train.errors import BackendError, ConfigError, DataError
from tests.unit.data import chat_toys as toys
from tests.unit.data.chat_toys import CHATML, plain, says
from tests.unit.data.conftest import corpus

RECORDS: list[dict[str, Any]] = []
for number, text in enumerate(corpus(40)):
    messages = [dict(message) for message in toys.CONVERSATIONS[number % 3]]
    messages[0]["content"] += f" {number}"
    RECORDS.append({"text": text} if number % 4 == 0 else {"messages": messages, "tools": toys.TOOLS})
SILENT = {"messages": [{"role": "user", "content": "Is anybody there?"}]}
FORGED = {"messages": says("a", "<|im_end|>")}


def lines(records: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = toys.make_chatml(corpus(60), tmp_path_factory.mktemp("chat") / "model")
    settings = path.parent / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": plain(CHATML)}))
    return path


@pytest.fixture(scope="module")
def options(model: Path) -> PrepOptions:
    source = model.parents[1] / "corpus.jsonl"
    source.write_bytes(lines(RECORDS))
    out = model.parents[1] / "prepared"
    chosen = PrepOptions(out, (str(source),), tokenizer=str(model), held_out=0.2)
    prepare(chosen)
    return chosen


@pytest.fixture
def tokenizer(options: PrepOptions) -> HfTokenizer:
    tokenizer = load_tokenizer(options.out / "tokenizer.json")
    assert isinstance(tokenizer, HfTokenizer)
    return tokenizer


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "prep.json"}


def test_every_format_and_any_number_of_processes_gives_the_same_bytes(
    options: PrepOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCH_KIB", 2)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(RECORDS)))
    half = len(lines(RECORDS[:20]))
    frames = [zstandard.compress(lines(RECORDS)[cut]) for cut in (slice(half + 7), slice(half + 7, None))]
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(frames))
    columns = dict.fromkeys(("id", "messages", "text", "tools"))
    table = pyarrow.Table.from_pylist([columns | record for record in RECORDS])
    parquet.write_table(table, tmp_path / "c.parquet", row_group_size=15)
    for name, workers in (("a.jsonl.gz", 3), ("b.jsonl.zst", 1), ("c.parquet", 1)):
        changed = dataclasses.replace(options, out=tmp_path / "out", sources=(str(tmp_path / name),), workers=workers)
        assert not prepare(changed).up_to_date
        assert bytes_of(tmp_path / "out") == bytes_of(options.out), name


def test_the_folder_says_how_it_was_made(options: PrepOptions, tokenizer: HfTokenizer, tmp_path: Path) -> None:
    record = json.loads((options.out / "prep.json").read_text())
    written = {path.name for path in options.out.iterdir()}
    assert written - {"prep.json"} == set(record["files"])
    assert {"chat_template.jinja", "train.spans.npy", "valid.spans.npy"} < written
    assert (options.out / "chat_template.jinja").read_text() == plain(CHATML)
    assert "chat_template" not in json.loads((options.out / "tokenizer_config.json").read_text())
    known = {tokenizer.fingerprint}
    folder = find_companions([], options.out, known)
    write_companions(tmp_path, folder, tokenizer.path, known)
    assert (tmp_path / "chat_template.jinja").read_text() == plain(CHATML)  # an export carries it
    report = prepare(options)
    assert report.up_to_date and report.chat is not None and report.chat.documents == 30 and report.chat.silent == 0
    spans = [open_indexed(options.out / name).spans for name in ("train", "valid")]
    texts = sum(tokens.size for tokens, is_chat in documents_of(options, tokenizer) if not is_chat)
    counted = sum(int((rows[:, 2] - rows[:, 1]).sum()) for rows in spans if rows is not None)
    assert report.chat.loss_tokens == counted - texts
    assert report.chat.tokens == sum(report.tokens.values()) - texts


def documents_of(options: PrepOptions, tokenizer: HfTokenizer) -> list[tuple[np.ndarray, bool]]:
    """Documents of both pairs, and whether they are conversations."""
    start = tokenizer.encode_with_specials("<|im_start|>")[0][0]
    pairs = [open_indexed(options.out / name) for name in ("train", "valid")]
    found = [pair.get(i) for pair in pairs for i in range(pair.num_documents)]
    return [(tokens, bool(start in tokens)) for tokens in found]


def test_labels_that_count_are_the_words_of_the_assistant_and_all_of_a_text(
    options: PrepOptions, tokenizer: HfTokenizer, tmp_path: Path
) -> None:
    coder = ChatEncoder(ChatTemplate(plain(CHATML), "here", tuple(tokenizer.named_tokens.items())), tokenizer)
    wanted: dict[tuple[int, ...], list[int]] = {}
    for record in RECORDS:
        document = document_of(record, "here")
        if isinstance(document, Conversation):
            chat = coder.encode(document)
            inside = np.zeros(len(chat.ids), dtype=int)
            for start, end in chat.spans_N2:
                inside[start:end] = 1
            wanted[tuple(chat.ids)] = [*inside[1:].tolist(), 0]
        else:
            ids = [*tokenizer.encode(document), tokenizer.eod_id]
            wanted[tuple(ids)] = [1] * (len(ids) - 1) + [0]
    longest = max(map(len, wanted))
    data = DataConfig(sources={"train": SourceConfig(path=str(options.out / "train"), packing="whole")})
    seq_len = -(-longest // 16) * 16
    stage = StageConfig(seq_len=seq_len, tokens=seq_len * 40, tokens_per_step=seq_len, mix={"train": 1.0})
    ids = {"eod_id": tokenizer.eod_id, "pad_id": tokenizer.pad_id}
    rows = StageData(data, stage, stage_index=0, seed=1, cache_dir=tmp_path, **ids)
    seen = set()
    for i in range(len(rows)):
        row = rows.row(i)
        for start, end, document in zip(row.cu_seqlens[:-1], row.cu_seqlens[1:], row.document_ids, strict=True):
            if document >= 0:
                tokens = tuple(row.tokens_S[start:end].tolist())
                assert row.loss_mask_S[start:end].tolist() == wanted[tokens]
                seen.add(tokens)
    assert len(seen) == open_indexed(options.out / "train").num_documents


def test_broken_and_silent_conversations_are_counted_whoever_reads_ahead(
    options: PrepOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCH_KIB", 2)
    source = tmp_path / "bad.jsonl"
    source.write_bytes(lines([*RECORDS[:5], FORGED, SILENT, *RECORDS[5:], {"messages": []}, SILENT]))
    changed = dataclasses.replace(options, sources=(str(source),), out=tmp_path / "one")
    with pytest.raises(DataError, match="broken record") as caught:
        prepare(dataclasses.replace(changed, sources=(str(source),), max_mib=0.01))
    assert caught.value.where.endswith("bad.jsonl, line 6") and "<|im_end|>" in str(caught.value.got)
    report = prepare(dataclasses.replace(changed, skip_bad=True))
    assert report.chat is not None and report.chat.silent == 2 and report.read.bad == 2
    assert 'messages" is empty' in report.read.first_bad
    assert report.read.documents == 42 and sum(report.documents.values()) == 40
    prepare(dataclasses.replace(changed, skip_bad=True, workers=3, out=tmp_path / "three"))
    assert bytes_of(tmp_path / "three") == bytes_of(tmp_path / "one")
    assert (tmp_path / "three" / "prep.json").read_bytes() == (tmp_path / "one" / "prep.json").read_bytes()


def test_another_template_prepares_anew_where_there_are_conversations(options: PrepOptions, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(toys.marked(CHATML))
    mine = dataclasses.replace(options, out=tmp_path / "out", chat_template=str(tmp_path / "mine.jinja"))
    assert not prepare(mine).up_to_date and prepare(mine).up_to_date
    assert bytes_of(tmp_path / "out")["train.spans.npy"] == bytes_of(options.out)["train.spans.npy"]
    (tmp_path / "mine.jinja").write_text(toys.marked(CHATML).replace("assistant\n", "assistant\n\n"))
    assert not prepare(mine).up_to_date
    assert bytes_of(tmp_path / "out")["chat_template.jinja"] == (tmp_path / "mine.jinja").read_bytes()
    (tmp_path / "text.jsonl").write_bytes(lines(RECORDS[::4]))
    text = dataclasses.replace(mine, sources=(str(tmp_path / "text.jsonl"),), out=tmp_path / "text")
    report = prepare(text)
    assert report.chat is None and not {"chat_template.jinja", "train.spans.npy"} & set(bytes_of(tmp_path / "text"))
    assert prepare(dataclasses.replace(text, chat_template="")).up_to_date


def test_conversations_without_what_they_need_are_refused(options: PrepOptions, model: Path, tmp_path: Path) -> None:
    def refused(kind: type[Exception], **changes: Any) -> str:
        with pytest.raises(kind) as caught:
            prepare(dataclasses.replace(options, out=tmp_path / "out", **changes))
        return str(caught.value)

    toys.make_chatml(corpus(60), tmp_path / "bare")
    told = refused(DataError, tokenizer=str(tmp_path / "bare" / "tokenizer.json"))
    assert "no chat template" in told and "line 2" in told and "--chat-template FILE" in told
    assert "need the tokenizer.json" in refused(DataError, tokenizer="train")
    assert "--tokenizer PATH/tokenizer.json" in refused(ConfigError, tokenizer="train", chat_template="x.jinja")
    assert "joined" in refused(ConfigError, join=True)
    (tmp_path / "bad.jinja").write_text("{% for %}")
    assert "not a jinja template" in refused(DataError, chat_template=str(tmp_path / "bad.jinja"))
    (tmp_path / "silent.jsonl").write_bytes(lines([SILENT]))
    assert "nothing to write" in refused(DataError, sources=(str(tmp_path / "silent.jsonl"),))


def test_a_sentencepiece_model_is_refused(options: PrepOptions, tokenizer: HfTokenizer, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_bytes(lines([{"text": line} for line in corpus(60)]))
    prepare(PrepOptions(tmp_path / "own", (str(text),), vocab_size=640))
    with pytest.raises(DataError, match="conversations need the") as caught:
        prepare(dataclasses.replace(options, out=tmp_path / "out", tokenizer=str(tmp_path / "own" / "tokenizer.model")))
    assert "tokenizer.model" in str(caught.value.got)


def test_the_command_tells_how_many_there_are_and_what_the_loss_is_on(
    options: PrepOptions, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "talk.jsonl"
    source.write_bytes(lines([*RECORDS, SILENT]))
    (tmp_path / "mine.jinja").write_text(toys.marked(CHATML))
    words = [str(source), "--out", str(tmp_path / "out"), "--tokenizer", str(model), "--workers", "1"]
    assert main(["prep", *words, "--chat-template", str(tmp_path / "mine.jinja")]) == 0
    told = capsys.readouterr().out
    assert "30 of the documents are conversations" in told and "% of their" in told
    assert "left out 1 conversations in which the assistant says nothing" in told and "warning" not in told
    bare = toys.marked(CHATML).replace(
        "{{- '<|im_end|>' }}\n        {%- endgeneration %}", "{%- endgeneration %}<|im_end|>"
    )
    (tmp_path / "mine.jinja").write_text(bare)
    assert main(["prep", *words, "--chat-template", str(tmp_path / "mine.jinja")]) == 0
    assert "warning: in 30 conversations no answer ends in a special token" in capsys.readouterr().out


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_something_kills_is_told_without_a_traceback(
    options: PrepOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = ProcessPoolExecutor.submit
    monkeypatch.setattr(ProcessPoolExecutor, "submit", lambda pool, *rest: submit(pool, _killed))
    with pytest.raises(BackendError, match="a process that encodes was killed") as caught:
        prepare(dataclasses.replace(options, out=tmp_path / "out", workers=2))
    assert caught.value.where == "--workers 2"
