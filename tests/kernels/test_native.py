"""The torch backend's compiled kernel: the oracle's numbers in fp32, at any size, the same bits for any threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from moba_kernels import Full, MoBA, Pack, Routing, attend, attend_partial, attend_partial_backward, route
from moba_kernels.attend import native
from moba_kernels.native import Arguments, available

from . import test_fused
from .inputs import ROWS, assert_close, make_qkv
from .test_attend import SPECS, check_against_oracle, run
from .test_partial import check_that_parts_merge_to_the_whole

pytestmark = pytest.mark.skipif(not available(), reason="no C compiler here")

FP32 = {"tolerance": 3e-6, "backends": ["torch"], "dtype": torch.float32}


@pytest.fixture(params=["small blocks", "blocks as they are"])
def blocks(request, monkeypatch):
    """Small rows in several blocks of queries and ranges of keys, and as calls of their size have them."""
    if request.param == "small blocks":
        monkeypatch.setattr(native, "MIN_BLOCK", 3)
        monkeypatch.setattr(native, "CACHE_BYTES", 4 * 4 * 32 * 7)
        monkeypatch.setattr(native, "LIST_ROWS", 1)
        monkeypatch.setattr(native, "MIN_RANGE_KEYS", 4)


@pytest.fixture
def calls(monkeypatch):
    """The calls that the kernel ran: forward and backward."""
    seen, real = [], Arguments.run

    def run(self, function, *flags):
        seen.extend([flags] if function == "moba_attend" else [])
        real(self, function, *flags)

    monkeypatch.setattr(Arguments, "run", run)
    return seen


@pytest.fixture
def watched(calls):
    """The kernel did run."""
    yield
    assert calls


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("cu", ROWS.values(), ids=ROWS.keys())
def test_output_lse_gradients_and_pairs_are_the_oracles(cu, spec, calls):
    check_against_oracle(cu, spec, **FP32)
    # A row without tokens needs neither.
    assert calls == ([(native.FORWARD,), (native.BACKWARD,)] if cu[-1] else [])


@pytest.mark.usefixtures("blocks", "watched")
@pytest.mark.parametrize("spec", [Full(), MoBA(8, 3), MoBA(8, 3, "group")], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (8, 1), (6, 2)])
def test_every_gqa_group_size(heads, kv_heads, spec):
    check_against_oracle([0, 11, 50], spec, heads=heads, kv_heads=kv_heads, dim=8, **FP32)


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize(("dim", "value_dim"), [(1, 1), (5, 3), (16, 100), (72, 40), (96, 96), (192, 128), (256, 256)])
def test_every_head_dim(dim, value_dim):
    for spec in (Full(), MoBA(8, 3)):
        check_against_oracle([0, 1, 41], spec, dim=dim, value_dim=value_dim, **FP32)


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("scale", [-0.5, -1e-3, 0.0, 1e-60])
def test_a_softmax_scale_that_is_not_positive_is_a_scale_like_any_other(scale):
    for spec in (Full(), MoBA(8, 3)):
        check_against_oracle([0, 30, 97], spec, scale=scale, **FP32)


@pytest.mark.usefixtures("blocks", "watched")
@pytest.mark.parametrize("cut", ["halves", "inside chunks", "zigzag", "random"])
@pytest.mark.parametrize("spec", [Full(), MoBA(8, 1), MoBA(8, 3), MoBA(16, 3, "group"), MoBA(100, 2)], ids=str)
def test_parts_of_queries_and_keys_merge_to_the_whole(spec, cut):
    check_that_parts_merge_to_the_whole(spec, cut, "torch", torch.float32)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_geometry_with_engineered_ties(data):
    lengths = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=5))
    cu = [0]
    for length in lengths:
        cu.append(cu[-1] + length)
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    spec = MoBA(
        data.draw(st.integers(1, 40)), data.draw(st.integers(1, 9)), data.draw(st.sampled_from(["head", "group"]))
    )
    check_against_oracle(cu, spec, heads=kv_heads * group, kv_heads=kv_heads, dim=4, integers=True, **FP32)


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("spec", [Full(), MoBA(64, 4), MoBA(100, 3, "group")], ids=str)
def test_bits_are_the_same_for_any_number_of_threads_and_on_every_run(spec):
    cu = [0, 300, 2500]
    q, k, v, dout = make_qkv(cu, heads=4, kv_heads=2, dtype=torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 5):
            torch.set_num_threads(threads)
            result, *grads = run(q, k, v, dout, spec, cu)
            found.append((result.out, result.lse, *grads))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_inputs_are_read_exactly(dtype):
    cu = [0, 60, 200]
    q, k, v, dout = make_qkv(cu, dtype=dtype)
    k[3, 0, :4] = torch.tensor([0.0, -0.0, torch.finfo(dtype).smallest_normal, torch.finfo(dtype).smallest_normal / 4])
    v[5, 0, 0] = 60000.0
    pack, spec = Pack(cu), MoBA(16, 3)
    routing = route(q, k, spec, cu_seqlens=pack)
    narrow = attend_partial(q, k, v, spec, pack=pack, routing=routing)
    wide = attend_partial(q.float(), k.float(), v.float(), spec, pack=pack, routing=routing)
    assert torch.equal(narrow.out, wide.out) and torch.equal(narrow.lse, wide.lse)
    delta = (narrow.out * dout).sum(-1)
    options = {"pack": pack, "routing": routing}
    grads = attend_partial_backward(dout, q, k, v, narrow.lse, delta, spec, **options)
    others = attend_partial_backward(dout.float(), q.float(), k.float(), v.float(), narrow.lse, delta, spec, **options)
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


@pytest.mark.parametrize("position", ["q", "k", "v"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.usefixtures("watched")
def test_what_is_not_a_number_shows_in_the_rows_that_see_it(position, value):
    tensors = dict(zip("qkv", make_qkv([0, 64], dtype=torch.float32)[:3], strict=True))
    tensors[position][40, 0, 0] = value
    out = attend(*tensors.values(), Full()).out[:, 0, 0]
    assert torch.isfinite(out[:32]).all()  # tiles of 16 keys: what a tile holds beyond a row's own keys has weight 0
    assert not torch.isfinite(out[40])


@pytest.mark.usefixtures("watched")
def test_strided_views_are_read_where_they_lie_and_results_do_not_depend_on_it():
    cu, spec = [0, 50, 130], MoBA(8, 3)
    q, k, v, dout = make_qkv(cu, dtype=torch.float32)
    options = {"pack": Pack(cu), "routing": route(q, k, spec, cu_seqlens=cu)}
    wanted = attend_partial(q, k, v, spec, **options)
    delta = (wanted.out * dout).sum(-1)
    gradients = attend_partial_backward(dout, q, k, v, wanted.lse, delta, spec, **options)
    of_one_projection = torch.cat((q, k, v), 1).split([4, 2, 2], 1)
    across = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v, dout)]
    for q_, k_, v_, dout_ in ((*of_one_projection, dout), across):
        part = attend_partial(q_, k_, v_, spec, **options)
        assert torch.equal(part.out, wanted.out) and torch.equal(part.lse, wanted.lse)
        got = attend_partial_backward(dout_, q_, k_, v_, wanted.lse, delta, spec, **options)
        assert all(torch.equal(a, b) for a, b in zip(got, gradients, strict=True))


@pytest.mark.usefixtures("watched")
def test_chunk_ids_that_need_32_bits_are_picks_like_any_others():
    tokens = 70000
    pack, rows = Pack([0, tokens]), torch.arange(tokens - 3, tokens)
    picked = torch.tensor([[1, 257, tokens - 9], [0, 256, -1], [2, 255, 66000]], dtype=torch.int32)[:, None]
    routing = Routing(picked, MoBA(1, 4), pack, rows)
    assert routing.stored.dtype == torch.int32
    q, k, v, _ = make_qkv([0, tokens], heads=1, kv_heads=1, dim=4, dtype=torch.float32)
    part = attend_partial(q[rows], k, v, MoBA(1, 4), pack=pack, q_positions=rows, routing=routing)
    for i, row in enumerate(rows.tolist()):
        seen = [*(c for c in picked[i, 0].tolist() if c >= 0), row]
        weights = torch.softmax(q[row, 0] @ k[seen, 0].T * 0.5, -1)
        assert_close(part.out[i, 0], weights @ v[seen, 0], 1e-6)


@pytest.mark.usefixtures("watched")
def test_queries_that_pick_all_chunks_before_their_own_are_plain_causal_attention():
    """In the first topk chunks of every document, to the bit; a routing that may have picked fewer is followed."""
    cu, spec = [0, 90, 700], MoBA(32, 5)
    q, k, v, _ = make_qkv(cu, dtype=torch.float32)
    routing = route(q, k, spec, cu_seqlens=cu)
    every = torch.cat((torch.arange(90), torch.arange(90, 90 + 5 * 32)))
    full = attend(q, k, v, Full(), cu_seqlens=cu).out
    out = attend(q, k, v, spec, cu_seqlens=cu, routing=routing).out
    assert torch.equal(out[every], full[every])
    later = torch.arange(90 + 5 * 32, 700)
    assert ((out[later] - full[later]).abs().amax((1, 2)) > 1e-3).all()
    none = Routing.from_chunk_ids(routing.chunk_ids[:, :, :1], spec, routing.pack)
    alone = attend(q, k, v, MoBA(32, 1), cu_seqlens=cu).out
    assert_close(attend(q, k, v, spec, cu_seqlens=cu, routing=none).out, alone, 1e-6)


@pytest.mark.usefixtures("blocks", "watched")
@pytest.mark.parametrize("keys_of_a_list", [0, 12, 1 << 20], ids=["lists", "as it is", "masks"])
@pytest.mark.parametrize("spec", [MoBA(1, 40), MoBA(2, 60, "group"), MoBA(4, 40), MoBA(16, 5), MoBA(23, 3)], ids=str)
def test_lists_of_picks_and_masks_over_documents_are_the_same_attention(spec, keys_of_a_list, monkeypatch):
    """Masks of several words, of chunks that are whole vectors or not and lie across tiles, over whole documents."""
    monkeypatch.setattr(native, "MASK_KEYS", keys_of_a_list)
    check_against_oracle([0, 530, 535, 600], spec, dim=8, **FP32)


@pytest.mark.usefixtures("watched")
def test_where_most_short_chunks_are_picked_the_others_are_hidden_by_a_mask(monkeypatch):
    """Queries with 7 picks among up to 12 chunks: a list costs as much as 16 + 12 keys, the mask 12 * 16 of 7 * 28."""
    cu, spec = [0, 640], MoBA(16, 8)
    q, k, v, _ = make_qkv(cu, heads=1, kv_heads=1, dtype=torch.float32)

    def scored(keys_of_a_list):
        monkeypatch.setattr(native, "MASK_KEYS", keys_of_a_list)
        return attend(q, k, v, spec, cu_seqlens=cu).report.scored_pairs

    hidden = sum(16 * 16 * (before - 7) for before in range(8, 13))
    assert hidden <= scored(12) - scored(0) <= 1.5 * hidden  # what the tiles of a segment have beyond the diagonal
    assert scored(2) == scored(0)  # 8 * 16 > 7 * 18


@pytest.mark.usefixtures("watched")
def test_rows_that_see_no_key_are_nothing_and_get_and_give_nothing():
    pack, early, late = Pack([0, 50]), torch.arange(20), torch.arange(20, 50)
    q, k, v, dout = make_qkv([0, 50], dtype=torch.float32)
    options = {"pack": pack, "q_positions": early, "k_positions": late}
    part = attend_partial(q[:20], k[20:], v[20:], Full(), **options)
    assert (part.out == 0).all() and (part.lse == -torch.inf).all()
    for grad in attend_partial_backward(
        dout[:20], q[:20], k[20:], v[20:], part.lse, torch.zeros(20, 4), Full(), **options
    ):
        assert (grad == 0).all()


@pytest.mark.usefixtures("watched")
def test_some_heads_of_a_routing_are_read_where_they_lie():
    pack, spec = Pack([0, 90]), MoBA(8, 3)
    q, k, v, _ = make_qkv([0, 90], dtype=torch.float32)
    routing = route(q, k, spec, cu_seqlens=pack)
    whole = attend_partial(q, k, v, spec, pack=pack, routing=routing)
    for kv_head in (0, 1):
        some = routing.of_kv_heads(kv_head, kv_head + 1, 2)
        assert not some.stored.is_contiguous()
        heads, kv = slice(2 * kv_head, 2 * kv_head + 2), slice(kv_head, kv_head + 1)
        part = attend_partial(q[:, heads], k[:, kv], v[:, kv], spec, pack=pack, routing=some)
        assert torch.equal(part.out, whole.out[:, heads]) and torch.equal(part.lse, whole.lse[:, heads])


@pytest.mark.usefixtures("watched")
def test_infinite_numbers_of_narrow_dtypes_are_infinite():
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v, _ = make_qkv([0, 20], dtype=dtype)
        v[0, 0, :2] = torch.tensor([torch.inf, -torch.inf])
        out = attend(q, k, v, Full()).out
        assert (out[:, :2, 0] == torch.inf).all() and (out[:, :2, 1] == -torch.inf).all()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("which", [1, 2, 3], ids=["k", "v", "dout"])
def test_tensors_without_memory_of_their_own_are_refused(which):
    tensors = list(make_qkv([0, 20], dtype=torch.float32))
    if which == 3:
        out = attend(*(x.requires_grad_() for x in tensors[:3]), MoBA(8, 2)).out
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tensors[which] = mode.from_tensor(tensors[which])
    with pytest.raises(ValueError, match="memory of their own; got FakeTensor"):
        out.backward(tensors[3]) if which == 3 else attend(*tensors[:3], MoBA(8, 2))


@pytest.mark.usefixtures("watched")
def test_the_sign_of_a_view_counts():
    heads = [torch.randn(20, num, dtype=torch.complex64).conj().imag.unsqueeze(-1) for num in (4, 2, 2)]
    assert all(x.is_neg() for x in heads)
    assert torch.equal(attend(*heads, Full()).out, attend(*(x.resolve_neg() for x in heads), Full()).out)


# What holds of PyTorch's own kernel holds of this one.
test_perturbed_future_tokens_leave_the_prefix_bitwise_the_same = (
    test_fused.test_perturbed_future_tokens_leave_the_prefix_bitwise_the_same
)
test_rms_error_is_at_most_twice_that_of_the_plain_same_precision_way = (
    test_fused.test_rms_error_is_at_most_twice_that_of_the_plain_same_precision_way
)


def test_a_block_of_queries_follows_from_sizes():
    block = native.query_block
    assert block(32768, 2, 4, 128, 0, 0.0) == 256  # 512 KiB of q and out
    assert block(1 << 20, 8, 4, 256, 7, 4 * 7 / 8192) == 14043  # lists of 48 rows
    assert block(40, 1, 1, 128, 0, 0.0) == 32  # a short row, for more threads than one
    assert block(5, 1, 1, 128, 0, 0.0) == 5
    for size in (block(1 << 20, 1, 64, 512, 4095, 4.0), block(1 << 20, 8, 1, 8, 1, 1e-6)):  # notes keep to 16 MiB
        assert 1 <= size < 1 << 19
    assert block(1 << 20, 1, 64, 512, 4095, 4.0) * 64 * 4095 * 20 <= 1 << 24


def test_more_heads_than_a_rows_number_has_room_for_are_left_to_pytorch():
    assert native.serves(torch.empty(1, native.MAX_HEADS, 0))
    assert not native.serves(torch.empty(1, native.MAX_HEADS + 1, 0))
