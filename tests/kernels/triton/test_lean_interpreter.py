"""What lean_interpreter.py leaves out changes neither the language outside of kernels nor the types within."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from . import lean_interpreter

ELEMENTS = [tl.int1, tl.int8, tl.uint8, tl.int16, tl.int32, tl.int64, tl.uint64, tl.bfloat16, tl.float16, tl.float32]


@triton.jit
def _twice(x):
    return tl.sum(x, 0) * 2


@triton.jit
def _kernel(x_ptr, N: tl.constexpr):
    tl.store(x_ptr, _twice(_twice(tl.load(x_ptr + tl.arange(0, N))) + tl.zeros((N,), tl.float32)))


def test_functions_within_functions_run_and_the_language_is_whole_afterwards():
    x = torch.arange(4, dtype=torch.float32)
    for _ in range(2):
        expected = 8 * 2 * x.sum()
        _kernel[(1,)](x, 4)
        assert x[0] == expected
        assert tl.core.is_builtin(tl.load) and tl.core.is_builtin(tl.tensor.to)


@pytest.mark.parametrize("element", ELEMENTS, ids=str)
def test_types_are_stored_as_triton_would(element):
    for dtype in (element, tl.block_type(element, [2, 4]), tl.pointer_type(element)):
        for _ in range(2):
            assert interpreter._get_np_dtype(dtype) == lean_interpreter._numpy_dtype(dtype)
    pointers = tl.block_type(tl.pointer_type(element), [8])
    assert interpreter._get_np_dtype(pointers) == lean_interpreter._numpy_dtype(pointers)
