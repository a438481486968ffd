"""N ranks as threads of one process: to test and study geometry, bytes and balance at scales beyond one machine.

    def rank_main(group):                         # ThreadGroup: rank(), size(), and the collectives of wire.py
        traffic = Traffic()
        context_attend(q, k, v, spec, layout="zigzag", group=group, cu_seqlens=pack, traffic=traffic)
        return traffic

    traffics = run_threads(rank_main, 512)

Everything above the collectives is the code that real ranks run. A collective is a meeting of all threads: each lays
its tensor down, all copy what is theirs, nobody goes on before the last has copied. Between meetings the threads run
one at a time: many that want the interpreter at once spend more time in handing it over than in their work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


@dataclass(frozen=True)
class _Table:
    """What the threads of a group share."""

    slots: list[Any]
    barrier: threading.Barrier
    turn: threading.Lock
    """Of all threads, whatever group they meet in: whoever computes holds it."""
    tables: dict[tuple[int, ...], _Table] = field(default_factory=dict)
    """Of some of the threads, by their ranks."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @staticmethod
    def of(num_ranks: int, turn: threading.Lock) -> _Table:
        return _Table([None] * num_ranks, threading.Barrier(num_ranks), turn)

    def among(self, ranks: tuple[int, ...]) -> _Table:
        with self.lock:
            table = self.tables.setdefault(ranks, _Table.of(len(ranks), self.turn))
            if self.barrier.broken:  # a rank has failed before these met for the first time
                table.barrier.abort()
            return table

    def wait(self) -> None:
        """Until all have come. The others need the turn meanwhile."""
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()

    def abort(self) -> None:
        """Whoever waits, here or among some, waits no longer."""
        with self.lock:
            for table in (self, *self.tables.values()):
                table.barrier.abort()


@dataclass(frozen=True)
class ThreadGroup:
    """One rank's view of a group of threads; stands where a `dist.ProcessGroup` would."""

    table: _Table
    own_rank: int

    def size(self) -> int:
        return len(self.table.slots)

    def rank(self) -> int:
        return self.own_rank

    def among(self, ranks: tuple[int, ...]) -> ThreadGroup:
        """Some of the ranks, this one among them, as a group of their own."""
        return replace(self, table=self.table.among(ranks), own_rank=ranks.index(self.own_rank))

    def _meet(self, laid_down: Any, take: Callable[[Sequence[Any]], None]) -> None:
        self.table.slots[self.own_rank] = laid_down
        self.table.wait()
        take(self.table.slots)
        self.table.wait()

    def all_gather(self, received: Tensor, sent: Tensor) -> None:
        """received [N * n, ...] := every rank's sent [n, ...], in rank order."""
        self._meet(sent, lambda slots: torch.cat(list(slots), out=received))  # type: ignore[arg-type]

    def reduce_scatter(self, received: Tensor, sent: Tensor) -> None:
        """received [n, ...] := part `rank` of the sum over ranks of sent [N * n, ...], added up in rank order."""

        def take(slots: Sequence[Tensor]) -> None:
            rows = received.shape[0]
            received.copy_(torch.stack([x.narrow(0, self.own_rank * rows, rows) for x in slots]).sum(0))

        self._meet(sent, take)

    def all_reduce(self, x: Tensor) -> None:
        """x := the sum over ranks, in place."""
        total = torch.empty_like(x)
        self._meet(x, lambda slots: torch.sum(torch.stack(list(slots)), 0, out=total))  # type: ignore[arg-type]
        x.copy_(total)

    def all_to_all(
        self, received: Tensor, sent: Tensor, received_rows: Sequence[int], sent_rows: Sequence[int]
    ) -> None:
        """received := the rows that each rank sends here, in rank order."""

        def take(slots: Sequence[tuple[Tensor, Sequence[int]]]) -> None:
            bounds = [edges[self.own_rank : self.own_rank + 2] for _, edges in slots]
            assert [stop - start for start, stop in bounds] == list(received_rows), "ranks disagree on what is sent"
            # Most ranks of many send nothing here, and a view of nothing costs as much as any other.
            parts = [x[start:stop] for (x, _), (start, stop) in zip(slots, bounds, strict=True) if stop > start]
            if parts:
                torch.cat(parts, out=received)

        self._meet((sent, list(accumulate(sent_rows, initial=0))), take)


def run_threads(fn: Callable[[ThreadGroup], R], num_ranks: int) -> list[R]:
    """Run `fn(group)` as `num_ranks` threads; their results in rank order. Raises the first failure of any rank."""
    table = _Table.of(num_ranks, threading.Lock())
    results: dict[int, R] = {}
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            with table.turn:
                results[rank] = fn(ThreadGroup(table, rank))
        except threading.BrokenBarrierError:
            pass  # another rank failed; its exception is the one to see
        except BaseException as error:  # raised below, in the caller's thread
            failures.append(error)
            table.abort()

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [results[rank] for rank in range(num_ranks)]


__all__ = ["ThreadGroup", "run_threads"]
