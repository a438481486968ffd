"""The policy for steps whose loss or gradient norm is not finite: skip them, count them, and give up in time.

A step in which no token counts has no loss either (a long question whose answer lies in another row). It is skipped and
told, but it is no sign that training diverges, so it does not count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from moba_train.errors import TrainingDiverged


@dataclass
class BadSteps:
    """Counts skipped steps and remembers what they were trained on.

    Attributes:
        limit: steps in a row that are too many (at least 1).
        in_a_row: those at the end of the run so far; a resumed run begins with its checkpoint's count.
        total: those of the whole run, likewise.
        seen: one line per bad step in a row of this process: step, stage and row numbers.
    """

    limit: int
    in_a_row: int = 0
    total: int = 0
    seen: tuple[str, ...] = ()

    @property
    def too_many(self) -> bool:
        return self.in_a_row >= max(1, self.limit)

    def note(self, record: dict[str, Any], sample_ids: range) -> tuple[str, ...]:
        """Count the step of `record`, and write the run's count into it as "train/bad_steps".

        Args:
            record: as `moba_train.train.record.step_record` makes it, the same on every rank.
            sample_ids: rows of its stage that the step trained on, over all data-parallel ranks.

        Returns:
            Lines for the log, at once: none for a step that was taken.
        """
        is_bad = "train/bad" in record
        self.total += is_bad
        record["train/bad_steps"] = self.total
        step, rows = record["step"], f"{sample_ids.start}..{sample_ids.stop - 1}"
        if "train/empty" in record:
            return (
                f"step {step} skipped on all ranks, since none of its tokens counts in the loss; stage "
                f"{record['stage']!r}, rows (sample ids) {rows}: take more rows a step, or longer ones",
            )
        if not is_bad:
            self.in_a_row, self.seen = 0, ()
            return ()
        self.in_a_row += 1
        self.seen += (f"step {step}: rows {rows} of stage {record['stage']!r}",)
        numbers = (("loss", record["train/loss"]), ("gradient norm", record["train/grad_norm"]))
        broken = [f"{name} {str(value).upper()}" for name, value in numbers if not math.isfinite(value)]
        return (
            f"step {step} skipped on all ranks, weights and optimizer left as they were: {' and '.join(broken)}; stage "
            f"{record['stage']!r}, {record['tokens']:,} tokens, rows (sample ids) {rows}; {self.in_a_row} in a row "
            f"(run.max_bad_steps {self.limit}), {self.total} in the run; see them: moba-train data show RUN --step "
            f"{step}",
        )

    def raise_if_too_many(self) -> None:
        """TrainingDiverged, on every rank alike (the engine agrees on what was skipped)."""
        if self.too_many:
            raise TrainingDiverged(
                f"the loss or the gradient norm was not finite for {self.in_a_row} steps in a row",
                where="; ".join(self.seen),
                got="weights as they were before the first of these steps; saved",
                fix="Look at the rows named above (moba-train data show RUN --step N), lower the learning rate, or "
                "raise run.max_bad_steps; then resume.",
            )
