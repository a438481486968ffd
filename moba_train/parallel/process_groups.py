"""The start and the end of the process groups: ranks meet, and part, also where PyTorch alone would wait in vain."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from moba_train.errors import BackendError, ExchangeError

from .differing import name_ranks, tell_differing
from .watch import plain_text

PLAIN_SINCE = "2.8"
"""Of PyTorch; torch.__version__ compares by number."""

_GROUPS_AMONG: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], dist.ProcessGroup]] = WeakKeyDictionary()


def start_process_group(rank: int, world_size: int, device: torch.device, *, timeout: timedelta) -> None:
    """The default process group of the ranks that the launcher's variables name: gloo on CPU, NCCL on CUDA. Collective.

    Ranks of which some found a GPU and some did not, or with different PyTorch, could not exchange a byte: their groups
    would wait for each other until the timeout and name nobody. So all first say in the store what they are.

    Raises BackendError on every rank where they differ, ExchangeError where some have not come within `timeout`, or
    this rank does not reach the store.
    """
    if device.type == "cuda" and torch.__version__ < PLAIN_SINCE:
        # Else the allocator keeps what an exchange has used until the device has come so far, with the host far ahead:
        # several strides of keys and values instead of two. `Pending` keeps them as long as is needed.
        os.environ.setdefault("TORCH_NCCL_AVOID_RECORD_STREAMS", "1")
    store = _store_of_job(rank, world_size, timeout)
    facts = {"device": device.type, "PyTorch": torch.__version__.split("+")[0]}
    differing = tell_differing(facts, meet(store, rank, world_size, facts, timeout=timeout))
    if differing:
        raise BackendError(
            "ranks cannot work together",
            where="the start of the job",
            got=differing,
            allowed="the same on all ranks",
            fix="give all nodes the same environment and working GPU drivers, or set engine.device",
        )
    dist.init_process_group(_backend(device), store=store, rank=rank, world_size=world_size, timeout=timeout)


def meet(
    store: Any, rank: int, world_size: int, facts: Mapping[str, str], *, timeout: timedelta
) -> list[dict[str, str]]:
    """What every rank says of itself, by rank. Collective over the ranks of a `dist.Store`.

    Raises ExchangeError that names the ranks which have not come within `timeout`.
    """
    # A launcher's store outlives the groups that are made over it, and all ranks make as many: each meeting is new.
    number = store.add(f"moba meetings of rank {rank}", 1)
    place: Any = dist.PrefixStore(f"moba meeting {number}", store)  # type: ignore[attr-defined]
    place.append("lines", json.dumps([rank, dict(facts)]) + "\n")
    if place.add("ranks", 1) == world_size:
        place.set("complete", "1")
    try:
        place.wait(["complete"], timeout)
    except RuntimeError as error:
        raise ExchangeError(
            f"rank {rank} of {world_size}: at the start of the job {_missing(place, world_size)} within "
            f"{timeout.total_seconds():.0f} s; look at what its node and its launcher printed"
        ) from error
    came = _lines(place)
    return [came[other] for other in range(world_size)]


def start_alone(device: torch.device, *, timeout: timedelta) -> None:
    """The default process group of a process that is a job by itself."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(_backend(device), store=store, rank=0, world_size=1, timeout=timeout)


@contextmanager
def shared_gloo_devices() -> Iterator[None]:
    """gloo groups that are made meanwhile share the devices of the default group, or of the first of them.

    A device is a listening socket and a thread, which wakes up every 10 ms however idle its group is. PyTorch makes
    one for each group, and Megatron some twenty groups a rank: with several ranks on a core that took a third of its
    time. What differs between groups, connections and their order, belongs to the group itself.
    """
    usual = dist.ProcessGroupGloo
    shared: list[Any] = []
    if dist.is_initialized() and dist.get_backend() == "gloo":
        assert dist.group.WORLD is not None
        options: Any = dist.group.WORLD._get_backend(torch.device("cpu")).options
        shared += options._devices

    class Group(usual):  # type: ignore[misc, valid-type]
        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            if not shared:
                super().__init__(store, rank, size, timeout=timeout)
                shared.extend(self.options._devices)  # type: ignore[attr-defined]
                return
            options = usual._Options()  # type: ignore[attr-defined]
            options._devices, options._threads, options._timeout = shared, 2 * len(shared), timeout
            super().__init__(store, rank, size, options)

    dist.distributed_c10d.ProcessGroupGloo = Group  # type: ignore[misc]
    try:
        yield
    finally:
        dist.distributed_c10d.ProcessGroupGloo = usual  # type: ignore[misc]
        shared.clear()  # a device goes with the last of its groups


def group_among(group: dist.ProcessGroup, ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """The ranks `ranks` of `group`, as a group of their own with the same backend and timeout; made once, then kept.

    Collective over `ranks` alone, the first time: this rank is one of them, and all of them call.
    """
    made = _GROUPS_AMONG.setdefault(group, {})
    if ranks not in made:
        backend = dist.get_backend(group)
        device = torch.device("cuda" if backend == "nccl" else "cpu")
        timeout = group._get_backend(device).options._timeout
        everyone = dist.get_process_group_ranks(group)
        members = [everyone[rank] for rank in ranks]
        with shared_gloo_devices():
            made[ranks] = dist.new_group(members, timeout=timeout, backend=backend, use_local_synchronization=True)
    return made[ranks]


def forget_groups_among(group: dist.ProcessGroup) -> None:
    """What `group_among` made of `group` is made anew. All ranks must call, or none.

    PyTorch names such a group by how many groups a rank has, so ranks that have not equally many never meet. That comes
    about where some ranks already have the group that they are asked for, and others make one.
    """
    _GROUPS_AMONG.pop(group, None)


def destroy_process_groups() -> None:
    """Take all process groups down, if there are any.

    Before PyTorch 2.8 a group that Python lets go of joins its gloo threads with the interpreter's lock held; a thread
    that is about to let go of a tensor waits for that lock, so neither returns, and no other thread can say so
    (github.com/pytorch/pytorch/pull/154976). There the objects, their threads and connections live until the process
    ends.
    """
    if not dist.is_initialized():
        return
    if torch.__version__ < PLAIN_SINCE:
        for group in dist.distributed_c10d._world.pg_map:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    dist.destroy_process_group()


def _store_of_job(rank: int, world_size: int, timeout: timedelta) -> Any:
    """Of the launcher, or of rank 0."""
    try:
        store: Any = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))[0]  # type: ignore[attr-defined]
    except dist.DistError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ExchangeError(
            f"rank {rank} of {world_size}: at the start of the job ranks did not meet at {address} within "
            f"{timeout.total_seconds():.0f} s ({plain_text(error)}); look whether all were started, rank 0 first, "
            "and can reach that address"
        ) from error
    store.set_timeout(timeout)
    return store


def _missing(place: Any, world_size: int) -> str:
    """Who did not come, in words."""
    try:
        came = _lines(place)
    except RuntimeError as error:
        return f"the store was lost, with rank 0 or the launcher ({plain_text(error)}),"
    return f"{name_ranks([rank for rank in range(world_size) if rank not in came])} did not come"


def _lines(place: Any) -> dict[int, dict[str, str]]:
    return dict(map(json.loads, place.get("lines").decode().splitlines()))


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"
