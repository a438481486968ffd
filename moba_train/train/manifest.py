"""The part of a checkpoint that makes it trustworthy: sizes and hashes of its files, and writes that reach the disk.

A checkpoint is written under `<name>.tmp`; every file is hashed and fsynced, `manifest.json` lists them all, the folder
is renamed, and the pointer `latest` moves last. A crash at any moment leaves either the old state or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
READ_BYTES = 1 << 22


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def fsync_path(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Replace a small file so that a reader, or a crash, sees the old text or the new one."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
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
    """Write manifest.json into `folder` and flush it."""
    replace_text(folder / MANIFEST, json.dumps({"files": dict(sorted(entries.items()))}, indent=1) + "\n")


def read_manifest(folder: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """(entries, "") or ({}, why the manifest cannot be used)."""
    path = folder / MANIFEST
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        entries = {str(name): {"bytes": int(e["bytes"]), "sha256": str(e["sha256"])} for name, e in files.items()}
    except FileNotFoundError:
        return {}, f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    strays = [name for name in entries if Path(name).name != name]
    if strays or not entries:
        return (
            {},
            f"{MANIFEST} lists {strays[0]!r}, which is not a file name" if strays else f"{MANIFEST} lists no file",
        )
    return entries, ""


def find_damage(folder: Path, *, part: int = 0, parts: int = 1) -> str:
    """Compare a checkpoint folder with its manifest.

    Args:
        folder: the checkpoint.
        part: hash only every `parts`-th file, beginning with the `part`-th, so that ranks share the reading; presence
            and sizes are always checked for all.

    Returns:
        "" if all is well, else one line that names the first damaged file.
    """
    entries, trouble = read_manifest(folder)
    if trouble:
        return trouble
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
    for name in list(entries)[part::parts]:
        if sha256_of(folder / name) != entries[name]["sha256"]:
            return f"{name} has the right size but another SHA-256"
    return ""
