"""The policy for steps whose loss or gradient norm is not finite: skip them, count them, and give up in time."""

from __future__ import annotations

from dataclasses import dataclass

from moba_train.errors import TrainingDiverged


@dataclass
class BadSteps:
    """Counts skipped steps in a row and remembers what they were trained on.

    Attributes:
        limit: steps in a row that are too many (at least 1).
        in_a_row: the count; a resumed run begins with its checkpoint's.
        seen: one line per bad step of this process: step, stage and row numbers.
    """

    limit: int
    in_a_row: int = 0
    seen: tuple[str, ...] = ()

    @property
    def too_many(self) -> bool:
        return self.in_a_row >= max(1, self.limit)

    def note(self, step: int, stage: str, sample_ids: range, *, skipped: bool) -> None:
        """Take the outcome of a step; `sample_ids` are its rows over all data-parallel ranks."""
        if not skipped:
            self.in_a_row, self.seen = 0, ()
            return
        self.in_a_row += 1
        self.seen += (f"step {step}: rows {sample_ids.start}..{sample_ids.stop - 1} of stage {stage!r}",)

    def raise_if_too_many(self) -> None:
        """TrainingDiverged, on every rank alike (the engine agrees on `skipped`)."""
        if self.too_many:
            raise TrainingDiverged(
                f"the loss or the gradient norm was not finite for {self.in_a_row} steps in a row",
                where="; ".join(self.seen),
                got="weights as they were before the first of these steps; saved",
                fix="Look at the rows named above, lower the learning rate, or raise run.max_bad_steps; then resume.",
            )
