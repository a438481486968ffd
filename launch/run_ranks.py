"""torchrun for people: the same program and options, but a rank's exit code is passed on, and no launcher's traceback.

    python launch/run_ranks.py --standalone --nproc-per-node 2 -m moba_train train configs/smoke.toml --parallel.cp 2

torchrun itself ends with 1 whatever a rank ended with, below forty lines about its own insides. SIGUSR1 is ignored
here, since the launcher would die of it; the ranks install handlers of their own.
"""

from __future__ import annotations

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

EXIT_USER = 2  # the rank has said what is wrong


def run() -> int:
    """Run torchrun's main with this process's arguments; returns the exit code."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # They repeat, rank by rank, the failure that is summarised below.
    for name in ("multiprocessing.api", "agent.server.api", "agent.server.local_elastic_agent"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode != EXIT_USER:
            how = signal.Signals(-failure.exitcode).name if failure.exitcode < 0 else f"exit code {failure.exitcode}"
            print(f"launch: rank {rank} (process {failure.pid}) ended first, with {how}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException as stop:
        print(f"launch: {signal.Signals(stop.sigval).name} was passed on to the ranks", file=sys.stderr)
        return 128 + int(stop.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(run())
