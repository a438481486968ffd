"""The key convolution against a loop over tokens, channels and taps."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from moba_train.model.key_conv import KeyConv
from moba_train.model.row_context import document_offsets

BOUNDS = (0, 1, 4, 4, 11)


def convolve(width: int, keys: torch.Tensor) -> tuple[torch.Tensor, KeyConv]:
    module = KeyConv(2, 3, width, dtype=torch.float32, tp_group=None)  # type: ignore[arg-type]  # for checkpoints only
    torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(1))
    offsets = torch.from_numpy(document_offsets(torch.arange(11).numpy(), BOUNDS))
    return module(keys, torch.zeros(1, width - 1, 2, 3), [11], offsets), module


@pytest.mark.parametrize("width", [3, 5])
def test_keys_get_the_silu_of_a_causal_filter_of_their_own_document(width: int) -> None:
    keys = torch.randn(11, 2, 3, generator=torch.Generator().manual_seed(0))
    out, module = convolve(width, keys)
    for start, stop in pairwise(BOUNDS):
        for t in range(start, stop):
            for head in range(2):
                for d in range(3):
                    total = sum(
                        module.weight[head, d, width - 1 - lag].item() * keys[t - lag, head, d].item()
                        for lag in range(width)
                        if t - lag >= start
                    )
                    expected = keys[t, head, d].item() + total / (1 + math.exp(-total))
                    assert out[t, head, d].item() == pytest.approx(expected, abs=1e-6)


def test_no_document_sees_the_keys_of_another() -> None:
    keys = torch.randn(11, 2, 3, generator=torch.Generator().manual_seed(0))
    before, _ = convolve(5, keys)
    changed = keys.clone()
    changed[1:4] += 1.0
    after, _ = convolve(5, changed)
    assert torch.equal(before[4:], after[4:]) and torch.equal(before[:1], after[:1])
    assert not torch.equal(before[1:4], after[1:4])


def test_no_key_sees_a_later_one() -> None:
    keys = torch.randn(11, 2, 3, generator=torch.Generator().manual_seed(0))
    before, _ = convolve(3, keys)
    changed = keys.clone()
    changed[8] += 1.0
    after, _ = convolve(3, changed)
    assert torch.equal(before[:8], after[:8])
    assert not torch.equal(before[8:], after[8:])
