"""The Triton kernels under Triton's interpreter, on the CPU: `TRITON_INTERPRET=1 pytest tests/kernels/triton`.

Triton reads the variable once, when a kernel is defined, so these files run in a process of their own; without the
variable they are not collected. The interpreter needs milliseconds for every inner tile: shapes are small.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    from . import lean_interpreter

    lean_interpreter.install()
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header() -> str | None:
    return None if INTERPRETED else "tests/kernels/triton: not collected, set TRITON_INTERPRET=1"


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.empty and its kin give is full of NaN (or absurd integers): a kernel that leaves a hole is seen."""

    def poisoned(allocate):
        def of(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(torch.nan if x.is_floating_point() else 123456789 % (1 << (8 * x.element_size() - 1)))

        return of

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
