"""How far a run has come, and whose run it is: the plain values that a checkpoint's state.json holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moba_train.config.schema import ModelConfig, StageConfig
from moba_train.config.until_rules import RULES
from moba_train.errors import CheckpointError

_COUNTS = ("step", "stage_index", "step_in_stage", "tokens", "bad_steps", "bad_steps_total")


@dataclass(frozen=True)
class Progress:
    """Position after `step` finished steps, and what decides where its stage ends.

    Attributes:
        step: finished steps.
        stage_index: stage of the last finished step (0 before the first).
        step_in_stage: finished steps of that stage.
        tokens: tokens seen.
        bad_steps: consecutive skipped steps (loss or gradient norm not finite) up to here.
        bad_steps_total: skipped steps of the whole run.
        evaluated: what is due after the last step has been evaluated; False = the run was stopped before, and whoever
            goes on with it begins with that.
        watched: the rule of `until` that `watched_values` belong to ("loss_plateau", "trailing_gap"), "" without one.
        watched_values: what it watched at the evaluations of this stage, as far as it matters (`until.kept`).
        decided: stage index -> steps after which the stage ended, for those that `until` has ended.
    """

    step: int = 0
    stage_index: int = 0
    step_in_stage: int = 0
    tokens: int = 0
    bad_steps: int = 0
    bad_steps_total: int = 0
    evaluated: bool = True
    watched: str = ""
    watched_values: tuple[float, ...] = ()
    decided: Mapping[int, int] = field(default_factory=dict)

    def advanced(
        self, stage_index: int, step_in_stage: int, tokens: int, bad_steps: int, bad_steps_total: int
    ) -> Progress:
        """Position one step later; what was watched counts in its own stage alone."""
        is_same_stage = stage_index == self.stage_index
        return replace(
            self,
            step=self.step + 1,
            stage_index=stage_index,
            step_in_stage=step_in_stage,
            tokens=tokens,
            bad_steps=bad_steps,
            bad_steps_total=bad_steps_total,
            evaluated=True,
            watched=self.watched if is_same_stage else "",
            watched_values=self.watched_values if is_same_stage else (),
        )


@dataclass(frozen=True)
class Identity:
    """What must not change between a checkpoint and the run that resumes it, and a little provenance.

    Attributes:
        model: the model's configuration as a flat dictionary (`model_fingerprint`).
        tokenizer: SHA-256 of the tokenizer file.
        seed: seed of weights and data order.
        mesh: {tp, cp, pp, dp}; may change on resume.
        versions: package name -> version, for the reader.
        engine: engine.kind, for the reader: the engines go on from each other's checkpoints.
    """

    model: dict[str, Any]
    tokenizer: str
    seed: int
    mesh: dict[str, int]
    versions: dict[str, str]
    engine: str = "megatron"


def model_fingerprint(model: ModelConfig) -> dict[str, Any]:
    """Every field that shapes the weights or the function they compute: not what they are at the beginning."""
    beginning = ("preset", "init_std", "init_from")
    return {name: value for name, value in asdict(model).items() if name not in beginning}


def saved_model(state: Mapping[str, Any]) -> dict[str, Any]:
    """The `model_fingerprint` in a decoded state.json; what did not exist when it was written has its default."""
    return {**model_fingerprint(ModelConfig()), **state["model"]}


def rows_fingerprint(stage: StageConfig, sources: Mapping[str, Any]) -> dict[str, Any]:
    """What decides which rows a stage draws, and in which order (with the seed).

    Args:
        sources: what its sources hold and how they are drawn, by name (`moba_train.data.stage_data.source_facts`).
    """
    names = ("name", "tokens", "tokens_per_step", "seq_len", "mix", "lengths")
    fields = {name: value for name, value in asdict(stage).items() if name in names}
    return {**fields, "sources": dict(sources)}


def progress_from_state(state: Mapping[str, Any]) -> Progress:
    """Read the fields of `Progress` from a decoded state.json; KeyError if one is missing."""
    state = _completed(state)
    return Progress(
        **{name: int(state[name]) for name in _COUNTS},
        evaluated=bool(state["evaluated"]),
        watched=str(state["watched"]),
        watched_values=tuple(float(value) for value in state["watched_values"]),
        decided={int(index): int(steps) for index, steps in state["decided"].items()},
    )


def wrong_fields(state: Mapping[str, Any]) -> list[str]:
    """The fields of `Progress` whose value in a decoded state.json is none that a run writes.

    KeyError if one is missing; others of Python's own errors where a value has a type of its own.
    """
    state = _completed(state)
    wrong = [name for name in _COUNTS if not is_count(state[name])]
    if type(state["evaluated"]) is not bool:
        wrong.append("evaluated")
    if state["watched"] not in ("", *RULES):
        wrong.append("watched")
    values, decided = state["watched_values"], state["decided"]
    if not isinstance(values, (list, tuple)) or not all(
        type(value) in (int, float) and math.isfinite(value) for value in values
    ):
        wrong.append("watched_values")
    if wrong or not isinstance(decided, dict):
        return wrong or ["decided"]
    for index, steps in decided.items():
        is_past = str(index).isdecimal() and int(index) <= state["stage_index"] and is_count(steps) and steps > 0
        if not is_past or (int(index) == state["stage_index"] and steps != state["step_in_stage"]):
            return ["decided"]
    return []


def is_count(value: object) -> bool:
    """A whole number from 0 that fits 64 bits; true and false are none."""
    return type(value) is int and 0 <= value < 1 << 63


def _completed(state: Mapping[str, Any]) -> dict[str, Any]:
    """With what older checkpoints do not have."""
    return {"bad_steps_total": 0, "evaluated": True, "watched": "", "watched_values": (), "decided": {}, **state}


def check_identity(path: Path, state: dict[str, Any], identity: Identity) -> None:
    """Refuse a checkpoint of another model, vocabulary or data order.

    Raises:
        CheckpointError: names the first thing that differs, in terms of the configuration.
    """
    if state.get("weights_only"):
        raise CheckpointError(
            "the checkpoint holds weights alone, so a run cannot go on from it",
            where=str(path),
            allowed="a checkpoint that a run has saved",
            fix=f'Begin a run with them: model.init_from = "{path}", without --resume.',
        )
    theirs = saved_model(state)
    different = [key for key in identity.model if theirs.get(key) != identity.model[key]]
    if different:
        raise CheckpointError(
            "the checkpoint belongs to another model",
            where=str(path),
            got="; ".join(f"model.{key} = {theirs.get(key)!r} in the checkpoint" for key in different),
            allowed="; ".join(f"model.{key} = {identity.model[key]!r} in this run" for key in different),
            fix="Resume with the checkpoint's config.toml, or choose another --run-dir for the new model.",
        )
    if state.get("tokenizer") != identity.tokenizer:
        raise CheckpointError(
            "the checkpoint was trained with another vocabulary",
            where=str(path),
            got=f"tokenizer sha256 {str(state.get('tokenizer'))[:16]}... in the checkpoint",
            allowed=f"tokenizer sha256 {identity.tokenizer[:16]}... (data.tokenizer)",
            fix="Point data.tokenizer and data.sources at the data that the run began with.",
        )
    if state.get("seed") != identity.seed:
        raise CheckpointError(
            "run.seed is not the checkpoint's, so rows would be repeated and left out",
            where=str(path),
            got=f"run.seed = {identity.seed}",
            allowed=f"run.seed = {state.get('seed')}",
            fix="Use the seed that the run began with.",
        )
