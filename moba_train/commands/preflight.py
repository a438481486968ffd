"""`moba-train preflight`: everything that a run needs, checked in seconds and shown in one table."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

from moba_train.commands.inputs import training_data_errors
from moba_train.commands.parts import joined_ranks, on_mesh_of_next_stage
from moba_train.config.mesh import parallel_of_stage
from moba_train.config.schema import ParallelConfig, RunConfig
from moba_train.data.tokenizer import load_tokenizer
from moba_train.errors import CheckpointError, DataError, UserError
from moba_train.train.preflight import run_preflight
from moba_train.train.preflight_rules import num_ranks
from moba_train.train.progress import model_fingerprint
from moba_train.train.resume import locate_checkpoint
from moba_train.train.run_folder import newest_progress, read_state
from moba_train.train.schedule import build_schedule

_RESUME = "auto"


def run_preflight_command(config: RunConfig) -> int:
    """Check and print; returns the exit code.

    Under a launcher, the ranks are those of the run. A single process looks at what it can see of a larger mesh: that
    of the stage in which `train --resume auto` would go on.

    Raises:
        ConfigError: the number of ranks does not fit the mesh.
        PreflightFailed: something is wrong; the message is the table.
    """
    mesh = _mesh_of_next_stage(config)
    is_simulated = int(os.environ.get("WORLD_SIZE", "1")) == 1 and num_ranks(mesh) > 1
    alone = replace(config, parallel=replace(mesh, tp=1, cp=1, pp=1, dp=1))
    here = alone if is_simulated else on_mesh_of_next_stage(config, _RESUME)
    with joined_ranks(here) as topology:
        report = run_preflight(
            config,
            topology,
            find_data_errors=partial(_input_errors, config),
            simulated=mesh if is_simulated else None,
        )
        report.raise_if_failed()
        if topology.is_first_rank:
            print(report.text())
    return 0


def _input_errors(config: RunConfig) -> list[UserError]:
    """What is wrong with the data, and with the weights that a run without a checkpoint begins with."""
    errors = training_data_errors(config)
    if config.model.init_from and not newest_progress(Path(config.run.dir), _RESUME).step:
        try:
            _check_initial_weights(config)
        except CheckpointError as error:
            errors.append(error)
        except DataError:  # the tokenizer's, told already
            pass
    return errors


def _check_initial_weights(config: RunConfig) -> None:
    """Are they there, and of this model and vocabulary? Hashes are compared when the run begins: that takes longer."""
    from moba_train.train.weights import check_weights

    path = locate_checkpoint(Path(config.model.init_from), argument="model.init_from")
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_weights(path, read_state(path), model_fingerprint(config.model), tokenizer.fingerprint)


def _mesh_of_next_stage(config: RunConfig) -> ParallelConfig:
    """Its degrees; dp = "auto" counts as 1."""
    progress = newest_progress(Path(config.run.dir), _RESUME)
    schedule = build_schedule(config.stages, config.optimizer, progress.decided)
    mesh = parallel_of_stage(config.parallel, config.stages[schedule.stage_of_next_step(progress)])
    return replace(mesh, dp=1 if mesh.dp == "auto" else mesh.dp)
