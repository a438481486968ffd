"""What the binary files of a checkpoint claim, checked before PyTorch believes it.

`.metadata` is a pickle: a small program that builds tables of tensors, their pieces and where in which file each piece
lies. Three questions are asked of it. Does the program build tables and nothing else (`check_program`; the names it may
use are `megatron_io.CHECKPOINT_NAMES`)? Do the pieces of every tensor cover it once (`check_tensors`)? Do they lie
side by side inside files of this folder (`check_places`)? The pieces themselves and `common.pt` are archives that
torch.save wrote (`check_archive`). All raise SuspectFile with a reason; none allocates what a file merely claims.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise, product
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

SHARD_NAME = re.compile(r"__[0-9]{1,9}_[0-9]{1,9}\.distcp")
MOST_DIMS = 8
END_OF_ARCHIVE = struct.Struct("<4s4H2LH")
"""Signature, disks and entries, size and position of the list of entries, length of a comment."""
END_IN_64_BITS = struct.Struct("<4sQ2H2L4Q4sLQL")
"""The same in 64 bits, and where that stands; torch.save writes it in front of END_OF_ARCHIVE."""
ARCHIVED = re.compile(
    r"[^/]+/(data\.pkl|data/[0-9]+|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id)"
)
TABLE_OPS = frozenset(
    {
        *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINGET", "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE"),
        *("BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE", "EMPTY_LIST", "APPEND", "APPENDS"),
        *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("STACK_GLOBAL", "NEWOBJ", "REDUCE", "BUILD"),
    }
)
"""What Python's pickler writes for metadata; LONG_BINPUT, which reserves memory by number, is not among them."""


class SuspectFile(ValueError):
    """A file is not what it should be; the message says how, without naming it."""


def check_program(content: bytes) -> None:
    """Refuse a pickle that does more than build values from parts.

    `BUILD` must follow the making of the object that it fills: on a class it would change the class for the process.
    Values must not grow beyond the file by naming the same part again and again: hashing one would take for ever.

    Raises:
        SuspectFile: the operation that does not belong there, or where the program breaks off.
    """
    stack: list[_Value] = []
    memo: list[_Value] = []
    try:
        for op, argument, _ in pickletools.genops(content):
            if op.name not in TABLE_OPS:
                raise SuspectFile(f"it uses {op.name}, which no metadata needs")
            if op.name == "MEMOIZE":
                memo.append(stack[-1])
            elif op.name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[int(str(argument))])
            else:
                _apply(op, stack)
            if stack and stack[-1].nodes > 16 * len(content):
                raise SuspectFile("it repeats itself without end")
    except SuspectFile:
        raise
    except (ValueError, IndexError, TypeError) as error:  # bytes are missing, or operands
        raise SuspectFile(f"it is not a pickle ({error})") from error


class _Value(NamedTuple):
    """Something that a pickle has at hand: a "class", an "object" made of one, a "value", or a "mark" between them."""

    kind: str
    nodes: int


def _apply(op: pickletools.OpcodeInfo, stack: list[_Value]) -> None:
    """Take the operands of one operation from the stack, and put what it makes there."""
    taken: list[_Value] = []
    for operand in reversed(op.stack_before):
        if operand is pickletools.stackslice:
            while (top := stack.pop()).kind != "mark":
                taken.append(top)
        elif operand is not pickletools.markobject:  # it went with the slice
            taken.append(stack.pop())
    if op.name in ("NEWOBJ", "REDUCE") and taken[-1].kind != "class":
        raise SuspectFile(f"it calls a {taken[-1].kind}")
    if op.name == "BUILD" and taken[-1].kind != "object":
        raise SuspectFile(f"it changes a {taken[-1].kind}")
    made = {"STACK_GLOBAL": "class", "NEWOBJ": "object", "REDUCE": "object", "BUILD": "object", "MARK": "mark"}
    stack.extend(_Value(made.get(op.name, "value"), 1 + sum(v.nodes for v in taken)) for _ in op.stack_after)


