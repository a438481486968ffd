"""The halo between shards: a causal convolution over a sharded row gives what it gives on one rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moba_kernels import Pack
from moba_train.parallel.emulation import ThreadGroup, run_threads
from moba_train.parallel.halo import halo_plan, key_halo
from moba_train.parallel.shard import Layout, shard, shard_pieces, shard_positions
from tests.distributed import run_ranks
from tests.parallel.sharded_case import NoHostRead

LAYOUTS: tuple[Layout, ...] = ("zigzag", "contiguous")
# (tokens, cu_seqlens): even cut, uneven cut with empty and one-token documents, fewer tokens than the halo spans
ROWS = ((32, [0, 32]), (45, [0, 11, 11, 12, 45]), (5, [0, 2, 5]), (2, [0, 2]))


def _tokens_of_documents(cu_seqlens: list[int]) -> Tensor:
    lengths = torch.tensor(cu_seqlens).diff()
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


def _convolve(before_TWD: Tensor, document_T: Tensor, positions: Tensor, filters_WD: Tensor) -> Tensor:
    """y_t = sum_w filters[w] x[t - w] within the document; before_TWD[t, w] = x[t - w]."""
    width = filters_WD.shape[0]
    source = positions[:, None] - torch.arange(width)
    same = (source >= 0) & (document_T[source.clamp_min(0)] == document_T[positions][:, None])
    return (torch.where(same[..., None], before_TWD, 0.0) * filters_WD).sum(1)


def _windows(extended: Tensor, width: int) -> Tensor:
    """[S + width - 1, D] -> [S, width, D], the latest token first."""
    return torch.stack([extended[width - 1 - w : extended.shape[0] - w] for w in range(width)], 1)


def _one_rank(x: Tensor, cu_seqlens: list[int], filters: Tensor) -> Tensor:
    width = filters.shape[0]
    padded = torch.cat([x.new_zeros(width - 1, x.shape[1]), x])
    return _convolve(_windows(padded, width), _tokens_of_documents(cu_seqlens), torch.arange(x.shape[0]), filters)


def _many_ranks(rank: int, n: int) -> float:
    worst = 0.0
    for layout in LAYOUTS:
        for num_tokens, cu_seqlens in ROWS:
            for width in (3, 5):
                generator = torch.Generator().manual_seed(num_tokens + width)
                x, dy = (torch.randn(num_tokens, 4, generator=generator) for _ in range(2))
                filters = torch.randn(width, 4, generator=generator)
                worst = max(worst, _difference(x, dy, filters, cu_seqlens, layout, rank, n))
    return worst


def _difference(
    x: Tensor, dy: Tensor, filters: Tensor, cu_seqlens: list[int], layout: Layout, rank: int, n: int
) -> float:
    """Largest difference to one rank of output, gradient of the input and gradient of the filters."""
    num_tokens, width = x.shape[0], filters.shape[0]
    whole, w = x.clone().requires_grad_(), filters.clone().requires_grad_()
    expected = _one_rank(whole, cu_seqlens, w)
    expected.backward(dy)

    local = shard(x, 0, num_ranks=n, rank=rank, layout=layout).clone().requires_grad_()
    local_w = filters.clone().requires_grad_()
    halos = key_halo(local, width - 1, num_tokens=num_tokens, layout=layout, group=dist.group.WORLD)
    sizes = [stop - start for start, stop in shard_pieces(num_tokens, n, rank, layout)]
    windows = [_windows(torch.cat([halo, piece]), width) for halo, piece in zip(halos, local.split(sizes), strict=True)]
    positions = torch.from_numpy(shard_positions(num_tokens, n, rank, layout))
    y = _convolve(torch.cat(windows), _tokens_of_documents(cu_seqlens), positions, local_w)
    y.backward(shard(dy, 0, num_ranks=n, rank=rank, layout=layout))
    assert local.grad is not None and local_w.grad is not None and whole.grad is not None and w.grad is not None
    dist.all_reduce(local_w.grad)
    pairs = (
        (y, shard(expected, 0, num_ranks=n, rank=rank, layout=layout)),
        (local.grad, shard(whole.grad, 0, num_ranks=n, rank=rank, layout=layout)),
        (local_w.grad, w.grad),
    )
    return max(float((a - b).abs().max()) if a.numel() else 0.0 for a, b in pairs)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_convolution_over_shards_equals_one_rank_forward_and_backward(num_ranks: int) -> None:
    assert max(run_ranks(_many_ranks, num_ranks)) <= 1e-5


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 90), st.integers(1, 6), st.integers(1, 20), st.sampled_from(LAYOUTS))
def test_every_halo_slot_names_the_token_before_the_piece(
    num_tokens: int, halo: int, num_ranks: int, layout: Layout
) -> None:
    plans = [halo_plan(num_tokens, halo, num_ranks=num_ranks, rank=r, layout=layout) for r in range(num_ranks)]
    table = []
    for rank, plan in enumerate(plans):
        positions = shard_positions(num_tokens, num_ranks, rank, layout)
        table += [int(positions[row]) if row >= 0 else None for row in plan.sent]
    for rank, plan in enumerate(plans):
        wanted = [
            token if token >= 0 else None
            for start, _ in shard_pieces(num_tokens, num_ranks, rank, layout)
            for token in range(start - halo, start)
        ]
        assert [table[row] if row >= 0 else None for row in plan.taken] == wanted


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_read_from_the_device_for_a_halo_of_a_row_that_is_known(layout: Layout) -> None:
    num_tokens, cu_seqlens = ROWS[1]
    pack = Pack(cu_seqlens)

    def rank_main(group: ThreadGroup) -> None:
        x = shard(torch.ones(num_tokens, 2), 0, num_ranks=3, rank=group.rank(), layout=layout).requires_grad_()

        def layer() -> None:
            halo = key_halo(x, 2, num_tokens=num_tokens, layout=layout, group=group, pack=pack)
            torch.autograd.grad(halo.sum(), x)

        layer()
        with NoHostRead():  # type: ignore[no-untyped-call]
            layer()

    run_threads(rank_main, 3)


def test_one_rank_needs_no_group_and_a_halo_of_nothing_is_empty() -> None:
    x = torch.arange(6.0).view(6, 1)
    assert key_halo(x, 2, num_tokens=6, layout="contiguous", group=None).tolist() == [[[0.0], [0.0]]]
    assert key_halo(x, 2, num_tokens=6, layout="zigzag", group=None)[1].flatten().tolist() == [1.0, 2.0]
    assert key_halo(x, 0, num_tokens=6, layout="zigzag", group=None).shape == (2, 0, 1)


def test_a_shard_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"contiguous shard of rank 0 of 1, 7 of 7 tokens.*got \(6, 1\)"):
        key_halo(torch.zeros(6, 1), 2, num_tokens=7, layout="contiguous", group=None)
