"""Rules of a job: when it stops, what it keeps, how long it waits."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from moba_train.config.rules import at_least, positive
from moba_train.config.schema import RunConfig
from moba_train.errors import ConfigError

_UNIT_S = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_DURATION = re.compile(r"(?:(?P<d>\d+)d)?(?:(?P<h>\d+)h)?(?:(?P<m>\d+)m)?(?:(?P<s>\d+)s)?")


def duration_s(text: str) -> float:
    """Seconds of "3h50m" (13800.0) or "90s"; "never" is infinity. ValueError for anything else, and for no time."""
    if text == "never":
        return math.inf
    found = _DURATION.fullmatch(text.strip())
    seconds = sum(_UNIT_S[unit] * int(number) for unit, number in found.groupdict("0").items()) if found else 0.0
    if not seconds > 0:
        raise ValueError(f"{text!r} is no length of time such as 3h50m or 90s")
    return seconds


def job_errors(config: RunConfig) -> Iterator[ConfigError]:
    """Broken rules of [run], [checkpoint], [watchdog] and what [engine] asks of a job."""
    run = config.run
    if not run.dir.strip():
        allowed = "the path of a folder"
        yield ConfigError(
            "the run folder has no name", where="run.dir", got='""', allowed=allowed, fix="--run-dir PATH"
        )
    yield from at_least(run.seed, 0, "run.seed")
    yield from at_least(run.log_every, 1, "run.log_every")
    yield from at_least(run.max_bad_steps, 1, "run.max_bad_steps")
    yield from at_least(run.stop_after_steps, 0, "run.stop_after_steps")
    yield from at_least(config.checkpoint.every_steps, 0, "checkpoint.every_steps")
    yield from at_least(config.checkpoint.keep_last, 1, "checkpoint.keep_last")
    yield from at_least(config.checkpoint.keep_every, 0, "checkpoint.keep_every")
    for name in ("start_s", "step_s", "save_s"):
        yield from at_least(getattr(config.watchdog, name), 0, f"watchdog.{name}", "0 = no limit")
    try:
        duration_s(run.stop_after)
    except ValueError:
        allowed = '"never", or hours, minutes and seconds: "3h50m", "90s"'
        yield ConfigError(
            "this is no length of time", where="run.stop_after", got=f'"{run.stop_after}"', allowed=allowed,
            fix='write it like "3h50m"',
        )  # fmt: skip
    yield from positive(config.engine.timeout_s, "engine.timeout_s", "give seconds")
    if config.engine.offload == "host" and config.engine.recompute != "full":
        what, fix = "only full recompute has checkpoints that can be offloaded", 'set engine.recompute = "full"'
        yield ConfigError(what, where="engine.offload", got='"host"', allowed='"none"', fix=fix)


__all__ = ["duration_s", "job_errors"]
