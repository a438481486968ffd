"""Run a function on several gloo ranks of this machine, and get its results back.

    from tests.distributed import run_ranks

    def sum_of_ranks(rank, n):            # top level of its module, so that it can be pickled
        total = torch.tensor([rank])
        dist.all_reduce(total)
        return total.item()

    def test_every_rank_sees_the_sum():
        assert run_ranks(sum_of_ranks, 3) == [3, 3, 3]

Ranks are forked from a server that has imported torch, megatron-core and this project already (tests/preload.py), so
that a rank costs less than a tenth of a second; each has one thread. The default process group exists when `fn` begins
(also for `init_topology`, which uses a group that it finds); RANK, WORLD_SIZE and LOCAL_RANK are set as torchrun sets
them.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from moba_train.parallel.process_groups import destroy_process_groups

# After one rank has failed the others are likely to hang in a collective; this long they may still report.
GRACE_S = 3.0


class RankError(AssertionError):
    """One rank failed, died or hung; the message holds the rank's own traceback."""


def run_ranks(
    fn: Callable[..., Any], n: int, *args: Any, timeout_s: float = 240.0, method: str = "forkserver"
) -> list[Any]:
    """Run `fn(rank, n, *args)` on n ranks with a gloo process group; returns the result of each rank, in rank order.

    `fn`, `args` and the results travel by pickle. Raises RankError with the traceback of the rank that failed first, or
    with the exit code of a rank that died, or when ranks are still running after `timeout_s` (they are killed).

    Ranks that use a GPU need method="spawn": a process that was forked from one which has asked for GPUs has none.
    """
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["tests.preload"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # port 0: the system picks a free one
    readers: dict[Connection, int] = {}
    processes: list[BaseProcess] = []
    try:
        for rank in range(n):
            reader, writer = context.Pipe(duplex=False)
            job = (rank, n, store.port, timeout_s, writer, fn, args)
            process: BaseProcess = context.Process(target=_rank_main, args=job, name=f"rank {rank}", daemon=True)
            process.start()
            writer.close()  # the child's copy is the only one left, so its death is seen as end of file
            readers[reader] = rank
            processes.append(process)
        results = _collect(readers, processes, n, timeout_s)
        for process in processes:
            process.join(timeout=GRACE_S)  # let each take its process group down
        return results
    finally:
        for process in processes:
            process.kill()  # without effect on one that has ended
            process.join()


def _collect(readers: dict[Connection, int], processes: list[BaseProcess], n: int, timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    failures: list[str] = []
    while readers:
        ready = wait(list(readers), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            if failures:
                break
            raise RankError(f"ranks {sorted(readers.values())} of {n} still ran after {timeout_s} s and were killed")
        for reader in ready:
            assert isinstance(reader, Connection)
            rank = readers.pop(reader)
            try:
                ok, value = pickle.loads(reader.recv_bytes())
            except EOFError:
                processes[rank].join(timeout=GRACE_S)
                ok, value = False, f"died with exit code {processes[rank].exitcode} and no Python error"
            if ok:
                results[rank] = value
            else:
                failures.append(f"rank {rank} of {n}: {value}")
                deadline = min(deadline, time.monotonic() + GRACE_S)
    if failures:
        raise RankError("\n".join(failures))
    return [results[rank] for rank in range(n)]


def _rank_main(
    rank: int, n: int, port: int, timeout_s: float, writer: Connection, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """Body of a rank: process group up, `fn`, result or traceback into the pipe, process group down."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    # A rank that hangs shows where on its stderr, shortly before it is killed; its collectives wait longer than that.
    faulthandler.dump_traceback_later(0.9 * timeout_s, file=sys.__stderr__)
    timeout = timedelta(seconds=timeout_s + 60.0)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=n, timeout=timeout)
        dist.barrier()  # a rank that is done at once must not leave while others still connect to it
        message = pickle.dumps((True, fn(rank, n, *args)))
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    writer.send_bytes(message)
    writer.close()
    destroy_process_groups()
