"""`moba-train data show`: what a row holds, readable; and what is said of steps, rows and files that are not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moba_train import cli
from moba_train.commands.data_show import run_data_show
from moba_train.config.load import decode_toml, to_toml
from moba_train.config.schema import DataConfig, SourceConfig, StageConfig
from moba_train.data.indexed import open_indexed, write_indexed
from moba_train.data.show import row_checksum, row_lines, visible_text
from moba_train.data.stage_data import StageData
from moba_train.data.tokenizer import Tokenizer
from moba_train.errors import ConfigError, DataError

TEXTS = ("def add(left, right):\n\treturn left + right\n", "# 漢字 🙂 \u200b\n", 'say "no\\way"\n')
CONFIG = """
run.dir = "{0}/run"
model.vocab_size = 700
[data]
tokenizer = "{1}"
valid.path = "{0}/text"
sources.text.path = "{0}/text"
sources.answers = {{ path = "{0}/text", packing = "whole" }}
[[stages]]
name = "first"
tokens = 192
tokens_per_step = 64
seq_len = 32
mix.text = 1.0
attention = "full"
chunk_size = 8
[[stages]]
name = "second"
tokens = 512
tokens_per_step = 256
seq_len = 128
mix.answers = 1.0
chunk_size = 16
"""


@pytest.fixture
def run_dir(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A run folder that has its config.toml and nothing else."""
    documents = [[*tokenizer.encode(TEXTS[i % 3] * (1 + i % 2)), tokenizer.eod_id] for i in range(12)]
    write_indexed(tmp_path / "text", documents, vocab_size=700)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(to_toml(decode_toml(CONFIG.format(tmp_path, tokenizer.path))))
    return tmp_path / "run"


def stage_data(run_dir: Path, tokenizer: Tokenizer, packing: str, seq_len: int) -> StageData:
    path = str(run_dir.parent / "text")
    return StageData(
        DataConfig(sources={"text": SourceConfig(path, packing=packing)}),  # type: ignore[arg-type]
        StageConfig(tokens=8 * seq_len, tokens_per_step=seq_len, seq_len=seq_len, mix={"text": 1.0}),
        stage_index=0,
        seed=1,
        cache_dir=run_dir.parent / "cache",
        eod_id=tokenizer.eod_id,
        pad_id=tokenizer.pad_id,
    )


@pytest.mark.parametrize(("packing", "seq_len"), [("split", 23), ("split", 128), ("whole", 128)])
def test_pieces_are_the_tokens_of_the_row(run_dir: Path, tokenizer: Tokenizer, packing: str, seq_len: int) -> None:
    data, documents = stage_data(run_dir, tokenizer, packing, seq_len), open_indexed(run_dir.parent / "text")
    for i in range(len(data)):
        row, pieces = data.row(i), data.pieces(i)
        tokens = [documents.get(p.document, p.first, p.stop - p.first) for p in pieces]
        np.testing.assert_array_equal(np.concatenate(tokens), row.tokens_S[: sum(map(len, tokens))])
        assert (row.tokens_S[sum(map(len, tokens)) :] == tokenizer.pad_id).all()
        assert [p.size for p in pieces] == [documents.size(p.document) for p in pieces]
        assert [p.document for p in pieces] == [d for d in row.document_ids if d >= 0]
    with pytest.raises(IndexError):
        data.pieces(len(data))


def test_characters_without_a_shape_are_made_visible(tokenizer: Tokenizer) -> None:
    text = 'a\tb\n"c\\d" 漢字 🙂 \u200b\x07\u00a0'
    tokens = [*tokenizer.encode(text), tokenizer.eod_id, tokenizer.pad_id, tokenizer.pad_id, 5000]
    shown = visible_text(tokens, tokenizer)
    assert shown == 'a\\tb\\n\\"c\\\\d\\" 漢字 🙂 \\u200b\\x07\\xa0<eod><pad><pad><id 5000>'.replace(
        "<pad>", tokenizer.piece(2)
    )


