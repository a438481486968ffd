"""The key convolution in Triton: forward and gradients against the reference, halos, documents, precision."""

from __future__ import annotations

import pytest
import torch

from ..test_key_conv import NAMES, draw, halos_of, offsets_of, plain, run, worst


@pytest.mark.parametrize("width", [1, 3, 5])
@pytest.mark.parametrize("lengths", [(37,), (20, 17), (1, 36), (0, 37)], ids=str)
def test_values_and_gradients_are_the_references(lengths, width):
    cu = [0, 1, 9, 9, 37]
    k, weight, dout = draw(cu, width, dim=32, dtype=torch.float32)
    halos = torch.randn(len(lengths), width - 1, 2, 32, generator=torch.Generator().manual_seed(1))
    offset = offsets_of(cu)
    offset[:1] += 2  # two tokens of the first document lie in the first halo
    got = run(k, weight, dout, offset, halos, piece_lengths=lengths, backend="triton")
    want = run(
        *(x.double() for x in (k, weight, dout)), offset, halos.double(), piece_lengths=lengths, backend="reference"
    )
    for name, mine, expected in zip(NAMES, got, want, strict=True):
        assert worst(mine, expected) <= 2e-5, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_that_of_the_plain_same_precision_way(dtype):
    cu = [0, 30, 80]
    k, weight, dout = draw(cu, 3, dim=32, dtype=dtype)
    offset = offsets_of(cu)
    got = run(k, weight, dout, offset, backend="triton")[:3]
    exact = plain(*(x.double() for x in (k, weight, dout)), offset)
    usual = plain(k, weight, dout, offset)
    for name, mine, want, peer in zip(NAMES, got, exact, usual, strict=False):
        assert mine.dtype == dtype
        assert worst(mine, want) <= 2 * worst(peer, want), name


def test_rows_of_several_programs_and_padded_head_dims(monkeypatch):
    from moba_kernels.key_conv import triton as form

    monkeypatch.setattr(form, "SUMMED_ROWS", 32)
    cu = [0, 45, 70]
    k, weight, dout = draw(cu, 3, heads=1, dim=96, dtype=torch.float32)
    got = run(k, weight, dout, offsets_of(cu), backend="triton")
    want = run(*(x.double() for x in (k, weight, dout)), offsets_of(cu), backend="torch")
    for name, mine, expected in zip(NAMES, got, want, strict=True):
        assert worst(mine, expected) <= 2e-5, name


def test_pieces_with_halos_are_bitwise_the_whole():
    cu, cut = [0, 6, 21], 9
    k, weight, dout = draw(cu, 5, dim=32, dtype=torch.bfloat16)
    whole = run(k, weight, dout, offsets_of(cu), backend="triton")
    halos = halos_of(k, (0, cut), 5)
    pieces = run(k, weight, dout, offsets_of(cu), halos, piece_lengths=(cut, 12), backend="triton")
    assert torch.equal(whole[0], pieces[0])
    assert torch.equal(whole[1][cut:], pieces[1][cut:]) and torch.equal(whole[1][: cut - 4], pieces[1][: cut - 4])
    assert not pieces[3][0].any() and pieces[3][1].any()


def test_no_document_sees_another_even_where_that_holds_nan():
    cu = [0, 8, 20]
    k, weight, dout = draw(cu, 3, dim=32, dtype=torch.float32)
    before = run(k, weight, dout, offsets_of(cu), backend="triton")
    k[:8] = torch.nan
    after = run(k, weight, dout, offsets_of(cu), backend="triton")
    assert torch.equal(before[0][8:], after[0][8:]) and torch.equal(before[1][8:], after[1][8:])


def test_views_empty_rows_and_wide_filters():
    cu = [0, 20]
    k, weight, dout = draw(cu, 8, dim=32, dtype=torch.float32)
    fused = torch.cat((dout, k), 1)
    first = run(k, weight, dout, offsets_of(cu), backend="triton")
    again = run(fused[:, 2:], weight, fused[:, :2], offsets_of(cu).int(), backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    out, dk, dweight, dhalos = run(k[:0], weight, dout[:0], offsets_of([0]), piece_lengths=(0, 0), backend="triton")
    assert out.shape == dk.shape == (0, 2, 32) and not dweight.any() and not dhalos.any()
