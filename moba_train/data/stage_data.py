"""The rows of one stage: row i is a pure function of (seed, stage, i).

    mix        row i -> (part, row r of that part)                     memory-mapped, `mix.py`
    row index  r -> where that row begins in the part's stream         memory-mapped, `row_index.py`
    assemble   the pieces of documents in between -> Row               `assemble.py`

A part is a source, or where the stage asks for a share of its rows from long documents (per-source length upsampling,
arXiv 2402.10171): its long documents, or its shorter ones, each with a list of its documents, an order and epochs of
its own. Row counts of the sources come first and do not depend on that.

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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moba_train.config.mix_rules import doc_floor, lengths_errors
from moba_train.config.schema import DataConfig, SourceConfig, SourceLengths, StageConfig
from moba_train.data.assemble import Piece, pieces_of_stream, row_of_stream
from moba_train.data.files import published
from moba_train.data.fingerprint import fingerprint_of
from moba_train.data.indexed import IndexedDocuments, open_indexed
from moba_train.data.mix import mix_rows, rows_per_source
from moba_train.data.permutation import permute
from moba_train.data.row import Row
from moba_train.data.row_index import DocumentStream, LengthCounts, build_row_starts, split_by_length
from moba_train.errors import ConfigError, DataError

INDEX_VERSION = 2
"""Part of the name of every cached index; raised when its meaning changes."""


class StageData:
    """Rows of one stage.

    Args:
        data: the sources.
        stage: its mix, lengths, seq_len and tokens.
        stage_index: position of the stage in the schedule; part of the shuffle.
        seed: `run.seed`.
        cache_dir: folder of the memory-mapped indices; made if missing.
        eod_id: end-of-document id of the tokenizer.
        pad_id: id that fills up rows of whole documents.

    Attributes:
        rows_by_source: rows of the stage from each source.
        length_lines: for the log, of each source whose long documents have a share of their own: what is drawn of them.

    Raises:
        ConfigError: the mix names no source, or one that `data.sources` does not have; lengths that cannot be.
        DataError: a source is missing or damaged, its documents do not fit the rows, or none has the length wanted.
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
        for error in lengths_errors(stage, f"stages.{stage_index}", data.sources):
            raise error
        self.seq_len = stage.seq_len
        self.rows_per_step = stage.tokens_per_step // stage.seq_len
        self._num_rows = stage.tokens // stage.seq_len
        self._eod_id, self._pad_id = eod_id, pad_id
        counts = rows_per_source(weights, self._num_rows)
        self.names = tuple(name for name in weights if counts[name])
        self.rows_by_source = {name: counts[name] for name in self.names}
        facts = _StageFacts(cache_dir, stage.seq_len, seed, stage_index)
        self._parts: list[_Part] = []
        self.length_lines: tuple[str, ...] = ()
        for name in self.names:
            lengths = stage.lengths.get(name, SourceLengths())
            parts, lines = _parts_of(name, data.sources[name], lengths, counts[name], facts)
            self._parts += parts
            self.length_lines += lines
        self._mix = _open_mix(cache_dir, [part.num_rows for part in self._parts])

    def __len__(self) -> int:
        """Rows of the stage."""
        return self._num_rows

    @property
    def cut_share(self) -> float:
        """Share of the documents that a row boundary cuts (0..1), over the epochs that this stage draws from."""
        documents = sum(part.num_documents for part in self._parts)
        return sum(part.num_cut for part in self._parts) / max(1, documents)

    def row(self, i: int) -> Row:
        """Row i of the stage, 0 <= i < len.

        Raises:
            IndexError: outside the stage.
        """
        part, begin, end = self._place(i)
        return row_of_stream(
            part.documents,
            part.stream,
            begin,
            end,
            seq_len=self.seq_len,
            eod_id=self._eod_id,
            pad_id=self._pad_id,
            source=part.stream.name,
            sample_id=i,
        )

    def pieces(self, i: int) -> tuple[Piece, ...]:
        """The pieces of documents that row i holds, in order; padding is none. IndexError outside the stage."""
        part, begin, end = self._place(i)
        return tuple(pieces_of_stream(part.stream, begin, end))

    def _place(self, i: int) -> tuple[_Part, tuple[int, int], tuple[int, int]]:
        """Part of row i, and where the row begins and ends in its stream."""
        if not 0 <= i < self._num_rows:
            raise IndexError(f"row {i} of a stage of {self._num_rows}")
        which, r = (int(x) for x in self._mix[i])
        part = self._parts[which]
        r = part.shuffled(r)
        begin, end = ((int(position), int(offset)) for position, offset in part.starts[r : r + 2])
        return part, begin, end


@dataclass(frozen=True)
class _StageFacts:
    """What all sources of the stage share."""

    cache_dir: Path
    seq_len: int
    seed: int
    stage_index: int


