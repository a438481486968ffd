"""Compressed files as streams of bytes that notice when a file was cut."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import IO, Final, cast

from moba_train.errors import DataError

MAX_WINDOW_MIB: Final = 512
"""Memory that a .zst file may ask for to be read: the files of `zstd --long=29` and of everything below."""
_PIECE_BYTES: Final = 8192  # one of 8 KiB becomes 256 MiB at the very most


class DamagedError(ValueError):
    """The compressed stream is damaged, or ends too early."""


def open_bytes(path: Path) -> IO[bytes]:
    """Open a plain, .gz or .zst file for reading; damage shows as one of the errors of `DAMAGE` while it is read.

    Raises:
        DataError: on reading, a .zst file that asks for more than MAX_WINDOW_MIB.
    """
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix == ".zst":
        return cast(IO[bytes], io.BufferedReader(_ZstdStream(path), 1 << 16))
    return open(path, "rb")


DAMAGE: Final = (DamagedError, EOFError, gzip.BadGzipFile, zlib.error)


class _ZstdStream(io.RawIOBase):
    """All frames of a .zst file. The library's own reader takes a file that was cut for one that ends there."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._path = path
        self._error = zstandard.ZstdError
        self._make_frame = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_MIB * 2**20).decompressobj
        self._file = open(path, "rb")  # noqa: SIM115 (closed with this stream)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        target = memoryview(buffer)  # type: ignore[arg-type]
        while not self._ready:
            packed = self._packed or self._file.read(_PIECE_BYTES)
            if not packed:
                if self._frame is not None:
                    raise DamagedError("the file ends in the middle")
                return 0
            self._ready = memoryview(self._unpack(packed))
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()

    def _unpack(self, packed: bytes) -> bytes:
        frame = self._frame or self._make_frame()
        try:
            unpacked = frame.decompress(packed)
        except self._error as error:
            if "too much memory" in str(error):
                raise DataError(
                    "reading the file takes too much memory",
                    where=str(self._path),
                    got=f"a window of more than {MAX_WINDOW_MIB} MiB",
                    allowed=f"at most {MAX_WINDOW_MIB} MiB, as of zstd --long=29",
                    fix="Pack it again: zstd -d --long=31 -c OLD.zst | zstd --long=27 -o NEW.zst",
                ) from error
            raise DamagedError(str(error)) from error
        self._packed = frame.unused_data
        self._frame = None if frame.eof else frame
        return unpacked
