"""Readers: order, formats, and broken records named by file and line."""

import gzip
import json

import pytest

from moba_train.data.readers import ReadStats, list_files, read_documents, signature
from moba_train.errors import DataError


def jsonl(*records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def read(*sources, **options) -> list[str]:
    return list(read_documents(list_files([str(source) for source in sources]), **options))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "b" / "one.txt").write_text("one")
    (tmp_path / "a.py").write_text("two = 2\n")
    (tmp_path / "c.jsonl").write_bytes(jsonl({"text": "three"}, {"text": "four", "id": 4}))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(jsonl({"text": "five"})))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "__pycache__" / "cached.py").write_text("no")
    return tmp_path


def test_a_folder_is_read_by_name_whatever_the_format(folder):
    stats = ReadStats()
    assert read(folder, stats=stats) == ["two = 2\n", "one", "three", "four", "five"]
    assert (stats.documents, stats.num_bytes, stats.bad) == (5, 24, 0)


def test_files_are_read_in_the_order_given(folder):
    assert read(folder / "c.jsonl", folder / "a.py") == ["three", "four", "two = 2\n"]


def test_a_named_file_is_read_whatever_its_ending(tmp_path):
    (tmp_path / "NOTES").write_text("text")
    assert read(tmp_path / "NOTES") == ["text"]


def test_reading_stops_at_the_size_limit(tmp_path):
    (tmp_path / "many.jsonl").write_bytes(jsonl(*({"text": "x" * 1024} for _ in range(100))))
    assert len(read(tmp_path, max_mib=0.01)) == 11


BROKEN = [
    (b'{"text": "ok"}\n{"text": \n', "line 2", "not JSON"),
    (b'{"text": "ok"}\n\n{"txt": "x"}\n', "line 3", 'no field "text"'),
    (b'{"text": 5}\n', "line 1", 'no field "text"'),
    (b'["text"]\n', "line 1", 'no field "text"'),
    (b'{"text": "\xff"}\n', "line 1", "not JSON"),
    (b'{"text": "\\ud800"}\n', "line 1", "surrogate"),
]


@pytest.mark.parametrize(("content", "line", "why"), BROKEN)
def test_a_broken_record_is_named_by_file_and_line_or_counted(tmp_path, content, line, why):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="broken record") as caught:
        read(path)
    assert caught.value.where.endswith(f"data.jsonl, {line}") and why in str(caught.value.got)
    assert "--skip-bad" in caught.value.fix
    stats = ReadStats()
    assert read(path, skip_bad=True, stats=stats) == content.count(b"ok") * ["ok"]
    assert stats.bad == 1 and line in stats.first_bad


def test_a_cut_gzip_file_is_named(tmp_path):
    whole = gzip.compress(jsonl(*({"text": f"{i}" * 50} for i in range(500))))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="broken record") as caught:
        read(tmp_path)
    assert "gzip" in str(caught.value.got)


def test_a_text_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="broken record") as caught:
        read(tmp_path)
    assert "latin.txt" in caught.value.where


def test_a_source_that_is_not_there_or_holds_no_text_is_named(tmp_path):
    with pytest.raises(DataError, match="source not found"):
        list_files([str(tmp_path / "nowhere")])
    with pytest.raises(DataError, match="no text file"):
        list_files([str(tmp_path)])
    with pytest.raises(DataError, match="no source"):
        list_files([])


def test_the_standard_library_is_a_source_of_real_text():
    files = list_files(["stdlib"])
    assert len(files) > 500
    assert not any("site-packages" in file.name for file in files)
    first = next(read_documents(files))
    assert "def " in first or "import" in first


def test_the_signature_changes_with_the_files(folder):
    before = signature(list_files([str(folder)]))
    assert signature(list_files([str(folder)])) == before
    (folder / "a.py").write_text("three = 3\n")
    assert signature(list_files([str(folder)])) != before
