"""The rows of one stage: row i is a pure function of (seed, stage, i).

    mix        row i -> (source, row r of that source)                 memory-mapped, `mix.py`
    row index  r -> where that row begins in the source's stream       memory-mapped, `row_index.py`
    assemble   the pieces of documents in between -> Row               `assemble.py`

The memory maps live in the run's cache folder. They are made once: the first rank that needs one writes it aside and
renames it, so that several ranks may start at once (each may then do the same work; let rank 0 go first to save it).
Each stage shuffles every source anew, and again at every epoch of it: first the documents, and where documents go on
in the next row ("split"), then the rows too. Otherwise the rows of one long document would follow one another, and a
short stage might see little else.

Legend: R rows of the stage, S tokens of a row.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moba_train.config.schema import DataConfig, SourceConfig, StageConfig
from moba_train.data.assemble import Piece, pieces_of_stream, row_of_stream
from moba_train.data.files import published
from moba_train.data.indexed import IndexedDocuments, open_indexed
from moba_train.data.mix import mix_rows, rows_per_source
from moba_train.data.permutation import permute
from moba_train.data.row import Row
from moba_train.data.row_index import DocumentStream, build_row_starts
from moba_train.errors import ConfigError, DataError

INDEX_VERSION = 2
"""Part of the name of every cached index; raised when its meaning changes."""


class StageData:
    """Rows of one stage.

    Args:
        data: the sources.
        stage: its mix, seq_len and tokens.
        stage_index: position of the stage in the schedule; part of the shuffle.
        seed: `run.seed`.
        cache_dir: folder of the memory-mapped indices; made if missing.
        eod_id: end-of-document id of the tokenizer.
        pad_id: id that fills up rows of whole documents.

    Raises:
        ConfigError: the mix names no source, or one that `data.sources` does not have.
        DataError: a source is missing or damaged, or its documents do not fit the rows.
    """

    def __init__(
        self,
        data: DataConfig,
        stage: StageConfig,
        *,
        stage_index: int,
        seed: int,
        cache_dir: Path,
        eod_id: int,
        pad_id: int,
    ) -> None:
        weights = _check_mix(data, stage, stage_index)
        self.seq_len = stage.seq_len
        self.rows_per_step = stage.tokens_per_step // stage.seq_len
        self._num_rows = stage.tokens // stage.seq_len
        self._eod_id, self._pad_id = eod_id, pad_id
        counts = rows_per_source(weights, self._num_rows)
        self.names = tuple(name for name in weights if counts[name])
        self.rows_by_source = {name: counts[name] for name in self.names}
        self._mix = _open_mix(cache_dir, [counts[name] for name in self.names])
        self._sources = [
            _Source(
                name,
                data.sources[name],
                seq_len=stage.seq_len,
                num_rows=counts[name],
                order_key=f"seed {seed}/stage {stage_index}/source {name}",
                cache_dir=cache_dir,
            )
            for name in self.names
        ]

    def __len__(self) -> int:
        """Rows of the stage."""
        return self._num_rows

    @property
    def cut_share(self) -> float:
        """Share of the documents that a row boundary cuts (0..1), over the epochs that this stage draws from."""
        documents = sum(source.num_documents for source in self._sources)
        return sum(source.num_cut for source in self._sources) / max(1, documents)

    def row(self, i: int) -> Row:
        """Row i of the stage, 0 <= i < len.

        Raises:
            IndexError: outside the stage.
        """
        source, begin, end = self._place(i)
        return row_of_stream(
            source.documents,
            source.stream,
            begin,
            end,
            seq_len=self.seq_len,
            eod_id=self._eod_id,
            pad_id=self._pad_id,
            source=source.name,
            sample_id=i,
        )

    def pieces(self, i: int) -> tuple[Piece, ...]:
        """The pieces of documents that row i holds, in order; padding is none. IndexError outside the stage."""
        source, begin, end = self._place(i)
        return tuple(pieces_of_stream(source.stream, begin, end))

    def _place(self, i: int) -> tuple[_Source, tuple[int, int], tuple[int, int]]:
        """Source of row i, and where the row begins and ends in its stream."""
        if not 0 <= i < self._num_rows:
            raise IndexError(f"row {i} of a stage of {self._num_rows}")
        which, r = (int(x) for x in self._mix[i])
        source = self._sources[which]
        r = source.shuffled(r)
        begin, end = ((int(position), int(offset)) for position, offset in source.starts[r : r + 2])
        return source, begin, end


class _Source:
    """One source of the stage: its documents, their order, and where each row begins."""

    def __init__(
        self, name: str, config: SourceConfig, *, seq_len: int, num_rows: int, order_key: str, cache_dir: Path
    ) -> None:
        self.name = name
        self.documents: IndexedDocuments = open_indexed(config.path)
        self.stream = DocumentStream(
            name, self.documents.num_documents, self.documents.sizes, config.min_doc_tokens, order_key
        )
        # Rows are shuffled over whole epochs, so all rows of an epoch have a place in the index.
        self._rows_of_epoch = max(1, self.stream.tokens_of_epoch() // seq_len) if config.packing == "split" else 0
        if self._rows_of_epoch:
            num_rows = -(-num_rows // self._rows_of_epoch) * self._rows_of_epoch
        identity = [INDEX_VERSION, self.documents.fingerprint(), config.packing, config.min_doc_tokens]
        path = cache_dir / f"rows-{_digest([*identity, seq_len, num_rows, order_key])}.npy"
        meta_path = path.with_suffix(".json")
        if not (path.exists() and meta_path.exists()):
            with published(path) as aside, published(meta_path) as meta_aside:
                out = _new_map(aside, (num_rows + 1, 2))
                built = build_row_starts(
                    self.stream, packing=config.packing, seq_len=seq_len, num_rows=num_rows, out=out
                )
                meta_aside.write_text(json.dumps({"documents": built.num_documents, "cut": built.num_cut}) + "\n")
        self.starts = _map(path, (num_rows + 1, 2))
        meta = json.loads(meta_path.read_text())
        self.num_documents, self.num_cut = int(meta["documents"]), int(meta["cut"])

    def shuffled(self, r: int) -> int:
        """The row of the index that is drawn as the r-th: a permutation within each epoch of split documents."""
        if not self._rows_of_epoch:
            return r
        epoch, inside = divmod(r, self._rows_of_epoch)
        key = f"{self.stream.order_key}/rows of epoch {epoch}"
        place = permute(np.array([inside], dtype=np.int64), n=self._rows_of_epoch, key=key)
        return epoch * self._rows_of_epoch + int(place[0])


def _check_mix(data: DataConfig, stage: StageConfig, stage_index: int) -> dict[str, float]:
    """The sources with a weight above 0."""
    where = f"stages.{stage_index}.mix"
    known = ", ".join(sorted(data.sources)) or "none: data.sources is empty"
    for name, weight in stage.mix.items():
        if name not in data.sources:
            raise ConfigError("the mix names an unknown source", where=where, got=name, allowed=known)
        if not 0 <= weight < float("inf"):
            raise ConfigError("a weight must be a finite number of at least 0", where=f"{where}.{name}", got=weight)
    weights = {name: weight for name, weight in stage.mix.items() if weight > 0}
    if not weights:
        raise ConfigError("the stage draws from no source", where=where, got=stage.mix, allowed=f"sources: {known}")
    return weights


def _open_mix(cache_dir: Path, counts: list[int]) -> NDArray[np.int64]:
    path = cache_dir / f"mix-{_digest([INDEX_VERSION, *counts])}.npy"
    if not path.exists():
        with published(path) as aside:
            out = _new_map(aside, (sum(counts), 2))
            mix_rows(counts, out)
    return _map(path, (sum(counts), 2))


def _new_map(path: Path, shape: tuple[int, int]) -> NDArray[np.int64]:
    made: NDArray[np.int64] = np.lib.format.open_memmap(path, mode="w+", dtype=np.int64, shape=shape)  # type: ignore[no-untyped-call]
    return made


def _map(path: Path, shape: tuple[int, int]) -> NDArray[np.int64]:
    fix = f"delete {path.parent}; it is built again"
    try:
        array: NDArray[np.int64] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError("cannot read a cached row index", where=str(path), got=str(error), fix=fix) from error
    if array.shape != shape:
        raise DataError("a cached row index is damaged", where=str(path), got=array.shape, allowed=str(shape), fix=fix)
    return array


def _digest(parts: list[object]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
