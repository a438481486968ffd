"""What the sentry of a rank finds out, says and does, with a clock, a store and events of our own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from moba_train.errors import EXIT_RANKS
from moba_train.parallel.sentry import (
    Board,
    Line,
    Sentry,
    answer_time_s,
    collective_timeout_s,
    device_timeout_s,
    story,
)
from moba_train.parallel.watch import Watch
from moba_train.parallel.wire import Wire


class _Store:
    """A key-value store that can go out of reach."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.there = True

    def _reach(self) -> dict[str, bytes]:
        if not self.there:
            raise RuntimeError("Connection reset by peer")
        return self.kept

    def set(self, key: str, value: str) -> None:
        self._reach()[key] = value.encode()

    def append(self, key: str, value: str) -> None:
        self._reach()[key] = self.kept.get(key, b"") + value.encode()

    def get(self, key: str) -> bytes:
        return self._reach()[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self._reach() for key in keys)


class _Event:
    """A CUDA event whose device hangs until it is told otherwise."""

    happened = False

    def record(self) -> None:
        self.happened = False

    def query(self) -> bool:
        return self.happened


class _Device:
    """A watch of a CUDA rank with a clock and events of our own, and what its sentry says and does."""

    def __init__(self, rank: int, num_ranks: int, clock: Callable[[], float] | None = None) -> None:
        self.now_s, self.events, self.said, self.ended = 0.0, [], [], []
        self.store = _Store()
        self.watch = Watch(torch.device("cuda"), new_event=self._new, clock=clock or (lambda: self.now_s))
        self.board = board = Board.__new__(Board)
        board._store, board.rank, board.world_size = self.store, rank, num_ranks
        self.sentry = Sentry(
            self.watch, board, timeout_s=4.0, say=self.said.append, end=self.ended.append
        )  # answers within 1 s; a device is late after 0.5 s
        self.watch.is_read = True

    def _new(self) -> _Event:
        self.events.append(_Event())
        return self.events[-1]

    def exchange(self, layer: int) -> None:
        wire = Wire(dist.group.WORLD, transport="pull", layer=layer)
        self.watch.wait_begins(wire, "forward/kv")
        self.watch.wait_is_over()


def test_a_device_that_hangs_in_an_exchange_ends_its_process_with_a_message_before_the_watchdog_would() -> None:
    device = _Device(rank=1, num_ranks=2)
    device.watch.begin("step 3: forward, layer 1/4, attention")
    device.exchange(0)
    device.exchange(1)
    device.events[0].happened = True
    assert not device.sentry.look() and not device.said
    device.now_s = 0.4
    assert not device.sentry.look() and not device.said  # not yet late
    device.now_s = 0.6
    assert device.sentry.look()
    assert device.ended == [EXIT_RANKS]
    (message,) = device.said
    assert "rank 1 of 2 broke off: layer 1, transport pull, phase forward/kv: nothing came" in message
    assert "in step 3: forward, layer 1/4, attention" in message
    assert "rank 0: gone" in message
    assert device.store.kept["alarm"] == b"1" and device.board.is_hang()


@pytest.mark.parametrize("rank", [0, 1])  # rank 0 waits for the others to read what it kept for them
def test_the_story_is_told_before_nccl_ends_the_process(rank: int) -> None:
    device = _Device(rank, num_ranks=2, clock=time.monotonic)
    started_s = time.monotonic()
    device.exchange(0)
    with device.sentry:
        while not device.ended and time.monotonic() < started_s + 20.0:
            time.sleep(0.02)
    assert device.ended == [EXIT_RANKS] and "gone" in device.said[0]
    assert time.monotonic() - started_s < device_timeout_s(4.0, torch.device("cuda")) == 4.0


def test_a_thread_that_asks_about_an_event_does_so_on_the_device_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [torch.device("cuda", 0)]

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    class CudaEvent:
        def record(self) -> None: ...

        def query(self) -> bool:
            asked_on.append(current[-1])
            return True

    asked_on: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "Event", CudaEvent)
    watch = Watch(torch.device("cuda", 5))
    watch.is_read = True
    with watch.during("step 1"):
        pass
    assert watch.late(1.0) == "" and asked_on == [torch.device("cuda", 5)]


def test_events_are_used_again_so_that_exchanges_allocate_nothing() -> None:
    device = _Device(rank=0, num_ranks=2)
    for layer in range(50):
        device.exchange(layer)
        device.events[-1].happened = True
        assert device.watch.late(1.0) == ""
    assert len(device.events) <= 2