def check_tensors(metadata: Metadata) -> dict[tuple[str, tuple[int, ...]], int]:
    """The pieces of every tensor must cover it, once.

    Returns:
        (name, offsets) of each piece -> the bytes of its content.

    Raises:
        SuspectFile: the tensor, and what is wrong with it.
    """
    if not isinstance(metadata.state_dict_metadata, dict):
        raise SuspectFile(f"its list of tensors is {shown(metadata.state_dict_metadata)}")
    pieces = {}
    for name, tensor in metadata.state_dict_metadata.items():
        if type(name) is not str or not isinstance(tensor, TensorStorageMetadata):
            raise SuspectFile(f"{shown(name)} is no tensor")
        told = f"tensor {name[:200]}"
        size = _extents(tensor.size, f"the shape of {told}")
        if not isinstance(tensor.properties.dtype, torch.dtype) or not isinstance(tensor.chunks, list):
            raise SuspectFile(f"{told} has no dtype or no pieces")
        boxes = [_box(chunk, f"a piece of {told}", len(size)) for chunk in tensor.chunks]
        if not covers_once(size, boxes):
            raise SuspectFile(f"the pieces of {told} do not cover its shape {size} once")
        for offsets, sizes in boxes:
            pieces[name, offsets] = math.prod(sizes) * tensor.properties.dtype.itemsize
    return pieces


