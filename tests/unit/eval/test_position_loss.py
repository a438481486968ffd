"""Held-out loss by position, against sums worked out by hand; over ranks, against one rank."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moba_train.data.row import Row
from moba_train.errors import ConfigError, DataError, UserError
from moba_train.eval.position_loss import (
    bucket_edges,
    document_positions,
    evaluate_position_loss,
    position_metrics,
    trailing_start,
)
from moba_train.parallel.ranks import from_rank_0, map_over_ranks
from tests.distributed import run_ranks

from .toy import FormulaEngine


class ListedRows:
    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, i: int) -> Row:
        return self.rows[i]


def make_row(cu_seqlens: tuple[int, ...], masked: tuple[int, ...] = ()) -> Row:
    size = cu_seqlens[-1]
    mask = np.ones(size, dtype=np.float32)
    mask[list(masked)] = 0
    return Row(np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64), mask, cu_seqlens)


def linear(position: np.ndarray, attention: str) -> np.ndarray:
    return position + (1.0 if attention == "moba" else 0.0)


def test_positions_restart_at_every_document_and_empty_documents_have_none() -> None:
    assert document_positions((0, 3, 3, 5)).tolist() == [0, 1, 2, 0, 1]


def test_buckets_divide_the_row_evenly() -> None:
    assert bucket_edges(2048, 8) == (0, 256, 512, 768, 1024, 1280, 1536, 1792, 2048)
    assert bucket_edges(10, 4) == (0, 2, 5, 7, 10)
    assert bucket_edges(3, 8) == (0, 1, 2, 3)
    assert trailing_start(2048) == 1920
    assert trailing_start(8) == 7


def test_buckets_trailing_part_and_mean_have_the_values_of_a_sum_by_hand() -> None:
    rows = ListedRows([make_row((0, 16)), make_row((0, 6, 16), masked=(3, 15))])
    result = evaluate_position_loss(
        FormulaEngine(linear), rows, num_rows=9, seq_len=16, buckets=4, attention="full", count_bytes=lambda row: 30
    )
    first = list(range(16))
    second = [0, 1, 2, 4, 5, *range(9)]  # positions inside the two documents, without the masked ones
    counted = first + second
    assert result.loss == pytest.approx(sum(counted) / len(counted))
    by_bucket = [[p for p in counted if 4 * b <= p < 4 * b + 4] for b in range(4)]
    assert result.bucket_tokens == tuple(len(bucket) for bucket in by_bucket)
    assert result.bucket_loss == pytest.approx([sum(bucket) / len(bucket) for bucket in by_bucket])
    assert result.trailing_loss == pytest.approx(15.0)
    assert result.bits_per_byte == pytest.approx(sum(counted) / math.log(2) / 60)


def test_a_bucket_without_tokens_is_none_and_so_is_the_trailing_part() -> None:
    rows = ListedRows([make_row((0, 5, 16 - 6, 16))])
    result = evaluate_position_loss(FormulaEngine(linear), rows, num_rows=1, seq_len=16, buckets=4, attention="moba")
    assert result.bucket_loss[2:] == (None, None)
    assert result.trailing_loss is None
    assert result.bits_per_byte is None


def test_metrics_hold_both_attentions_and_leave_out_what_is_not_known() -> None:
    long, short = ListedRows([make_row((0, 16))]), ListedRows([make_row((0, 8, 16))])
    known = position_metrics(
        FormulaEngine(linear),
        long,
        num_rows=1,
        seq_len=16,
        buckets=2,
        count_bytes=lambda row: 16,
        unigram_bits_per_byte=3.5,
    )
    assert known["eval/loss_moba"] == pytest.approx(8.5)
    assert known["eval/loss_full"] == pytest.approx(7.5)
    assert known["eval/trailing_loss_full"] == pytest.approx(15.0)
    assert known["eval/position_loss_moba"] == pytest.approx([4.5, 12.5])
    assert known["eval/position_edges"] == [0.0, 8.0, 16.0]
    assert known["eval/bits_per_byte_unigram"] == 3.5
    fewer = position_metrics(FormulaEngine(linear), short, num_rows=1, seq_len=16, buckets=2)
    assert fewer["eval/position_loss_full"] == [pytest.approx(3.5), None]
    assert not [key for key in fewer if "trailing" in key or "byte" in key]


@pytest.mark.parametrize(("num_rows", "buckets", "rows"), [(0, 4, 1), (1, 0, 1), (1, 4, 0)])
def test_nothing_to_measure_is_an_error_that_says_what_to_mend(num_rows: int, buckets: int, rows: int) -> None:
    listed = ListedRows([make_row((0, 16))] * rows)
    with pytest.raises(ConfigError, match=r"eval\.rows"):
        evaluate_position_loss(
            FormulaEngine(linear), listed, num_rows=num_rows, seq_len=16, buckets=buckets, attention="full"
        )


def _topology(rank: int, n: int, cp: int) -> Any:
    device = torch.device("cpu")
    return SimpleNamespace(rank=rank, world_size=n, dp=n // cp, dp_rank=rank // cp, device=device)


def _loss_on_rank(rank: int, n: int, cp: int) -> Any:
    rows = ListedRows([make_row((0, 3 + i, 16), masked=(i,)) for i in range(5)])
    engine = FormulaEngine(linear, topology=_topology(rank, n, cp))
    return evaluate_position_loss(engine, rows, num_rows=5, seq_len=16, buckets=4, attention="moba")


def _raise_on_rank(rank: int, n: int) -> str:
    def decide() -> int:
        raise DataError("the file is damaged", where="niah.jsonl, line 3")

    try:
        from_rank_0(decide)
    except UserError as error:
        return error.message()
    return "no error"


def _indices_of_rank(rank: int, n: int) -> tuple[list[int], list[int]]:
    worked: list[int] = []
    results = map_over_ranks(lambda i: worked.append(i) or 10 * i, range(5), _topology(rank, n, 1))
    return worked, results


def test_loss_is_the_same_for_any_split_of_rows_over_data_parallel_ranks() -> None:
    alone = _loss_on_rank(0, 1, 1)
    assert run_ranks(_loss_on_rank, 4, 2) == [alone] * 4


def test_an_error_of_rank_0_is_raised_on_every_rank() -> None:
    messages = run_ranks(_raise_on_rank, 2)
    assert messages[0] == messages[1]
    assert "niah.jsonl, line 3" in messages[0]


def test_data_parallel_ranks_share_the_work_and_get_all_results() -> None:
    (first, results), (second, same) = run_ranks(_indices_of_rank, 2)
    assert (first, second) == ([0, 2, 4], [1, 3, 4])  # equally often: an evaluation may be collective over all ranks
    assert results == same == [0, 10, 20, 30, 40]
