"""prep with a tokenizer.json: documents begin and end as its model knows them, and training finds the same ids."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from moba_train.commands.companions import token_ids, write_companions
from moba_train.data import encode
from moba_train.data.indexed import open_indexed
from moba_train.data.needles import haystack_of
from moba_train.data.prep import prepare
from moba_train.data.prep_options import PrepOptions
from moba_train.data.tokenizer import Tokenizer, load_tokenizer
from moba_train.data.vocabulary import check_vocabulary
from moba_train.errors import ConfigError, DataError
from tests.unit.data.conftest import corpus
from tests.unit.data.hf_toys import make_llama3

TEXTS = [*corpus(60), "<|end_of_text|> <|begin_of_text|>\n", "🙂\x00 漢字\n"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "model"
    make_llama3(corpus(60), folder)
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def options(model: Path) -> PrepOptions:
    source = model.parents[1] / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    out = model.parents[1] / "prepared"
    return PrepOptions(out, (str(source),), tokenizer=str(model), held_out=0.1, needles={128: 4})


@pytest.fixture(scope="module")
def prepared(options: PrepOptions) -> Tokenizer:
    prepare(options)
    return load_tokenizer(options.out / "tokenizer.json")


def documents_of(folder: Path, *names: str) -> list[list[int]]:
    pairs = [open_indexed(folder / name) for name in names or ("train", "valid")]
    return [pair.get(i).tolist() for pair in pairs for i in range(pair.num_documents)]


@pytest.mark.parametrize("place", ["out", "."])
def test_a_folder_inside_of_its_own_source_is_not_read(model: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    again = PrepOptions(tmp_path / place, (str(tmp_path),), tokenizer=str(model), held_out=0.1)
    first = prepare(again)
    assert first.read.files == 1 and not first.up_to_date
    assert prepare(again).up_to_date
    changed = prepare(dataclasses.replace(again, held_out=0.2))
    assert changed.read == first.read and not changed.up_to_date


def test_a_document_begins_and_ends_as_the_model_knows_it(
    options: PrepOptions, prepared: Tokenizer, model: Path
) -> None:
    begin, end = (prepared.piece(i) for i in (prepared.begin_ids[0], prepared.eod_id))
    assert (begin, end) == ("<|begin_of_text|>", "<|end_of_text|>")
    found = documents_of(options.out)
    for ids in found:
        assert (ids[0], ids[-1]) == (prepared.begin_ids[0], prepared.eod_id)
        assert not {prepared.eod_id, *prepared.begin_ids}.intersection(ids[1:-1])
    assert sorted(prepared.decode(ids) for ids in found) == sorted(TEXTS)
    assert prepared.fingerprint == load_tokenizer(model).fingerprint
    for ids in documents_of(options.out, "needle_128"):
        assert (len(ids), ids[0], ids[-1]) == (128, prepared.begin_ids[0], prepared.eod_id)
        assert not {prepared.eod_id, *prepared.begin_ids}.intersection(ids[1:-1])


def test_a_haystack_holds_nothing_that_begins_or_ends_a_document(options: PrepOptions, prepared: Tokenizer) -> None:
    haystack = haystack_of(
        open_indexed(options.out / "train"), eod_id=prepared.eod_id, begin_ids=prepared.begin_ids
    ).tolist()
    assert haystack == [i for ids in documents_of(options.out, "train") for i in ids[1:-1]]


def test_processes_change_no_byte_and_a_finished_folder_is_left_alone(
    options: PrepOptions, prepared: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCH_KIB", 8)
    prepare(dataclasses.replace(options, out=tmp_path / "x", workers=2))
    names = sorted(path.name for path in options.out.iterdir())
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == names
    assert {"tokenizer.json", "tokenizer_config.json"} < set(names) and "tokenizer.model" not in names
    for name in names:
        assert (tmp_path / "x" / name).read_bytes() == (options.out / name).read_bytes(), name
    again = prepare(options)
    assert again.up_to_date and again.tokenizer == "tokenizer.json"


def test_joined_text_begins_once_and_ends_once(options: PrepOptions, prepared: Tokenizer, tmp_path: Path) -> None:
    prepare(dataclasses.replace(options, out=tmp_path, join=True, needles={}))
    for name in ("train", "valid"):
        (joined,), apart = documents_of(tmp_path, name), documents_of(options.out, name)
        assert joined == [*prepared.begin_ids, *(i for ids in apart for i in ids[1:-1]), prepared.eod_id]


def test_another_end_of_documents_is_kept_with_the_data_and_told_apart(
    options: PrepOptions, prepared: Tokenizer, model: Path, tmp_path: Path
) -> None:
    shutil.copy(model, tmp_path / "tokenizer.json")  # alone: nothing says what ends a document
    chosen = dataclasses.replace(options, out=tmp_path / "out", tokenizer=str(tmp_path / "tokenizer.json"), needles={})
    with pytest.raises(DataError, match="what ends a document is not known"):
        prepare(chosen)
    chosen = dataclasses.replace(chosen, eod="<|eot_id|>")
    assert not prepare(chosen).up_to_date and prepare(chosen).up_to_date
    ours = load_tokenizer(tmp_path / "out" / "tokenizer.json")
    assert ours.piece(ours.eod_id) == "<|eot_id|>" and ours.fingerprint == prepared.fingerprint
    train = open_indexed(tmp_path / "out" / "train")
    assert train.get(0)[-1] == ours.eod_id
    check_vocabulary(ours, train, vocab_size=ours.vocab_size)
    with pytest.raises(DataError, match="end in another token") as caught:
        check_vocabulary(prepared, train, vocab_size=ours.vocab_size)
    assert "<|eot_id|>" in str(caught.value.got) and "<|end_of_text|>" in caught.value.allowed
    assert not prepare(dataclasses.replace(chosen, eod="<|end_of_text|>")).up_to_date
    with pytest.raises(ConfigError) as refused:
        prepare(dataclasses.replace(chosen, tokenizer="train"))
    assert refused.value.where == "--eod"


def test_an_export_takes_the_tokenizer_of_the_data(options: PrepOptions, prepared: Tokenizer, tmp_path: Path) -> None:
    path = options.out / "tokenizer.json"
    assert "tokenizer.json of" in write_companions(tmp_path, None, path, {prepared.fingerprint})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (options.out / name).read_bytes()
    eod_id, begin_id = prepared.eod_id, prepared.begin_ids[0]
    expected = {"bos_token_id": begin_id, "eos_token_id": eod_id, "pad_token_id": eod_id}
    assert token_ids(path, {prepared.fingerprint}) == expected and token_ids(path, {"another"}) == {}
