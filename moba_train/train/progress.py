"""How far a run has come, and whose run it is: the plain values that a checkpoint's state.json holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from moba_train.config.schema import ModelConfig, StageConfig


@dataclass(frozen=True)
class Progress:
    """Position after `step` finished steps.

    Attributes:
        step: finished steps.
        stage_index: stage of the last finished step (0 before the first).
        step_in_stage: finished steps of that stage.
        tokens: tokens seen.
        bad_steps: consecutive skipped steps (loss or gradient norm not finite) up to here.
    """

    step: int = 0
    stage_index: int = 0
    step_in_stage: int = 0
    tokens: int = 0
    bad_steps: int = 0


@dataclass(frozen=True)
class Identity:
    """What must not change between a checkpoint and the run that resumes it, and a little provenance.

    Attributes:
        model: the model's configuration as a flat dictionary (`model_fingerprint`).
        tokenizer: SHA-256 of the sentencepiece model.
        seed: seed of weights and data order.
        mesh: {tp, cp, pp, dp}; may change on resume.
        versions: package name -> version, for the reader.
    """

    model: dict[str, Any]
    tokenizer: str
    seed: int
    mesh: dict[str, int]
    versions: dict[str, str]


def model_fingerprint(model: ModelConfig) -> dict[str, Any]:
    """Every field that shapes the weights or the function they compute; `preset` and `init_std` do neither."""
    return {name: value for name, value in asdict(model).items() if name not in ("preset", "init_std")}


def rows_fingerprint(stage: StageConfig) -> dict[str, Any]:
    """The fields that decide which rows a stage draws, and in which order (with seed and sources)."""
    names = ("name", "tokens", "tokens_per_step", "seq_len", "mix")
    return {name: value for name, value in asdict(stage).items() if name in names}


def progress_from_state(state: Mapping[str, Any]) -> Progress:
    """Read the fields of `Progress` from a decoded state.json; KeyError if one is missing."""
    return Progress(**{field.name: int(state[field.name]) for field in fields(Progress)})
