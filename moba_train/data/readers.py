"""Text documents from files, in the same order on every run.

A source is a folder (all text and code files below it, by name), a `.txt` file or any other text file (one document),
a `.jsonl` or `.jsonl.gz` file (one document per line, field "text"), or the word `stdlib`: the source tree of the
Python that runs this, some 30 MB of real text that every machine with Python has.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moba_train.errors import DataError

STDLIB = "stdlib"
"""The built-in source."""
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
TEXT_SUFFIXES = frozenset(
    (
        *(".txt", ".md", ".rst", ".tex", ".html", ".css", ".json", ".toml", ".yaml", ".yml", ".sql"),
        *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".java", ".js", ".ts", ".go", ".rs"),
        *(".rb", ".sh", ".pl", ".lua", ".scala", ".kt", ".swift", ".r", ".jl", ".hs", ".ml"),
    )
)
"""Endings that are read inside a folder; a file that is named itself is read whatever its ending."""
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", ".git", ".venv", "node_modules"})


@dataclass
class ReadStats:
    """What the readers saw; filled while they run.

    Attributes:
        files: files read.
        documents: documents read.
        num_bytes: UTF-8 bytes of them.
        bad: broken records that were left out (`skip_bad`, or undecodable files of the built-in source).
        first_bad: file and line of the first of them.
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
            endings = " ".join(sorted(TEXT_SUFFIXES)) + " " + " ".join(JSONL_SUFFIXES)
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
) -> Iterator[str]:
    """Documents of the files, in order; empty ones are left out.

    Args:
        skip_bad: leave out and count broken records instead of stopping at the first.
        max_mib: stop when this much text has been read (MiB of UTF-8); 0 = read everything.
        stats: counters to fill.

    Raises:
        DataError: a broken record, with file and line.
    """
    stats = ReadStats() if stats is None else stats
    for file in files:
        stats.files += 1
        for text in _records(file, skip_bad or file.may_be_bad, stats):
            if not text.strip():
                continue
            stats.documents += 1
            stats.num_bytes += len(text.encode())
            yield text
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
    names = (path for path in _walk(source) if path.suffix in TEXT_SUFFIXES or path.name.endswith(JSONL_SUFFIXES))
    return [SourceFile(path, path.as_posix()) for path in names]


def _walk(root: Path) -> list[Path]:
    paths = (path for path in root.rglob("*") if path.is_file())
    kept = [path for path in paths if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)]
    return sorted(kept, key=lambda path: path.relative_to(root).as_posix())


def _records(file: SourceFile, skip_bad: bool, stats: ReadStats) -> Iterator[str]:
    if file.path.name.endswith(JSONL_SUFFIXES):
        yield from _json_lines(file, skip_bad, stats)
        return
    try:
        yield file.path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        _bad(file, 0, f"not UTF-8: {error}", skip_bad, stats)


def _json_lines(file: SourceFile, skip_bad: bool, stats: ReadStats) -> Iterator[str]:
    opener = gzip.open if file.path.suffix == ".gz" else open
    line_number = 0
    try:
        with opener(file.path, "rb") as stream:
            for line_number, line in enumerate(stream, start=1):
                if line.strip():
                    text = _text_of(line)
                    if isinstance(text, str):
                        yield text
                    else:
                        _bad(file, line_number, str(text), skip_bad, stats)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        _bad(file, line_number + 1, f"damaged gzip stream: {error}", skip_bad, stats)


def _text_of(line: bytes) -> str | ValueError:
    """The document of a line, or what is wrong with it."""
    try:
        record = json.loads(line)
    except ValueError as error:
        return ValueError(f"not JSON: {error}")
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        return ValueError('no field "text" that holds a string')
    try:
        record["text"].encode()
    except UnicodeEncodeError as error:
        return ValueError(f"half a surrogate pair: {error}")
    return str(record["text"])


def _bad(file: SourceFile, line: int, why: str, skip_bad: bool, stats: ReadStats) -> None:
    where = f"{file.name}, line {line}" if line else file.name
    if not skip_bad:
        raise DataError(
            "broken record", where=where, got=why, fix="mend it, or leave such records out and count them: --skip-bad"
        )
    stats.bad += 1
    stats.first_bad = stats.first_bad or f"{where}: {why}"
