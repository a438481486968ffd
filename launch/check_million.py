"""Hold a finished `make million` to its limits: python launch/check_million.py runs/million

The last step is the one on 1,048,576 tokens, the one before it has rows of 131,072. Exits with 1 and says which limit
is broken.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

MOST_GIB = 12.0  # all ranks together
MOST_SECONDS = 720.0
MOST_GROWTH = 1.5  # time per token, against the shorter rows


def main(run_dir: Path) -> int:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    before, last = records[-2:]
    growth = before["perf/tokens_per_s"] / last["perf/tokens_per_s"]
    limits = (
        ("peak memory of all ranks, GiB", last["memory/peak_all_ranks_gib"], MOST_GIB),
        ("the step, s", last["perf/step_time_s"], MOST_SECONDS),
        ("time per token / that of rows of 131,072 tokens", growth, MOST_GROWTH),
    )
    for name, value, limit in limits:
        print(f"{name:<48} {value:8.2f}   limit {limit:6.1f}   {'ok' if value <= limit else 'BROKEN'}")
    return 0 if all(value <= limit for _, value, limit in limits) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
