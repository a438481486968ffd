"""The end of the process groups, also where PyTorch cannot end them."""

from __future__ import annotations

import ctypes

import torch
import torch.distributed as dist

GROUPS_CAN_GO = "2.8"  # of PyTorch; torch.__version__ compares by number


def destroy_process_groups() -> None:
    """Take all process groups down, if there are any.

    Before PyTorch 2.8 a group that Python lets go of joins its gloo threads with the interpreter's lock held; a thread
    that is about to let go of a tensor waits for that lock, so neither returns, and no other thread can say so
    (github.com/pytorch/pytorch/pull/154976). There the objects, their threads and connections live until the process
    ends.
    """
    if not dist.is_initialized():
        return
    if torch.__version__ < GROUPS_CAN_GO:
        for group in dist.distributed_c10d._world.pg_map:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    dist.destroy_process_group()
