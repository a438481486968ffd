"""The gate's compiled kernel: the picks of PyTorch's operations, in whatever order scores come, for any threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moba_kernels import MoBA, Pack, Routing, mean_keys, pool_sums, route, route_means
from moba_kernels.native import Arguments, available
from moba_kernels.route import native

from .inputs import assert_same_choice, make_qkv

pytestmark = pytest.mark.skipif(not available(), reason="no C compiler here")


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    """The kernel did run."""
    seen, real = [], Arguments.run
    monkeypatch.setattr(Arguments, "run", lambda self, name, *flags: (seen.append(name), real(self, name, *flags)))
    yield
    assert "moba_gate" in seen


@pytest.fixture(params=["small blocks", "blocks as they are"])
def blocks(request, monkeypatch):
    """Short rows in several blocks, and as calls of their size have them."""
    if request.param == "small blocks":
        monkeypatch.setattr(native, "BLOCK_ROWS", 7)


def scored(scores, spec, query=1.0):
    """The routing where chunk i, of one token, has the score query * scores[i] for the last query."""
    tokens = len(scores) + 1
    means = torch.cat((scores, torch.zeros(1)))[:, None, None]
    q = torch.full((1, 1, 1), query)
    return route_means(q, means, spec, pack=Pack([0, tokens]), q_positions=torch.tensor([tokens - 1]))


def falling(scores, count):
    """The indices of the largest, ties to the later one."""
    return sorted(range(len(scores)), key=lambda i: (scores[i].item(), i), reverse=True)[:count]


ORDERS = {
    "random": lambda n: torch.randn(n, generator=torch.Generator().manual_seed(1)),
    "rising": lambda n: torch.arange(n).float(),
    "falling": lambda n: -torch.arange(n).float(),
    "up and down": lambda n: -(torch.arange(n) - n // 3).abs().float(),
    "equal": lambda n: torch.full((n,), -2.5),
    "two values": lambda n: (torch.arange(n) % 3 == 1).float(),
    "few values": lambda n: ((torch.arange(n) * 7919) % 11 - 5).float(),
    "tiny and huge": lambda n: (-1.0) ** torch.arange(n) * 10.0 ** ((torch.arange(n) * 31) % 76 - 44).float(),
}


@pytest.mark.parametrize("count", [1, 2, 3, 11, 40, 127, 600])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_the_best_scores_are_picked_in_falling_order(order, count):
    for chunks in (1, 5, 16, 33, 130, 700, 2000):
        scores = order(chunks)
        picks = scored(scores, MoBA(1, count + 1)).picks[0, 0]
        assert [pick for pick in picks.tolist() if pick >= 0] == falling(scores, count)


def test_infinite_scores_are_the_best_and_the_worst_ones():
    scores = torch.zeros(90)
    scores[[3, 50]], scores[[4, 89]] = torch.inf, -torch.inf
    assert scored(scores, MoBA(1, 4)).picks[0, 0].tolist() == [50, 3, 88]
    assert scored(scores, MoBA(1, 91)).picks[0, 0].tolist()[-2:] == [89, 4]


def test_scores_that_round_to_a_zero_of_either_sign_tie():
    scores = torch.tensor([1e-30, -1e-30, 1e-30, -1e-30])
    assert scored(scores, MoBA(1, 5), query=1e-30).picks[0, 0].tolist() == [3, 2, 1, 0]


def test_scores_that_are_not_numbers_leave_picks_that_are_candidates():
    q, k, _, _ = make_qkv([0, 40, 200], dtype=torch.float32)
    q[::3, 0, 0] = torch.nan
    k[150, 1, 2] = torch.nan
    for spec in (MoBA(4, 3), MoBA(4, 30), MoBA(4, 12, "group")):
        routing = route(q, k, spec, cu_seqlens=[0, 40, 200])
        Routing(routing.picks, spec, routing.pack).validate()
        assert torch.equal((routing.picks >= 0).sum(-1)[:, 0], candidates(routing).clamp_max(spec.num_picks))


def candidates(routing):
    geometry = routing.pack.chunks(routing.spec.chunk_size).tensors("cpu")
    return routing.own_chunks - geometry.first_chunk_of_doc[geometry.doc_C[routing.own_chunks]]


@pytest.mark.usefixtures("blocks")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_geometry_with_engineered_ties(data):
    lengths = data.draw(st.lists(st.integers(0, 150), min_size=1, max_size=5))
    cu = [0]
    for length in lengths:
        cu.append(cu[-1] + length)
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    spec = MoBA(
        2 ** data.draw(st.integers(0, 5)), data.draw(st.integers(2, 60)), data.draw(st.sampled_from(["head", "group"]))
    )
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    q, k, _, _ = make_qkv(cu, heads=kv_heads * group, kv_heads=kv_heads, dim=5, dtype=dtype, integers=True)
    # In fp64 PyTorch's operations serve.
    assert route(q, k, spec, cu_seqlens=cu).equals(route(q.double(), k.double(), spec, cu_seqlens=cu))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dim", [1, 3, 24, 96, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_head_dim_and_dtype_picks_as_the_oracle(dim, dtype):
    cu = [0, 30, 131]
    q, k, _, _ = make_qkv(cu, dim=dim, dtype=dtype)
    for spec in (MoBA(4, 3), MoBA(4, 20), MoBA(5, 6, "group")):
        assert_same_choice(route(q, k, spec, cu_seqlens=cu), q, k, cu)


def test_picks_are_the_same_for_any_number_of_threads():
    q, k, _, _ = make_qkv([0, 300, 2500], heads=4, kv_heads=2, dtype=torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(route(q, k, MoBA(16, 40), cu_seqlens=[0, 300, 2500]))
    finally:
        torch.set_num_threads(before)
    assert all(other.equals(found[0]) for other in found)


def test_strided_queries_are_read_where_they_lie():
    cu, spec = [0, 50, 130], MoBA(8, 3)
    q, k, v, _ = make_qkv(cu, dtype=torch.float32)
    wanted = route(q, k, spec, cu_seqlens=cu)
    of_one_projection = torch.cat((q, k, v), 1).split([4, 2, 2], 1)
    assert route(*of_one_projection[:2], spec, cu_seqlens=cu).equals(wanted)
    across = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k)]
    assert route(*across, spec, cu_seqlens=cu).equals(wanted)
    means = mean_keys(*pool_sums(k, pack=wanted.pack, chunk_size=8))
    spread = means.repeat_interleave(2, 0)[::2]
    assert route_means(q, spread, spec, pack=wanted.pack).equals(wanted)


def test_more_chunks_than_16_bits_can_name():
    tokens = 70000
    scores = torch.randn(tokens - 1, generator=torch.Generator().manual_seed(0))
    routing = scored(scores, MoBA(1, 6))
    assert routing.stored.dtype == torch.int32
    assert routing.picks[0, 0].tolist() == falling(scores, 5)
