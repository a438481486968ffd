"""Document order, row starts and mix: pure functions, checked against obvious ones."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moba_train.data import row_index
from moba_train.data.mix import mix_rows, rows_per_source
from moba_train.data.permutation import permute
from moba_train.data.row_index import DocumentStream, build_row_starts, split_by_length
from moba_train.data.sampler import rows_of_step
from moba_train.errors import ConfigError, DataError


def stream_of(sizes, *, key: str = "", min_doc_tokens: int = 0) -> DocumentStream:
    table = np.asarray(sizes, dtype=np.int64)
    return DocumentStream("text", table.size, lambda ids: table[ids], min_doc_tokens, key)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 100, 1000, 1023, 1024, 1025])
def test_the_order_is_a_permutation_for_any_number_of_documents(n):
    order = permute(np.arange(n), n=n, key="a")
    assert np.array_equal(np.sort(order), np.arange(n))


def test_any_part_of_the_order_can_be_asked_for_alone():
    whole = permute(np.arange(1000), n=1000, key="a")
    assert np.array_equal(permute(np.array([[7, 999], [0, 500]]), n=1000, key="a"), whole[[[7, 999], [0, 500]]])


def test_another_key_gives_another_order():
    assert not np.array_equal(permute(np.arange(100), n=100, key="a"), permute(np.arange(100), n=100, key="b"))


def test_every_document_comes_first_equally_often():
    firsts = np.array([int(permute(np.array([0]), n=12, key=f"key {i}")[0]) for i in range(6000)])
    counts = np.bincount(firsts, minlength=12)
    # 500 expected, standard deviation 21.
    assert counts.min() > 400 and counts.max() < 600


def test_neighbours_in_the_file_are_not_neighbours_in_the_order():
    order = permute(np.arange(100_000), n=100_000, key="a")
    assert np.count_nonzero(np.abs(np.diff(order)) == 1) < 20
    assert abs(np.corrcoef(order, np.arange(order.size))[0, 1]) < 0.02


def obvious_split(sizes, seq_len, num_rows):
    """Row starts by walking token by token."""
    points = [(p, o) for p in range(len(sizes)) for o in range(sizes[p])]
    # The first row begins at the beginning of the stream, empty documents included.
    return [(0, 0), *(points[r * seq_len] for r in range(1, num_rows + 1))]


def obvious_whole(sizes, seq_len, num_rows):
    starts, used = [], seq_len
    for p, size in enumerate(sizes):
        if size and used + size > seq_len:
            starts.append((p, 0))
            used = 0
        used += size
        if len(starts) > num_rows:
            break
    return [(0, 0), *starts[1:]]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    seq_len=st.integers(9, 20),
    num_rows=st.integers(1, 9),
    batch=st.integers(1, 5),
    packing=st.sampled_from(["split", "whole"]),
)
def test_row_starts_equal_those_of_an_obvious_walk(sizes, seq_len, num_rows, batch, packing):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_index, "DOCUMENTS_AT_ONCE", batch)
        built = build_row_starts(stream_of(sizes), packing=packing, seq_len=seq_len, num_rows=num_rows)
    endless = sizes * (seq_len * (num_rows + 2))
    obvious = obvious_split if packing == "split" else obvious_whole
    assert built.starts.tolist() == [list(start) for start in obvious(endless, seq_len, num_rows)]
    last, offset = built.starts[-1].tolist()
    assert built.num_documents == sum(1 for size in endless[: last + (offset > 0)] if size)
    assert built.num_cut == len({p for p, o in built.starts.tolist() if o > 0})


def test_every_epoch_has_an_order_of_its_own():
    stream = stream_of([1] * 50, key="seed 1")
    first, second = stream.documents(0, 50), stream.documents(50, 100)
    assert sorted(first) == sorted(second) == list(range(50))
    assert not np.array_equal(first, second)
    assert np.array_equal(stream.documents(30, 70), np.concatenate([first[30:], second[:20]]))


def test_short_documents_are_left_out():
    stream = stream_of([3, 10, 2, 10], min_doc_tokens=5)
    built = build_row_starts(stream, packing="split", seq_len=10, num_rows=2)
    assert built.starts.tolist() == [[0, 0], [3, 0], [5, 0]]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=20),
    floor=st.integers(0, 9),
    long=st.integers(0, 10),
    batch=st.integers(1, 7),
)
def test_documents_are_listed_on_both_sides_of_a_length(sizes, floor, long, batch):
    table = np.asarray(sizes, dtype=np.int64)
    expected = [
        [d for d, size in enumerate(sizes) if size >= max(1, floor) and (size >= long) == is_long]
        for is_long in (True, False)
    ]
    ids = tuple(np.full(len(side), -1, dtype=np.int64) for side in expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_index, "DOCUMENTS_AT_ONCE", batch)
        counts = split_by_length(table.size, lambda of: table[of], floor=floor, long_doc_tokens=long, out=ids)
    assert [side.tolist() for side in ids] == expected
    assert (counts.num_long, counts.num_short) == tuple(map(len, expected))
    assert (counts.long_tokens, counts.short_tokens) == tuple(sum(sizes[d] for d in side) for side in expected)
    assert counts.longest == max(sizes)


@pytest.mark.parametrize("key", ["", "seed 1"])
def test_listed_documents_alone_are_walked(key):
    table, ids = np.array([5, 90, 6, 91, 7, 92], dtype=np.int64), np.array([1, 3, 5])
    asked = []

    def sizes_of(documents):
        asked.extend(documents.tolist())
        return table[documents]

    stream = DocumentStream("text", 3, sizes_of, 0, key, ids)
    assert stream.tokens_of_epoch() == 273
    assert all(sorted(stream.documents(3 * epoch, 3 * epoch + 3)) == [1, 3, 5] for epoch in range(4))
    built = build_row_starts(stream, packing="split", seq_len=91, num_rows=6)
    assert built.starts[-1].tolist() == [6, 0] and set(asked) == {1, 3, 5}


def test_a_source_whose_documents_are_all_too_short_is_an_error_not_an_endless_loop():
    with pytest.raises(DataError, match="gives no token"):
        build_row_starts(stream_of([3, 4], min_doc_tokens=5), packing="split", seq_len=8, num_rows=1)


def test_a_whole_document_longer_than_a_row_is_an_error():
    with pytest.raises(DataError, match="longer than a row") as caught:
        build_row_starts(stream_of([3, 9, 8, 11, 10]), packing="whole", seq_len=8, num_rows=4)
    assert "document 3" in caught.value.where and caught.value.got == "11 tokens; 3 of 5 documents do not fit"


def index_synthetic(num_documents: int, out: np.ndarray) -> float:
    """Index documents whose sizes are computed, not stored; returns the peak of traced memory in MiB."""
    stream = DocumentStream("big", num_documents, lambda ids: 100 + (ids * 2654435761) % 1801, 0, "seed 1")
    tracemalloc.start()
    try:
        build_row_starts(
            stream, packing="split", seq_len=out_row_len(num_documents, len(out) - 1), num_rows=len(out) - 1, out=out
        )
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


def out_row_len(num_documents: int, num_rows: int) -> int:
    # A mean document has 1000 tokens: one epoch less a little.
    return num_documents * 990 // num_rows


def test_memory_does_not_grow_with_the_number_of_documents(monkeypatch):
    monkeypatch.setattr(row_index, "DOCUMENTS_AT_ONCE", 1 << 14)
    out = np.empty((1001, 2), dtype=np.int64)
    small, large = index_synthetic(100_000, out), index_synthetic(1_000_000, out)
    assert large < 1.2 * small + 0.1
    assert large < 8


@pytest.mark.slow
def test_a_hundred_million_documents_are_indexed_in_bounded_memory():
    assert index_synthetic(100_000_000, np.empty((100_001, 2), dtype=np.int64)) < 256


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=4), at_once=st.integers(1, 50))
def test_the_mix_takes_every_row_of_every_source_once_and_evenly(counts, at_once):
    out = np.full((sum(counts), 2), -1, dtype=np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moba_train.data.mix.ROWS_AT_ONCE", at_once)
        mix_rows(counts, out)
    for source, count in enumerate(counts):
        rows = np.flatnonzero(out[:, 0] == source)
        assert out[rows, 1].tolist() == list(range(count))
        # After n rows of the stage a source has given its share of them, up to one row per source.
        given_so_far = np.arange(1, count + 1)
        assert np.abs(given_so_far - (rows + 1) * count / sum(counts)).max() <= len(counts)


def test_weights_become_exact_counts():
    assert rows_per_source({"a": 3.0, "b": 1.0}, 8) == {"a": 6, "b": 2}
    assert rows_per_source({"a": 1.0, "b": 1.0, "c": 1.0}, 8) == {"a": 3, "b": 3, "c": 2}
    assert rows_per_source({"a": 0.999, "b": 0.001}, 10) == {"a": 10, "b": 0}


def test_ranks_slice_the_rows_of_a_step():
    assert [list(rows_of_step(3, rows_per_step=4, dp_rank=rank, dp=2)) for rank in range(2)] == [[12, 13], [14, 15]]
    with pytest.raises(ConfigError, match="multiple"):
        rows_of_step(0, rows_per_step=3, dp_rank=0, dp=2)
