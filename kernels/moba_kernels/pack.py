"""One packed row: its documents and, per chunk size, its chunk geometry. Host integers first, device copies on demand.

Shape letters: T tokens of the row, C chunks. Chunk ids count over the row: document after document, in order; an empty
document has no chunk, and no chunk crosses a document.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from threading import RLock
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import bad_argument
from .spec import AttentionSpec, Full, MoBA

IntArray = npt.NDArray[np.int64]
T = TypeVar("T")


def device_copy(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """On `device`, in the order of its current stream: from pinned memory, so that the host does not wait for a GPU."""
    x = torch.from_numpy(array)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class ChunkTensors(NamedTuple):
    """Device copies of a ChunkGeometry, all int64."""

    start_C: Tensor
    end_C: Tensor
    doc_C: Tensor
    first_chunk_of_doc: Tensor
    chunk_of_token_T: Tensor


class ChunkGeometry:
    """Where the chunks of a pack lie for one chunk_size. Built by `Pack.chunks`, never by hand."""

    def __init__(self, cu_seqlens: IntArray, chunk_size: int) -> None:
        lengths = np.diff(cu_seqlens)
        chunks_of_doc = -(-lengths // chunk_size)
        self.chunk_size = chunk_size
        self.first_chunk_of_doc: IntArray = np.concatenate(([0], np.cumsum(chunks_of_doc))).astype(np.int64)
        """[documents + 1]: chunks of document d are first_chunk_of_doc[d] .. first_chunk_of_doc[d + 1] - 1."""
        self.num_chunks = int(self.first_chunk_of_doc[-1])
        self.doc_C: IntArray = np.repeat(np.arange(len(lengths), dtype=np.int64), chunks_of_doc)
        self.index_in_doc_C: IntArray = np.arange(self.num_chunks, dtype=np.int64) - self.first_chunk_of_doc[self.doc_C]
        self.start_C: IntArray = cu_seqlens[self.doc_C] + self.index_in_doc_C * chunk_size
        self.end_C: IntArray = np.minimum(self.start_C + chunk_size, cu_seqlens[self.doc_C + 1])
        self.max_chunks_of_doc = int(chunks_of_doc.max(initial=0))
        self._on_device: dict[torch.device, ChunkTensors] = {}

    @property
    def chunk_of_token_T(self) -> IntArray:
        """[T] the chunk that each token lies in."""
        return np.repeat(np.arange(self.num_chunks, dtype=np.int64), self.end_C - self.start_C)

    def tensors(self, device: torch.device | str) -> ChunkTensors:
        """Copies on `device`, made once and kept on this object."""
        device = torch.device(device)
        if device not in self._on_device:
            arrays = (self.start_C, self.end_C, self.doc_C, self.first_chunk_of_doc)
            start_C, end_C, doc_C, first_chunk_of_doc = (device_copy(array, device) for array in arrays)
            chunk_C = torch.arange(self.num_chunks, device=device)
            num_tokens = int((self.end_C - self.start_C).sum())
            chunk_of_token_T = chunk_C.repeat_interleave(end_C - start_C, output_size=num_tokens)
            self._on_device[device] = ChunkTensors(start_C, end_C, doc_C, first_chunk_of_doc, chunk_of_token_T)
        return self._on_device[device]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_on_device": {}}


class Segments:
    """What is plain causal attention in a call: documents under Full, own chunks under MoBA, and whole documents again
    where topk chunks cover them and every query took all it could. Built by `Pack.segments`, never by hand.
    """

    def __init__(self, bounds: IntArray, spec: AttentionSpec, geometry: ChunkGeometry | None) -> None:
        lengths = np.diff(bounds)
        filled = lengths > 0
        if geometry is None:
            covered, covered_C, edges = filled, np.zeros(0, dtype=bool), bounds[np.append(True, filled)]
        else:
            assert isinstance(spec, MoBA)
            covered = lengths <= spec.topk * spec.chunk_size
            covered_C = covered[geometry.doc_C]
            first_of_doc = np.diff(geometry.doc_C, prepend=-1) > 0
            edges = np.append(geometry.start_C[first_of_doc | ~covered_C], bounds[-1])
        self.edges: IntArray = edges
        """[segments + 1]: segment s holds tokens edges[s] .. edges[s + 1] - 1."""
        self.covered_C: npt.NDArray[np.bool_] = covered_C
        """[C]: the picks of this chunk's queries lie in their segment already. Empty under Full."""
        self.num_covered_documents = int((covered & filled).sum())
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def any_picks(self) -> bool:
        """Is there a query whose picks lie outside its segment?"""
        return bool((~self.covered_C).any())

    def tensors(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """(edges int64 [segments + 1], covered_C bool [C]) on `device`, copied once and kept on this object."""
        device = torch.device(device)
        if device not in self._on_device:
            self._on_device[device] = device_copy(self.edges, device), device_copy(self.covered_C, device)
        return self._on_device[device]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_on_device": {}}


class Pack:
    """The documents of one packed row.

    Args:
        cu_seqlens: [documents + 1] cumulative lengths: starts at 0, never falls; equal neighbours = an empty document.
            A sequence of ints or an integer tensor. It is copied: editing the source later changes nothing here.

    Raises ValueError when it is empty, not integer, does not start at 0 or falls.
    """

    def __init__(self, cu_seqlens: Sequence[int] | Tensor) -> None:
        fix = "pass the running sums of the document lengths, e.g. [0, 128, 300] for documents of 128 and 172 tokens"
        if isinstance(cu_seqlens, Tensor):
            if cu_seqlens.is_floating_point() or cu_seqlens.is_complex() or cu_seqlens.layout != torch.strided:
                got = f"{cu_seqlens.layout} tensor of {cu_seqlens.dtype}"
                raise bad_argument("cu_seqlens must be a dense tensor of integers", got, fix)
            raw = cu_seqlens.detach().cpu().numpy()
        else:
            try:
                raw = np.asarray(cu_seqlens)
            except ValueError:  # rows of several lengths
                raise bad_argument("cu_seqlens must be a sequence of integers", cu_seqlens, fix) from None
        if raw.ndim != 1 or raw.size == 0 or not np.issubdtype(raw.dtype, np.integer):
            got = f"shape {tuple(raw.shape)}, dtype {raw.dtype}"
            raise bad_argument("cu_seqlens must be a non-empty 1-D sequence of integers", got, fix)
        bounds = raw.astype(np.int64)  # always a copy
        if bounds[0] != 0:
            raise bad_argument("cu_seqlens must start at 0", f"cu_seqlens[0] = {bounds[0]}", fix)
        falls = np.flatnonzero(np.diff(bounds) < 0)
        if falls.size:
            i = int(falls[0])
            raise bad_argument(
                "cu_seqlens must not fall", f"cu_seqlens[{i}:{i + 2}] = {bounds[i : i + 2].tolist()}", fix
            )
        self.cu_seqlens: tuple[int, ...] = tuple(bounds.tolist())
        self.bounds: IntArray = bounds
        """cu_seqlens as a numpy array; do not write to it."""
        bounds.setflags(write=False)
        self._chunks: dict[int, ChunkGeometry] = {}
        self._segments: dict[tuple[AttentionSpec, bool], Segments] = {}
        self._derived: dict[Hashable, Any] = {}
        self._building = RLock()

    @property
    def num_tokens(self) -> int:
        return self.cu_seqlens[-1]

    @property
    def num_documents(self) -> int:
        return len(self.cu_seqlens) - 1

    def chunks(self, chunk_size: int) -> ChunkGeometry:
        """The chunk geometry for `chunk_size`, computed once and kept on this object."""
        if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
            raise bad_argument("chunk_size must be an integer >= 1", repr(chunk_size), "pass chunk_size >= 1")
        if chunk_size not in self._chunks:
            self._chunks[chunk_size] = ChunkGeometry(self.bounds, chunk_size)
        return self._chunks[chunk_size]

    def segments(self, spec: AttentionSpec, *, complete: bool) -> Segments:
        """The causal segments under `spec`, computed once and kept. complete: see `Routing.complete`; without it no
        document counts as covered."""
        known = (spec, complete)
        if known not in self._segments:
            geometry = self.chunks(spec.chunk_size) if isinstance(spec, MoBA) else None
            counted = MoBA(spec.chunk_size, 1, spec.select) if isinstance(spec, MoBA) and not complete else spec
            self._segments[known] = Segments(self.bounds, counted, geometry)
        return self._segments[known]

    def derived(self, key: Hashable, build: Callable[[], T]) -> T:
        """What follows from the documents and `key` alone (a cut over ranks, its device copies): built once, kept on
        this object, left behind when it is pickled."""
        if key not in self._derived:
            with self._building:  # ranks that are threads share a Pack: one builds, the others wait for it
                if key not in self._derived:
                    self._derived[key] = build()
        kept: T = self._derived[key]
        return kept

    def planned_pairs(self, spec: AttentionSpec) -> int:
        """(query, key) pairs that one query head attends to under `spec`, in closed form."""
        return planned_pairs_of_lengths(np.diff(self.bounds), spec)

    def density(self, spec: AttentionSpec) -> float:
        """Attended pairs divided by causal pairs; 1.0 for Full and for an empty row."""
        causal = self.planned_pairs(Full())
        return self.planned_pairs(spec) / causal if causal else 1.0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pack) and self.cu_seqlens == other.cu_seqlens

    def __hash__(self) -> int:
        return hash(self.cu_seqlens)

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name != "_building"}
        return {**kept, "_derived": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._building = RLock()

    def __repr__(self) -> str:
        return f"Pack(num_tokens={self.num_tokens}, num_documents={self.num_documents})"


def planned_pairs_of_lengths(lengths: IntArray, spec: AttentionSpec) -> int:
    """(query, key) pairs that one query head attends to in documents of these lengths, in closed form.

    A query at offset o of its chunk, c chunks before it, attends to o + 1 + min(topk - 1, c) * chunk_size keys.
    """
    if isinstance(spec, Full):
        return int((lengths * (lengths + 1) // 2).sum())
    size, picks = spec.chunk_size, spec.num_picks
    whole, tail = lengths // size, lengths % size
    own = whole * (size * (size + 1) // 2) + tail * (tail + 1) // 2
    growing = np.minimum(whole, picks + 1)  # chunks 0 .. picks see all chunks before them, the rest see `picks`
    picked_by_whole = growing * (growing - 1) // 2 + (whole - growing) * picks
    picked = picked_by_whole * size * size + tail * np.minimum(whole, picks) * size
    return int((own + picked).sum())


def pack_of(cu_seqlens: Pack | Sequence[int] | Tensor | None, num_tokens: int) -> Pack:
    """The Pack of a call: given, built from cu_seqlens, or one document. ValueError unless it ends at num_tokens."""
    if cu_seqlens is None:
        return Pack([0, num_tokens] if num_tokens else [0])
    pack = cu_seqlens if isinstance(cu_seqlens, Pack) else Pack(cu_seqlens)
    if pack.num_tokens != num_tokens:
        fix = "cu_seqlens[-1] must equal the number of tokens of q, k and v"
        raise bad_argument(f"cu_seqlens must end at {num_tokens}", pack.num_tokens, fix)
    return pack


__all__ = ["ChunkGeometry", "ChunkTensors", "Pack", "pack_of", "planned_pairs_of_lengths"]
