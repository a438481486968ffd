"""The parity grid: a seeded sample in every run, the whole of it under the marker `parity`."""

from __future__ import annotations

import itertools

import pytest
import torch

from moba_kernels import route
from moba_kernels.attend import flash

from . import parity

GROUPS = [list(group) for _, group in itertools.groupby(parity.cases(), lambda case: (len(case.cu), case.heads))]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def test_the_grid_is_the_documented_one():
    grid = list(parity.cases())
    assert len(grid) == 3 * 4 * 3 * 3 * 4 * 2 and len(set(grid)) == len(grid)
    assert grid == list(parity.cases())
    assert {case.group for case in grid} == {1, 2, 4}
    assert {case.spec.select for case in grid} == {"head", "group"}


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2, 3))])
def test_a_sample_of_the_grid_routes_exactly_and_attends_within_twice_the_plain_error(part):
    parity.check_all(parity.sample(24)[part::4], "cpu", f"sample {part + 1}")


@pytest.mark.parametrize(
    ("spec", "dim", "dtype"),
    [
        (parity.MoBA(512, 3), 64, torch.float32),
        pytest.param(parity.MoBA(512, 3), 64, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(parity.MoBA(256, 4, "group"), 128, torch.float32, marks=pytest.mark.slow),
        (parity.MoBA(256, 4, "group"), 128, torch.bfloat16),
        (parity.MoBA(16, 100), 64, torch.float32),
    ],
    ids=str,
)
def test_long_rows_on_cpu_route_exactly_and_attend_within_twice_the_plain_error(spec, dim, dtype):
    """Rows that PyTorch's flash kernel serves: covered documents, lists, and masks."""
    case = parity.Case((0, 900, 4200), 2, 1, spec, dtype, seed=3, dim=dim)
    parity.check(case, ("torch",), "cpu")


@pytest.mark.parity
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: f"{len(group[0].cu) - 1}docs-H{group[0].heads}")
def test_the_whole_grid_routes_exactly_and_attends_within_twice_the_plain_error(group, device, capsys):
    with capsys.disabled():
        parity.check_all(group, device, f"{len(group[0].cu) - 1} documents, {group[0].heads} heads, {device}")


def small_case(**changes):
    fields = {"cu": (0, 100, 260), "heads": 2, "kv_heads": 1, "spec": parity.MoBA(32, 3), "dtype": torch.float32}
    return parity.Case(**{**fields, "seed": 5, **changes})


def test_the_check_notices_a_wrong_pick_a_wrong_gradient_and_a_lost_pair(monkeypatch):
    case = small_case()
    parity.check(case, ("torch", "flash"), "cpu")
    q, k, _, _ = parity.inputs(case, "cpu")
    ids = route(q, k, case.spec, cu_seqlens=list(case.cu)).chunk_ids
    for wrong in (0, -1):
        changed = ids.clone()
        changed[-1, 0, 1] = wrong if changed[-1, 0, 1] != wrong else 4
        with pytest.raises(AssertionError, match="query 259, head 0"):
            parity.compare_routing(changed, q, k, case)

    backward, forward = flash.attend_partial_backward, flash.attend_partial

    def off_by_little(*args):
        dq, dk, dv = backward(*args)
        return dq, dk * (1 + 1e-5), dv

    monkeypatch.setattr(flash, "attend_partial_backward", off_by_little)
    with pytest.raises(AssertionError, match="flash: dk"):
        parity.check(case, ("flash",), "cpu")
    monkeypatch.setattr(flash, "attend_partial_backward", backward)
    monkeypatch.setattr(flash, "attend_partial", lambda q, k, v, call, tally: forward(q, k, v, call, None))
    with pytest.raises(RuntimeError, match="planned"):
        parity.check(case, ("flash",), "cpu")


def test_the_dense_reference_is_autograds():
    case = small_case(dtype=torch.float64)
    q, k, v, dout = parity.inputs(case, "cpu")
    ids = parity.expected_picks(q, k, case)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    mask = torch.stack([parity.mask_of_head(ids, head, case) for head in range(2)])
    keys, values = (x.repeat_interleave(2, 1).transpose(0, 1) for x in leaves[1:])
    scores = (leaves[0].transpose(0, 1) @ keys.mT * case.dim**-0.5).masked_fill(~mask, -torch.inf)
    out = (scores.softmax(-1) @ values).transpose(0, 1)
    want = [out.detach(), scores.logsumexp(-1).T.detach(), *torch.autograd.grad(out, leaves, dout)]
    for got, exact in zip(parity.dense(q, k, v, dout, ids, case, torch.float64), want, strict=True):
        assert (got - exact).abs().max() < 1e-12
