"""No tensor of size [T,T] or [T,C,H] is ever made: every tensor that an op returns is measured."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moba_kernels import Full, MoBA, Pack, Routing, attend

from .inputs import make_qkv


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any op returned, in one dtype or in all."""

    def __init__(self, dtype=None):
        super().__init__()
        self.dtype = dtype
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor) and self.dtype in (None, x.dtype):
                # What it stores, not what it shows: an expanded view costs nothing.
                self.num_elements = max(self.num_elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("cu", [[0, 8192], [*range(0, 8193, 128)]], ids=["one document", "64 documents"])
@pytest.mark.parametrize("spec", [Full(), MoBA(16, 3), MoBA(16, 3, "group"), MoBA(1024, 2)], ids=str)
def test_scratch_stays_bounded_forward_and_backward(spec, cu):
    tokens, heads = 8192, 2
    if isinstance(spec, Full):
        tokens, cu = 2048, [0, 2048] if len(cu) == 2 else cu[:17]
    q, k, v, dout = make_qkv(cu, heads=heads, kv_heads=1, dim=4, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with LargestTensor() as largest:
        result = attend(*leaves, spec, cu_seqlens=Pack(cu))
        torch.autograd.grad(result.out, leaves, dout)
    # The gate's [T,C,H] would hold 8.4 million elements, [T,T] 67 million (4.2 million under Full).
    assert tokens * heads * 4 <= largest.num_elements <= 1 << 20
    result.report.raise_if_different()


@pytest.mark.parametrize("tokens", [64, 70000], ids=["uint16", "int32"])
def test_picks_are_narrowed_a_range_at_a_time(monkeypatch, tokens):
    monkeypatch.setattr("moba_kernels.routing.TEMPORARY_ELEMENTS", 128)
    picks = torch.arange(tokens * 6, dtype=torch.int32).remainder(40).view(tokens, 2, 3) - 1
    with LargestTensor(torch.int64) as largest:
        routing = Routing(picks, MoBA(1, 4), Pack([0, tokens]))
    assert torch.equal(routing.picks, picks) and routing.stored.dtype == (torch.uint16, torch.int32)[tokens > 65535]
    assert 100 <= largest.num_elements <= 128


class CopiedBytes(TorchDispatchMode):
    """Adds up what was copied only to lie densely."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.clone.default:
            self.total += result.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize(
    ("spec", "copies_of_inputs"),
    [(Full(), 4), (MoBA(512, 3), 4), (MoBA(16, 3), 4), (MoBA(16, 100), 8)],  # under masks one for every 1024 keys
    ids=["blocks", "lists", "tiles", "masks"],
)
def test_views_with_strides_are_gathered_from_where_they_lie(spec, copies_of_inputs):
    cu = [0, 4600]
    dense = make_qkv(cu, heads=4, kv_heads=2, dim=8, dtype=torch.float32)
    q, k, v, dout = dense
    fused = torch.cat((q, k, v), 1)  # [T,H+2K,D], as a fused projection gives them
    views = fused[:, :4], fused[:, 4:6], fused[:, 6:], dout.transpose(0, 1).contiguous().transpose(0, 1)
    spread = [torch.stack((x, x), -1)[..., 0] for x in dense]  # not even a row lies dense
    results, copied = [], []
    for *inputs, upstream in (dense, views, spread):
        leaves = [x.detach().requires_grad_() for x in inputs]
        with CopiedBytes() as copies:
            result = attend(*leaves, spec, cu_seqlens=cu)
            results.append([result.out, result.lse, *torch.autograd.grad(result.out, leaves, upstream)])
        copied.append(copies.total)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    # A copy of q, or of k, in every piece of work would be hundreds of megabytes.
    size = sum(x.nbytes for x in dense)
    assert copied[1] <= copied[0] and copied[2] <= copied[0] + copies_of_inputs * size


def test_a_bad_document_does_not_spoil_its_neighbours():
    cu = [0, 40, 60, 130]
    q, k, v, dout = make_qkv(cu, dtype=torch.float32)
    for x in (q, k, v):
        x[40:60] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for spec in (Full(), MoBA(8, 3), MoBA(8, 3, "group"), MoBA(64, 2)):
        result = attend(*leaves, spec, cu_seqlens=cu)
        for x in (result.out, result.lse, *torch.autograd.grad(result.out, leaves, dout)):
            assert torch.isfinite(x[:40]).all() and torch.isfinite(x[60:]).all() and torch.isnan(x[40:60]).any()
