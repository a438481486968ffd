"""What a pair of data files is known by, wherever it lies."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

from moba_train.data.indexed import bin_path, idx_path, require_file, spans_path


def fingerprint_of(prefix: str | Path) -> str:
    """sha256 (hex) of the sizes and the first and last mebibyte of a pair's files, answer spans included. Cheap for any
    size: it tells pairs apart that were prepared differently, not a flipped bit in the middle.

    Raises:
        DataError: a file of the pair is missing or empty.
    """
    digest, spans = hashlib.sha256(), spans_path(prefix)
    for path in (idx_path(prefix), bin_path(prefix), *([spans] if spans.exists() else [])):
        require_file(path)
        size = path.stat().st_size
        digest.update(struct.pack("<Q", size))
        with open(path, "rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()