def test_a_row_is_told_with_its_documents_and_its_padding(run_dir: Path, tokenizer: Tokenizer) -> None:
    data = stage_data(run_dir, tokenizer, "whole", 128)
    row, pieces = data.row(2), data.pieces(2)
    head, *lines = row_lines(row, pieces, tokenizer, num_shown=3)
    assert head.startswith(f"row 2: source 'text', 128 tokens, {len(pieces)} document(s), loss on ")
    assert head.endswith(f"checksum {row_checksum(row)}")
    begins = row.cu_seqlens
    for i, piece in enumerate(pieces):
        place, text = lines[2 * i : 2 * i + 2]
        span = f"tokens 0..{piece.size - 1} of {piece.size}, at {begins[i]}..{begins[i + 1] - 1} of the row"
        assert place == f"  document {piece.document}: {span}"
        first = visible_text(row.tokens_S[begins[i] : begins[i] + 3], tokenizer)
        assert text.startswith(f'    "{first}" ... "') and text.endswith('\\n<eod>"')
    assert lines[-1] == f"  padding: at {begins[len(pieces)]}..127 of the row"
    whole = row_lines(row, pieces, tokenizer, num_shown=500)[2]
    assert " ... " not in whole and whole.count("\\n") in (1, 2, 4)


def test_a_step_shows_its_rows_and_changes_nothing(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_data_show(run_dir, step=4, row=None, num_shown=2) == 0
    out = capsys.readouterr().out
    assert out.startswith("step 4 of 5: stage 2/2 'second', rows (sample ids) 0..1 of 4, 128 tokens each; 448 tokens")
    assert "\nrow 0: " in out and "\nrow 1: " in out and "\nnote: the run has not used these data files" in out
    assert run_data_show(run_dir, step=4, row=1, num_shown=2) == 0
    assert capsys.readouterr().out.split("\n\n")[1] == out.split("\n\n")[2].rstrip() + "\n"
    assert [path.name for path in run_dir.iterdir()] == ["config.toml"]


def test_a_step_tells_how_much_more_often_long_documents_come(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run_dir / "config.toml"
    lengths = "[stages.lengths.text]\nmin_doc_tokens = 4\nlong_doc_tokens = 20\nlong_share = 0.5"
    file.write_text(file.read_text().replace("[stages.lengths]", lengths, 1))
    assert run_data_show(run_dir, step=1, row=None, num_shown=2) == 0
    line = "\ntext: 3 of its 6 rows (50 % asked for) from documents of >= 20 tokens, which are "
    assert line in capsys.readouterr().out
    assert run_data_show(run_dir, step=4, row=None, num_shown=2) == 0
    assert "asked for" not in capsys.readouterr().out


def test_what_is_not_there_is_told_with_what_is(run_dir: Path) -> None:
    for step in (0, 6):
        with pytest.raises(ConfigError) as caught:
            run_data_show(run_dir, step=step, row=None, num_shown=2)
        assert (caught.value.where, caught.value.got) == ("--step", step)
        assert caught.value.allowed == "1..5 (stages 'first' 1..3, 'second' 4..5)"
    with pytest.raises(ConfigError) as caught:
        run_data_show(run_dir, step=5, row=1, num_shown=2)
    assert caught.value.where == "--row" and caught.value.allowed.startswith("2..3, ")
    with pytest.raises(ConfigError, match="at least one token"):
        run_data_show(run_dir, step=5, row=2, num_shown=0)
    with pytest.raises(DataError, match="there is no run here"):
        run_data_show(run_dir.parent, step=5, row=2, num_shown=1)
    (run_dir.parent / "text.bin").unlink()
    with pytest.raises(DataError, match="data file not found"):
        run_data_show(run_dir, step=1, row=None, num_shown=1)


def test_the_command_line_shows_a_step_without_torch(run_dir: Path) -> None:
    code = (
        "import sys; from moba_train.cli import main\n"
        f"code = main(['data', 'show', {str(run_dir)!r}, '--step', '2'])\n"
        "print(code, [m for m in ('torch', 'megatron') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.endswith("\n0 []\n"), done.stderr


def test_options_that_data_show_does_not_have_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "show", "run", "--step", "1", "--rows", "2"]) == 2
    assert "unknown option" in capsys.readouterr().err
