"""Hold a finished `make million` to its limits: python launch/check_million.py runs/million

The last step is the one on 1,048,576 tokens, the one before it has rows of 131,072. Exits with 1 and says which limit
is broken, or that the rows were other ones.
"""

from __future__ import annotations

import sys
from pathlib import Path

from moba_train.train.flops import document_pairs
from moba_train.train.metrics import read_metrics

MOST_GIB = 12.0  # all ranks together
MOST_SECONDS = 720.0
MOST_GROWTH = 1.5  # time per token, against the shorter rows
SHORT, LONG = 1 << 17, 1 << 20
CHUNK, TOPK = 1024, 3  # of configs/million_cpu.toml


def main(run_dir: Path) -> int:
    before, last = read_metrics(run_dir / "metrics.jsonl")[-2:]
    growth = before["perf/tokens_per_s"] / last["perf/tokens_per_s"]
    limits = (
        ("peak memory of all ranks, GiB", last["memory/peak_all_ranks_gib"], MOST_GIB),
        ("the step, s", last["perf/step_time_s"], MOST_SECONDS),
        (f"time per token / that of rows of {SHORT:,} tokens", growth, MOST_GROWTH),
    )
    for name, value, limit in limits:
        print(f"{name:<48} {value:8.2f}   limit {limit:6.1f}   {'ok' if value <= limit else 'BROKEN'}")
    # Documents that are shorter than their row attend to a larger share of their pairs: the density tells them apart.
    rows = [
        (record["train/loss_tokens"], record["train/density"], length, _density(length))
        for record, length in ((before, SHORT), (last, LONG))
    ]
    whole = all(tokens == length and abs(found / density - 1) < 1e-6 for tokens, found, length, density in rows)
    for tokens, found, length, density in rows:
        print(f"tokens that count {tokens:>11,} of {length:>9,}   density {found:.6f}, of one document {density:.6f}")
    print("every row is one document" if whole else "BROKEN: a row is not one document of its length")
    return 0 if whole and all(value <= limit for _, value, limit in limits) else 1


def _density(length: int) -> float:
    """Attended pairs / causal pairs of one document."""
    return document_pairs(length, chunk_size=CHUNK, topk=TOPK) / (length * (length + 1) / 2)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
