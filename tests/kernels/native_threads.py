"""Which threads the compiled kernels' work runs on. Without torch, so that a process can be without its threads.

As a script, with a library and a number of threads, it says how many there were; with a third word, in a fork.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run(library: ctypes.CDLL, threads: int, parts: int, work: object) -> None:
    library.moba_on_threads(ctypes.c_int64(threads), ctypes.c_int64(parts), WORK(work), None)


def threads_of(library: ctypes.CDLL, most: int) -> set[int]:
    """The threads that work on something together, all at one time."""
    barrier, seen = threading.Barrier(most), set()

    def work(_: object) -> None:
        barrier.wait(60)
        seen.add(threading.get_native_id())

    run(library, most, most, work)
    return seen


if __name__ == "__main__":
    if sys.argv[3:]:
        import torch  # noqa: F401 - its threads are there before the fork
    library, most = ctypes.CDLL(sys.argv[1]), int(sys.argv[2])
    found = len(threads_of(library, most))
    if not sys.argv[3:]:
        print(found)
    elif os.fork() == 0:
        signal.alarm(60)
        print(len(threads_of(library, most)), flush=True)
        os._exit(0)
    else:
        os.wait()
