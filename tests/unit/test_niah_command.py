"""`moba-train eval niah`: what names a measurement, and which checkpoint's configuration is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moba_train.commands.niah import _config_of, _of_other_stages, function_of
from moba_train.config.schema import EngineConfig, FullLayers, RopeConfig, RunConfig, StageConfig
from moba_train.train.manifest import seal_files, write_manifest
from moba_train.train.run_folder import CONFIG, FOLDER, STATE, step_name

STAGE = StageConfig(name="long", seq_len=256, chunk_size=16, topk=3)
CONFIG_OF_RUN = RunConfig(stages=(STAGE,))


def test_what_changes_the_scores_changes_the_name_of_the_function() -> None:
    names = [
        function_of(CONFIG_OF_RUN, STAGE),
        function_of(CONFIG_OF_RUN, replace(STAGE, full_layers=FullLayers(last=3))),
        function_of(CONFIG_OF_RUN, replace(STAGE, rope=RopeConfig(base=20.0))),
        function_of(CONFIG_OF_RUN, replace(STAGE, attention="full")),
        function_of(replace(CONFIG_OF_RUN, engine=EngineConfig(precision="bf16")), STAGE),
        function_of(replace(CONFIG_OF_RUN, engine=EngineConfig(attention_backend="flash")), STAGE),
    ]
    assert len(set(names)) == len(names)


def test_what_leaves_the_scores_as_they_are_leaves_the_name() -> None:
    other = replace(STAGE, tokens=10**6, lr=0.5, mix={"text": 1.0})
    recomputed = replace(CONFIG_OF_RUN, engine=EngineConfig(recompute="full"))
    assert function_of(CONFIG_OF_RUN, STAGE) == function_of(recomputed, other)


def test_settings_of_a_stage_that_is_not_evaluated_are_found() -> None:
    words = ["--stages.0.topk", "1", "--stages.1.topk", "2", "--stages.10.rope.base=3", "--niah.depths", "4"]
    assert _of_other_stages(words, 1) == ["--stages.0.topk", "--stages.10.rope.base"]


def checkpoint(run: Path, step: int) -> Path:
    folder = run / FOLDER / step_name(step)
    folder.mkdir(parents=True)
    files = [folder / CONFIG, folder / STATE]
    for file in files:
        file.write_text(f"# {step}\n")
    write_manifest(folder, seal_files(files))
    return folder


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("")], ids=["removed", "emptied"])
def test_a_newest_checkpoint_without_its_configuration_is_passed_over(tmp_path: Path, damage) -> None:
    older, newest = checkpoint(tmp_path, 10), checkpoint(tmp_path, 20)
    assert _config_of(tmp_path) == _config_of(tmp_path / FOLDER) == newest / CONFIG
    damage(newest / CONFIG)
    assert _config_of(tmp_path) == _config_of(tmp_path / FOLDER) == older / CONFIG
    assert _config_of(newest) == newest / CONFIG  # named itself, it is not replaced by another
