"""What a rank that hangs was doing: the Python stack of every thread, and PyTorch's flight recorder where it has one.

    RUN/hang/rank_3.txt             stacks of rank 3; a later hang is written below an earlier one
    RUN/hang/rank_3.flight.json     the newest collectives of gloo on rank 3, with shapes and sequence numbers
    RUN/hang/rank_3.nccl.json       the same of NCCL
    RUN/hang/nccl_trace_rank_3      the same in the form that PyTorch's own `torchfrtrace` reads

The stacks go to standard error too. The file system may be what hangs, so files are written by a thread that nobody
waits for longer than a second, and no source line is looked up.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

FOLDER = "hang"
_WRITE_S = 1.0
"""Seconds that the files get."""
_OWN_THREADS = ("sentry", "watchdog", "stacks", "signals")
"""Threads of ours that look on: they are not what hangs."""
_C10D = "torch.distributed.distributed_c10d"
_RECORDERS = (
    ("_dump_fr_trace_json", "rank_{}.flight.json"),
    ("_dump_nccl_trace_json", "rank_{}.nccl.json"),
    ("_dump_nccl_trace", "nccl_trace_rank_{}"),
)
"""Functions of PyTorch, each there in some builds, and the file of a rank."""


class Stacks:
    """Writes them down, once.

    Args:
        rank: of this process.
        run_dir: the run folder; None = standard error alone.
    """

    def __init__(self, rank: int, run_dir: Path | None) -> None:
        self._rank = rank
        self._run_dir = run_dir
        self._once = threading.Lock()

    def dump(self, why: str) -> None:
        """Write all stacks to standard error and to the run folder. A second call does nothing."""
        if not self._once.acquire(blocking=False):
            return
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        head = f"stacks of rank {self._rank} (process {os.getpid()} on {socket.gethostname()}) at {when}: {why}"
        text = "\n".join([head, *all_stacks()]) + "\n"
        print(text, end="", file=sys.stderr, flush=True)
        if self._run_dir is not None:
            thread = threading.Thread(target=self._write, args=(self._run_dir, text), name="stacks", daemon=True)
            thread.start()
            thread.join(_WRITE_S)

    def _write(self, run_dir: Path, text: str) -> None:
        """A run folder that is not there yet stays so; a disk that refuses is not worth a second error."""
        folder = run_dir / FOLDER
        try:
            if not run_dir.is_dir():
                return
            folder.mkdir(exist_ok=True)
            with (folder / f"rank_{self._rank}.txt").open("a", encoding="utf-8") as file:
                file.write(text + "\n")
            for name, record in flight_records():
                (folder / name.format(self._rank)).write_bytes(record)
        except (OSError, RuntimeError) as error:
            print(f"rank {self._rank}: {folder} is not complete: {error}", file=sys.stderr, flush=True)


def all_stacks() -> list[str]:
    """Lines that show the Python stack of every thread but ours that look on, the main thread first."""
    frames = sys._current_frames()
    known = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    lines = []
    for ident in sorted(frames, key=lambda ident: (ident != main, ident)):
        name = known.get(ident, "a thread that Python did not start")
        if not name.startswith(_OWN_THREADS):
            lines += [f"thread {name} (most recent call last):", *_calls(frames[ident])]
    return lines


def waiting_collective() -> str:
    """The collective of torch.distributed that the main thread is in, and who called it; "" = none."""
    return _collective_of(sys._current_frames().get(threading.main_thread().ident or 0))


def waiting_beside() -> str:
    """The same of the other threads, as that of a save, each as "; thread NAME waits in ..."."""
    frames = sys._current_frames()
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    waits = [(thread.name, _collective_of(frames.get(thread.ident or 0))) for thread in others]
    return "".join(f"; thread {name} waits in {collective}" for name, collective in waits if collective)


def _collective_of(frame: FrameType | None) -> str:
    found, caller = None, None
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module == _C10D:
            found, caller = frame, None
        elif found is not None and caller is None and not str(module).startswith("torch."):
            caller = frame
        frame = frame.f_back
    if found is None:
        return ""
    by = f", called by {caller.f_globals.get('__name__')}.{caller.f_code.co_qualname}" if caller else ""
    return f"torch.distributed.{found.f_code.co_name}{by}"


def flight_records() -> Iterator[tuple[str, bytes]]:
    """(file name with {} for the rank, content) of what PyTorch recorded. RuntimeError when a recorder refuses."""
    recorded = True
    for function, name in _RECORDERS:
        dump = getattr(torch._C._distributed_c10d, function, None)
        if dump is None:
            continue
        record: bytes = dump()
        if name.endswith(".json"):
            recorded = b'"entries"' in record
        if recorded:
            yield name, record


def _calls(frame: FrameType | None) -> list[str]:
    calls: list[str] = []
    while frame is not None:
        code = frame.f_code
        calls.append(f'  File "{code.co_filename}", line {frame.f_lineno}, in {code.co_qualname}')
        frame = frame.f_back
    return calls[::-1]


__all__ = ["FOLDER", "Stacks", "all_stacks", "flight_records", "waiting_beside", "waiting_collective"]
