"""What a user can mend, as typed errors.

Every error says what is wrong, where, what was found, what is allowed and how to fix it. The command line prints the
message alone and exits with code 2. Ranks that lost each other (`ExchangeError`) exit with code 3. A run whose next
stage wants another mesh exits with code 4. Anything else is our bug and exits with code 1.
"""

from __future__ import annotations

from collections.abc import Sequence

EXIT_RANKS = 3
"""Exit code of a process that lost the other ranks, or that the watchdog ended."""
EXIT_MESH = 4
"""Exit code of a run that has saved and is to be started again, since its next stage wants another mesh."""


class UserError(Exception):
    """A mistake that the user can mend.

    Args:
        what: one sentence, lower case, no full stop ("topk must be at least 1").
        where: file, config key, line or rank ("stages.0.topk").
        got: the offending value as the user wrote it.
        allowed: the values that would have been accepted.
        fix: one imperative sentence.
    """

    def __init__(self, what: str, *, where: str = "", got: object = None, allowed: str = "", fix: str = "") -> None:
        self.what = what
        self.where = where
        self.got = got
        self.allowed = allowed
        self.fix = fix
        super().__init__(self.message())

    def message(self) -> str:
        """The lines that a user reads: what, then the parts that are known."""
        lines = [self.what]
        if self.where:
            lines.append(f"  where:   {self.where}")
        if self.got is not None:
            lines.append(f"  got:     {self.got}")
        if self.allowed:
            lines.append(f"  allowed: {self.allowed}")
        if self.fix:
            lines.append(f"  fix:     {self.fix}")
        return "\n".join(lines)


class UserErrors(UserError):
    """Several errors found in one pass, shown together."""

    found = "errors"

    def __init__(self, errors: Sequence[UserError]) -> None:
        self.errors = tuple(errors)
        super().__init__(f"{len(self.errors)} {self.found}")

    def __reduce__(self) -> tuple[type[UserErrors], tuple[tuple[UserError, ...]]]:
        """Errors travel between ranks by pickle."""
        return type(self), (self.errors,)

    def message(self) -> str:
        return "\n".join([self.what, *(f"{i}. {error.message()}" for i, error in enumerate(self.errors, start=1))])


class ConfigError(UserError):
    """The configuration does not decode, or its parts contradict one another."""


class ConfigErrors(UserErrors, ConfigError):
    """Several configuration errors found in one pass, shown together."""

    found = "errors in the configuration"


class DataError(UserError):
    """A data file is missing, empty, damaged, or does not fit the configuration."""


class InputErrors(UserErrors, DataError):
    """Several files or folders that a run needs are not as they should be."""

    found = "errors in the files that the run needs"


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, or belongs to another model."""


class BackendError(UserError):
    """The requested backend, device or library cannot serve this run."""


class TrainingDiverged(UserError):
    """The loss stayed NaN or infinite for `run.max_bad_steps` steps; the state was saved before this was raised."""


class ExchangeError(RuntimeError):
    """Ranks lost each other: one died, stalled beyond the timeout, or disagreed on what is sent."""
