"""Per-chunk lists: the counting sort against a sort in Python."""

from __future__ import annotations

import pytest
import torch

from moba_kernels import MoBA, Pack, Routing, random_routing
from moba_kernels.attend import triton_lists
from moba_kernels.attend.call import AttendCall
from moba_kernels.attend.triton_geometry import device_geometry
from moba_kernels.attend.triton_lists import build_lists

CU = [0, 1, 1, 40, 130]


def lists_of(routing, kv_heads, q_positions=None, k_positions=None):
    call = AttendCall(routing.pack, q_positions, k_positions, routing, 1.0, torch.float32)
    geometry = device_geometry(call, torch.device("cpu"))
    return build_lists(routing.stored, geometry, kv_heads), geometry


def expected(routing, geometry, kv_heads):
    """{(kv, chunk, slot): [entry, ...]} by walking over the picks."""
    heads = routing.num_routed_heads // kv_heads
    keys = geometry.key_edges_C.diff().tolist()
    want = {}
    for query, of_query in enumerate(routing.picks.tolist()):
        if not geometry.picking_T[query]:
            continue
        for head, of_head in enumerate(of_query):
            for slot, chunk in enumerate(of_head):
                if chunk >= 0 and keys[chunk]:
                    want.setdefault((head // heads, chunk, slot), []).append(query * heads + head % heads)
    return want


def check(routing, kv_heads, **positions):
    lists, geometry = lists_of(routing, kv_heads, **positions)
    want = expected(routing, geometry, kv_heads)
    edges = lists.edges.tolist()
    assert edges[0] == 0 and len(edges) == kv_heads * geometry.num_chunks * lists.num_slots + 1
    assert lists.rows_per_query == routing.num_routed_heads // kv_heads
    for i in range(len(edges) - 1):
        rest, slot = divmod(i, lists.num_slots)
        kv, chunk = divmod(rest, geometry.num_chunks)
        assert lists.entries_E[edges[i] : edges[i + 1]].tolist() == want.pop((kv, chunk, slot), [])
    assert not want
    return lists


def picks_of(spec, heads=4, kv_heads=2, cu=CU, q_positions=None):
    return random_routing(
        spec, pack=Pack(cu), num_heads=heads, num_kv_heads=kv_heads, q_positions=q_positions, seed=3, device="cpu"
    )


@pytest.mark.parametrize("select", ["head", "group"])
@pytest.mark.parametrize(("chunk_size", "topk"), [(16, 3), (7, 2), (5, 9), (1, 3)])
def test_lists_hold_every_pick_in_order(chunk_size, topk, select):
    check(picks_of(MoBA(chunk_size, topk, select)), 2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (4, 4)])
def test_every_group_size(heads, kv_heads):
    check(picks_of(MoBA(16, 3), heads, kv_heads), kv_heads)


def test_queries_are_cut_into_parts_without_a_trace(monkeypatch):
    routing = picks_of(MoBA(16, 4))
    whole = check(routing, 2)
    monkeypatch.setattr(triton_lists, "MIN_PART_PAIRS", 1)
    monkeypatch.setattr(triton_lists, "STEP_PAIRS", 16)
    parts = check(routing, 2)
    assert torch.equal(whole.edges, parts.edges)
    used = int(whole.edges[-1])
    assert torch.equal(whole.entries_E[:used], parts.entries_E[:used])
    monkeypatch.setattr(triton_lists, "MAX_COUNTS", 100)  # fewer counts than parts would take
    assert torch.equal(check(routing, 2).edges, whole.edges)


def test_chunks_without_keys_at_hand_and_covered_documents_are_left_out():
    generator = torch.Generator().manual_seed(0)
    queries = (torch.rand(CU[-1], generator=generator) < 0.6).nonzero().flatten()
    keys = torch.arange(50, 100)
    lists = check(picks_of(MoBA(16, 4), q_positions=queries), 2, q_positions=queries, k_positions=keys)
    assert 0 < int(lists.edges[-1]) < lists.entries_E.numel()


def test_chunk_ids_are_read_as_they_are_stored():
    for num_chunks, dtype in ((65000, torch.uint16), (70000, torch.int32)):
        pack, spec = Pack([0, num_chunks]), MoBA(1, 3)
        positions = torch.tensor([40000, num_chunks - 1])
        ids = torch.tensor([[[40000, 39999, -1]], [[num_chunks - 1, 2, num_chunks - 2]]])
        routing = Routing.from_chunk_ids(ids, spec, pack, positions)
        assert routing.stored.dtype == dtype
        lists, _ = lists_of(routing, 1, q_positions=positions)
        sizes = lists.edges.diff()
        assert sizes.nonzero().flatten().tolist() == sorted([39999 * 2, 2 * 2, (num_chunks - 2) * 2 + 1])
        assert lists.entries_E[: int(lists.edges[-1])].tolist() == [1, 0, 1]


def test_a_part_of_the_heads_may_be_a_view_with_strides():
    routing = picks_of(MoBA(16, 3))
    part = routing.of_kv_heads(1, 2, 2)
    assert not part.stored.is_contiguous()
    check(part, 1)


def test_picks_that_lie_slot_by_slot_in_memory_give_the_same_lists():
    routing = picks_of(MoBA(16, 3))
    ids = routing.chunk_ids.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    strided = Routing.from_chunk_ids(ids, routing.spec, routing.pack)
    assert strided.stored.stride(2) != 1 and strided.equals(routing)
    check(strided, 2)
