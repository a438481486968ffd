"""What a run says last: the time per token of each stage, and its peak memory by component."""

from __future__ import annotations

from collections.abc import Sequence

from moba_train.config.schema import StageConfig
from moba_train.train.figures import memory_rows, take_memory, time_per_token_us
from moba_train.train.metrics import Record


class RunSummary:
    """A metric sink that keeps what the last lines need.

    Args:
        stages: the schedule.
    """

    def __init__(self, stages: Sequence[StageConfig]) -> None:
        self._seq_len = {stage.name: stage.seq_len for stage in stages}
        self._rates: dict[str, list[float]] = {}
        self._memory: dict[str, float] = {}

    def write(self, record: Record) -> None:
        """Note one step."""
        self._rates.setdefault(str(record["stage"]), []).append(float(record["perf/tokens_per_s"]))
        take_memory(self._memory, record)

    def amend(self, record: Record) -> None:
        """An evaluation says nothing of time and memory of steps."""

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        """Nothing is open."""

    def lines(self) -> list[str]:
        """The last lines of the log; none when no step was taken."""
        memory = [f"  {name:<14}{gib:>8.3f} GiB  {how}" for name, gib, how in memory_rows(self._memory)]
        if not self._rates:
            return []
        return [
            "time per token, median step of each stage:",
            *self._time_lines(),
            "peak memory by component, of the rank that needs most:",
            *memory,
        ]

    def _time_lines(self) -> list[str]:
        times = {name: time_per_token_us(rates) for name, rates in self._rates.items()}
        first = next(iter(times.values()))
        return [
            f"  {name:<14}seq_len {self._seq_len[name]:>10,}  {us:>9.2f} us per token  "
            f"{1e6 / us:>10,.0f} tokens/s  {us / first:.2f} x the first stage"
            for name, us in times.items()
        ]
