"""Who may ask a run to stop: signals, and (see `Stopping`) the time that it has."""

from __future__ import annotations

from moba_train.train.signals import StopSignals


class Stopping:
    """Signals and deadlines, asked after every step.

    Args:
        signals: open handlers.
    """

    def __init__(self, signals: StopSignals) -> None:
        self._signals = signals
        self.reason = ""

    def wish(self, save_time_s: float) -> str:
        """Why this rank wishes to stop after the step that has just been done, or ""."""
        self.reason = self.reason or self._signals.requested
        return self.reason

    def step_done(self) -> None:
        """All that belongs to a step has been done, its evaluations and the begin of its save included."""
