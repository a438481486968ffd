"""The checks of tests/gpu under pytest, one test a case. `python tests/gpu/run.py` runs the same without pytest."""

from __future__ import annotations

import pytest

from .cases import all_cases

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", all_cases("cuda", toy=False), ids=lambda case: case.name)
def test_the_triton_kernels_on_a_gpu(case):
    case.run("cuda", "triton")
