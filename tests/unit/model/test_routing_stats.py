"""Routing numbers of picks that were written down by hand."""

from __future__ import annotations

import math

import pytest
import torch

from moba_kernels import MoBA, Pack, Routing
from moba_train.model.routing_stats import DISTANCE_NAMES, routing_numbers, routing_totals

CPU = torch.device("cpu")


def routing_of(picks: list[list[list[int]]], pack: Pack, spec: MoBA) -> Routing:
    return Routing(torch.tensor(picks), spec, pack)


def test_entropy_top_share_and_distances_of_known_picks() -> None:
    pack, spec = Pack([0, 6]), MoBA(1, 2)  # six chunks of one token; five can be picked
    picks = [[[-1]], [[0]], [[0]], [[2]], [[0]], [[0]]]
    numbers = routing_numbers(routing_totals({3: routing_of(picks, pack, spec)}, None, CPU))
    assert numbers["top_chunk_share"] == pytest.approx(4 / 5)
    assert numbers["entropy"] == pytest.approx(-(0.8 * math.log(0.8) + 0.2 * math.log(0.2)) / math.log(5))
    assert numbers["distance_1"] == pytest.approx(2 / 5)  # 1 -> 0 and 3 -> 2
    assert numbers["distance_2_4"] == pytest.approx(2 / 5)  # 2 -> 0 and 4 -> 0
    assert numbers["distance_5_16"] == pytest.approx(1 / 5)  # 5 -> 0
    assert sum(numbers[name] for name in DISTANCE_NAMES) == pytest.approx(1.0)


def test_heads_and_layers_are_averaged() -> None:
    pack, spec = Pack([0, 3]), MoBA(1, 2)
    collapsed = [[[-1], [-1]], [[0], [0]], [[0], [1]]]
    numbers = routing_numbers(routing_totals({0: routing_of(collapsed, pack, spec)}, None, CPU))
    assert numbers["top_chunk_share"] == pytest.approx((1.0 + 0.5) / 2)
    assert numbers["entropy"] == pytest.approx((0.0 + 1.0) / 2)


def test_layers_without_picks_give_no_numbers() -> None:
    pack, spec = Pack([0, 2]), MoBA(4, 3)
    nothing = Routing(torch.empty(2, 1, 0, dtype=torch.int64), spec, pack)
    assert routing_numbers(routing_totals({0: nothing}, None, CPU)) == {}
    assert routing_numbers(routing_totals({}, None, CPU)) == {}
