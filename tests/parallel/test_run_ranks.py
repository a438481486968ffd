"""The launcher that every test of several ranks stands on."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankError, run_ranks


def _sum_of_ranks(rank: int, n: int, offset: int) -> tuple[int, torch.Tensor, int]:
    total = torch.tensor([rank + offset])
    dist.all_reduce(total)
    return rank, total, torch.get_num_threads()


def _one_rank_raises(rank: int, n: int) -> None:
    if rank == 1:
        raise ValueError("the second rank is unhappy")
    dist.barrier()


def _one_rank_dies(rank: int, n: int) -> None:
    if rank == 0:
        os._exit(7)
    time.sleep(60)


def _ranks_hang(rank: int, n: int) -> None:
    time.sleep(60)


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_results_come_back_in_rank_order_and_ranks_have_one_thread(method: str) -> None:
    results = run_ranks(_sum_of_ranks, 3, 10, method=method)
    assert [(rank, int(total), threads) for rank, total, threads in results] == [(0, 33, 1), (1, 33, 1), (2, 33, 1)]


def test_the_error_of_a_rank_is_shown_with_its_traceback() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2(.|\n)*the second rank is unhappy"):
        run_ranks(_one_rank_raises, 2)


def test_a_rank_that_dies_is_reported_with_its_exit_code() -> None:
    with pytest.raises(RankError, match="rank 0 of 2: died with exit code 7"):
        run_ranks(_one_rank_dies, 2)


def test_ranks_that_hang_are_killed_after_the_timeout() -> None:
    with pytest.raises(RankError, match=r"ranks \[0, 1\] of 2 still ran after 2"):
        run_ranks(_ranks_hang, 2, timeout_s=2.0)
