"""prep: real files in, the same bytes out, and nothing done twice."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from moba_train.data import encode, prep
from moba_train.data.encode import document_hash
from moba_train.data.indexed import open_indexed, write_indexed
from moba_train.data.needles import NeedleText, load_words
from moba_train.data.prep import prepare
from moba_train.data.prep_options import PrepOptions
from moba_train.data.tokenizer import load_tokenizer
from moba_train.data.tokenizer_sentencepiece import SentencepieceTokenizer
from moba_train.data.vocabulary import check_vocabulary
from moba_train.errors import ConfigError, DataError
from tests.full_disk import full_disk
from tests.unit.data.conftest import corpus


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus(200)))
    return path


def options_of(source: Path, out: Path, **changes) -> PrepOptions:
    base = PrepOptions(out=out, sources=(str(source),), vocab_size=700, held_out=0.1, needles={64: 20, 128: 10})
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared")
    prepare(options_of(source, out))
    return out


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_folder_holds_what_training_reads_and_nothing_else(prepared):
    pairs = [f"{name}.{end}" for name in ("needle_128", "needle_64", "train", "valid") for end in ("bin", "idx")]
    spans = ["needle_128.spans.npy", "needle_64.spans.npy"]
    assert sorted(digests(prepared)) == sorted([*pairs, *spans, "prep.json", "tokenizer.model"])


def test_any_number_of_processes_gives_the_same_bytes(prepared, source, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "BATCH_KIB", 8)
    prepare(options_of(source, tmp_path / "out", workers=2))
    assert digests(tmp_path / "out") == digests(prepared)


def test_every_document_is_in_train_or_in_valid_by_its_hash_and_ends_in_eod(prepared):
    tokenizer = load_tokenizer(prepared / "tokenizer.model")
    found = {}
    for name in ("train", "valid"):
        documents = open_indexed(prepared / name)
        ids = [documents.get(i) for i in range(documents.num_documents)]
        assert all(tokens[-1] == tokenizer.eod_id for tokens in ids)
        found[name] = [tokenizer.decode(tokens) for tokens in ids]
    assert sorted(found["train"] + found["valid"]) == sorted(corpus(200))
    train_hashes = [document_hash(text) for text in found["train"]]
    assert max(document_hash(text) for text in found["valid"]) < min(train_hashes)
    assert 5 <= len(found["valid"]) <= 50


def test_joined_text_is_one_document_of_the_same_tokens_on_each_side(prepared, source, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "BATCH_KIB", 8)
    report = prepare(options_of(source, tmp_path / "out", join=True, workers=2, needles={}))
    eod_id = load_tokenizer(prepared / "tokenizer.model").eod_id
    for name in ("train", "valid"):
        apart, joined = open_indexed(prepared / name), open_indexed(tmp_path / "out" / name)
        tokens = np.concatenate([apart.get(i)[:-1] for i in range(apart.num_documents)])
        assert apart.num_documents > 1 and joined.num_documents == report.documents[name] == 1
        assert np.array_equal(joined.get(0), [*tokens, eod_id])


def test_a_folder_from_before_text_could_be_joined_is_left_alone(prepared, source):
    record = json.loads((prepared / "prep.json").read_text())
    assert "join" not in record["request"]["options"]
    assert prepare(options_of(source, prepared)).up_to_date


def test_a_text_of_which_a_tokenizer_leaves_nothing_is_left_out_of_joined_text(source, tmp_path, monkeypatch):
    encode_many = SentencepieceTokenizer.encode_many
    monkeypatch.setattr(SentencepieceTokenizer, "encode_many", lambda self, texts: [[], *encode_many(self, texts)[1:]])
    assert prepare(options_of(source, tmp_path / "out", join=True, needles={})).documents["train"] == 1


def test_the_same_document_twice_lands_on_the_same_side(source, tmp_path):
    twice = tmp_path / "twice.jsonl"
    twice.write_text(source.read_text() * 2)
    prepare(options_of(twice, tmp_path / "out", needles={}))
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer.model")
    sides = []
    for name in ("train", "valid"):
        documents = open_indexed(tmp_path / "out" / name)
        sides.append({tokenizer.decode(documents.get(i)) for i in range(documents.num_documents)})
    assert not sides[0] & sides[1]


def test_needle_documents_are_hidden_in_training_text_and_carry_answer_spans(prepared):
    tokenizer = load_tokenizer(prepared / "tokenizer.model")
    text = NeedleText(tokenizer, load_words())
    documents = open_indexed(prepared / "needle_128")
    assert documents.num_documents == 10
    for i in range(10):
        tokens = documents.get(i)
        assert tokens.size == 128
        for start, end in documents.answer_spans(i):
            before = tokenizer.decode(tokens[:start])
            assert before.endswith(text.form.middle)
            question = before[before.rfind(text.form.prefix) :]
            assert question + tokenizer.decode(tokens[start:end]) + text.form.suffix in before


def test_a_finished_folder_is_left_alone_and_a_changed_request_is_not(prepared, source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    small = options_of(source, out, needles={})
    assert not prepare(small).up_to_date
    with monkeypatch.context() as patch:
        patch.setattr(prep, "survey", lambda *a, **k: pytest.fail("prepared again"))
        assert prepare(small).up_to_date
        assert prepare(dataclasses.replace(small, workers=2)).up_to_date
    assert not prepare(dataclasses.replace(small, held_out=0.2)).up_to_date
    (out / "train.bin").write_bytes(b"cut")
    assert not prepare(dataclasses.replace(small, held_out=0.2)).up_to_date
    (out / "prep.json").write_text("{")
    assert not prepare(dataclasses.replace(small, held_out=0.2)).up_to_date


def test_the_report_of_a_finished_folder_says_what_the_first_one_said(source, tmp_path):
    options = options_of(source, tmp_path / "out", needles={})
    first = prepare(options)
    assert dataclasses.replace(prepare(options), up_to_date=False) == first
    assert first.read.documents == 200 and sum(first.documents.values()) == 200
    assert first.tokens["train"] == open_indexed(tmp_path / "out" / "train").num_tokens


def test_an_interrupted_run_is_not_taken_for_a_finished_one(source, tmp_path, monkeypatch):
    options = options_of(source, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(prep, "_write_needles", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(options)
    assert not prepare(options).up_to_date


def test_a_taken_tokenizer_is_kept_byte_for_byte(prepared, source, tmp_path):
    report = prepare(options_of(source, tmp_path / "out", tokenizer=str(prepared / "tokenizer.model")))
    assert report.fingerprint == load_tokenizer(prepared / "tokenizer.model").fingerprint
    assert digests(tmp_path / "out")["train.bin"] == digests(prepared)["train.bin"]


def test_a_tiny_corpus_holds_something_out(tmp_path):
    (tmp_path / "few.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus(40)))
    report = prepare(PrepOptions(tmp_path / "out", (str(tmp_path / "few.jsonl"),), vocab_size=640, held_out=1e-9))
    assert 1 <= report.documents["valid"] <= 20


def test_broken_records_stop_prep_or_are_counted(source, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(source.read_text() + '{"no text": 1}\n')
    with pytest.raises(DataError, match="broken record") as caught:
        prepare(options_of(broken, tmp_path / "out"))
    assert "line 201" in caught.value.where
    report = prepare(options_of(broken, tmp_path / "out", skip_bad=True, needles={}))
    assert report.read.bad == 1 and "line 201" in report.read.first_bad


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/none"])
def test_a_place_that_takes_no_folder_is_told_before_anything_is_read(source, tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(prep, "survey", lambda *args, **options: pytest.fail("it began to read"))
    with pytest.raises(DataError, match="the folder cannot be written") as caught:
        prepare(options_of(source, tmp_path / place))
    assert caught.value.where == str(tmp_path / place)


@pytest.mark.parametrize(("num_bytes", "name"), [(1000, "tokenizer.model"), (30_000, "train.bin")])
def test_a_full_disk_is_told_with_the_file_and_leaves_no_part_of_one(prepared, source, tmp_path, num_bytes, name):
    options = options_of(source, tmp_path / "out", tokenizer=str(prepared / "tokenizer.model"))
    with pytest.raises(DataError, match="the file cannot be written") as caught, full_disk(num_bytes):
        prepare(options)
    assert caught.value.where == str(tmp_path / "out" / name)
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"tokenizer.model"}


def test_prep_is_silent_where_there_is_no_terminal(source, tmp_path, capfd):
    prepare(options_of(source, tmp_path / "out"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "change",
    [
        *({"held_out": share} for share in (0.0, 1.0, -0.1, math.nan)),
        *({"max_mib": mib} for mib in (-1.0, math.nan, math.inf)),
        *({"workers": 0}, {"seed": -1}, {"needles": {0: 5}}, {"needles": {64: 0}}),
    ],
)
def test_options_out_of_range_are_refused(source, tmp_path, change):
    with pytest.raises(ConfigError) as caught:
        prepare(options_of(source, tmp_path, **change))
    assert caught.value.where.startswith("--")


def test_sources_without_text_are_refused(tmp_path):
    (tmp_path / "blank.txt").write_text("  \n")
    with pytest.raises(DataError, match="no text"):
        prepare(PrepOptions(tmp_path / "out", (str(tmp_path / "blank.txt"),)))


def test_vocabularies_that_do_not_fit_are_refused(prepared, source, tmp_path):
    tokenizer = load_tokenizer(prepared / "tokenizer.model")
    train = open_indexed(prepared / "train")
    check_vocabulary(tokenizer, train, vocab_size=700)
    with pytest.raises(ConfigError, match="smaller") as caught:
        check_vocabulary(tokenizer, train, vocab_size=699)
    assert caught.value.where == "model.vocab_size"
    prepare(options_of(source, tmp_path / "other", vocab_size=650))
    other = load_tokenizer(tmp_path / "other" / "tokenizer.model")
    with pytest.raises(DataError, match="another tokenizer"):
        check_vocabulary(other, train, vocab_size=700)


def test_ids_that_the_tokenizer_does_not_have_are_found_without_prep_json(prepared, tmp_path):
    write_indexed(tmp_path / "foreign", [np.array([5, 900, 1])], vocab_size=1000)
    with pytest.raises(DataError, match="does not have") as caught:
        check_vocabulary(
            load_tokenizer(prepared / "tokenizer.model"), open_indexed(tmp_path / "foreign"), vocab_size=700
        )
    assert "900" in str(caught.value.got)
