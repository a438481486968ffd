"""key_conv(): values, gradients, documents, halos, precision, and what it refuses. Forms: reference and torch."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

from moba_kernels import BackendError
from moba_kernels.key_conv import key_conv

BACKENDS = ["reference", "torch"]
ROWS = ([0, 24], [0, 0, 1, 2, 2, 17, 18], [0, 7, 29])
NAMES = ("out", "dk", "dweight", "dhalos")


def offsets_of(cu):
    return torch.cat([torch.arange(b - a) for a, b in pairwise(cu)] or [torch.zeros(0).long()])


def draw(cu, width, heads=2, dim=3, dtype=torch.float64, seed=0):
    """k [S,K,D], weight [K,D,W], dout [S,K,D]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return normal(cu[-1], heads, dim), normal(heads, dim, width), normal(cu[-1], heads, dim)


def run(k, weight, dout, offset, halos=None, **options):
    """(out, dk, dweight, dhalos) of key_conv."""
    width = weight.shape[2]
    pieces = len(options.get("piece_lengths", (0,)))
    halos = k.new_zeros((pieces, width - 1, *k.shape[1:])) if halos is None else halos
    leaves = [x.clone().requires_grad_() for x in (k, weight, halos)]
    out = key_conv(leaves[0], leaves[1], halos=leaves[2], document_offset=offset, **options)
    return out, *torch.autograd.grad(out, leaves, dout)


def halos_of(k, starts, width):
    """The width - 1 tokens before each start, zeros before the row."""
    padded = torch.cat((k.new_zeros((width - 1, *k.shape[1:])), k))
    return torch.stack([padded[start : start + width - 1] for start in starts])


def oracle(k, weight, offset):
    """Token by token in numpy, from the formula alone."""
    k, weight = k.double().numpy(), weight.double().numpy()
    out, width = k.copy(), weight.shape[2]
    for t in range(len(k)):
        z = sum(weight[:, :, width - 1 - lag] * k[t - lag] for lag in range(width) if lag <= offset[t])
        out[t] += z / (1 + np.exp(-z))
    return torch.from_numpy(out)


def plain(k, weight, dout, offset):
    """The plain way at the inputs' own precision: shifted products, masks and autograd; one piece, no halo."""
    leaves = [x.clone().requires_grad_() for x in (k, weight)]
    keys, filters = leaves
    width = weight.shape[2]
    z = keys * filters[:, :, -1]
    for lag in range(1, min(width, len(k))):
        before = torch.cat((keys.new_zeros((lag, *keys.shape[1:])), keys[:-lag]))
        z = z + torch.where((offset >= lag)[:, None, None], before, 0.0) * filters[:, :, width - 1 - lag]
    out = keys + silu(z)
    return out, *torch.autograd.grad(out, leaves, dout)


def worst(got, want):
    assert got.shape == want.shape
    return float((got.detach().double() - want.detach().double()).abs().max()) if got.numel() else 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("cu", ROWS, ids=str)
def test_values_are_the_formulas(cu, width, backend):
    k, weight, _ = draw(cu, width)
    offset = offsets_of(cu)
    out = key_conv(k, weight, document_offset=offset, backend=backend)
    assert worst(out, oracle(k, weight, offset)) <= 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(12,), (5, 7), (1, 11), (0, 12)], ids=str)
def test_gradcheck_in_keys_weight_and_halos(lengths, backend):
    k, weight, _ = draw([0, 12], 4, heads=1, dim=2)
    offset = offsets_of([0, 5, 12])
    offset[:5] += 2  # two tokens of the first document lie before this row: in the first halo
    halos = torch.randn(len(lengths), 3, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = [x.requires_grad_() for x in (k, weight, halos)]

    def convolved(k, weight, halos):
        return key_conv(k, weight, halos=halos, document_offset=offset, piece_lengths=lengths, backend=backend)

    assert torch.autograd.gradcheck(convolved, leaves, eps=1e-6, atol=1e-7)


def test_torch_and_reference_agree_over_many_ranges(monkeypatch):
    from moba_kernels.key_conv import torch as form

    monkeypatch.setattr(form, "RANGE_ELEMENTS", 48)  # 8 tokens a range
    cu = [0, 3, 30, 31, 70]
    k, weight, dout = draw(cu, 5)
    for lengths in ((70,), (9, 61), (2, 68)):
        halos = halos_of(k, (0, *np.cumsum(lengths)[:-1]), 5)
        results = [
            run(k, weight, dout, offsets_of(cu), halos, piece_lengths=lengths, backend=backend) for backend in BACKENDS
        ]
        for got, want in zip(*results, strict=True):
            assert worst(got, want) <= 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [1, 2, 9, 20])
@pytest.mark.parametrize("width", [3, 5])
def test_pieces_with_halos_are_the_whole_and_their_gradients_add_up(width, cut, backend):
    cu = [0, 6, 21]
    k, weight, dout = draw(cu, width)
    offset = offsets_of(cu)
    out, dk, dweight, _ = run(k, weight, dout, offset, backend=backend)
    halos = halos_of(k, (0, cut), width)
    together = run(k, weight, dout, offset, halos, piece_lengths=(cut, 21 - cut), backend=backend)
    alone = [
        run(k[rows], weight, dout[rows], offset[rows], halos[i : i + 1], backend=backend)
        for i, rows in enumerate((slice(0, cut), slice(cut, 21)))
    ]
    for of_pieces in (together, [torch.cat(x) for x in zip(*((a[0], a[1]) for a in alone), strict=True)]):
        assert worst(of_pieces[0], out) <= 1e-14
    dhalos = together[3]
    assert worst(dhalos, torch.cat([a[3] for a in alone])) <= 1e-14
    returned = torch.cat((dk.new_zeros((width - 1, *dk.shape[1:])), together[1]))
    returned[cut : cut + width - 1] += dhalos[1]  # as its owner adds it up; slots before the row fall off
    assert worst(returned[width - 1 :], dk) <= 1e-13
    assert worst(together[2], dweight) <= 1e-13
    assert worst(sum(a[2] for a in alone), dweight) <= 1e-13


