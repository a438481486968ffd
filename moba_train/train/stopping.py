"""Who may ask a run to stop: signals, `run.stop_after`, and the end of the Slurm job that it runs in.

A deadline is met by stopping early enough: after a step, when what is left is less than one more step, a save and a
minute. Both are measured. A step is the longest of the last twenty (the first ones compile kernels and open data; a new
stage has longer ones) plus the longest that ever followed one (evaluations, and the begin of a save, are rare). A save
is the longest so far, from its begin to its publication; before there was one it is estimated from the state's size.
The last save waits for one that is still being written, so what that one may still take counts too.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from moba_train.config.job_rules import duration_s
from moba_train.errors import ConfigError
from moba_train.train.signals import StopSignals

MARGIN_S = 60.0
"""What is left for leaving in good order, and for what was not foreseen."""
RECENT_STEPS = 20
STATE_BYTES = 16
"""Of a parameter, in a checkpoint: fp32 weight and two moments, and the weight that the forward pass takes."""
SLOW_DISKS_GB_S = 0.5
"""GB/s (1e9 bytes) that the first save is taken to reach, over all ranks."""
JOB_END = "SLURM_JOB_END_TIME"
"""Unix time at which Slurm ends the job; Slurm sets it."""
_IMPORTED_S = time.monotonic()


@dataclass(frozen=True)
class Deadline:
    """When the process has to be gone.

    Attributes:
        name: where it comes from ("stop_after 3h50m").
        at_s: on the clock of `time.time`.
        is_slurms: the job may be started again when it is over, as launch/slurm.sbatch does it.
    """

    name: str
    at_s: float
    is_slurms: bool = False


class Stopping:
    """Signals and deadlines, asked after every step.

    Args:
        signals: open handlers.
        deadlines: the nearest counts.
        first_save_s: how long a save is taken to last before one has been measured.
        clock: seconds as `time.time` gives them.
    """

    def __init__(
        self,
        signals: StopSignals,
        deadlines: tuple[Deadline, ...] = (),
        *,
        first_save_s: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.reason = ""
        """Why this rank wishes to stop, once it does."""
        self._signals = signals
        self._deadline = min(deadlines, key=lambda deadline: deadline.at_s, default=None)
        self._first_save_s = first_save_s
        self._clock = clock
        self._steps_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self._longest_rest_s = 0.0
        self._step_began_s = self._step_ended_s = clock()

    def wish(self, save_time_s: float, in_flight_s: float | None = None) -> str:
        """Why this rank wishes to stop after the step that has just been done, or "".

        Args:
            save_time_s: of the longest save so far; 0 = there was none.
            in_flight_s: for how long a save has been under way beside the training; None = there is none.
        """
        self._step_ended_s = self._clock()
        self._steps_s.append(self._step_ended_s - self._step_began_s)
        return self.wish_now(save_time_s, in_flight_s)

    def wish_now(self, save_time_s: float, in_flight_s: float | None = None) -> str:
        """The same after an evaluation: the first one of a process may take longer than anything that was reckoned
        with, and one that was put off comes before any step."""
        self.reason = self.reason or self._signals.requested or self._deadline_is_near(save_time_s, in_flight_s)
        return self.reason

    def step_done(self) -> None:
        """All that belongs to a step has been done, its evaluations and the begin of its save included."""
        self._step_began_s = self._clock()
        self._longest_rest_s = max(self._longest_rest_s, self._step_began_s - self._step_ended_s)

    def too_late(self) -> str:
        """Before the first step: why none is worth beginning, or "". Slurm's deadline leads to a planned stop: ranks
        may have been started again late in a job, which goes on in its next start.

        Raises:
            ConfigError: `run.stop_after` is too short; a run that is started again under it would never get anywhere.
        """
        if self._deadline is None:
            return ""
        left_s, name = max(0.0, self._deadline.at_s - self._clock()), self._deadline.name
        if left_s > MARGIN_S:
            return ""
        if self._deadline.is_slurms:
            return f"{name}: {left_s:.0f} s left, too little to begin a step (unset it where it is of another job)"
        raise ConfigError(
            "the deadline is too near to begin a step",
            where=name,
            got=f"{left_s:.0f} s left once the run was ready to train",
            allowed=f"one step, one save and {MARGIN_S:.0f} s",
            fix="give the run more time; start-up counts too",
        )

    def announce(self) -> tuple[str, ...]:
        """For the log, before the first step: the deadline, and where it comes from."""
        if self._deadline is None:
            return ()
        left_s, name = self._deadline.at_s - self._clock(), self._deadline.name
        at = datetime.fromtimestamp(self._deadline.at_s).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
        return (
            f"deadline: {at}, in {left_s:.0f} s ({name}); the run stops when less is left than a step, a save and "
            f"{MARGIN_S:.0f} s",
        )

    def _deadline_is_near(self, save_time_s: float, in_flight_s: float | None) -> str:
        if self._deadline is None:
            return ""
        left_s = self._deadline.at_s - self._clock()
        step_s = max(self._steps_s, default=0.0) + self._longest_rest_s
        save_s, what = (save_time_s, "a save") if save_time_s > 0 else (self._first_save_s, "a save perhaps")
        before_s, told = 0.0, ""
        if in_flight_s is not None:
            save_s = max(save_s, in_flight_s)
            before_s = save_s - in_flight_s
            told = f", the one under way {before_s:.1f} s more"
        if left_s > step_s + before_s + save_s + MARGIN_S:
            return ""
        return f"{self._deadline.name}: {left_s:.0f} s left, a step takes {step_s:.1f} s, {what} {save_s:.1f} s{told}"


def deadlines(stop_after: str, environment: Mapping[str, str] = os.environ) -> tuple[Deadline, ...]:
    """Those of this process: `run.stop_after`, counted from its start, and the end of the Slurm job.

    Raises:
        ConfigError: SLURM_JOB_END_TIME is no unix time.
    """
    found = []
    if stop_after != "never":
        found.append(Deadline(f"stop_after {stop_after}", time.time() - process_age_s() + duration_s(stop_after)))
    end = environment.get(JOB_END, "")
    if end:
        if not end.isdecimal():
            allowed, fix = "a unix time in whole seconds, as Slurm sets it", f"unset {JOB_END}"
            raise ConfigError("this is no time", where=JOB_END, got=f'"{end}"', allowed=allowed, fix=fix)
        found.append(Deadline(f"the end of the Slurm job, {JOB_END}", float(end), is_slurms=True))
    return tuple(found)


def first_save_s(num_parameters: int) -> float:
    """Seconds that a save is taken to last before one was measured: the state's bytes over slow shared disks."""
    return num_parameters * STATE_BYTES / (SLOW_DISKS_GB_S * 1e9)


def process_age_s() -> float:
    """Seconds since the system started this process; where it does not say, since this module was imported.

    The launcher began earlier; a rank that torchrun starts again counts anew.
    """
    since_import_s = time.monotonic() - _IMPORTED_S
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            after_name = file.read().rpartition(")")[2].split()  # the name may hold blanks
        started_s = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), in ticks after the boot
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
    except (OSError, ValueError, IndexError, AttributeError):
        return since_import_s
    return max(age_s, since_import_s)


__all__ = ["MARGIN_S", "Deadline", "Stopping", "deadlines", "first_save_s", "process_age_s"]