class _Part:
    """Documents that give rows of their own: their order, and where each row begins.

    Args:
        identity: what the index depends on, beside the order and the rows.
    """

    def __init__(
        self,
        documents: IndexedDocuments,
        stream: DocumentStream,
        packing: Literal["split", "whole"],
        num_rows: int,
        identity: Sequence[object],
        facts: _StageFacts,
    ) -> None:
        self.documents, self.stream, self.num_rows = documents, stream, num_rows
        seq_len = facts.seq_len
        # Rows are shuffled over whole epochs, so all rows of an epoch have a place in the index.
        tokens = stream.tokens_of_epoch() if packing == "split" else 0
        self._rows_of_epoch = max(1, tokens // seq_len) if packing == "split" else 0
        indexed = -(-num_rows // self._rows_of_epoch) * self._rows_of_epoch if self._rows_of_epoch else num_rows
        names = [INDEX_VERSION, *identity, seq_len, indexed, stream.order_key]
        path = facts.cache_dir / f"rows-{_digest(names)}.npy"
        meta_path = path.with_suffix(".json")
        if not (path.exists() and meta_path.exists()):
            with published(path) as aside, published(meta_path) as meta_aside:
                out = _new_map(aside, (indexed + 1, 2))
                built = build_row_starts(stream, packing=packing, seq_len=seq_len, num_rows=indexed, out=out)
                meta_aside.write_text(json.dumps({"documents": built.num_documents, "cut": built.num_cut}) + "\n")
        self.starts = _map(path, (indexed + 1, 2))
        meta = json.loads(meta_path.read_text())
        self.num_documents, self.num_cut = int(meta["documents"]), int(meta["cut"])
        # How often the stage draws each document, on average.
        self.epochs = num_rows * seq_len / tokens if tokens else int(self.starts[-1, 0]) / stream.num_documents

    def shuffled(self, r: int) -> int:
        """The row of the index that is drawn as the r-th: a permutation within each epoch of split documents."""
        if not self._rows_of_epoch:
            return r
        epoch, inside = divmod(r, self._rows_of_epoch)
        key = f"{self.stream.order_key}/rows of epoch {epoch}"
        place = permute(np.array([inside], dtype=np.int64), n=self._rows_of_epoch, key=key)
        return epoch * self._rows_of_epoch + int(place[0])


def source_facts(data: DataConfig, stage: StageConfig) -> dict[str, dict[str, object]]:
    """What of its sources decides which rows a stage draws, beside the stage itself: {name: {packing, min_doc_tokens,
    documents}}. Where the documents lie does not count: data may be moved.

    Reads a few MiB a source. `documents` is what `fingerprint_of` tells; `min_doc_tokens` holds with the stage's floor.

    Raises:
        DataError: files of a source are missing.
    """
    return {
        name: {
            "packing": data.sources[name].packing,
            "min_doc_tokens": doc_floor(data.sources[name], stage.lengths.get(name, SourceLengths())),
            "documents": fingerprint_of(data.sources[name].path),
        }
        for name in stage.mix
    }


def check_lengths(
    documents: IndexedDocuments,
    name: str,
    source: SourceConfig,
    lengths: SourceLengths,
    *,
    stage_index: int,
    seq_len: int,
) -> None:
    """Has the source `name` documents of the lengths that a stage wants? Reads all sizes where it does not take any.

    Args:
        seq_len: of the stage; no whole document may be longer.

    Raises:
        DataError: there are none, or one is too long; says how many documents there are, and how long.
    """
    floor, long, is_whole = doc_floor(source, lengths), lengths.long_doc_tokens, source.packing == "whole"
    if not (floor > 1 or long or is_whole):
        return
    counts = split_by_length(documents.num_documents, documents.sizes, floor=floor, long_doc_tokens=long)
    _require_lengths(counts, documents, floor, lengths, name, stage_index)
    if is_whole and counts.longest > seq_len:
        raise DataError(
            "a document is longer than a row, and this source packs whole documents",
            where=f"stages.{stage_index}.seq_len, data.sources.{name} ({documents.prefix})",
            got=f"{documents.num_documents:,} documents, the longest of {counts.longest:,} tokens",
            allowed=f"<= seq_len = {seq_len:,}",
            fix='raise the stage\'s seq_len, prepare shorter documents, or set packing = "split"',
        )


def _require_lengths(
    counts: LengthCounts, documents: IndexedDocuments, floor: int, lengths: SourceLengths, name: str, stage_index: int
) -> None:
    where = f"stages.{stage_index}.lengths.{name}"
    there = f"{documents.num_documents:,} documents, the longest of {counts.longest:,} tokens"
    what = "no document of the source has the length that the stage wants"
    long, share = lengths.long_doc_tokens, lengths.long_share
    if not counts.num_long and (share or not counts.num_short):
        key, least = ("long_doc_tokens", long) if long > floor else ("min_doc_tokens", floor)
        if key == "min_doc_tokens" and lengths.min_doc_tokens == "inherit":
            where = f"data.sources.{name}"
        where, got = f"{where}.{key} ({documents.prefix})", there
        allowed, fix = f"one or more of at least {least:,} tokens", f"lower {key}, or prepare longer documents"
    elif long and share < 1 and not counts.num_short:
        where, got = f"{where}.long_share ({documents.prefix})", f"{share}, and {there}; none is below {long:,} tokens"
        allowed = f"1.0, or one or more documents of {max(1, floor):,} to {long - 1:,} tokens"
        fix = "raise long_doc_tokens, lower min_doc_tokens, or set long_share = 1.0"
    else:
        return
    raise DataError(what, where=where, got=got, allowed=allowed, fix=fix)


def _divide(
    documents: IndexedDocuments, name: str, floor: int, lengths: SourceLengths, facts: _StageFacts
) -> tuple[LengthCounts, dict[str, NDArray[np.int64]]]:
    """The long and the shorter documents of a source: their numbers, and memory maps of their ids."""
    of_file = _digest([INDEX_VERSION, fingerprint_of(documents.prefix), floor, lengths.long_doc_tokens])
    path = facts.cache_dir / f"docs-{of_file}.npy"
    meta_path = path.with_suffix(".json")
    long, num = lengths.long_doc_tokens, documents.num_documents
    is_built = path.exists() and meta_path.exists()
    if is_built:
        counts = LengthCounts(**json.loads(meta_path.read_text()))
    else:
        counts = split_by_length(num, documents.sizes, floor=floor, long_doc_tokens=long)
    _require_lengths(counts, documents, floor, lengths, name, facts.stage_index)
    num_listed = counts.num_long + counts.num_short
    if not is_built:
        with published(path) as aside, published(meta_path) as meta_aside:
            out = _new_map(aside, (num_listed,))
            sides = out[: counts.num_long], out[counts.num_long :]
            split_by_length(num, documents.sizes, floor=floor, long_doc_tokens=long, out=sides)
            meta_aside.write_text(json.dumps(asdict(counts)) + "\n")
    ids = _map(path, (num_listed,))
    return counts, {"long": ids[: counts.num_long], "shorter": ids[counts.num_long :]}


def _short(number: float) -> str:
    """Two digits, or all before the point: 1,200, 31, 3.1, 0.31."""
    return f"{number:,.0f}" if number >= 9.95 else f"{number:.2g}"


def _parts_of(
    name: str, config: SourceConfig, lengths: SourceLengths, num_rows: int, facts: _StageFacts
) -> tuple[list[_Part], tuple[str, ...]]:
    """The parts of a source that give rows, and what the log says of them."""
    documents, floor, long = open_indexed(config.path), doc_floor(config, lengths), lengths.long_doc_tokens
    order = f"seed {facts.seed}/stage {facts.stage_index}"
    identity: list[object] = [fingerprint_of(documents.prefix), config.packing, floor]
    if not long:
        stream = DocumentStream(name, documents.num_documents, documents.sizes, floor, f"{order}/source {name}")
        return [_Part(documents, stream, config.packing, num_rows, identity, facts)], ()
    counts, ids = _divide(documents, name, floor, lengths, facts)
    # Long documents are named first: where half a row is left over, it is theirs.
    rows = rows_per_source({"long": lengths.long_share, "shorter": 1 - lengths.long_share}, num_rows)
    parts = {}
    for side in (side for side in rows if rows[side]):
        key = f"{order}/{side} documents of source {name}"
        stream = DocumentStream(name, ids[side].size, documents.sizes, 0, key, ids[side])
        parts[side] = _Part(documents, stream, config.packing, rows[side], [*identity, long], facts)
    natural = counts.long_tokens / (counts.long_tokens + counts.short_tokens)
    of_long, of_shorter = (_short(parts[side].epochs) if side in parts else "none" for side in rows)
    line = (
        f"{name}: {rows['long']:,} of its {num_rows:,} rows ({100 * lengths.long_share:g} % asked for) from documents "
        f"of >= {max(floor, long):,} tokens, which are {_short(100 * natural)} % of its tokens: "
        f"{_short(lengths.long_share / natural)} times as often; {of_long} epochs of them, {of_shorter} of the others"
    )
    return list(parts.values()), (line,)


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


def _new_map(path: Path, shape: tuple[int, ...]) -> NDArray[np.int64]:
    made: NDArray[np.int64] = np.lib.format.open_memmap(path, mode="w+", dtype=np.int64, shape=shape)  # type: ignore[no-untyped-call]
    return made


def _map(path: Path, shape: tuple[int, ...]) -> NDArray[np.int64]:
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
