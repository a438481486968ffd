"""Keeps third-party advice that a user of this project can do nothing about off the terminal.

Without Transformer Engine and Apex, megatron-core falls back to PyTorch modules that compute the same, and says so in a
dozen warnings; parts of it still call collectives by names that PyTorch has renamed. None names a fault of the run.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Said while megatron-core runs, matched from the beginning of the message.
_KNOWN_ADVICE = (
    "full scope is deprecated",  # about CUDA graphs, which are not used
    "The .grad attribute of a Tensor that is not a leaf Tensor",  # the distributed optimizer's shards are views
    "`torch.distributed.[a-z_]+` is deprecated",
    "Please use DTensor instead",  # Megatron's checkpoint format is made of ShardedTensor
)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Drops what is warned or logged below ERROR while megatron-core is imported, and nothing else."""
    logger = logging.getLogger("megatron")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def ignore_known_advice() -> None:
    """From now on the warnings that megatron-core is known to cause at run time are not shown; all others are."""
    for message in _KNOWN_ADVICE:
        warnings.filterwarnings("ignore", message=message)


__all__ = ["ignore_known_advice", "quiet_imports"]
