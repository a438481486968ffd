"""rowsum(a * b) in Triton against fp64."""

from __future__ import annotations

import pytest
import torch

from moba_kernels.triton_row_dot import row_dot, variants
from tests.kernels.inputs import assert_close


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [32, 96, 256])
def test_rows_are_multiplied_and_added_in_fp32(dim, dtype):
    generator = torch.Generator().manual_seed(dim)
    a, b = (torch.randn(37, 3, dim, generator=generator).to(dtype) for _ in range(2))
    got = row_dot(a, b, torch.float32)
    assert got.dtype == torch.float32 and got.shape == (37, 3)
    assert_close(got, (a.double() * b.double()).sum(-1), 1e-5 * dim**0.5)


def test_strides_are_the_callers_and_there_may_be_no_row():
    a, b = torch.randn(9, 4, 32), torch.randn(32, 9, 2)
    views = a[:, 1:3], b.permute(1, 2, 0)
    want = row_dot(*(x.contiguous() for x in views), torch.float32)
    assert torch.equal(row_dot(*views, torch.float32), want)
    assert row_dot(a[:0], a[:0], torch.float32).shape == (0, 4)


def test_variants_name_every_argument_of_their_kernel():
    for variant in variants([(64, 64), (192, 128)], [torch.bfloat16], 90):
        assert {*variant.types, *variant.constants} == set(variant.kernel.arg_names)
