from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moba_train.config.schema import ParallelConfig
from moba_train.parallel.topology import Topology, close_topology, init_topology
from tests.unit.train.hostile import hostile as hostile  # the fixture


@pytest.fixture
def topology() -> Iterator[Topology]:
    """One rank with process groups, as a run without torchrun has them."""
    yield init_topology(ParallelConfig(), device=torch.device("cpu"), timeout_s=60.0)
    close_topology()
