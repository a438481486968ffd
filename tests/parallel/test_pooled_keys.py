"""The exchange of pooled chunk keys: who holds which chunk, and the means that come out, for any number of ranks.

One process stands in for N ranks here; the exchange over real ranks is tested with `context_attend`.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moba_kernels import MoBA, Pack, mean_keys, pool_sums
from moba_train.parallel.emulation import ThreadGroup, run_threads
from moba_train.parallel.pooled_keys import assemble, chunk_owners, contribution, exchange_plan, global_means
from moba_train.parallel.shard import Layout, shard, shard_positions
from moba_train.parallel.wire import Wire
from tests.parallel.sharded_case import NoHostRead

layouts = st.sampled_from(("zigzag", "contiguous"))
document_lengths = st.lists(st.integers(0, 40), min_size=1, max_size=6)


def _pack(documents: list[int]) -> Pack:
    return Pack(np.concatenate(([0], np.cumsum(documents))).tolist())


def _emulated_means(k: torch.Tensor, pack: Pack, chunk_size: int, num_ranks: int, layout: Layout) -> torch.Tensor:
    """The exchange of all ranks, one after the other: gather = concatenate, reduce = add up."""
    device = torch.device("cpu")
    gathered, total = [], torch.zeros(0)
    for rank in range(num_ranks):
        plan = exchange_plan(pack, chunk_size, num_ranks=num_ranks, rank=rank, layout=layout, device=device)
        positions = torch.from_numpy(shard_positions(pack.num_tokens, num_ranks, rank, layout))
        local = shard(k, 0, num_ranks=num_ranks, rank=rank, layout=layout)
        sums, counts = pool_sums(local, pack=pack, chunk_size=chunk_size, k_positions=positions)
        sent, straddling = contribution(sums, counts, plan)
        gathered.append(sent)
        total = straddling if rank == 0 else total + straddling
    return assemble(torch.cat(gathered), total, plan)


@settings(deadline=None, max_examples=60)
@given(document_lengths, st.integers(1, 50), st.integers(1, 24), layouts)
def test_a_chunk_is_whole_on_a_rank_exactly_when_that_rank_holds_all_its_tokens(
    documents: list[int], chunk_size: int, num_ranks: int, layout: Layout
) -> None:
    pack = _pack(documents)
    rank_of_token = np.empty(pack.num_tokens, dtype=np.int64)
    for rank in range(num_ranks):
        rank_of_token[shard_positions(pack.num_tokens, num_ranks, rank, layout)] = rank
    geometry = pack.chunks(chunk_size)
    owners = chunk_owners(pack, chunk_size, num_ranks=num_ranks, layout=layout)
    for chunk, (start, end) in enumerate(zip(geometry.start_C, geometry.end_C, strict=True)):
        held_by = set(rank_of_token[start:end].tolist())
        assert owners.owner_C[chunk] == (held_by.pop() if len(held_by) == 1 else -1)


@settings(deadline=None, max_examples=40)
@given(document_lengths, st.integers(1, 50), st.integers(1, 24), layouts, st.integers(0, 10**6))
def test_the_means_are_bitwise_those_of_one_rank(
    documents: list[int], chunk_size: int, num_ranks: int, layout: Layout, seed: int
) -> None:
    pack = _pack(documents)
    k = torch.randn(pack.num_tokens, 2, 3, generator=torch.Generator().manual_seed(seed))
    expected = mean_keys(*pool_sums(k, pack=pack, chunk_size=chunk_size))
    assert torch.equal(_emulated_means(k, pack, chunk_size, num_ranks, layout), expected)


@pytest.mark.parametrize("num_ranks", [8, 64, 512])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_only_shard_edges_can_be_straddled_at_any_scale(num_ranks: int, layout: Layout) -> None:
    pack = Pack([0, 100_000, 100_001, 400_000])
    owners = chunk_owners(pack, 128, num_ranks=num_ranks, layout=layout)
    assert 0 < len(owners.straddling) <= 2 * num_ranks - 1
    rows = owners.rows_of_exchange()
    assert len(set(rows.tolist())) == len(rows)
    assert rows.max() < num_ranks * owners.most_whole + len(owners.straddling)


def test_a_million_token_row_exchanges_a_megabyte_a_layer() -> None:
    # T = 1M, chunk 4096, K = 8, D = 128 on 8 ranks: fp32 means only, and no straddling chunk
    owners = chunk_owners(Pack([0, 1 << 20]), 4096, num_ranks=8, layout="zigzag")
    assert len(owners.straddling) == 0
    assert 8 * owners.most_whole * 8 * 128 * 4 <= 1.1e6


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_nothing_is_read_from_the_device_for_the_exchange_of_a_row_that_is_known(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both exchanges and the means; pooling and scores are the operator's affair."""
    pack, spec = _pack([30, 1, 61]), MoBA(8, 3)  # no shard ends where a chunk does
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(pack.num_tokens, 2, 8, generator=generator)

    def rank_main(group: ThreadGroup) -> torch.Tensor:
        k = shard(whole, 0, num_ranks=3, rank=group.rank(), layout=layout)
        positions = torch.from_numpy(shard_positions(pack.num_tokens, 3, group.rank(), layout))

        def layer() -> torch.Tensor:
            return global_means(Wire(group), k, spec, layout=layout, pack=pack, positions_S=positions)

        pooled[threading.get_ident()] = pool_sums(k, pack=pack, chunk_size=8, k_positions=positions)
        layer()
        with NoHostRead():  # type: ignore[no-untyped-call]
            return layer()

    pooled: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    monkeypatch.setattr("moba_train.parallel.pooled_keys.pool_sums", lambda *_, **__: pooled[threading.get_ident()])
    means = run_threads(rank_main, 3)
    assert chunk_owners(pack, 8, num_ranks=3, layout=layout).straddling.size
    assert all(torch.equal(of_rank, means[0]) for of_rank in means)
