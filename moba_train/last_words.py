"""What a process that ends with an error leaves for its launcher: a small JSON file, where the launcher names one.

torchrun, and launch/run_ranks.py, name it in TORCHELASTIC_ERROR_FILE and read it when the process has ended. Its
shape is torchrun's, with `rank`, `host`, `time_s`, `where`, `step` and `code` besides. The first error of a process
gives time and place, which tells causes from consequences; a later one, which may say more of it, replaces the text.
Imports no torch.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

_MOST_TEXT = 4000
"""Characters of a message; the log of the rank has the rest."""


def leave(message: str, *, where: str = "", step: int = -1, code: int = 0) -> None:
    """Note an error of this process; nothing happens where no launcher asks for it.

    Args:
        message: what a user should read.
        where: what the process was at ("step 12, optimizer").
        step: finished steps; -1 = unknown.
        code: exit code with which the process will end; 0 = not known yet.
    """
    name = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    if not name:
        return
    earlier = _read(Path(name))
    time_s = float(earlier.get("time_s", time.time()))
    extra = {
        "py_callstack": message[:_MOST_TEXT],  # what torchrun prints
        "timestamp": str(int(time_s)),
        "time_s": time_s,
        "rank": int(os.environ.get("RANK", "0")),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "where": earlier.get("where") or where,
        "step": step,
        "code": code,
    }
    try:
        Path(name).write_text(json.dumps({"message": {"message": message[:_MOST_TEXT], "extraInfo": extra}}), "utf-8")
    except OSError:
        return  # a full disk must not hide the error itself, which is on its way to the terminal


def _read(path: Path) -> dict[str, Any]:
    """`extraInfo` of what this process has left before."""
    try:
        extra = json.loads(path.read_text("utf-8"))["message"]["extraInfo"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return extra if isinstance(extra, dict) and extra.get("pid") == os.getpid() else {}


__all__ = ["leave"]
