"""The part of a checkpoint that makes it trustworthy: sizes and hashes of its files, and writes that reach the disk.

A checkpoint is written under `<name>.tmp`; every file is fsynced and hashed, `manifest.json` lists them all, the folder
is renamed, and the pointer `latest` moves last. A crash at any moment leaves either the old state or the new one.

What is read here may come from anywhere, so it is bounded: names are plain, files are regular (no link, no pipe), and
small files are small.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

MANIFEST = "manifest.json"
READ_BYTES = 1 << 22
MANIFEST_BYTES = 1 << 24
"""The most that a manifest may hold: a hundred thousand files."""
FILE_NAME = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,255}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

OnBytes = Callable[[int], None]
"""Told how many bytes have been hashed since the last call."""


def sha256_of(path: Path, on_bytes: OnBytes | None = None) -> str:
    """SHA-256 of a regular file, read in pieces. OSError when it is none or does not read."""
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        while piece := stream.read(READ_BYTES):
            digest.update(piece)
            if on_bytes is not None:
                on_bytes(len(piece))
    return digest.hexdigest()


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; OSError for a symbolic link, a pipe, a device or a folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path.name} is no regular file")
    return os.fdopen(descriptor, "rb")


def read_small(path: Path, limit: int) -> str:
    """Text of a regular file of at most `limit` bytes.

    Raises:
        OSError, ValueError: see `read_small_bytes`; or not UTF-8.
    """
    return read_small_bytes(path, limit).decode("utf-8")


def read_small_bytes(path: Path, limit: int) -> bytes:
    """Content of a regular file of at most `limit` bytes.

    Raises:
        OSError: it is missing, no regular file, or does not read.
        ValueError: it is larger; nothing is read then.
    """
    with open_regular(path) as stream:
        num_bytes = os.fstat(stream.fileno()).st_size
        if num_bytes > limit:
            raise ValueError(f"{path.name} is larger than {limit} bytes")
        return stream.read(num_bytes)


def decode_json(text: str) -> Any:
    """Decode JSON that says every thing once.

    Raises:
        ValueError: it is not JSON, nests too deep, or names a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_no_key_twice)
    except RecursionError as error:
        raise ValueError("brackets nest too deep") from error


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def fsync_path(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and flush it; the entry in its folder is flushed by whoever flushes the folder."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def replace_text(path: Path, text: str) -> None:
    """Replace a small file so that a reader, or a crash, sees the old text or the new one."""
    aside = path.with_name(path.name + ".tmp")
    write_durably(aside, text.encode("utf-8"))
    os.replace(aside, path)
    fsync_path(path.parent)


def seal_files(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Flush files of one checkpoint folder and describe them: file name -> {"bytes", "sha256"}."""
    entries = {}
    for path in paths:
        fsync_path(path)
        entries[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return entries


def write_manifest(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Write manifest.json into `folder` and flush both: then all that it lists is on the disk."""
    write_durably(folder / MANIFEST, (json.dumps({"files": dict(sorted(entries.items()))}, indent=1) + "\n").encode())
    fsync_path(folder)


def read_manifest(folder: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """(entries, "") or ({}, why the manifest cannot be used)."""
    try:
        entries = decode_json(read_small(folder / MANIFEST, MANIFEST_BYTES))["files"]
        trouble = _trouble(entries)
    except FileNotFoundError:
        return {}, f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return {}, f"{MANIFEST} cannot be read ({type(error).__name__}: {_short(error)})"
    return ({}, f"{MANIFEST} {trouble}") if trouble else (entries, "")


def content_name(folder: Path) -> str:
    """A short name of what a checkpoint holds: of its manifest, which has the hashes. OSError when there is none."""
    return sha256_of(folder / MANIFEST)[:16]


def damages(
    folder: Path, *, part: int = 0, parts: int = 1, hashes: bool = True, on_bytes: OnBytes | None = None
) -> Iterator[str]:
    """Compare a checkpoint folder with its manifest; one line for each file that is not as it should be.

    Args:
        folder: the checkpoint.
        part: hash only every `parts`-th file, beginning with the `part`-th, so that ranks share the reading; presence
            and sizes are always checked for all.
        hashes: False = presence and sizes only.
        on_bytes: told of the progress of hashing.
    """
    entries, trouble = read_manifest(folder)
    if trouble:
        yield trouble
        return
    wrong = {name: text for name, entry in entries.items() if (text := _wrong_size(folder / name, entry["bytes"]))}
    yield from wrong.values()
    for name in list(entries)[part::parts] if hashes else ():
        if name in wrong:
            continue
        try:
            if sha256_of(folder / name, on_bytes) != entries[name]["sha256"]:
                yield f"{name} has the right size but another SHA-256"
        except OSError as error:
            yield f"{name} cannot be read ({error})"


def find_damage(folder: Path, *, part: int = 0, parts: int = 1) -> str:
    """The first line of `damages`, "" if all is well."""
    return next(damages(folder, part=part, parts=parts), "")


def _wrong_size(path: Path, num_bytes: int) -> str:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error})"
    if not stat.S_ISREG(found.st_mode):
        return f"{path.name} is no regular file"
    return "" if found.st_size == num_bytes else f"{path.name} has {found.st_size} bytes instead of {num_bytes}"


def _trouble(entries: Any) -> str:
    """Why decoded entries cannot be used, or ""."""
    if not isinstance(entries, dict) or not entries:
        return "lists no file"
    for name, entry in entries.items():
        if not FILE_NAME.fullmatch(name):
            return f"lists {name[:100]!r}, which is not a file name"
        if not isinstance(entry, dict):
            return f"says nothing of {name}"
        num_bytes, sha256 = entry.get("bytes"), entry.get("sha256")
        if type(num_bytes) is not int or num_bytes < 0:
            return f"gives {name} a size of {str(num_bytes)[:40]!r}"
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            return f"gives {name} a SHA-256 of {str(sha256)[:70]!r}"
    return ""


def _short(error: BaseException) -> str:
    return str(error)[:200]
