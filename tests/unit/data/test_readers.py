"""Readers: order, formats, and broken records named by file and line."""

import gzip
import json

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from moba_train.data import compressed, readers
from moba_train.data import parquet as parquet_module
from moba_train.data.compressed import open_bytes
from moba_train.data.parquet import parquet_rows
from moba_train.data.readers import ReadStats, list_files, read_documents, signature
from moba_train.data.records import Conversation
from moba_train.errors import DataError


def jsonl(*records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def write_table(path, rows, **options) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)


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
    (tmp_path / "e.jsonl.zst").write_bytes(zstandard.compress(jsonl({"text": "six"})))
    write_table(tmp_path / "f.parquet", [{"id": 1, "text": "seven"}, {"id": 2, "text": "eight"}])
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "__pycache__" / "cached.py").write_text("no")
    return tmp_path


def test_a_folder_is_read_by_name_whatever_the_format(folder):
    stats = ReadStats()
    assert read(folder, stats=stats) == ["two = 2\n", "one", "three", "four", "five", "six", "seven", "eight"]
    assert (stats.documents, stats.num_bytes, stats.bad) == (8, 37, 0)


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


def test_a_cut_or_damaged_zstd_file_is_named_by_line(tmp_path):
    path = tmp_path / "cut.jsonl.zst"
    lines = jsonl(*({"text": f"{i * i}" * 50} for i in range(5000)))
    whole = zstandard.compress(lines)
    for content in (whole[: len(whole) // 2], whole[:-1], whole + b"\x28\xb5\x2f\xfd", b"no zstd at all"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="broken record") as caught:
            read(path)
        assert "damaged zstd stream" in str(caught.value.got) and "cut.jsonl.zst, line " in caught.value.where
    stats = ReadStats()
    path.write_bytes(whole[: len(whole) // 2])
    assert 0 < len(read(path, skip_bad=True, stats=stats)) < 5000 and stats.bad == 1


def test_frames_of_a_zstd_file_follow_one_another_and_may_be_skippable(tmp_path):
    lines = jsonl(*({"text": f"{i}"} for i in range(3000)))
    skippable = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"
    frames = zstandard.compress(lines[:1000]) + skippable + zstandard.compress(lines[1000:])
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    assert read(tmp_path) == [f"{i}" for i in range(3000)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    assert read(tmp_path) == []


def zstd_of_window(log: int) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=log)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(jsonl({"text": "one"})) + packer.flush()


def test_a_zstd_window_beyond_the_limit_is_refused_whatever_is_skipped(tmp_path, monkeypatch):
    path = tmp_path / "long.jsonl.zst"
    assert compressed.MAX_WINDOW_MIB == 512
    monkeypatch.setattr(compressed, "MAX_WINDOW_MIB", 16)  # the same at a size that costs no memory
    path.write_bytes(zstd_of_window(24))
    assert read(path) == ["one"]
    path.write_bytes(zstd_of_window(25))
    with pytest.raises(DataError, match="takes too much memory") as caught:
        read(path, skip_bad=True)
    assert "16 MiB" in caught.value.allowed and "--long=27" in caught.value.fix


def test_a_zstd_file_is_unpacked_a_piece_at_a_time(tmp_path):
    many = jsonl(*({"text": f"{i * i * 7919}" * 9} for i in range(10000)))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(many))
    with open_bytes(tmp_path / "a.jsonl.zst") as stream:
        while stream.readline():
            assert len(stream.raw._ready) < len(many) // 4


def test_a_record_that_would_fill_the_memory_is_a_broken_one_and_what_follows_is_read(tmp_path, monkeypatch):
    for module in (readers, parquet_module):
        monkeypatch.setattr(module, "MAX_RECORD_MIB", 1)
    most = {"text": "y" * (2**20 - len('{"text": ""}\n'))}
    content = jsonl({"text": "a"}, {"text": "x" * 3 * 2**20}, most, {"text": "b"})
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(content))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content + b"\0" * 2**21))
    nothing = [{"role": None, "content": None}] * 2**18
    write_table(tmp_path / "c.parquet", [{"messages": nothing}, {"messages": [{"role": "user", "content": "c"}]}])
    write_table(tmp_path / "d.parquet", [{"text": "a"}, {"text": "x" * 2**20}, {"text": "b"}])
    for name, found, bad in (("a.jsonl.zst", 3, 1), ("b.jsonl.gz", 3, 2), ("c.parquet", 1, 1), ("d.parquet", 2, 1)):
        stats = ReadStats()
        assert len(read(tmp_path / name, skip_bad=True, stats=stats)) == found and stats.bad == bad, name
        assert "longer than 1 MiB" in stats.first_bad
        with pytest.raises(DataError, match="longer than 1 MiB"):
            read(tmp_path / name)


