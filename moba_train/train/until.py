"""Where a stage with `until` ends: functions of the numbers that its held-out evaluations gave, no torch.

With n = until.evaluations and the numbers x_1 .. x_k of the stage's evaluations, k > n:

    fall = min(x_1 .. x_{k-n}) - min(x_{k-n+1} .. x_k)

The stage ends with the step of x_k if fall is less than the number in the configuration. What is watched:

    loss_plateau    the held-out loss under the stage's own attention
    trailing_gap    the held-out loss of trailing positions under MoBA minus that under full attention: MoBA has done
                    its work when the two no longer come closer (arXiv 2502.13189 goes on with full attention after
                    90 % of the tokens)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from moba_train.config.schema import StageConfig, UntilConfig
from moba_train.config.until_rules import rule_of
from moba_train.errors import DataError
from moba_train.train.progress import Progress

_TITLES: Final = {"loss_plateau": "held-out loss", "trailing_gap": "trailing gap"}


@dataclass(frozen=True)
class Decision:
    """What an evaluation came to.

    Attributes:
        progress: with the number that was watched, and the stage's end if that is decided.
        record: until/value, until/fall where enough evaluations came before, until/decided at the end of the stage.
        lines: for the log.
    """

    progress: Progress
    record: dict[str, float]
    lines: tuple[str, ...] = ()


def describe_rule(until: UntilConfig) -> str:
    """The rule in words, for the plan; "" without one."""
    rule = rule_of(until)
    if not rule:
        return ""
    return (
        f"ends when the {_TITLES[rule]} has fallen by less than {getattr(until, rule):g} nats in its "
        f"{_last(until)} (until.{rule})"
    )


def watched_number(stage: StageConfig, evaluated: Mapping[str, Any]) -> float | None:
    """The number that the stage watches, from the `eval/*` numbers of a step; None = they hold no held-out loss.

    Raises:
        DataError: there is a held-out loss, but none of trailing positions.
    """
    if "eval/loss_full" not in evaluated:
        return None
    if rule_of(stage.until) == "loss_plateau":
        return float(evaluated[f"eval/loss_{stage.attention}"])
    if "eval/trailing_loss_full" not in evaluated:
        raise no_trailing_loss(stage, "the held-out rows")
    return float(evaluated["eval/trailing_loss_moba"]) - float(evaluated["eval/trailing_loss_full"])


def no_trailing_loss(stage: StageConfig, rows: str) -> DataError:
    """The error of a stage that watches trailing positions where held-out documents have none."""
    return DataError(
        f"stage '{stage.name}' watches the loss of trailing positions, but no held-out token lies there",
        where="data.valid",
        got=f"no document in {rows} reaches position {stage.seq_len - max(1, stage.seq_len // 16):,}",
        allowed=f"documents about as long as a row (seq_len {stage.seq_len:,})",
        fix="hold out long documents, raise eval.rows, or use until.loss_plateau",
    )


def fall_of(values: Sequence[float], evaluations: int) -> float | None:
    """By how much the lowest of the last `evaluations` values is below the lowest before; None = too few values."""
    if len(values) <= evaluations:
        return None
    return min(values[:-evaluations]) - min(values[-evaluations:])


def kept(values: Sequence[float], evaluations: int) -> tuple[float, ...]:
    """All that later falls depend on: at most evaluations + 1 values, those before the last ones as their lowest."""
    if len(values) <= evaluations:
        return tuple(values)
    return (min(values[:-evaluations]), *values[-evaluations:])


def decide(stage: StageConfig, progress: Progress, evaluated: Mapping[str, Any], *, is_end: bool) -> Decision:
    """Take the number that the stage watches, and decide whether it ends here.

    Args:
        stage: that of the last finished step, with a rule.
        progress: after that step.
        evaluated: `eval/*` numbers.
        is_end: the stage has its greatest length.
    """
    rule, until, value = rule_of(stage.until), stage.until, watched_number(stage, evaluated)
    if value is None:
        return Decision(progress, {})
    record = {"until/value": value}
    values = progress.watched_values if progress.watched == rule else ()
    if not math.isfinite(value):
        line = f"WARNING: the {_TITLES[rule]} of stage '{stage.name}' is {value}: it does not count"
        return Decision(progress, record, (line, *_told_end(stage, "", is_end=is_end)))
    fall = fall_of((*values, value), until.evaluations)
    values = kept((*values, value), until.evaluations)
    progress = replace(progress, watched=rule, watched_values=values)
    if fall is None:
        told = f"{len(values)} of the {until.evaluations + 1} evaluations were made that it takes"
        return Decision(progress, record, _told_end(stage, told, is_end=is_end))
    record["until/fall"] = fall
    told = _told_fall(until, values, fall)
    if not fall < getattr(until, rule):
        return Decision(progress, record, _told_end(stage, told, is_end=is_end))
    record["until/decided"] = 1.0
    steps = progress.step_in_stage
    length = f"{steps * stage.tokens_per_step:,} of at most {stage.tokens:,} tokens"
    decided = {**progress.decided, progress.stage_index: steps}
    line = f"stage '{stage.name}' ends after {length}: {told}"
    return Decision(replace(progress, decided=decided), record, (line,))


def _told_fall(until: UntilConfig, values: Sequence[float], fall: float) -> str:
    rule, before, now = rule_of(until), values[0], min(values[1:])
    moved = f"fell by {fall:.4g}" if fall >= 0 else f"rose by {-fall:.4g}"
    return (
        f"the {_TITLES[rule]} {moved} nats in its {_last(until)} (until.{rule} {getattr(until, rule):g}): "
        f"{before:.6g} -> {now:.6g}"
    )


def _last(until: UntilConfig) -> str:
    return "last evaluation" if until.evaluations == 1 else f"last {until.evaluations} evaluations"


def _told_end(stage: StageConfig, told: str, *, is_end: bool) -> tuple[str, ...]:
    """The line of a stage that ends at its greatest length."""
    line = f"stage '{stage.name}' ends at its greatest length, {stage.tokens:,} tokens, undecided"
    return (f"{line}: {told}" if told else line,) if is_end else ()
