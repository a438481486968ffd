"""Which threads the compiled kernels' work runs on. Without torch, so that a process can be without its threads.

As a script, with a library and a number of threads, it says how many there were.
"""

from __future__ import annotations

import ctypes
import sys
import threading

WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def threads_of(library: ctypes.CDLL, most: int) -> set[int]:
    """The threads that work on something together, all at one time."""
    barrier, seen = threading.Barrier(most), set()

    def work(_: object) -> None:
        barrier.wait(60)
        seen.add(threading.get_native_id())

    library.moba_on_threads(ctypes.c_int64(most), WORK(work), None)
    return seen


if __name__ == "__main__":
    print(len(threads_of(ctypes.CDLL(sys.argv[1]), int(sys.argv[2]))))
