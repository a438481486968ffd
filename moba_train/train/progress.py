"""How far a run has come, and whose run it is: the plain values that a checkpoint's state.json holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from moba_train.config.schema import ModelConfig, StageConfig
from moba_train.errors import CheckpointError


@dataclass(frozen=True)
class Progress:
    """Position after `step` finished steps.

    Attributes:
        step: finished steps.
        stage_index: stage of the last finished step (0 before the first).
        step_in_stage: finished steps of that stage.
        tokens: tokens seen.
        bad_steps: consecutive skipped steps (loss or gradient norm not finite) up to here.
        bad_steps_total: skipped steps of the whole run.
    """

    step: int = 0
    stage_index: int = 0
    step_in_stage: int = 0
    tokens: int = 0
    bad_steps: int = 0
    bad_steps_total: int = 0


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


def rows_fingerprint(stage: StageConfig) -> dict[str, Any]:
    """The fields that decide which rows a stage draws, and in which order (with seed and sources)."""
    names = ("name", "tokens", "tokens_per_step", "seq_len", "mix")
    return {name: value for name, value in asdict(stage).items() if name in names}


def progress_from_state(state: Mapping[str, Any]) -> Progress:
    """Read the fields of `Progress` from a decoded state.json; KeyError if one is missing."""
    state = {"bad_steps_total": 0, **state}  # older checkpoints do not have it
    return Progress(**{field.name: int(state[field.name]) for field in fields(Progress)})


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
