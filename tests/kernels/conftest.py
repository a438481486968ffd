"""What the tests of the operator share."""

from __future__ import annotations

import pytest

from moba_kernels import native


@pytest.fixture
def pytorch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a C compiler: the torch backend is made of PyTorch's own operations."""
    monkeypatch.setattr(native, "available", lambda: False)
