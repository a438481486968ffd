"""Files that appear whole or not at all, and what is said where a disk refuses them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moba_train.errors import DataError, UserError


@contextmanager
def disk_errors(
    path: Path,
    *,
    what: str = "the file cannot be written",
    kind: type[UserError] = DataError,
    fix: str = "Check free space and permissions, or name another place.",
) -> Iterator[None]:
    """An error of `kind` about `path` in place of an OSError: a disk that is full or read-only, a file for a folder."""
    try:
        yield
    except OSError as error:
        raise kind(what, where=str(path), got=str(error), fix=fix) from error


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on success it is flushed to disk and renamed to `path`, else removed.

    Several processes may publish the same file at once: each writes its own, the last rename wins.

    Raises:
        DataError: the disk refuses, also in the body, which should read nothing that can fail by an OSError.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        try:
            yield aside
            with open(aside, "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