def covers_once(size: tuple[int, ...], boxes: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Do boxes (offsets, sizes) fill a box of `size` from the origin without gap or overlap? Linear in their number.

    A set of boxes is known by its corners, signed by how many of their coordinates are upper ones: where boxes meet,
    the corners cancel, and what is left must be the corners of the whole.
    """
    corners: Counter[tuple[int, ...]] = Counter()
    for sign, (offsets, sizes) in [(-1, ((0,) * len(size), size)), *((1, box) for box in boxes)]:
        if 0 in sizes:
            continue
        for upper in product((0, 1), repeat=len(size)):
            corner = tuple(o + s * u for o, s, u in zip(offsets, sizes, upper, strict=True))
            corners[corner] += sign * (-1) ** sum(upper)
    return not any(corners.values())


def check_places(
    metadata: Metadata, pieces: Mapping[tuple[str, tuple[int, ...]], int], folder: Path, listed: Iterable[str]
) -> dict[str, list[tuple[int, int, int]]]:
    """Every piece must have a place of its own in a file of the folder.

    Args:
        pieces: what `check_tensors` returned.
        listed: the files of the manifest.

    Returns:
        File name -> (offset, length of the archive, size of the tensor in it) of its pieces, rising.

    Raises:
        SuspectFile: a piece without a place, or a place that cannot be.
    """
    if not isinstance(metadata.storage_data, dict):
        raise SuspectFile(f"its list of places is {shown(metadata.storage_data)}")
    names, found, places = set(listed), set(), dict[str, list[tuple[int, int, int]]]()
    for index, place in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(place, _StorageInfo) or type(index.fqn) is not str:
            raise SuspectFile(f"{shown(index)} is no place of a piece")
        told, file = f"a piece of tensor {index.fqn[:200]}", place.relative_path
        offsets = _extents(index.offset, f"the offset of {told}")
        if type(file) is not str or not SHARD_NAME.fullmatch(file) or file not in names:
            raise SuspectFile(f"{told} lies in {shown(file)}, which is no shard of this checkpoint")
        if getattr(place, "transform_descriptors", None):
            raise SuspectFile(f"{told} is compressed or encoded")
        offset, length = whole(place.offset, f"the place of {told}"), whole(place.length, f"the length of {told}")
        num_bytes = pieces.get((index.fqn, offsets), length + 1)
        if num_bytes > length:
            raise SuspectFile(f"{told} at {offsets} has {length} bytes, or the tensor has no such piece")
        found.add((index.fqn, offsets))
        places.setdefault(file, []).append((offset, length, num_bytes))
    if missing := pieces.keys() - found:
        name, offsets = min(missing)
        raise SuspectFile(f"the piece of tensor {name} at {offsets} lies nowhere")
    for file, taken in places.items():
        taken.sort()
        size_bytes = (folder / file).lstat().st_size
        if any(at[0] + at[1] > after[0] for at, after in pairwise([*taken, (size_bytes, 0, 0)])):
            raise SuspectFile(f"pieces in {file} overlap or reach beyond its {size_bytes} bytes")
    return places


def check_archive(stream: IO[bytes], offset: int, length: int) -> tuple[set[str], int]:
    """Refuse what torch.save did not write.

    PyTorch would read another beginning as its old format, which reserves memory by number, and would unpack
    compressed entries to whatever size they claim.

    Args:
        stream: the file.
        offset, length: the archive in it, in bytes.

    Returns:
        The names (module.name) that the pickle in the archive asks for, and the bytes of the tensors beside it.

    Raises:
        SuspectFile: what is wrong.
    """
    with io.BufferedReader(_Piece(stream, offset, length)) as piece:
        if piece.read(4) != b"PK\x03\x04":
            raise SuspectFile("it is not an archive of torch.save")
        try:
            if not _ends_with_list(piece, length):
                raise SuspectFile("the archive does not end with the list of its entries")
            return _content_of(zipfile.ZipFile(piece), length)
        except SuspectFile:
            raise
        except Exception as error:  # zipfile and pickletools fail in a dozen ways on what is no archive or no pickle
            raise SuspectFile(f"the archive does not read ({type(error).__name__}: {error})") from error


def _ends_with_list(piece: IO[bytes], length: int) -> bool:
    """Does the list of entries stand where every reader looks first? Else two readers may find two lists."""
    piece.seek(length - END_OF_ARCHIVE.size)
    signature, *_, list_bytes, list_at, comment = END_OF_ARCHIVE.unpack(piece.read())
    end = length - END_OF_ARCHIVE.size
    if length >= END_IN_64_BITS.size + END_OF_ARCHIVE.size:
        piece.seek(end - END_IN_64_BITS.size)
        wide = END_IN_64_BITS.unpack(piece.read(END_IN_64_BITS.size))
        if wide[10] == b"PK\x06\x07":
            end -= END_IN_64_BITS.size
            if wide[0] != b"PK\x06\x06" or wide[12] != end:
                return False
            list_bytes, list_at = wide[8:10]
    return bool(signature == b"PK\x05\x06" and not comment and list_at + list_bytes == end)


def _content_of(archive: zipfile.ZipFile, length: int) -> tuple[set[str], int]:
    entries = archive.infolist()
    strange = [entry.filename for entry in entries if not ARCHIVED.fullmatch(entry.filename)]
    if strange or len({entry.filename for entry in entries}) < len(entries):
        raise SuspectFile(f"the archive holds {shown(strange[0]) if strange else 'an entry twice'}")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise SuspectFile("the archive is compressed")
    if sum(entry.file_size for entry in entries) > length:
        raise SuspectFile("the archive claims more content than it has")
    names = set()
    for entry in entries:
        if entry.filename.endswith("/data.pkl"):
            for op, argument, _ in pickletools.genops(archive.read(entry)):
                if op.name in ("STACK_GLOBAL", "INST"):
                    raise SuspectFile(f"the archive uses {op.name}, which torch.save does not")
                names |= {str(argument).replace(" ", ".")} if op.name == "GLOBAL" else set()
    return names, sum(entry.file_size for entry in entries if "/data/" in entry.filename)


class _Piece(io.RawIOBase):
    """A piece of a file as a file of its own."""

    def __init__(self, stream: IO[bytes], offset: int, length: int) -> None:
        super().__init__()
        self._stream, self._offset, self._length, self._at = stream, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._stream.seek(self._offset + self._at)
        content = self._stream.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def _box(chunk: object, told: str, dims: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(offsets, sizes) of a piece."""
    if not isinstance(chunk, ChunkStorageMetadata):
        raise SuspectFile(f"{told} is {shown(chunk)}")
    offsets, sizes = _extents(chunk.offsets, f"the offset of {told}"), _extents(chunk.sizes, f"the shape of {told}")
    if len(offsets) != dims or len(sizes) != dims:
        raise SuspectFile(f"{told} has another number of dims than the tensor")
    return offsets, sizes


def _extents(value: object, name: str) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > MOST_DIMS:
        raise SuspectFile(f"{name} is {shown(value)}")
    return tuple(whole(number, name) for number in value)


def whole(value: object, name: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise SuspectFile(f"{name} is {shown(value)} instead of a whole number from 0")
    return value


def shown(value: object) -> str:
    """A value of unknown type and length, for a message."""
    return str(value)[:60] if isinstance(value, (str, int)) else type(value).__name__
