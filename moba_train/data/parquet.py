"""Rows of a .parquet file, a few at a time, and of its columns only those that a document is made of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from moba_train.data.records import MAX_RECORD_MIB

if TYPE_CHECKING:
    import pyarrow

COLUMNS: Final = ("text", "messages", "tools")
_BATCH_ROWS: Final = 64  # rows may be whole books
_BUFFER_BYTES: Final = 1 << 20  # of compressed pages that are read ahead, a column


class ParquetError(ValueError):
    """A file, or all that follows in it, cannot be read.

    Attributes:
        rows: rows that are lost by it, as far as that is known; at least 1.
    """

    def __init__(self, why: str, rows: int = 1) -> None:
        super().__init__(why)
        self.rows = max(1, rows)


def parquet_rows(path: Path) -> Iterator[dict[str, Any] | ValueError]:
    """Rows as JSON trees: column -> value, or what is wrong with the row. A null in an object is left out, because a
    table cannot tell it from a field that was never there.

    Raises:
        ParquetError: not a Parquet file, a damaged one, or one without a column text (of strings) or messages (of lists
            of objects).
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path, buffer_size=_BUFFER_BYTES) as file:
            schema = file.schema_arrow
            columns = _columns(schema, file.metadata.num_rows)
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
                for i in range(batch.num_rows):
                    yield _row(batch, i)
    except (pyarrow.ArrowException, OSError) as error:
        raise ParquetError(f"damaged Parquet file: {str(error)[:300]}") from error


def _columns(schema: pyarrow.Schema, num_rows: int) -> list[str]:
    """The columns to read."""
    kinds = {name: schema.field(name).type for name in COLUMNS if schema.names.count(name) == 1}
    usable = [name for name, is_right in (("text", _is_text), ("messages", _is_objects)) if is_right(kinds.get(name))]
    wrong = [f"{name} is of type {str(kind)[:200]}" for name, kind in kinds.items() if name not in usable]
    if not usable:
        has = "; ".join(wrong) or f"it has {', '.join(schema.names[:12]) or 'none'}"
        raise ParquetError(f"no column text of strings and no column messages of lists of objects: {has}", num_rows)
    if "messages" not in usable or "tools" not in kinds:
        return usable
    if not _is_objects(kinds["tools"]):
        raise ParquetError(f"column tools is of type {str(kinds['tools'])[:200]}, not of lists of objects", num_rows)
    return [*usable, "tools"]


def _row(batch: pyarrow.RecordBatch, i: int) -> dict[str, Any] | ValueError:
    try:
        for column in batch.columns:
            _check_size(column, i)
        return {
            name: _without_nulls(batch.column(name)[i].as_py(maps_as_pydicts="strict")) for name in batch.schema.names
        }
    except (ValueError, KeyError) as error:  # a string that is not UTF-8; a map with the same key twice
        return ValueError(str(error))


def _check_size(column: pyarrow.Array, i: int) -> None:
    from pyarrow import types

    # A dictionary counts whole in each of its rows. Of a list, Python makes ten times as much.
    if not types.is_dictionary(column.type) and column.slice(i, 1).nbytes > MAX_RECORD_MIB * 2**20:
        raise ValueError(f"longer than {MAX_RECORD_MIB} MiB")


def _is_text(kind: pyarrow.DataType | None) -> bool:
    from pyarrow import types

    if kind is None:
        return False
    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_objects(kind: pyarrow.DataType | None) -> bool:
    from pyarrow import types

    if kind is None:
        return False
    if types.is_null(kind):  # a column of nulls alone says nothing
        return True
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(is_list and (types.is_struct(kind.value_type) or types.is_map(kind.value_type)))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