def test_no_document_sees_another_even_where_that_holds_nan():
    cu = [0, 8, 20]
    k, weight, dout = draw(cu, 5)
    before = run(k, weight, dout, offsets_of(cu))
    k[:8] = torch.nan
    after = run(k, weight, dout, offsets_of(cu))
    assert torch.equal(before[0][8:], after[0][8:]) and torch.equal(before[1][8:], after[1][8:])
    assert after[0][:8].isnan().all()


def test_no_key_sees_a_later_one():
    k, weight, _ = draw([0, 20], 3)
    offset = offsets_of([0, 20])
    before = key_conv(k, weight, document_offset=offset)
    k[12:] += 1
    after = key_conv(k, weight, document_offset=offset)
    assert torch.equal(before[:12], after[:12]) and not torch.equal(before[12:], after[12:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [3, 5])
def test_error_is_at_most_twice_that_of_the_plain_same_precision_way(width, dtype):
    cu = [0, 70, 256]
    k, weight, dout = draw(cu, width, dim=16, dtype=dtype)
    offset = offsets_of(cu)
    got = run(k, weight, dout, offset)[:3]
    exact = plain(*(x.double() for x in (k, weight, dout)), offset)
    usual = plain(k, weight, dout, offset)
    for name, mine, want, peer in zip(NAMES, got, exact, usual, strict=False):
        assert mine.dtype == dtype
        assert worst(mine, want) <= 2 * worst(peer, want), name


def test_a_weight_in_fp32_goes_with_narrow_keys():
    cu = [0, 30]
    k, weight, dout = draw(cu, 3, dtype=torch.bfloat16)
    out, dk, dweight, dhalos = run(k, weight.float(), dout, offsets_of(cu))
    assert (out.dtype, dk.dtype, dhalos.dtype) == (torch.bfloat16,) * 3 and dweight.dtype == torch.float32
    assert torch.equal(out, run(k, weight, dout, offsets_of(cu))[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_row_gives_empty_results_and_zero_gradients(backend):
    k, weight, dout = draw([0], 3, dtype=torch.float32)
    for lengths in ((0,), (0, 0)):
        out, dk, dweight, dhalos = run(k, weight, dout, offsets_of([0]), piece_lengths=lengths, backend=backend)
        assert out.shape == dk.shape == (0, 2, 3)
        assert not dweight.any() and dhalos.shape == (len(lengths), 2, 2, 3) and not dhalos.any()


def test_views_with_strides_give_the_same_and_runs_are_bitwise_equal():
    cu = [0, 40]
    k, weight, dout = draw(cu, 3, dtype=torch.float32)
    fused = torch.cat((dout, k), 1)
    first = run(k, weight, dout, offsets_of(cu))
    for again in (run(k, weight, dout, offsets_of(cu).int()), run(fused[:, 2:], weight, fused[:, :2], offsets_of(cu))):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_second_derivative_is_refused():
    k, weight, _ = draw([0, 8], 3)
    out = key_conv(k.requires_grad_(), weight, document_offset=offsets_of([0, 8]))
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(out.sum(), k, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(8, 6)}, "k must be"),
        ({"k": torch.zeros(8, 2, 3, dtype=torch.int64)}, "k must be"),
        ({"k": [[[0.0]]]}, "k must be"),
        ({"weight": [[[0.0]]]}, "weight must be"),
        ({"document_offset": [0]}, "document_offset must be"),
        ({"halos": [0.0]}, "halos must be"),
        ({"weight": torch.zeros(2, 4, 3)}, "weight must be"),
        ({"weight": torch.zeros(2, 3, 9)}, "width in 1..8"),
        ({"weight": torch.zeros(2, 3, 3).bfloat16()}, "weight must be fp32"),
        ({"document_offset": torch.zeros(7).long()}, "document_offset must be"),
        ({"document_offset": torch.zeros(8)}, "document_offset must be"),
        ({"piece_lengths": (3, 4)}, "add up to 8"),
        ({"piece_lengths": (9, -1)}, "add up to 8"),
        ({"piece_lengths": (4.0, 4.0)}, "piece_lengths must be a sequence of integers"),
        ({"piece_lengths": 8}, "piece_lengths must be a sequence of integers"),
        ({"halos": torch.zeros(2, 2, 2, 3)}, "halos must be"),
        ({"halos": torch.zeros(1, 2, 2, 3).double()}, "halos must be"),
        ({"backend": "cuda"}, "unknown backend"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_arguments_that_do_not_fit_are_named(change, message):
    arguments = {"k": torch.zeros(8, 2, 3), "weight": torch.zeros(2, 3, 3), "document_offset": torch.zeros(8).long()}
    with pytest.raises(ValueError, match=message) as caught:
        key_conv(**(arguments | change))
    assert "got" in str(caught.value) and "fix" in str(caught.value)


def test_triton_says_why_it_cannot_serve():
    k, weight, _ = draw([0, 8], 3)
    with pytest.raises(BackendError, match="triton") as caught:
        key_conv(k, weight, document_offset=offsets_of([0, 8]), backend="triton")
    assert caught.value.reasons
