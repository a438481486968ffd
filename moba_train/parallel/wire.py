"""The exchanges of context parallelism: one place where bytes are counted and where a failure gets its name.

    pending = wire.all_gather(k_SKD, phase="forward/kv")      # under way: on NCCL's own stream, or in gloo's threads
    ...                                                       # compute what does not need it
    k_NSKD = pending.wait()                                   # CUDA: the current stream waits, the host does not

A wire knows its group, the layer and the transport that use it, so that a broken exchange says which rank was doing
what. `among(ranks)` restricts it to some ranks of the group, as exchanges inside a node and across nodes do; these have
a process group of their own.

Shape letters: N ranks of the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from moba_train.errors import ExchangeError

from . import collectives
from .traffic import Traffic
from .watch import Watch, is_broken_exchange, plain_text


class Group(Protocol):
    """What is asked of a process group; `dist.ProcessGroup` and `emulation.ThreadGroup` offer it."""

    def size(self) -> int: ...

    def rank(self) -> int: ...


@dataclass(frozen=True)
class Pending:
    """An exchange under way. It keeps what is sent alive until `wait` has returned.

    On NCCL that is long enough, though the device may not have come so far: memory that is freed after `wait` is used
    again by the same stream, which waits for the exchange first. So wait on the stream that started the exchange, and
    wait for every one.
    """

    work: collectives.Work
    finish: Callable[[], Tensor]
    kept: tuple[Tensor, ...]
    wire: Wire
    phase: str

    def wait(self) -> Tensor:
        """The received tensor. Raises ExchangeError when the exchange broke off."""
        watch = self.wire.watch
        with self.wire.named(self.phase):
            if watch is not None:
                watch.wait_begins(self.wire, self.phase)
            with self.wire.traffic.waits.timed(any(x.is_cuda for x in self.kept)):
                self.work.wait()
            if watch is not None:
                watch.wait_is_over()
            return self.finish()


@dataclass(frozen=True)
class Wire:
    """See the module. `layer` counts from 0; None = outside of a model."""

    group: Group
    traffic: Traffic = field(default_factory=Traffic)
    transport: str = ""
    layer: int | None = None
    members: tuple[int, ...] = ()
    """Ranks of the group that this wire joins, ascending; () = all."""
    watch: Watch | None = None
    """Is told what this rank waits for."""
    joined: Group | None = None
    """The group of `members`; None = `group`."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of the group that this wire joins."""
        return self.members or tuple(range(self.group.size()))

    @property
    def size(self) -> int:
        return len(self.members) or self.group.size()

    @property
    def rank(self) -> int:
        """This rank's index among those that the wire joins."""
        return self.members.index(self.group.rank()) if self.members else self.group.rank()

    def among(self, ranks: Sequence[int]) -> Wire:
        """The same wire between some ranks of the group only, this rank one of them. Collective over them."""
        if len(ranks) == self.group.size():
            return replace(self, members=(), joined=None)
        members = tuple(sorted(ranks))
        return replace(self, members=members, joined=collectives.among(self.group, members))

    def all_gather(self, sent: Tensor, *, phase: str) -> Pending:
        """sent [...], of one shape on all ranks -> [N, ...] in rank order."""
        others = (self.size - 1) * _bytes(sent)
        self.traffic.add(phase, sent=others, received=others)
        sent = sent.contiguous()
        received = sent.new_empty((self.size, *sent.shape))
        with self.named(phase):
            work = collectives.all_gather(received.view(-1), sent.view(-1), group=self._among)
        return Pending(work, lambda: received, (sent,), self, phase)

    def reduce_scatter(self, sent: Tensor, *, phase: str) -> Pending:
        """sent [N, ...], part r for rank r -> [...]: this rank's part, summed over ranks in the dtype of `sent`."""
        sent = sent.contiguous()
        others = (self.size - 1) * _bytes(sent) // self.size
        self.traffic.add(phase, sent=others, received=others)
        received = sent.new_empty(sent.shape[1:])
        with self.named(phase):
            work = collectives.reduce_scatter(received.view(-1), sent.view(-1), group=self._among)
        return Pending(work, lambda: received, (sent,), self, phase)

    def all_reduce(self, x: Tensor, *, phase: str) -> Pending:
        """x [...] -> the sum over all ranks of the group, in place."""
        assert not self.members  # nobody sums among some ranks only
        moved = 2 * (self.size - 1) * _bytes(x) // self.size
        self.traffic.add(phase, sent=moved, received=moved)
        with self.named(phase):
            work = collectives.all_reduce(x, group=self.group)
        return Pending(work, lambda: x, (x,), self, phase)

    def all_to_all(
        self, sent: Tensor, sent_rows: Sequence[int], received_rows: Sequence[int], *, phase: str
    ) -> Pending:
        """Rows to every rank, rows from every rank.

        Args:
            sent: [sum(sent_rows), ...]: first the rows for rank 0, then those for rank 1, ...
            sent_rows, received_rows: N host integers each, for the ranks of this wire. Ranks must agree on them.
        Returns a Pending of [sum(received_rows), ...], in rank order.
        """
        sent = sent.contiguous()
        of_row = sent.shape[1:].numel() * sent.element_size()
        self.traffic.add(
            phase,
            sent=(sum(sent_rows) - sent_rows[self.rank]) * of_row,
            received=(sum(received_rows) - received_rows[self.rank]) * of_row,
        )
        received = sent.new_empty((sum(received_rows), *sent.shape[1:]))
        with self.named(phase):
            work = collectives.all_to_all(received, sent, received_rows, sent_rows, group=self._among)
        return Pending(work, lambda: received, (sent,), self, phase)

    @contextmanager
    def named(self, phase: str) -> Iterator[None]:
        """A collective that breaks off inside raises ExchangeError with rank, layer, transport and phase.

        Other errors pass: a device reports an earlier failure of this rank wherever the host next speaks to it.
        """
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, ExchangeError) or not is_broken_exchange(error):
                raise
            raise ExchangeError(
                f"an exchange broke off on context-parallel rank {self.group.rank()} of {self.group.size()}: "
                f"{self.place(phase)}: {plain_text(error)}"
            ) from error

    def place(self, phase: str) -> str:
        """The name of an exchange in messages: layer, transport, phase."""
        where = "" if self.layer is None else f"layer {self.layer}, "
        return f"{where}transport {self.transport or 'none'}, phase {phase}"

    @property
    def _among(self) -> Group:
        return self.group if self.joined is None else self.joined


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


__all__ = ["ExchangeError", "Group", "Pending", "Wire"]
