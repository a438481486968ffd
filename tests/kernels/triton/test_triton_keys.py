"""dK and dV in Triton against the reference in fp64, with the routing forced and lists that plain torch sorts."""

from __future__ import annotations

import pytest
import torch

from moba_kernels import Full, MoBA, Pack, Routing, random_routing
from moba_kernels.attend import reference, triton_keys
from moba_kernels.attend.call import AttendCall
from moba_kernels.attend.triton_geometry import device_geometry
from moba_kernels.attend.triton_key_tables import key_items, key_tiles
from moba_kernels.attend.triton_keys import key_gradients
from moba_kernels.attend.triton_lists import PickLists
from tests.kernels.inputs import make_qkv

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CU = [0, 0, 1, 2, 2, 60, 130]
SPECS = [Full(), MoBA(16, 1), MoBA(16, 3), MoBA(16, 3, "group"), MoBA(21, 4), MoBA(64, 2), MoBA(200, 2)]


def sorted_lists(call, geometry, kv_heads):
    """PickLists by a stable sort over all picks."""
    if call.routing is None or not call.routing.stored.numel():
        return None
    picks = call.routing.picks.long().unflatten(1, (kv_heads, -1))  # [T,K,rows,P]
    num_queries, _, rows, slots = picks.shape
    has_keys = geometry.key_edges_C.diff() > 0
    counts = (picks >= 0) & has_keys[picks.clamp_min(0)] & geometry.picking_T[:, None, None, None]
    kv = torch.arange(kv_heads)[:, None, None]
    num_lists = kv_heads * geometry.num_chunks * slots
    of_list = torch.where(counts, (kv * geometry.num_chunks + picks) * slots + torch.arange(slots), num_lists)
    entries = torch.arange(num_queries)[:, None, None, None] * rows + torch.arange(rows)[:, None]
    order = of_list.flatten().sort(stable=True)
    edges = torch.searchsorted(order.values, torch.arange(num_lists + 1))
    entries = entries.expand_as(picks).flatten()[order.indices].int()
    return PickLists(entries, edges, kv_heads, geometry.num_chunks, slots, rows)


def call_of(cu, spec, heads, kv_heads, routing=None, rows=None, keys=None, result=FP32, dim=32):
    pack = Pack(cu)
    if isinstance(spec, MoBA) and routing is None:
        routing = random_routing(
            spec, pack=pack, num_heads=heads, num_kv_heads=kv_heads, q_positions=rows, seed=5, device="cpu"
        )
    return AttendCall(pack, rows, keys, routing, dim**-0.5, result)


def global_lse_and_delta(q, k, v, dout, call):
    """fp64, over all keys."""
    out, lse = reference.attend_partial(*(x.double() for x in (q, k, v)), call, None)
    return lse, (out.double() * dout.double()).sum(-1)


def gradients(dout, q, k, v, lse, delta, call, kv_ranges=None):
    """(dk, dv) of the kernel, written into NaN."""
    dk, dv = (torch.full(x.shape, torch.nan, dtype=call.result_dtype) for x in (k, v))
    geometry, kv_heads = device_geometry(call, q.device), k.shape[1]
    for first, stop in kv_ranges or [(0, kv_heads)]:
        routing = call.routing.of_kv_heads(first, stop, kv_heads) if call.routing else None
        mine = AttendCall(call.pack, call.q_positions, call.k_positions, routing, call.scale, call.result_dtype)
        lists = sorted_lists(mine, geometry, stop - first)
        key_gradients(dout, q, k, v, lse.float(), delta.float(), call, geometry, lists, first, stop, dk, dv)
    return dk, dv


def plain(q, k, v, dout, mask_HTS, scale):
    """(dk, dv) the plain way at the inputs' own precision, by autograd."""
    keys, values = k.clone().requires_grad_(), v.clone().requires_grad_()
    group = q.shape[1] // k.shape[1]
    scores = q.transpose(0, 1) @ keys.transpose(0, 1).repeat_interleave(group, 0).mT * scale
    weights = scores.masked_fill(~mask_HTS, -torch.inf).softmax(-1)
    out = (weights @ values.transpose(0, 1).repeat_interleave(group, 0)).transpose(0, 1)
    return torch.autograd.grad(out, (keys, values), dout)


