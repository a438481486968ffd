"""Rules of stages that decide where they end (`stages.N.until`).

A learning rate must not depend on a decision that has not been made. Of the schedules, "wsd" alone is flat until its
decay begins, so it is asked for, and the decay may not begin before the last decision: it lies in the stages behind it,
whose length is known. A cosine depends on the length of the whole run from its first step on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from moba_train.config.rules import at_least
from moba_train.config.schema import RunConfig, StageConfig, UntilConfig
from moba_train.errors import ConfigError

RULES: Final = ("loss_plateau", "trailing_gap")
"""What a stage may watch: fields of `UntilConfig`."""
_MOST_EVALUATIONS = 1000
"""A checkpoint keeps so many numbers, and one more."""


def rule_of(until: UntilConfig) -> str:
    """What a stage watches: one of `RULES`, or "" for a stage of fixed length."""
    return next((name for name in RULES if getattr(until, name) > 0), "")


def decides(stage: StageConfig) -> bool:
    """The stage may end before its tokens are used up."""
    return rule_of(stage.until) != ""


def until_errors(config: RunConfig) -> Iterator[ConfigError]:
    """Broken rules of `until`, and of what it needs elsewhere."""
    for i, stage in enumerate(config.stages):
        yield from _numbers(stage.until, f"stages.{i}.until")
        if decides(stage):
            yield from _stage(stage, f"stages.{i}", config.eval.every_steps)
    deciding = [i for i, stage in enumerate(config.stages) if decides(stage)]
    if deciding:
        yield from _evaluation(config, deciding[0])
        yield from _learning_rate(config, deciding[-1])


def _numbers(until: UntilConfig, where: str) -> Iterator[ConfigError]:
    for name in RULES:
        yield from at_least(getattr(until, name), 0, f"{where}.{name}", "0 = not watched")
    if until.loss_plateau > 0 and until.trailing_gap > 0:
        yield ConfigError(
            "a stage watches one number",
            where=where,
            got=f"loss_plateau {until.loss_plateau:g} and trailing_gap {until.trailing_gap:g}",
            allowed="one of them above 0",
            fix="remove one",
        )
    if not 1 <= until.evaluations <= _MOST_EVALUATIONS:
        yield ConfigError(
            "evaluations is out of range",
            where=f"{where}.evaluations",
            got=until.evaluations,
            allowed=f"1 to {_MOST_EVALUATIONS}",
            fix="3 is usual",
        )


def _stage(stage: StageConfig, where: str, every_steps: int) -> Iterator[ConfigError]:
    if stage.until.trailing_gap > 0 and stage.attention != "moba":
        yield ConfigError(
            "the trailing gap is watched in a stage that does not train under MoBA",
            where=f"{where}.until.trailing_gap",
            got=f'attention = "{stage.attention}"',
            allowed='attention = "moba"',
            fix="use until.loss_plateau",
        )
    steps, wanted = stage.tokens // max(1, stage.tokens_per_step), (stage.until.evaluations + 1) * every_steps
    if 1 <= steps <= wanted:
        yield ConfigError(
            "the stage is too short to decide anything before its end",
            where=f"{where}.tokens",
            got=f"{stage.tokens} tokens = {steps} steps",
            allowed=f"more than {wanted} steps = (until.evaluations {stage.until.evaluations} + 1) * eval.every_steps "
            f"{every_steps}",
            fix="raise tokens, or evaluate more often",
        )


def _evaluation(config: RunConfig, index: int) -> Iterator[ConfigError]:
    fix = f"stages.{index}.until decides by held-out evaluations"
    yield from at_least(config.eval.every_steps, 1, "eval.every_steps", fix)
    yield from at_least(config.eval.rows, 1, "eval.rows", fix)


def _learning_rate(config: RunConfig, last: int) -> Iterator[ConfigError]:
    """Args: last: the last stage that decides."""
    optimizer = config.optimizer
    behind = sum(stage.tokens for stage in config.stages[last + 1 :])
    if optimizer.schedule != "wsd":
        yield ConfigError(
            "the learning rate would depend on where a stage ends, which is not decided yet",
            where="optimizer.schedule",
            got=f'"{optimizer.schedule}", with stages.{last}.until',
            allowed='"wsd": flat until its decay',
            fix=f'set schedule = "wsd" and decay_tokens to at most {behind}, the tokens behind that stage'
            if behind
            else 'set schedule = "wsd" and decay_tokens = 0, or add a stage of fixed length for the decay',
        )
    elif optimizer.decay_tokens > behind:
        yield ConfigError(
            "the decay of the learning rate would begin before it is decided where the stages end",
            where="optimizer.decay_tokens",
            got=optimizer.decay_tokens,
            allowed=f"at most {behind}, the tokens of the stages behind stages.{last}, the last with until",
            fix="shorten the decay, or lengthen the stages behind" if behind else "set 0, or add a stage for the decay",
        )
    total = sum(stage.tokens for stage in config.stages)
    least = sum(_least_tokens(stage, config.eval.every_steps) for stage in config.stages)
    needed = optimizer.warmup_tokens + optimizer.decay_tokens
    if least < needed <= total:
        yield ConfigError(
            "warm-up and decay are longer than the run, if its stages end as early as they may",
            where="optimizer.warmup_tokens",
            got=f"{optimizer.warmup_tokens} + {optimizer.decay_tokens} tokens",
            allowed=f"together at most {least} tokens, which are trained in any case",
            fix="shorten warmup_tokens, raise until.evaluations, or evaluate less often",
        )


def _least_tokens(stage: StageConfig, every_steps: int) -> int:
    """Tokens after which the stage can end: its first evaluation may come after its first step."""
    if not decides(stage):
        return stage.tokens
    return min(stage.tokens, (1 + stage.until.evaluations * every_steps) * stage.tokens_per_step)


__all__ = ["RULES", "decides", "rule_of", "until_errors"]
