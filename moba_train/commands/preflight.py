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
from moba_train.train.preflight import run_preflight
from moba_train.train.preflight_rules import num_ranks
from moba_train.train.run_folder import newest_progress
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
            find_data_errors=partial(training_data_errors, config),
            simulated=mesh if is_simulated else None,
        )
        report.raise_if_failed()
        if topology.is_first_rank:
            print(report.text())
    return 0


def _mesh_of_next_stage(config: RunConfig) -> ParallelConfig:
    """Its degrees; dp = "auto" counts as 1."""
    progress = newest_progress(Path(config.run.dir), _RESUME)
    schedule = build_schedule(config.stages, config.optimizer, progress.decided)
    stage = schedule.stage_of_next_step(progress.step, evaluated=progress.evaluated)
    mesh = parallel_of_stage(config.parallel, config.stages[stage])
    return replace(mesh, dp=1 if mesh.dp == "auto" else mesh.dp)