def check(cu, spec, dtype=FP32, heads=4, kv_heads=2, dim=32, value_dim=None, routing=None):
    """Errors against fp64 at most twice those of the plain way."""
    q, k, v, dout = make_qkv(cu, heads, kv_heads, dim, value_dim, dtype)
    call = call_of(cu, spec, heads, kv_heads, routing, result=dtype, dim=dim)
    got = gradients(dout, q, k, v, *global_lse_and_delta(q, k, v, dout, call), call)
    mask = torch.stack([reference.mask_of_head(call, head, heads, q.device) for head in range(heads)])
    exact = plain(*(x.double() for x in (q, k, v, dout)), mask, call.scale)
    usual = plain(q, k, v, dout, mask, call.scale)
    for name, mine, want, peer in zip(("dk", "dv"), got, exact, usual, strict=True):
        assert mine.dtype == dtype and torch.isfinite(mine).all(), name
        error, allowed = (float((x.double() - want).abs().max()) for x in (mine, peer))
        assert error <= 2 * allowed + 1e-12, f"{name}: {error:.3g}, plain {allowed:.3g}"


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_packed_documents_with_tail_chunks_empty_and_one_token_documents(spec):
    check(CU, spec)


@pytest.mark.parametrize("spec", [Full(), MoBA(16, 4), MoBA(16, 4, "group")], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_error_is_at_most_twice_that_of_the_plain_same_precision_way(dtype, spec):
    check([0, 90, 200], spec, dtype, dim=64)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (4, 1), (6, 2)])