def test_a_parquet_file_is_read_by_rows_and_only_where_a_document_is(tmp_path):
    rows = [{"noise": bytes(9), "text": f"{i}"} for i in range(1000)]
    write_table(tmp_path / "a.parquet", rows, row_group_size=300)
    assert next(parquet_rows(tmp_path / "a.parquet")) == {"text": "0"}
    assert read(tmp_path) == [f"{i}" for i in range(1000)]
    table = pyarrow.table({"text": pyarrow.array(["a", "b", "a"]).dictionary_encode(), "messages": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path) == ["a", "b", "a"]


def test_a_message_of_a_table_has_no_fields_that_were_never_there(tmp_path):
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    other = {"function": {"name": "g", "arguments": {"y": [None, 2]}}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [call, other]},
        {"role": "assistant", "content": "b", "name": "n"},
    ]
    write_table(tmp_path / "a.parquet", [{"messages": messages, "tools": None}, {"messages": messages[:1]}])
    (tmp_path / "b.jsonl").write_bytes(jsonl({"messages": messages}, {"messages": messages[:1], "tools": None}))
    (table, *_), (lines, *_) = read(tmp_path / "a.parquet"), read(tmp_path / "b.jsonl")
    assert isinstance(table, Conversation) and table.messages == lines.messages == tuple(messages)
    assert table.canonical == lines.canonical and table.where.endswith("a.parquet, row 1")


BAD_TABLES = [
    ({"body": ["a", "b"]}, "it has body", 2),
    ({"text": [1, 2, 3]}, "text is of type int64", 3),
    ({"text": pyarrow.array([b"a"], pyarrow.binary())}, "text is of type binary", 1),
    ({"messages": ["[]", "[]"]}, "messages is of type string", 2),
    ({"messages": [[{"role": "user", "content": "a"}]], "tools": ["[]"]}, "tools is of type string", 1),
]


@pytest.mark.parametrize(("columns", "why", "records"), BAD_TABLES)
def test_a_table_without_documents_is_named_and_all_of_its_rows_are_counted(tmp_path, columns, why, records):
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="broken record") as caught:
        read(tmp_path)
    assert why in str(caught.value.got) and caught.value.where.endswith("a.parquet")
    stats = ReadStats()
    assert read(tmp_path, skip_bad=True, stats=stats) == [] and stats.bad == records


def test_a_bad_row_of_a_table_is_named_and_the_others_are_read(tmp_path):
    wrong = pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": wrong}), tmp_path / "a.parquet")
    write_table(tmp_path / "b.parquet", [{"text": "d"}, {"text": None}, {"text": "f"}])
    stats = ReadStats()
    assert read(tmp_path, skip_bad=True, stats=stats) == ["a", "c", "d", "f"] and stats.bad == 2
    assert "a.parquet, row 2" in stats.first_bad
    with pytest.raises(DataError) as caught:
        read(tmp_path / "b.parquet")
    assert caught.value.where.endswith("b.parquet, row 2") and 'no field "text"' in str(caught.value.got)


def test_a_cut_or_damaged_parquet_file_is_named_by_row(tmp_path):
    path = tmp_path / "a.parquet"
    write_table(path, [{"text": f"{i * i}" * 50} for i in range(4000)], row_group_size=1000, use_dictionary=False)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-4], b"", b"PAR1"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="broken record") as caught:
            read(path)
        assert "damaged Parquet file" in str(caught.value.got) and caught.value.where.endswith("a.parquet")
    half = len(whole) // 2
    path.write_bytes(whole[:half] + bytes(20000) + whole[half + 20000 :])
    stats = ReadStats()
    found = len(read(path, skip_bad=True, stats=stats))
    assert 0 < found < 4000 and stats.bad == 1 and f"a.parquet, row {found + 1}" in stats.first_bad


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.txt", bytes),
        ("a.jsonl", bytes),
        ("a.jsonl.gz", gzip.compress),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress),
    ],
)
def test_a_byte_order_mark_is_left_out_at_the_beginning_of_a_file_alone(tmp_path, name, pack):
    mark, texts = "\ufeff", ["first\ufeff", "\ufeffsecond"]
    if name == "a.txt":
        content, texts = mark + "".join(texts), ["".join(texts)]
    else:
        content = mark + "\n" + jsonl(*({"text": text} for text in texts)).decode()
    (tmp_path / name).write_bytes(pack(content.encode()))
    assert read(tmp_path / name) == texts


def test_a_text_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="broken record") as caught:
        read(tmp_path)
    assert "latin.txt" in caught.value.where


def test_a_file_that_vanishes_before_it_is_read_is_named(folder):
    files = list_files([str(folder)])
    files[1].path.unlink()
    with pytest.raises(DataError, match="cannot be read") as caught:
        list(read_documents(files))
    assert caught.value.where == str(files[1].path)


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