def test_nothing_is_followed_while_nobody_reads() -> None:
    device = _Device(rank=0, num_ranks=2)
    device.watch.is_read = False
    device.exchange(0)
    assert not device.events


def test_a_rank_whose_host_waits_answers_the_alarm_and_ends_by_itself() -> None:
    device = _Device(rank=0, num_ranks=3)
    device.watch.wait_begins(Wire(dist.group.WORLD, transport="a2a", layer=7), "backward/dqkv")
    device.store.kept["alarm"] = b"1"
    device.board.post(Line("busy", "step 2"))
    device.store.append("lines", '[1, "broke off", "its neighbour closed the connection"]\n')
    assert not device.sentry.look()
    answer = device.board.lines()[0]
    assert answer.kind == "waits" and answer.text.startswith("layer 7, transport a2a, phase backward/dqkv")
    while not device.sentry.look():
        time.sleep(0.1)
    (message,) = device.said
    assert "rank 1: broke off too: its neighbour closed the connection" in message
    assert "rank 2: gone" in message and device.ended == [EXIT_RANKS]


def test_a_message_says_so_when_the_store_is_out_of_reach_and_blames_nobody() -> None:
    device = _Device(rank=1, num_ranks=3)
    device.store.there = False
    told_by_main = device.sentry.explain(Line("broke off", "layer 0"))
    device = _Device(rank=1, num_ranks=3)
    device.store.kept["alarm"] = b"0"
    assert not device.sentry.look()
    device.store.there = False
    while not device.sentry.look():
        time.sleep(0.1)
    for message in (told_by_main, *device.said):
        assert "out of reach (Connection reset by peer)" in message and "gone:" not in message


def test_a_store_that_goes_when_all_have_spoken_is_not_worth_a_word() -> None:
    device = _Device(rank=1, num_ranks=2)
    device.store.kept |= {"alarm": b"0", "lines": b'[0, "failed", "ValueError: no such row"]\n'}
    assert not device.sentry.look() and not device.sentry.look()  # answers, then reads
    device.store.there = False
    while not device.sentry.look():
        time.sleep(0.1)
    (message,) = device.said
    assert "rank 0: failed by itself: ValueError: no such row" in message and "out of reach" not in message


def test_a_rank_that_has_spoken_for_itself_is_not_spoken_over_by_its_thread() -> None:
    device = _Device(rank=0, num_ranks=2)
    device.sentry.leave_word(Line("failed", "the data file is missing"))
    device.board.raise_alarm()
    assert not device.sentry.look()
    assert device.board.lines()[0] == Line("failed", "the data file is missing")


def test_what_an_earlier_run_of_the_same_process_left_is_not_heard() -> None:
    store = dist.HashStore()
    earlier = Board(store, 1, 2)
    earlier.post(Line("failed", "long ago"))
    earlier.raise_alarm()
    assert earlier.is_alarm() and Board(store, 0, 2).is_alarm()
    again = Board(store, 1, 2)
    assert not again.is_alarm() and again.lines() == {}


def test_a_store_that_never_answers_keeps_nobody() -> None:
    device, answers = _Device(rank=1, num_ranks=3), threading.Event()
    device.store.check = device.store.append = lambda *_: answers.wait(60.0)  # type: ignore[method-assign,assignment]
    started_s = time.monotonic()
    assert not device.sentry.look()  # asks whether there is an alarm
    message = device.sentry.explain(Line("broke off", "layer 0"))
    assert time.monotonic() - started_s < 30.0
    assert "out of reach (it does not answer)" in message and "gone:" not in message
    answers.set()


def test_the_story_of_a_thousand_ranks_fits_a_screen() -> None:
    lines = {r: Line("waits", f"layer {r}") for r in range(1000) if r not in (7, 8)} | {9: Line("busy", "step 1")}
    message = story(0, 1000, Line("broke off", "layer 2"), lines, 5.0)
    assert "rank 7, 8: gone" in message and "rank 9: alive" in message and "more ranks likewise" in message
    assert len(message.splitlines()) < 12


def test_all_ranks_have_spoken_and_ended_within_the_timeout() -> None:
    for timeout_s in (1.0, 12.0, 600.0):
        late_alarm_s, poll_s = collective_timeout_s(timeout_s), answer_time_s(timeout_s) / 5
        assert late_alarm_s + answer_time_s(timeout_s) + 2 * poll_s < timeout_s
