"""A tokenizer.json gives the ids that transformers gives, and no text becomes one of its special tokens."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from moba_train.data.needles import NeedleText, build_needle_document, build_niah_sample, load_words
from moba_train.data.show import visible_text
from moba_train.data.tokenizer import Tokenizer, load_tokenizer
from moba_train.errors import ConfigError, DataError
from tests.unit.data.conftest import corpus
from tests.unit.data.hf_toys import MAKERS

HOSTILE = (
    *("", " ", "\n", "\n\n\n \t", "  two  spaces, tab\tand line end\r\n", " begins with a space", "▁ marks a space"),
    *("🙂 👨‍👩‍👧‍👦🏽 🇪🇺 🏴󠁧󠁢󠁥󠁮󠁧󠁿", "日本語中文한국어 עִבְרִית عربى ไทย हिन्दी", "e\u0301 é ﬁ ① Å", "I'LL they'Ve 1234567 ٣٤٥ ½"),
    *(
        "".join(map(chr, range(0x20))) + "\x7f\x80\x9f",
        "\ufeff\u200b\u202e\u2028\ufffd\uffff\U0010ffff",
        "<0x41> Ġ Ċ ##a",
    ),
    *("ab" * 30_000, " " * 30_000 + "x", "漢" * 20_000, "(" * 5_000, "x\n" * 5_000, "a" + "\u0301" * 2_000),
    "def f(x):\n\treturn {'a': x ** 2}  # Ünïcödé\n",
)
SPELT = ("<|end_of_text|>", "<|im_end|>", "</s>", "<s>", "<|begin_of_text|>", "<unk>", "<|endoftext|>", "<think>")
DIALECTS = ["llama3", "qwen", "llama2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    for name, make in MAKERS.items():
        make(corpus(60), root / name)
    return {name: root / name for name in MAKERS}


@pytest.fixture(params=DIALECTS)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture
def hf(folder: Path) -> Tokenizer:
    return load_tokenizer(folder / "tokenizer.json")


def copied(folder: Path, target: Path, **settings: object) -> Path:
    """A copy with other settings; None leaves one out. Returns the tokenizer.json."""
    shutil.copytree(folder, target)
    path = target / "tokenizer_config.json"
    tree = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))
    return target / "tokenizer.json"


def edited(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))


def random_texts(count: int) -> list[str]:
    """Letters of every plane, whitespace and controls, mixed."""
    rng = random.Random(7)
    ranges = ((0, 0x7F), (0x80, 0x2FF), (0x300, 0x36F), (0x590, 0x6FF), (0x2000, 0x206F), (0x3040, 0x9FFF))
    ranges += ((0xE000, 0xFFFF), (0x1F300, 0x1FAFF), (0x10000, 0x10FFFF))
    pools = [rng.choice(ranges) for _ in range(count)]
    return ["".join(chr(rng.randint(*rng.choice((pool, (9, 126))))) for _ in range(40)) for pool in pools]


def test_ids_are_those_of_transformers(folder: Path, hf: Tokenizer, tmp_path: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(
        copied(folder, tmp_path / "x", tokenizer_class="PreTrainedTokenizerFast").parent
    )
    assert (len(theirs), theirs.eos_token_id) == (hf.vocab_size, hf.eod_id)
    assert hf.pad_id == (hf.eod_id if theirs.pad_token_id is None else theirs.pad_token_id)
    for text in (*HOSTILE, *corpus(3), *random_texts(200)):
        assert [*hf.begin_ids, *hf.encode(text)] == theirs(text)["input_ids"], text[:80]
    for spelt in SPELT[:-1]:
        text = f"a{spelt} {spelt}\n"
        expected = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert hf.encode(text) == expected or hf.eod_id in expected, text  # more of the second case below


def test_ids_are_those_of_the_classes_that_transformers_has_for_a_family(folder: Path, hf: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in (*HOSTILE, *random_texts(50)):
        # LlamaTokenizer of transformers 5 puts no space before a text that begins with one; the file (and
        # sentencepiece) does.
        if not (text[:1] in (" ", "▁") and type(theirs).__name__ == "LlamaTokenizer"):
            assert [*hf.begin_ids, *hf.encode(text)] == theirs(text)["input_ids"], text[:80]


def test_a_text_survives_and_its_bytes_are_counted(hf: Tokenizer, folder: Path) -> None:
    for text in (*HOSTILE, *(f"{a} x{b}{a}\n" for a in SPELT for b in SPELT), *random_texts(50)):
        ids = hf.encode(text)
        if folder.name != "qwen":  # NFC
            assert hf.decode(ids) == text.replace("▁", " ") if folder.name == "llama2" else hf.decode(ids) == text
        in_front = 1 if folder.name == "llama2" and text else 0  # the space before a text
        assert hf.byte_lengths_V[ids].sum() == len(hf.decode(ids).encode()) + in_front, text[:80]


def test_no_text_becomes_a_special_token_and_other_added_tokens_stay(hf: Tokenizer, folder: Path) -> None:
    specials = [i for i in range(hf.vocab_size) if hf.is_control(i)]
    assert hf.eod_id in specials and set(hf.begin_ids) <= set(specials)
    for token in specials:
        text = f"x{hf.piece(token)}y {hf.piece(token)}"
        assert not {hf.eod_id, *hf.begin_ids}.intersection(hf.encode(text)) and hf.decode(hf.encode(text)) == text
        assert hf.decode([token]) == "" and hf.byte_lengths_V[token] == 0
    (think,) = hf.encode("<think>")[:1] if folder.name == "qwen" else (None,)
    assert think is None or (hf.piece(think) == "<think>" and hf.decode([think]) == "<think>")


def test_special_tokens_are_seen_where_rows_are_shown(folders: dict[str, Path]) -> None:
    llama = load_tokenizer(folders["llama2"] / "tokenizer.json")
    assert (
        visible_text([*llama.begin_ids, *llama.encode("</s>\n"), llama.eod_id, 9999], llama)
        == "<s></s>\\n</s><id 9999>"
    )


def test_needles_survive_and_begin_as_documents_do(hf: Tokenizer) -> None:
    text = NeedleText(hf, load_words())
    haystack = np.array([i for line in corpus(9) for i in hf.encode_inside(line)], dtype=np.int64)
    made = build_niah_sample(text, haystack, length=300, depth_percent=50, seed=1)
    assert hf.decode(made.tokens[made.needle_start : made.needle_end]).strip() == f"{made.question} {made.value}"
    assert (
        hf.decode(made.tokens[made.answer_start :]).strip()
        == made.value
        == hf.decode(made.tokens[made.value_start : made.value_end]).strip()
    )
    document = build_needle_document(text, haystack, length=300, seed=1, index=0)
    for tokens in (made.tokens, document.tokens_L):
        assert tokens.size == 300 and tuple(tokens[: len(hf.begin_ids)]) == hf.begin_ids
    decoded = hf.decode(document.tokens_L)
    assert all(hf.decode(document.tokens_L[a:b]).strip() in decoded for a, b in document.answers_Q2)


@pytest.mark.parametrize("eos", ["<|eot_id|>", {"content": "<|eot_id|>", "special": True}])
def test_what_ends_a_document_is_said_beside_the_file_or_by_the_user(
    folders: dict[str, Path], tmp_path: Path, eos: object
) -> None:
    path = copied(folders["llama3"], tmp_path / "a", eos_token=eos)
    assert load_tokenizer(path).piece(load_tokenizer(path).eod_id) == "<|eot_id|>"
    assert (
        load_tokenizer(path, eod="<|end_of_text|>").eod_id
        == load_tokenizer(folders["llama3"] / "tokenizer.json").eod_id
    )
    path = copied(folders["llama3"], tmp_path / "b", eos_token=None)
    with pytest.raises(DataError, match="what ends a document is not known") as caught:
        load_tokenizer(path)
    assert "<|end_of_text|>" in caught.value.allowed and "--eod" in caught.value.fix
    (tmp_path / "b" / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": eos, "pad_token": "<|end_of_text|>"})
    )
    both = load_tokenizer(path)
    assert (both.piece(both.eod_id), both.piece(both.pad_id)) == ("<|eot_id|>", "<|end_of_text|>")
    for name, words in (("eos_token", "the"), ("pad_token", "<pad>")):
        with pytest.raises(DataError, match=f"the {name} is not one of the added tokens"):
            load_tokenizer(copied(folders["llama3"], tmp_path / name, **{name: words}))


def test_a_token_that_the_settings_call_special_is_so(folders: dict[str, Path], tmp_path: Path) -> None:
    qwen = load_tokenizer(folders["qwen"] / "tokenizer.json")
    think = qwen.encode("<think>")
    assert len(think) == 1 and not qwen.is_control(think[0])
    told = {str(think[0]): {"content": "<think>", "special": True}}
    for settings in ({"eos_token": "<think>"}, {"added_tokens_decoder": told}):
        path = copied(folders["qwen"], tmp_path / next(iter(settings)), **settings)
        theirs, ours = AutoTokenizer.from_pretrained(path.parent), load_tokenizer(path)
        assert ours.is_control(think[0]) and think[0] not in ours.encode("a<think>b") and ours.decode(think) == ""
        assert ours.encode("a<think>b") == theirs("a<think>b", split_special_tokens=True)["input_ids"]


def test_the_file_itself_says_what_begins_a_document(folders: dict[str, Path], tmp_path: Path) -> None:
    begins = {"llama2": ("<s>",), "llama3": ("<|begin_of_text|>",), "qwen": ()}
    for name, pieces in begins.items():
        path = copied(folders[name], tmp_path / name, add_bos_token=not pieces)
        ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path.parent)
        assert tuple(map(ours.piece, ours.begin_ids)) == pieces and theirs("")["input_ids"] == list(ours.begin_ids)


def spoilt(path: Path, name: str) -> str:
    """Spoil a tokenizer.json; what is wrong with it now."""
    settings = path.with_name("tokenizer_config.json")
    wordpiece = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    contents = {"not JSON": "{", "no object": "[]", "another file": '{"model": {}}', "deep": "[" * 100_000, "empty": ""}
    edits = {
        "random": (path, lambda tree: tree["model"].update(dropout=0.1)),
        "WordPiece": (path, lambda tree: tree.update(decoder=wordpiece)),
        "no decoder": (path, lambda tree: tree.update(decoder=None)),
        "bad ids": (settings, lambda tree: tree.update(added_tokens_decoder={"x": {}})),
        "another token": (settings, lambda tree: tree.update(added_tokens_decoder={"999": {"content": "<new>"}})),
    }
    if name in contents:
        path.write_text(contents[name])
    elif name in edits:
        edited(*edits[name])
    elif name == "gone":
        path.unlink()
    else:
        settings.write_text(name)
    return REFUSED[name]


REFUSED = {
    **dict.fromkeys(("not JSON", "no object", "another file", "deep"), "not a tokenizer.json"),
    "empty": "the tokenizer is empty",
    "random": "encodes at random",
    **dict.fromkeys(("WordPiece", "no decoder"), "not known to give a text back"),
    **dict.fromkeys(("[]", "{", "bad ids"), "cannot read the tokenizer's settings"),
    "another token": "adds a token that tokenizer.json does not have",
    "gone": "tokenizer not found",
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_will_not_do_are_refused(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    path = copied(folders["llama3"], tmp_path / "x")
    what = spoilt(path, name)
    with pytest.raises(DataError, match=what) as caught:
        load_tokenizer(path)
    assert str(tmp_path) in caught.value.where and caught.value.fix


def test_a_folder_and_a_choice_that_a_model_does_not_have_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tokenizer not found") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.got == "a folder"
    with pytest.raises(ConfigError) as refused:
        load_tokenizer(tokenizer.path, eod="</s>")
    assert refused.value.where == "--eod"
