"""The cut of a row into shards: any length, any number of ranks, both layouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moba_train.parallel.shard import (
    Layout,
    gather_shards,
    longest_shard,
    shard,
    shard_length,
    shard_pieces,
    shard_positions,
    unshard,
)
from tests.distributed import run_ranks

LAYOUTS: tuple[Layout, ...] = ("zigzag", "contiguous")
lengths = st.integers(0, 200)
ranks = st.integers(1, 17)
layouts = st.sampled_from(LAYOUTS)


@settings(deadline=None, max_examples=150)
@given(lengths, ranks, layouts)
def test_every_token_is_on_exactly_one_rank_and_shards_ascend(num_tokens: int, num_ranks: int, layout: Layout) -> None:
    shards = [shard_positions(num_tokens, num_ranks, rank, layout) for rank in range(num_ranks)]
    assert sorted(np.concatenate(shards).tolist()) == list(range(num_tokens))
    for rank, positions in enumerate(shards):
        assert positions.dtype == np.int64
        assert (np.diff(positions) > 0).all()
        assert len(positions) == shard_length(num_tokens, num_ranks, rank, layout)
    assert max(map(len, shards)) == longest_shard(num_tokens, num_ranks, layout)
    assert max(map(len, shards)) - min(map(len, shards)) <= 2


@settings(deadline=None, max_examples=150)
@given(lengths, ranks, layouts, st.integers(0, 2))
def test_unshard_undoes_shard_along_any_dim(num_tokens: int, num_ranks: int, layout: Layout, dim: int) -> None:
    shape = [2, 3, 2]
    shape[dim] = num_tokens
    x = torch.arange(int(np.prod(shape))).view(shape)
    shards = [shard(x, dim, num_ranks=num_ranks, rank=rank, layout=layout) for rank in range(num_ranks)]
    assert torch.equal(unshard(shards, dim, num_tokens=num_tokens, layout=layout), x)


@settings(deadline=None, max_examples=60)
@given(lengths, ranks, layouts)
def test_shards_hold_the_tokens_that_their_positions_name(num_tokens: int, num_ranks: int, layout: Layout) -> None:
    x = torch.arange(num_tokens)
    for rank in range(num_ranks):
        local = shard(x, 0, num_ranks=num_ranks, rank=rank, layout=layout)
        assert local.tolist() == shard_positions(num_tokens, num_ranks, rank, layout).tolist()


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 16, 23])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_pieces_are_those_of_tensor_split(num_tokens: int, num_ranks: int) -> None:
    x = torch.arange(num_tokens)
    contiguous = torch.tensor_split(x, num_ranks)
    zigzag = torch.tensor_split(x, 2 * num_ranks)
    for rank in range(num_ranks):
        assert torch.equal(shard(x, 0, num_ranks=num_ranks, rank=rank, layout="contiguous"), contiguous[rank])
        expected = torch.cat([zigzag[rank], zigzag[2 * num_ranks - 1 - rank]])
        assert torch.equal(shard(x, 0, num_ranks=num_ranks, rank=rank, layout="zigzag"), expected)


def test_zigzag_gives_every_rank_the_same_causal_work_where_the_row_divides() -> None:
    work = [int((shard_positions(64, 4, rank, "zigzag") + 1).sum()) for rank in range(4)]
    assert len(set(work)) == 1


def test_an_unknown_layout_or_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="layout must be 'zigzag' or 'contiguous'; got 'ring'"):
        shard_positions(8, 2, 0, "ring")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rank must lie in 0..1; got 2"):
        shard_pieces(8, 2, 2, "zigzag")


def _gathered(rank: int, n: int) -> bool:
    group = torch.distributed.group.WORLD
    for layout in LAYOUTS:
        for num_tokens in (0, 1, 2, 9, 24):
            x = torch.arange(2.0 * num_tokens).view(2, num_tokens)
            local = shard(x, 1, num_ranks=n, rank=rank, layout=layout)
            assert torch.equal(gather_shards(local, 1, num_tokens=num_tokens, layout=layout, group=group), x)
    return True


def test_gathering_the_shards_of_all_ranks_gives_the_row_on_every_rank() -> None:
    assert all(run_ranks(_gathered, 3))
    assert torch.equal(gather_shards(torch.ones(4), 0, num_tokens=4, layout="zigzag", group=None), torch.ones(4))
