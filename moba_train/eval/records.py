"""niah.jsonl: one JSON object per scored sample, appended as it is measured, readable after a kill at any moment.

A process that dies while it writes leaves at most one cut line, the last one; `read_records` leaves it out and
`RecordWriter` removes it before it appends. A damaged line anywhere else is an error: the file was edited.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from moba_train.errors import DataError
from moba_train.eval.cells import NiahRecord

_FIELDS = {field.name: str(field.type) for field in dataclasses.fields(NiahRecord)}
# Fields that older files do not have.
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(NiahRecord) if f.default is not dataclasses.MISSING}
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "float | None": (int, float, type(None)),
}


def _parse(line: bytes, *, where: str) -> NiahRecord:
    """One line as a record; DataError if it is no JSON object or a field is missing or of another type."""
    fix = "remove the line, or move the file away and run `moba-train eval niah` again"
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise DataError("a line of niah.jsonl is not JSON", where=where, got=str(error), fix=fix) from error
    if not isinstance(value, dict):
        raise DataError("a line of niah.jsonl is not an object", where=where, got=type(value).__name__, fix=fix)
    value = {**_DEFAULTS, **value}
    for name, kind in _FIELDS.items():
        known = name in value
        wrong_bool = known and isinstance(value[name], bool) and kind != "bool"
        if not known or wrong_bool or not isinstance(value[name], _TYPES[kind]):
            got = repr(value[name]) if known else "nothing"
            raise DataError(f"field {name!r} of a needle record is wrong", where=where, got=got, allowed=kind, fix=fix)
    return NiahRecord(**{name: value[name] for name in _FIELDS})


def _complete_part(content: bytes) -> bytes:
    """`content` up to and including its last line end."""
    return content[: content.rfind(b"\n") + 1]


def read_records(path: Path) -> tuple[NiahRecord, ...]:
    """Every complete line of `path`, in file order; empty if the file does not exist.

    Of two records with the same identity the later one counts. A last line without its line end is left out.

    Raises:
        DataError: a complete line is damaged (file and line are named).
    """
    if not path.exists():
        return ()
    records: dict[tuple[object, ...], NiahRecord] = {}
    for number, line in enumerate(_complete_part(path.read_bytes()).splitlines(), start=1):
        if line.strip():
            record = _parse(line, where=f"{path}, line {number}")
            records[record.identity] = record
    return tuple(records.values())


class RecordWriter:
    """Appends records to niah.jsonl; removes a cut last line first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            content = path.read_bytes()
            complete = _complete_part(content)
            if len(complete) < len(content):
                os.truncate(path, len(complete))
        self._file = path.open("a", encoding="utf-8")

    def write(self, records: Iterable[NiahRecord]) -> None:
        """Append and flush: what was measured survives a kill of the process."""
        for record in records:
            self._file.write(json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; every record written so far is in it."""
        self._file.close()


def latest_records(
    records: Iterable[NiahRecord], *, last_step: int | None = None, left: Collection[str] = ()
) -> tuple[NiahRecord, ...]:
    """The records of the newest step, and of those the weights, seed and settings that were measured last.

    Args:
        last_step: of the run; None = any. Records beyond it are of a branch that the run has left.
        left: weights of checkpoints of such branches.
    """
    own = [r for r in records if (last_step is None or r.step <= last_step) and r.weights not in left]
    newest = max((record.step for record in own), default=0)
    last = [record for record in own if record.step == newest][-1:]
    return tuple(r for r in own if last and (r.step, *r.settings) == (newest, *last[0].settings))
