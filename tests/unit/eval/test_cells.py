"""The needle grid as pure functions, against values worked out by hand or by enumeration."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from moba_train.eval.cells import (
    NiahRecord,
    by_chunk_offset,
    depth_grid,
    expected_share,
    is_dense,
    mean_by_length,
    mean_score,
    middle_depths,
    routed_share,
    summarise,
    token_chunks,
    wilson_interval,
)

RECORD = NiahRecord(
    context_length=512,
    depth_percent=50.0,
    sample=0,
    attention="moba",
    score=1.0,
    log_prob=-0.5,
    routed=0.5,
    routed_expected=0.25,
    dense=False,
    model_response="silver walnut",
    expected="silver walnut",
    key="amber river",
    needle_chunk=3,
    needle_offset=10,
    needle_tokens=9,
    chunk_size=64,
    topk=3,
    select="head",
    step=100,
    weights="f0f0",
    stage="long",
    seed=1,
    sample_hash="0123",
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(8, 8, 0.6756, 1.0), (0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (0, 0, 0.0, 1.0)],
)
def test_wilson_interval_has_the_published_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-4)


def test_depths_are_even_and_the_loop_takes_the_middle_ones() -> None:
    assert depth_grid(6) == (0.0, 20.0, 40.0, 60.0, 80.0, 100.0)
    assert depth_grid(4) == (0.0, 33.33, 66.67, 100.0)
    assert depth_grid(1) == (50.0,)
    assert middle_depths(6) == (20.0, 40.0, 60.0, 80.0)
    assert middle_depths(2) == (0.0, 100.0)


def test_a_cell_is_dense_up_to_topk_chunks() -> None:
    assert is_dense(192, chunk_size=64, topk=3)
    assert not is_dense(193, chunk_size=64, topk=3)


def test_token_chunks_cover_a_span_that_straddles() -> None:
    assert list(token_chunks(63, 64, chunk_size=64)) == [0]
    assert list(token_chunks(63, 65, chunk_size=64)) == [0, 1]
    assert list(token_chunks(64, 66, chunk_size=64)) == [1]


@pytest.mark.parametrize("topk", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("chunks", [range(1), range(2, 4), range(4, 6), range(6, 7)])
def test_the_share_expected_at_random_is_that_of_all_possible_picks(topk: int, chunks: range) -> None:
    chunk_size, position = 8, 6 * 8 + 3  # the query's own chunk is number 6
    picks = min(topk - 1, 6)
    outcomes = [bool({6, *drawn} & set(chunks)) for drawn in itertools.combinations(range(6), picks)]
    share = expected_share([position], chunks, chunk_size=chunk_size, topk=topk)
    assert share == pytest.approx(sum(outcomes) / len(outcomes))


def test_the_expected_share_is_the_mean_over_queries() -> None:
    one = expected_share([16], range(1), chunk_size=8, topk=2)
    two = expected_share([32], range(1), chunk_size=8, topk=2)
    assert (one, two) == (0.5, 0.25)
    assert expected_share([16, 32], range(1), chunk_size=8, topk=2) == pytest.approx(0.375)


def test_routed_share_counts_queries_and_heads_that_picked_the_chunk_of_this_document() -> None:
    picks = np.array([[[7, 5, -1], [7, 4, -1]], [[7, 4, 5], [7, -1, -1]]], dtype=np.int32)
    assert routed_share(picks, range(1, 2), first_chunk=4) == 0.5
    assert routed_share(picks, range(2), first_chunk=4) == 0.75
    assert routed_share(picks, range(5, 6), first_chunk=4) == 0.0


def test_cells_hold_means_and_come_ordered() -> None:
    records = [
        dataclasses.replace(RECORD, attention="full", routed=None, routed_expected=None),
        dataclasses.replace(RECORD, depth_percent=100.0),
        dataclasses.replace(RECORD, score=0.0, log_prob=-1.5, sample=1, routed=0.0),
        RECORD,
        dataclasses.replace(RECORD, context_length=256, score=0.0),
    ]
    cells = summarise(records)
    names = [(cell.attention, cell.context_length, cell.depth_percent) for cell in cells]
    assert names == [("full", 512, 50.0), ("moba", 256, 50.0), ("moba", 512, 50.0), ("moba", 512, 100.0)]
    middle = cells[2]
    assert (middle.num_samples, middle.score, middle.log_prob, middle.routed) == (2, 0.5, -1.0, 0.25)
    assert (middle.low, middle.high) == wilson_interval(1, 2)
    assert cells[0].routed is None
    assert mean_score(cells, "moba") == pytest.approx((0 + 0.5 + 1) / 3)
    assert mean_score(cells, "random") is None


def test_means_by_length_pool_all_depths() -> None:
    records = [dataclasses.replace(RECORD, depth_percent=float(d), score=float(d > 50)) for d in (0, 50, 100)]
    assert mean_by_length(records) == {("moba", 512): (1 / 3, *wilson_interval(1, 3), 3)}


def test_offsets_in_the_chunk_are_grouped_and_straddling_needles_stand_apart() -> None:
    offsets = {0: 1.0, 15: 0.0, 16: 1.0, 55: 1.0, 56: 0.0}  # a needle of 9 tokens that begins at 56 leaves the chunk
    records = [dataclasses.replace(RECORD, needle_offset=o, score=s) for o, s in offsets.items()]
    records.append(dataclasses.replace(RECORD, dense=True))
    groups = {cell.depth_percent: (cell.num_samples, cell.score) for cell in by_chunk_offset(records, "moba")}
    assert groups == {0.0: (2, 0.5), 25.0: (1, 1.0), 75.0: (1, 1.0), 100.0: (1, 0.0)}
