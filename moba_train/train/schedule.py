"""Which stage, how many tokens and which learning rate belong to a step: functions of integers, no torch.

Steps are counted from 0 when they name a step to do, and as a plain count when they say how many are finished: after
`step` finished steps the next one to do is step `step`. Progress is measured in tokens, because a stage may change the
tokens of a step, and the number of samples would then mean something else before and after the change.

A stage with `until` has its greatest length until its end is decided; from then on the schedule is one in which it has
the steps that it really took. The rules of the configuration (config/until_rules.py) see to it that no learning rate
changes with a decision that has not been made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moba_train.config.schema import OptimizerConfig, StageConfig
from moba_train.config.until_rules import decides
from moba_train.errors import ConfigError
from moba_train.train.progress import Progress


@dataclass(frozen=True)
class Place:
    """Where one step lies in the schedule.

    Attributes:
        stage_index: stage of the step.
        step_in_stage: steps of that stage that come before it.
        rows: packed rows of the step, over all data-parallel ranks.
        is_stage_end: it is the last step of its stage.
    """

    stage_index: int
    step_in_stage: int
    rows: int
    is_stage_end: bool


def lr_at(tokens_seen: int, *, peak: float, optimizer: OptimizerConfig, total_tokens: int) -> float:
    """Learning rate once `tokens_seen` tokens have been trained on, the step at hand included.

    Warm-up is linear from 0. Then either half a cosine down to `peak * min_lr_ratio` at the end of the run
    (arXiv 1608.03983), or a constant peak and a linear decay over the last `decay_tokens` (arXiv 2404.06395).
    Counting the step at hand means that the first step already moves and the last one runs at the minimum exactly.
    """
    if tokens_seen < optimizer.warmup_tokens:
        return peak * tokens_seen / optimizer.warmup_tokens
    floor = peak * optimizer.min_lr_ratio
    begin = optimizer.warmup_tokens
    if optimizer.schedule == "wsd":
        begin = max(begin, total_tokens - optimizer.decay_tokens)
    if tokens_seen <= begin:
        return peak
    progress = min(1.0, (tokens_seen - begin) / (total_tokens - begin))
    remaining = 1.0 - progress if optimizer.schedule == "wsd" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return floor + (peak - floor) * remaining


@dataclass(frozen=True)
class Schedule:
    """The stages laid end to end. Build it with `build_schedule`.

    Attributes:
        first_steps: the first step of each stage, then the number of steps of the run: [stages + 1].
        first_tokens: tokens seen before each stage, then the tokens of the run: [stages + 1].
        decided: stage index -> steps that the stage took, for those that `until` has ended.
    """

    stages: tuple[StageConfig, ...]
    optimizer: OptimizerConfig
    first_steps: tuple[int, ...]
    first_tokens: tuple[int, ...]
    decided: Mapping[int, int] = field(default_factory=dict)

    def with_decided(self, decided: Mapping[int, int]) -> Schedule:
        """This schedule, stages having taken the steps that `decided` says."""
        return self if decided == self.decided else build_schedule(self.stages, self.optimizer, decided)

    @property
    def total_steps(self) -> int:
        return self.first_steps[-1]

    @property
    def total_tokens(self) -> int:
        return self.first_tokens[-1]

    def place(self, step: int) -> Place:
        """Place of step `step`, 0 <= step < total_steps."""
        for index, stage in enumerate(self.stages):
            if self.first_steps[index] <= step < self.first_steps[index + 1]:
                return Place(
                    stage_index=index,
                    step_in_stage=step - self.first_steps[index],
                    rows=stage.tokens_per_step // stage.seq_len,
                    is_stage_end=step + 1 == self.first_steps[index + 1],
                )
        raise IndexError(f"step {step} is outside the run of {self.total_steps} steps")

    def stage_of_next_step(self, done: Progress) -> int:
        """Index of the stage in which a run goes on: that of the next step (the last one where none is left), or of an
        evaluation that is still to come, which takes place in the stage of its step."""
        following = done.step if done.evaluated or done.step == 0 else done.step - 1
        return self.place(min(following, self.total_steps - 1)).stage_index

    def tokens_after(self, step: int) -> int:
        """Tokens seen once `step` steps are finished; the run's total from its end on."""
        if step >= self.total_steps:
            return self.total_tokens
        place = self.place(step)
        return self.first_tokens[place.stage_index] + place.step_in_stage * self._tokens_per_step(place.stage_index)

    def lr(self, step: int) -> float:
        """Learning rate that step `step` is done with."""
        stage = self.stages[self.place(step).stage_index]
        peak = self.optimizer.lr if stage.lr == "inherit" else stage.lr
        return lr_at(self.tokens_after(step + 1), peak=peak, optimizer=self.optimizer, total_tokens=self.total_tokens)

    def undecided(self, step: int) -> list[int]:
        """Stages that may end before their greatest length, for all that is known after `step` finished steps."""
        ends = enumerate(self.first_steps[1:])
        return [i for i, end in ends if decides(self.stages[i]) and i not in self.decided and step < end]

    def sample_ids(self, step: int) -> range:
        """Rows of its stage that step `step` trains on, over all data-parallel ranks."""
        place = self.place(step)
        return range(place.step_in_stage * place.rows, (place.step_in_stage + 1) * place.rows)

    def _tokens_per_step(self, stage_index: int) -> int:
        return self.stages[stage_index].tokens_per_step


def build_schedule(
    stages: Sequence[StageConfig], optimizer: OptimizerConfig, decided: Mapping[int, int] | None = None
) -> Schedule:
    """Lay the stages end to end.

    Args:
        decided: stage index -> steps that the stage took, for those that `until` has ended; None = none.

    Raises:
        ConfigError: no stage, or a stage whose length is not a positive whole number of steps and rows.
    """
    if not stages:
        raise ConfigError("the schedule has no stage", where="stages", fix="Add at least one [[stages]] table.")
    steps, tokens = [0], [0]
    for index, stage in enumerate(stages):
        where = f"stages.{index}"
        if stage.seq_len < 1 or stage.tokens_per_step < 1 or stage.tokens_per_step % stage.seq_len:
            raise ConfigError(
                "tokens_per_step must be a positive multiple of seq_len",
                where=f"{where}.tokens_per_step",
                got=f"tokens_per_step {stage.tokens_per_step}, seq_len {stage.seq_len}",
                fix="Make a step a whole number of rows.",
            )
        if stage.tokens < 1 or stage.tokens % stage.tokens_per_step:
            raise ConfigError(
                "a stage must be a positive whole number of steps",
                where=f"{where}.tokens",
                got=f"tokens {stage.tokens}, tokens_per_step {stage.tokens_per_step}",
                fix="Make tokens a multiple of tokens_per_step.",
            )
        taken = (decided or {}).get(index, stage.tokens // stage.tokens_per_step)
        steps.append(steps[-1] + taken)
        tokens.append(tokens[-1] + taken * stage.tokens_per_step)
    return Schedule(tuple(stages), optimizer, tuple(steps), tuple(tokens), dict(decided or {}))
