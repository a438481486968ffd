"""What a stage may ask of its sources: weights, length floors and shares of long documents."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from moba_train.config.load import decode_toml, load_config, to_toml
from moba_train.config.mix_rules import doc_floor, mix_errors
from moba_train.config.schema import SourceConfig, SourceLengths, StageConfig
from moba_train.errors import ConfigErrors
from moba_train.plan_view import build_plan

SMOKE = Path(__file__).parents[3] / "configs" / "smoke.toml"
SOURCES = {
    "books": SourceConfig("books", min_doc_tokens=1000),
    "web": SourceConfig("web"),
    "chat": SourceConfig("chat", packing="whole"),
}
MIX = {"books": 0.5, "chat": 0.5}
LENGTHS = "\n[stages.lengths]\ntext = {min_doc_tokens = 1024, long_doc_tokens = 65536, long_share = 0.6}\n"


@pytest.fixture
def with_lengths(tmp_path: Path) -> Path:
    """The smoke configuration, its last stage with lengths."""
    (tmp_path / "c.toml").write_text(_last_stage_with(LENGTHS))
    return tmp_path / "c.toml"


def _last_stage_with(text: str) -> str:
    """At the end of the last [[stages]] table and before the table that follows it."""
    before, _, after = SMOKE.read_text().rpartition("[[stages]]")
    stage, table, rest = after.partition("\n[eval]")
    return f"{before}[[stages]]{stage}{text}{table}{rest}"


@pytest.mark.parametrize(
    ("name", "lengths", "where", "fragment"),
    [
        ("bok", SourceLengths(), "bok", "did you mean stages.0.lengths.books?"),
        ("zzz", SourceLengths(), "zzz", "books, web, chat"),
        ("web", SourceLengths(), "web", "give web a weight in stages.0.mix"),
        ("books", SourceLengths(min_doc_tokens=-1), "books.min_doc_tokens", ">= 0"),
        ("books", SourceLengths(long_doc_tokens=-1), "books.long_doc_tokens", ">= 0"),
        ("books", SourceLengths(long_doc_tokens=5000, long_share=1.1), "books.long_share", "0 to 1"),
        ("books", SourceLengths(long_doc_tokens=5000, long_share=-0.1), "books.long_share", "0 to 1"),
        ("books", SourceLengths(long_share=0.5), "books.long_doc_tokens", "set long_doc_tokens, or remove long_share"),
        ("books", SourceLengths(long_doc_tokens=5000), "books.long_share", "set long_share, or remove long_doc_tokens"),
        (
            *("books", SourceLengths(long_doc_tokens=1000, long_share=0.5), "books.long_doc_tokens"),
            "more than 1000 (min_doc_tokens of the source)",
        ),
        (
            *("books", SourceLengths(6000, 6000, 0.5), "books.long_doc_tokens"),
            "more than 6000 (min_doc_tokens of the stage)",
        ),
        ("chat", SourceLengths(long_doc_tokens=8193, long_share=0.5), "chat.long_doc_tokens", "at most 8192 (seq_len)"),
        ("chat", SourceLengths(min_doc_tokens=8193), "chat.min_doc_tokens", "at most 8192 (seq_len)"),
    ],
)
def test_lengths_that_cannot_be_are_reported_where_they_stand(
    name: str, lengths: SourceLengths, where: str, fragment: str
) -> None:
    stage = StageConfig(seq_len=8192, mix=MIX, lengths={name: lengths})
    (error,) = mix_errors(stage, "stages.0", SOURCES)
    assert error.where == f"stages.0.lengths.{where}"
    assert fragment in error.message() and error.what and error.got is not None and error.allowed and error.fix


def test_lengths_that_can_be_are_not_objected_to() -> None:
    for books in (
        SourceLengths(),
        SourceLengths(min_doc_tokens=0),
        SourceLengths(min_doc_tokens=9000),
        SourceLengths(long_doc_tokens=1001, long_share=0.5),
        SourceLengths(long_doc_tokens=500, long_share=1.0),
        SourceLengths(min_doc_tokens=0, long_doc_tokens=500, long_share=0.5),
    ):
        lengths = {"books": books, "chat": SourceLengths(100, 8192, 0.5)}
        assert not list(mix_errors(StageConfig(seq_len=8192, mix=MIX, lengths=lengths), "stages.0", SOURCES))


def test_the_floor_is_that_of_the_stage_or_that_of_the_source() -> None:
    floors = [doc_floor(SOURCES["books"], SourceLengths(floor)) for floor in ("inherit", 0, 10, 5000)]
    assert floors == [1000, 0, 10, 5000]


def test_all_mistakes_about_mix_and_lengths_are_reported_together(tmp_path: Path) -> None:
    text = "\n[stages.lengths]\ntxt = {}\ntext = {min_doc_tokens = -1, long_share = 2.0}\n"
    (tmp_path / "c.toml").write_text(_last_stage_with(text))
    with pytest.raises(ConfigErrors) as caught:
        load_config(tmp_path / "c.toml", ["--stages.1.mix.text", "-1"])
    assert [error.where.removeprefix("stages.1.") for error in caught.value.errors] == [
        *("mix.text", "lengths.txt", "lengths.text.min_doc_tokens", "lengths.text.long_share")
    ]


def test_lengths_can_be_overridden_and_survive_toml(with_lengths: Path) -> None:
    config = load_config(with_lengths, ["--stages.1.lengths.text.long-share", "0.25"])
    assert config.stages[1].lengths == {"text": SourceLengths(1024, 65536, 0.25)}
    assert not config.stages[0].lengths
    assert decode_toml(to_toml(config)) == config
    config = load_config(with_lengths, ["--stages.1.lengths.text.min-doc-tokens", "inherit"])
    assert config.stages[1].lengths["text"].min_doc_tokens == "inherit"
    assert decode_toml(to_toml(config)) == config


def test_the_plan_shows_floors_and_long_shares(with_lengths: Path) -> None:
    config = load_config(with_lengths)
    first, last = build_plan(config).stages
    assert last.mix == "text 50% (>= 1,024; 60% from >= 65,536), needle_64 50%"
    assert ">=" not in first.mix
    only_floor = {"text": SourceLengths(min_doc_tokens=256)}
    changed = dataclasses.replace(config, stages=(dataclasses.replace(config.stages[0], lengths=only_floor),))
    assert build_plan(changed).stages[0].mix == "text 50% (>= 256), needle_64 50%"