@pytest.mark.parametrize("spec", [Full(), MoBA(16, 3), MoBA(16, 3, "group")], ids=str)
def test_all_query_heads_of_a_group_add_into_one_tile(spec, heads, kv_heads):
    check([0, 11, 70], spec, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize(("dim", "value_dim"), [(96, 32), (32, 64)])
def test_head_dims_that_are_padded_or_differ(dim, value_dim):
    for dtype in (FP32, BF16):
        check([0, 50], MoBA(16, 2), dtype, heads=2, kv_heads=1, dim=dim, value_dim=value_dim)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("spec", [Full(), MoBA(150, 1)], ids=str)
def test_runs_of_keys_longer_than_a_tile(spec, dtype):
    check([0, 256], spec, dtype, heads=2, kv_heads=1)


def hot_routing(spec, cu, heads):
    """Every query that may picks chunk 0, and nothing else."""
    pack = Pack(cu)
    own = pack.chunks(spec.chunk_size).chunk_of_token_T
    picks = torch.where(torch.from_numpy(own) > 0, 0, -1)[:, None, None].expand(-1, heads, spec.topk - 1).clone()
    picks[:, :, 1:] = -1
    return Routing(picks, spec, pack)


@pytest.mark.parametrize("spec", [Full(), MoBA(16, 3), MoBA(16, 3, "group")], ids=str)
def test_a_tile_with_much_work_is_cut_into_pieces_that_add_up(spec, monkeypatch):
    monkeypatch.setattr(triton_keys, "MIN_UNITS", 2)
    counted = []
    monkeypatch.setattr(triton_keys, "key_items", lambda *a: counted.append(key_items(*a)) or counted[-1])
    heads = 2 if isinstance(spec, MoBA) and spec.select == "group" else 4
    routing = hot_routing(spec, [0, 128], heads) if isinstance(spec, MoBA) else None
    check([0, 128], spec, routing=routing)
    assert int((counted[0].results[:, 1] >= 0).sum()) >= 4, "nothing was split"
    assert int((counted[0].items[:, 0] < 0).sum()) > 0


def test_pieces_stay_within_their_bound_and_hold_every_unit_once():
    cu, spec, heads, group, block_m = [0, 40, 700], MoBA(16, 4), 2, 2, 16
    for routing in (None, hot_routing(spec, cu, heads * group)):
        call = call_of(cu, spec, heads * group, heads, routing)
        geometry = device_geometry(call, torch.device("cpu"))
        lists = sorted_lists(call, geometry, heads)
        tiles = key_tiles(call, geometry, 32, cu[-1])
        for num_pieces in (0, 1, 2, 7, 64, 1000):
            table = key_items(tiles, lists, heads, group, block_m, num_pieces, 2)
            there = table.items[:, 0] >= 0
            owner, first, stop = table.items[there].long().unbind(1)
            same, slot = table.results[there].long().unbind(1)
            assert torch.equal(same, owner)
            slots = slot[slot >= 0].tolist()
            assert sorted(slots) == list(range(len(slots))) and len(slots) <= num_pieces
            covered = {}
            for x, a, b in zip(owner.tolist(), first.tolist(), stop.tolist(), strict=True):
                assert covered.get(x, 0) == a <= b
                covered[x] = b
            lengths = lists.edges.view(-1)[:: lists.num_slots].diff().view(heads, -1)
            for x, units in covered.items():
                tile = tiles[x % tiles.shape[0]].tolist()
                rows = (tile[4] - tile[2]) * group, int(lengths[x // tiles.shape[0], tile[5]])
                assert units == sum(-(-n // block_m) for n in rows)
            sums = table.sums[table.sums[:, 0] >= 0].tolist()
            assert [s for _, a, b in sums for s in range(a, b)] == list(range(len(slots)))
            owners = dict(zip(slot.tolist(), owner.tolist(), strict=True))
            assert all(owners[s] == x for x, a, b in sums for s in range(a, b))


@pytest.mark.parametrize("spec", [Full(), MoBA(16, 3), MoBA(16, 3, "group")], ids=str)
def test_parts_of_the_queries_and_keys_at_hand_add_up_to_the_whole(spec):
    cu, heads, kv_heads = [0, 1, 1, 30, 97], 4, 2
    q, k, v, dout = make_qkv(cu, heads, kv_heads, 32, dtype=FP32)
    whole = call_of(cu, spec, heads, kv_heads)
    lse, delta = global_lse_and_delta(q, k, v, dout, whole)
    _, *want = reference.attend_partial_backward(*(x.double() for x in (dout, q, k, v)), lse, delta, whole)
    owner = (torch.arange(cu[-1]) // 5) % 3  # every chunk lies in all parts
    parts = [(owner == part).nonzero().flatten() for part in range(3)]
    got = [torch.zeros_like(x) for x in (k, v)]
    for rows in parts:
        routing = whole.routing.select(rows) if whole.routing else None
        for keys in parts:
            call = call_of(cu, spec, heads, kv_heads, routing, rows, keys)
            part = gradients(dout[rows], q[rows], k[keys], v[keys], lse[rows], delta[rows], call)
            for total, mine in zip(got, part, strict=True):
                total[keys] += mine
    for mine, expected in zip(got, want, strict=True):
        assert float((mine.double() - expected).abs().max()) <= 1e-5


@pytest.mark.parametrize("spec", [Full(), MoBA(16, 3), MoBA(16, 3, "group")], ids=str)
def test_kv_heads_one_by_one_are_bitwise_the_same_as_together_and_so_is_a_second_run(spec):
    q, k, v, dout = make_qkv(CU, 4, 2, 32, dtype=BF16)
    call = call_of(CU, spec, 4, 2, result=BF16)
    lse, delta = global_lse_and_delta(q, k, v, dout, call)
    together = gradients(dout, q, k, v, lse, delta, call)
    again = gradients(dout, q, k, v, lse, delta, call)
    apart = gradients(dout, q, k, v, lse, delta, call, [(1, 2), (0, 1)])
    for other in (again, apart):
        assert all(torch.equal(a, b) for a, b in zip(together, other, strict=True))


def test_heads_so_far_apart_in_memory_that_offsets_take_64_bits(tmp_path):
    q, k, v, dout = make_qkv([0, 20], 3, 1, 32, dtype=BF16)
    call = call_of([0, 20], Full(), 3, 1)
    lse, delta = global_lse_and_delta(q, k, v, dout, call)
    apart, before = 2**31 - 32, 64  # in 32 bits, twice `apart` would lie 64 elements before the first head
    # A file with a hole: only what is touched takes memory.
    elements = torch.from_file(str(tmp_path / "q"), shared=True, size=before + 2 * apart + q.numel(), dtype=BF16)
    far = elements[before:].as_strided(q.shape, (32, apart, 1))
    far.copy_(q)
    want, got = (gradients(dout, x, k, v, lse, delta, call) for x in (q, far))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_other_kv_heads_are_left_alone():
    q, k, v, dout = make_qkv(CU, 4, 2, 32, dtype=FP32)
    call = call_of(CU, MoBA(16, 3), 4, 2)
    lse, delta = global_lse_and_delta(q, k, v, dout, call)
    for grad in gradients(dout, q, k, v, lse, delta, call, [(1, 2)]):
        assert grad[:, 0].isnan().all() and torch.isfinite(grad[:, 1]).all()


@pytest.mark.parametrize("spec", [Full(), MoBA(16, 3)], ids=str)
def test_rows_whose_lse_is_minus_infinity_take_no_part(spec):
    q, k, v, dout = make_qkv([0, 80], 2, 1, 32, dtype=FP32)
    call = call_of([0, 80], spec, 2, 1)
    lse, delta = global_lse_and_delta(q, k, v, dout, call)
    silent = torch.arange(80) % 3 == 0
    lse[silent], delta[silent] = -torch.inf, 0
    got = gradients(dout, q, k, v, lse, delta, call)
    dout[silent] = 0
    lse[silent] = 0
    _, *want = reference.attend_partial_backward(dout, q, k, v, lse, delta, call)
    for mine, expected in zip(got, want, strict=True):
        assert float((mine - expected).abs().max()) <= 1e-5
    lse[:] = -torch.inf
    assert all((grad == 0).all() for grad in gradients(dout, q, k, v, lse, delta, call))


def test_no_queries_give_zeros_and_no_keys_give_nothing():
    q, k, v, dout = make_qkv([0, 24], 2, 1, 32, dtype=FP32)
    none = torch.zeros(0, dtype=torch.int64)
    for spec in (Full(), MoBA(8, 2)):
        call = call_of([0, 24], spec, 2, 1, rows=none)
        empty = torch.zeros(0, 2)
        assert all((grad == 0).all() for grad in gradients(dout[none], q[none], k, v, empty, empty, call))
        call = call_of([0, 24], spec, 2, 1, keys=none)
        grads = gradients(dout, q, k[none], v[none], torch.zeros(24, 2), torch.zeros(24, 2), call)
        assert [tuple(grad.shape) for grad in grads] == [(0, 1, 32)] * 2


def test_inputs_and_results_may_be_strided_views():
    cu, spec = [0, 60], MoBA(16, 2)
    q, k, v, dout = make_qkv(cu, 4, 2, 32, dtype=FP32)
    call = call_of(cu, spec, 4, 2)
    lse, delta = global_lse_and_delta(q, k, v, dout, call)
    fused = torch.cat((q, k, v), 1)
    want = gradients(dout, q, k, v, lse, delta, call)
    got = gradients(dout, fused[:, :4], fused[:, 4:6], fused[:, 6:], lse, delta, call)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    both = torch.full((60, 4, 32), torch.nan)
    geometry = device_geometry(call, q.device)
    lists = sorted_lists(call, geometry, 2)
    key_gradients(dout, q, k, v, lse.float(), delta.float(), call, geometry, lists, 0, 2, both[:, :2], both[:, 2:])
    assert torch.equal(both, torch.cat(want, 1))
