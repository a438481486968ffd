"""What every test file may rely on: it begins without process groups, whatever the file before it left behind."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator

import pytest

# As the Makefile has it: workers and ranks that take all cores each wait for one another, for ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Collecting tests imports all there is. What that leaves lives as long as the process: no garbage is looked for in it.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def no_process_groups_left_behind() -> Iterator[None]:
    """Engines that a file builds in the test process keep their groups between its tests; here they end."""
    yield
    topology = sys.modules.get("moba_train.parallel.topology")  # files that need no torch do not import it for this
    if topology is not None:
        topology.close_topology()
