"""Documents from files, in the same order on every run.

A source is a folder (all text, code and record files below it, by name), a `.txt` file or any other text file (one
document), a file of records (`.jsonl`, packed as .gz or .zst or not, or `.parquet`: one document per line or row, in
the field "text", or "messages" for a conversation), or the word `stdlib`: the source tree of the Python that runs
this, some 30 MB of real text that every machine with Python has. The mark with which Windows begins files (U+FEFF, a
byte order mark) is no part of their text.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from moba_train.data.compressed import DAMAGE, open_bytes
from moba_train.data.files import disk_errors
from moba_train.data.parquet import ParquetError, parquet_rows
from moba_train.data.records import MAX_RECORD_MIB, Document, document_of, size_bytes
from moba_train.errors import DataError

STDLIB = "stdlib"
"""The built-in source."""
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET_SUFFIX = ".parquet"
RECORD_SUFFIXES = (*JSONL_SUFFIXES, PARQUET_SUFFIX)
TEXT_SUFFIXES = frozenset(
    (
        *(".txt", ".md", ".rst", ".tex", ".html", ".css", ".json", ".toml", ".yaml", ".yml", ".sql"),
        *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".java", ".js", ".ts", ".go", ".rs"),
        *(".rb", ".sh", ".pl", ".lua", ".scala", ".kt", ".swift", ".r", ".jl", ".hs", ".ml"),
    )
)
"""Endings that are read inside a folder; a file that is named itself is read whatever its ending."""
_KINDS = {".gz": "gzip stream", ".zst": "zstd stream"}
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", ".git", ".venv", "node_modules"})


@dataclass
class ReadStats:
    """What the readers saw; filled while they run.

    Attributes:
        files: files read.
        documents: documents read.
        num_bytes: UTF-8 bytes of them (of a conversation: of its JSON).
        bad: broken records that were left out (`skip_bad`, or undecodable files of the built-in source).
        first_bad: file, and line or row, of the first of them.
    """

    files: int = 0
    documents: int = 0
    num_bytes: int = 0
    bad: int = 0
    first_bad: str = ""


@dataclass(frozen=True)
class SourceFile:
    """One file of a source: where it is, and the name that stands for it in messages and signatures."""

    path: Path
    name: str
    may_be_bad: bool = field(default=False)


def list_files(sources: Sequence[str]) -> list[SourceFile]:
    """Files of all sources, in reading order.

    Raises:
        DataError: a source does not exist or holds no text file.
    """
    files: list[SourceFile] = []
    for source in sources:
        found = _stdlib_files() if source == STDLIB else _files_of(Path(source))
        if not found:
            endings = " ".join(sorted(TEXT_SUFFIXES)) + " " + " ".join(RECORD_SUFFIXES)
            raise DataError("the folder holds no text file", where=source, allowed=endings)
        files.extend(found)
    if not files:
        raise DataError("no source given", where="moba-train prep SOURCE...", allowed=f"files, folders, {STDLIB}")
    return files


def signature(files: Sequence[SourceFile]) -> str:
    """sha256 (hex) of names, sizes and times of change: tells whether prepared data is still up to date."""
    digest = hashlib.sha256()
    for file in files:
        stat = file.path.stat()
        digest.update(f"{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def read_documents(
    files: Sequence[SourceFile], *, skip_bad: bool = False, max_mib: float = 0.0, stats: ReadStats | None = None
) -> Iterator[Document]:
    """Documents of the files, in order; empty ones are left out.

    Args:
        skip_bad: leave out and count broken records instead of stopping at the first.
        max_mib: stop when this much text has been read (MiB of UTF-8); 0 = read everything.
        stats: counters to fill.

    Raises:
        DataError: a broken record, with file and line or row; a file that takes too much memory to unpack, or that the
            disk does not give.
    """
    stats = ReadStats() if stats is None else stats
    for file in files:
        stats.files += 1
        with disk_errors(file.path, what="the source cannot be read", fix="mend it, or leave it out of the sources"):
            for document in _documents(file, skip_bad or file.may_be_bad, stats):
                if isinstance(document, str) and not document.strip():
                    continue
                stats.documents += 1
                stats.num_bytes += size_bytes(document)
                yield document
                if max_mib and stats.num_bytes >= max_mib * 2**20:
                    return


def _stdlib_files() -> list[SourceFile]:
    root = Path(sysconfig.get_path("stdlib"))
    # Its test suite holds files that are broken on purpose (encodings): they are left out and counted.
    return [
        SourceFile(path, f"{STDLIB}/{path.relative_to(root).as_posix()}", may_be_bad=True)
        for path in _walk(root)
        if path.suffix == ".py"
    ]


def _files_of(source: Path) -> list[SourceFile]:
    if source.is_file():
        return [SourceFile(source, str(source))]
    if not source.is_dir():
        raise DataError(
            "source not found",
            where=str(source),
            allowed=f"a file, a folder, or the word {STDLIB}",
            fix="mend the path",
        )
    names = (path for path in _walk(source) if path.suffix in TEXT_SUFFIXES or path.name.endswith(RECORD_SUFFIXES))
    return [SourceFile(path, path.as_posix()) for path in names]


def _walk(root: Path) -> list[Path]:
    paths = (path for path in root.rglob("*") if path.is_file())
    kept = [path for path in paths if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)]
    return sorted(kept, key=lambda path: path.relative_to(root).as_posix())


def _documents(file: SourceFile, skip_bad: bool, stats: ReadStats) -> Iterator[Document]:
    if file.path.name.endswith(JSONL_SUFFIXES):
        yield from _json_lines(file, skip_bad, stats)
    elif file.path.name.endswith(PARQUET_SUFFIX):
        yield from _rows(file, skip_bad, stats)
    else:
        try:
            yield file.path.read_bytes().removeprefix(BOM_UTF8).decode("utf-8")
        except UnicodeDecodeError as error:
            _bad(file.name, f"not UTF-8: {error}", skip_bad, stats)


def _json_lines(file: SourceFile, skip_bad: bool, stats: ReadStats) -> Iterator[Document]:
    line_number = 0
    try:
        with open_bytes(file.path) as stream:
            for line_number, line in enumerate(_lines(stream), start=1):
                if line is not None and line_number == 1:
                    line = line.removeprefix(BOM_UTF8)
                if line is not None and not line.strip():
                    continue
                where = f"{file.name}, line {line_number}"
                try:
                    document = document_of(_json_of(line), where)
                except ValueError as error:
                    _bad(where, str(error), skip_bad, stats)
                else:
                    yield document
    except DAMAGE as error:
        kind = _KINDS.get(file.path.suffix, "file")
        _bad(f"{file.name}, line {line_number + 1}", f"damaged {kind}: {error}", skip_bad, stats)


def _rows(file: SourceFile, skip_bad: bool, stats: ReadStats) -> Iterator[Document]:
    row_number = 0
    try:
        for row_number, row in enumerate(parquet_rows(file.path), start=1):
            where = f"{file.name}, row {row_number}"
            try:
                if isinstance(row, ValueError):
                    raise row
                document = document_of(row, where)
            except ValueError as error:
                _bad(where, str(error), skip_bad, stats)
            else:
                yield document
    except ParquetError as error:
        where = f"{file.name}, row {row_number + 1}" if row_number else file.name
        _bad(where, str(error), skip_bad, stats, records=error.rows)


def _lines(stream: IO[bytes]) -> Iterator[bytes | None]:
    """Lines; None in place of one that is too long: a packed file of a few KiB may hold one of many GiB."""
    limit = MAX_RECORD_MIB * 2**20
    while line := stream.readline(limit + 1):
        if len(line) <= limit:
            yield line
            continue
        yield None
        while line and not line.endswith(b"\n"):
            line = stream.readline(1 << 20)


def _json_of(line: bytes | None) -> object:
    if line is None:
        raise ValueError(f"longer than {MAX_RECORD_MIB} MiB")
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error


def _bad(where: str, why: str, skip_bad: bool, stats: ReadStats, records: int = 1) -> None:
    if not skip_bad:
        raise broken(where, why)
    stats.bad += records
    stats.first_bad = stats.first_bad or f"{where}: {why}"


def broken(where: str, why: str) -> DataError:
    """The error for a broken record."""
    return DataError(
        "broken record", where=where, got=why, fix="mend it, or leave such records out and count them: --skip-bad"
    )
