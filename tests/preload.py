"""Imported by a process before it forks ranks, so that they need not import it: see tests/distributed.py."""

from __future__ import annotations

import gc
from importlib import import_module

for name in (
    "pytest",
    "torch._dynamo",  # an optimizer loads it
    "moba_kernels.attend.torch",  # with the next two, what a call of the operator loads
    "moba_kernels.key_conv.torch",
    "moba_kernels.route.torch",
    "moba_train.commands.train",
    "moba_train.engine.megatron",
    "moba_train.train.megatron_io",
):
    import_module(name)

# A rank that collects garbage would visit, and so copy, all that it shares with the process that forked it.
gc.collect()
gc.freeze()
