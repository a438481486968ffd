"""Attention in Triton in units that fit the scratch, and the tables that a pack keeps for its calls."""

from __future__ import annotations

import weakref

import pytest
import torch

from moba_kernels import Full, MoBA, Pack, attend
from moba_kernels.attend import triton as backend
from moba_kernels.attend import triton_causal, triton_keys
from tests.kernels.inputs import assert_close, make_qkv

from .test_triton_attend import BF16, FP32, routing_of, run


@pytest.fixture
def budget_of_units(monkeypatch):
    """Sets the scratch by which 90 queries under 2 KV heads are cut into units of 32 queries or more."""
    for name, value in (("UNIT_QUERIES", 32), ("SORT_BYTES", 0), ("BYTES_OF_LIST", 0)):
        monkeypatch.setattr(backend, name, value)
    return lambda budget: monkeypatch.setattr(backend, "SCRATCH_BYTES", budget)


A_KV_HEAD, A_RANGE = 30_000, 12_000  # bytes for one KV head of bf16 at a time; for a third of its queries


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_work_in_units_gives_the_same_numbers(budget_of_units, dtype):
    cu, spec = [0, 20, 90], MoBA(16, 3)
    pack = Pack(cu)
    q, k, v, dout = make_qkv(cu, dim=32, dtype=dtype)
    routing = routing_of(spec, pack, 4, 2)
    whole = run(q, k, v, dout, spec, pack, routing)
    for budget, units in ((A_KV_HEAD, 2), (A_RANGE, 6)):
        budget_of_units(budget if dtype == BF16 else budget // 18)
        assert len(backend.work_units(90, 2, 16 + 256 * (dtype == BF16), 0, backend.SCRATCH_BYTES)) == units
        parts = run(q, k, v, dout, spec, pack, routing)
        # Not bitwise: in numpy's matrix product a row's last bit depends on where the row stands.
        for got, want in zip(
            (parts[0].out, parts[0].lse, *parts[1:]), (whole[0].out, whole[0].lse, *whole[1:]), strict=True
        ):
            assert_close(got, want.detach(), 3e-6 if got.dtype == FP32 else 2.0**-7 * float(want.detach().abs().max()))
        assert parts[0].report.computed_pairs == whole[0].report.computed_pairs


@pytest.mark.parametrize("budget", [A_KV_HEAD, A_RANGE], ids=["KV heads", "ranges of queries"])
def test_lists_and_accumulators_of_a_unit_are_gone_before_the_next_ones_are_made(monkeypatch, budget_of_units, budget):
    """Otherwise the scratch is twice what is documented."""
    pack, spec, held = Pack([0, 20, 90]), MoBA(16, 3), []
    budget_of_units(budget)
    make_lists, run_forward = backend._lists_of, backend.run_causal_forward

    def lists_of(*args):
        assert not [x for x in held if x[0] == "lists" and x[1]() is not None]
        lists = make_lists(*args)
        held.append(("lists", weakref.ref(lists)))
        return lists

    def causal_forward(q, k, v, running, *rest):
        assert not [x for x in held if x[0] == "running" and x[1]() is not None]
        held.append(("running", weakref.ref(running)))
        return run_forward(q, k, v, running, *rest)

    monkeypatch.setattr(backend, "_lists_of", lists_of)
    monkeypatch.setattr(backend, "run_causal_forward", causal_forward)
    run(*make_qkv([0, 20, 90], dim=32, dtype=BF16), spec, pack, routing_of(spec, pack, 4, 2))
    assert len(held) > 4


def test_of_the_pairs_of_a_unit_a_report_keeps_the_sums_alone(budget_of_units):
    """A number of every program of every unit would be gigabytes for a million tokens in short chunks."""
    pack, spec = Pack([0, 20, 90]), MoBA(16, 3)
    budget_of_units(A_RANGE)
    q, k, v, _ = make_qkv([0, 20, 90], dim=32, dtype=BF16)
    report = attend(q, k, v, spec, cu_seqlens=pack, routing=routing_of(spec, pack, 4, 2), backend="triton").report
    kept = [*report.tally._attended, *report.tally._scored]
    assert len(kept) == 24 and all(x.untyped_storage().nbytes() == 16 for x in kept)
    assert report.computed_pairs == report.planned_pairs


def test_kv_heads_one_at_a_time_and_layers_share_the_tables_that_none_of_them_changes(monkeypatch, budget_of_units):
    pack, spec, made = Pack([0, 20, 90]), MoBA(16, 3), []
    budget_of_units(A_KV_HEAD)
    for module, name in ((triton_causal, "tile_table"), (triton_keys, "key_tiles")):
        make = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, make=make: made.append(name) or make(*a))
    layers = [run(*make_qkv([0, 20, 90], dim=32, dtype=BF16), spec, pack, routing_of(spec, pack, 4, 2)) for _ in "ab"]
    assert sorted(made) == ["key_tiles", "tile_table"]  # for forward and backward of both layers: tiles are as high
    assert torch.equal(layers[0][0].out, layers[1][0].out)


def test_what_a_pack_keeps_for_one_spec_serves_no_other():
    cu, pack = [0, 15, 50], Pack([0, 15, 50])
    inputs = make_qkv(cu, 2, 1, dim=32, dtype=BF16)
    for spec in (MoBA(16, 3), Full(), MoBA(8, 3), MoBA(16, 2)):
        shared, alone = (run(*inputs, spec, row, routing_of(spec, row, 2, 1)) for row in (pack, Pack(cu)))
        assert torch.equal(shared[0].out, alone[0].out)
        assert all(torch.equal(a, b) for a, b in zip(shared[1:], alone[1:], strict=True))


def test_units_cover_every_query_and_head_once_and_fit():
    for queries, heads, per_query, fixed, budget in (
        (1000, 8, 2224, 5000, 10**7), (1000, 8, 2224, 5000, 10**6), (130, 1, 10**4, 10, 10**5), (1, 3, 8, 0, 1 << 30),
    ):  # fmt: skip
        units = backend.work_units(queries, heads, per_query, fixed, budget)
        seen = sorted((kv, t) for u in units for kv in range(u.kv_first, u.kv_stop) for t in range(u.first, u.stop))
        assert seen == [(kv, t) for kv in range(heads) for t in range(queries)]
        for u in units:
            rows = u.stop - u.first
            fits = (u.kv_stop - u.kv_first) * (per_query * rows + fixed) <= budget
            assert fits or rows <= backend.UNIT_QUERIES


def test_units_are_no_shorter_than_what_comes_with_each_of_them_pays_for():
    tokens, per_query = 2 << 20, 2300  # chunk 16, topk 64: lists alone take 567 MiB
    lists = backend.BYTES_OF_LIST * (tokens // 16) * 63
    budget = backend.SCRATCH_BYTES - backend.SORT_BYTES
    assert lists > budget
    units = backend.work_units(tokens, 8, per_query, lists, budget)
    rows = [u.stop - u.first for u in units]
    assert sum(rows) == 8 * tokens and len(rows) == 8 * -(-tokens * per_query // lists)
    assert max(rows) * per_query + lists <= 2 * lists
