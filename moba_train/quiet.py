"""Keeps third-party advice that a user of this project can do nothing about off the terminal, and start-up short.

Without Transformer Engine and Apex, megatron-core falls back to PyTorch modules that compute the same, and says so in a
dozen warnings; parts of it still call collectives by names that PyTorch has renamed. None names a fault of the run.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Loggers that speak while megatron-core is imported; the second finds a CUDA toolkit on a machine without a GPU.
_AT_IMPORT = ("megatron", "torch.utils.cpp_extension")

# Warned while megatron-core runs, matched from the beginning of the message.
_KNOWN_ADVICE = (
    "full scope is deprecated",  # about CUDA graphs, which are not used
    "The .grad attribute of a Tensor that is not a leaf Tensor",  # the distributed optimizer's shards are views
    "`torch.distributed.[a-z_]+` is deprecated",
    "MimoModelConfig is experimental",  # not used; the optimizer's set-up imports it
    "Please use DTensor instead",  # Megatron's checkpoint format is made of ShardedTensor
)

# Logged while megatron-core 0.19 runs: logger -> beginning of the message.
_KNOWN_LOGS = {
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",  # in favour of HybridModel, which 0.16 lacks
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",  # in favour of a pickle
}


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Drops what is warned or logged below ERROR while megatron-core is imported, and nothing else.

    It costs half the time without garbage collection, and on a machine without CUDA without PyTorch's compiler.
    """
    loggers = [logging.getLogger(name) for name in _AT_IMPORT]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), collection_paused(), _nothing_compiled_on_cpu():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def collection_paused() -> Iterator[None]:
    """For imports: they make hundreds of thousands of objects and no garbage, and a collector would look for some."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _nothing_compiled_on_cpu() -> Iterator[None]:
    """On a machine without CUDA torch.compile leaves functions as they are.

    Megatron decorates its fused functions with it when it is imported, which loads the compiler. Models on the CPU call
    none of them: fusions are off.
    """
    import torch  # here, since modules that need no torch import this one

    if torch.cuda.is_available():
        yield
        return
    compile_function = torch.compile
    torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_function


def _as_it_is(model: Any = None, **options: Any) -> Any:
    return model if model is not None else _as_it_is


def ignore_known_advice() -> None:
    """From now on what megatron-core is known to warn of and log at run time is not shown; all else is. Idempotent."""
    for message in _KNOWN_ADVICE:
        warnings.filterwarnings("ignore", message=message)
    for name in _KNOWN_LOGS:
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_KNOWN_LOGS[record.name])


__all__ = ["collection_paused", "ignore_known_advice", "quiet_imports"]
