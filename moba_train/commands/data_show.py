"""`moba-train data show`: the documents of any step of a run, past or future, from its configuration and data files.

Row i of a stage is a pure function of seed, stage and data files, so that nothing has to be recorded. Imports no torch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from moba_train.config.load import load_config
from moba_train.config.schema import RunConfig
from moba_train.data.show import row_lines
from moba_train.data.stage_data import StageData
from moba_train.data.tokenizer import load_tokenizer
from moba_train.errors import ConfigError, DataError
from moba_train.train.metrics import read_metrics
from moba_train.train.run_folder import newest_progress
from moba_train.train.schedule import Schedule, build_schedule


def run_data_show(run_dir: Path, *, step: int, row: int | None, num_shown: int) -> int:
    """Print the rows of a step; returns the exit code.

    Args:
        run_dir: the run folder; its config.toml and cache are read, nothing is written.
        step: counted from 1, as log and metrics.jsonl do.
        row: the row to print, by its number in the stage (its sample id); None = all rows of the step.
        num_shown: tokens whose text is shown at the beginning and at the end of each document; at least 1.

    Raises:
        ConfigError: the run has no such step, or the step no such row.
        DataError: no run folder, or a data file is missing or damaged.
    """
    if not (run_dir / "config.toml").is_file():
        what, fix = "there is no run here", "give a run folder, which holds config.toml"
        raise DataError(what, where=str(run_dir), got="no config.toml", fix=fix)
    config = load_config(run_dir / "config.toml")
    schedule, last = _schedule_so_far(run_dir, config)
    _check_step(schedule, step)
    place, sample_ids = schedule.place(step - 1), schedule.sample_ids(step - 1)
    stage = schedule.stages[place.stage_index]
    span = f"{sample_ids.start}..{sample_ids.stop - 1}"
    if row is not None and row not in sample_ids:
        what = "the step does not train on this row"
        raise ConfigError(what, where="--row", got=row, allowed=f"{span}, the rows of step {step} (their sample ids)")
    if num_shown < 1:
        raise ConfigError("at least one token must be shown", where="--tokens", got=num_shown, allowed=">= 1")
    undecided = schedule.undecided(last)
    total = f"{'at most ' if undecided else ''}{schedule.total_steps}"
    print(
        f"step {step} of {total}: stage {place.stage_index + 1}/{len(schedule.stages)} {stage.name!r}, "
        f"rows (sample ids) {span} of {stage.tokens // stage.seq_len:,}, {stage.seq_len:,} tokens each; "
        f"{schedule.tokens_after(step):,} tokens of the run with it"
    )
    names = [schedule.stages[index].name for index in undecided if index <= place.stage_index]
    if step > last and names:
        print(
            f"note: the run has done {last} steps; stage '{names[0]}' may end earlier, and step {step} train other rows"
        )
    for line in _lines(run_dir, config, place.stage_index, sample_ids if row is None else [row], num_shown):
        print(line)
    return 0


def _schedule_so_far(run_dir: Path, config: RunConfig) -> tuple[Schedule, int]:
    """The schedule with the ends of stages that the run has decided, and its last step.

    metrics.jsonl is ahead of the newest checkpoint, but may have been begun in another folder.
    """
    progress = newest_progress(run_dir, "auto")
    schedule, last = build_schedule(config.stages, config.optimizer, progress.decided), progress.step
    metrics = run_dir / "metrics.jsonl"
    for record in read_metrics(metrics) if metrics.is_file() else ():
        last = max(last, int(record["step"]))
        index = int(record["stage_index"]) if record.get("until/decided") else -1
        if 0 <= index < len(schedule.stages) and index not in schedule.decided:
            steps = max(1, int(record["step"]) - schedule.first_steps[index])
            schedule = schedule.with_decided({**schedule.decided, index: steps})
    return schedule, last


def _check_step(schedule: Schedule, step: int) -> None:
    if 1 <= step <= schedule.total_steps:
        return
    firsts = zip(schedule.stages, schedule.first_steps, schedule.first_steps[1:], strict=False)
    stages = ", ".join(f"{stage.name!r} {first + 1}..{last}" for stage, first, last in firsts)
    allowed = f"1..{schedule.total_steps} (stages {stages})"
    raise ConfigError("the run has no such step", where="--step", got=step, allowed=allowed)


def _lines(run_dir: Path, config: RunConfig, stage_index: int, rows: range | list[int], num_shown: int) -> list[str]:
    tokenizer = load_tokenizer(config.data.tokenizer)
    cache_dir = run_dir / "cache"
    with tempfile.TemporaryDirectory(prefix="moba-train-") as folder:
        # The run's own row index where there is one; another one is built aside: looking at a run does not change it.
        known = list(cache_dir.iterdir()) if cache_dir.is_dir() else []
        for path in known:
            (Path(folder) / path.name).symlink_to(path.absolute())
        data = StageData(
            config.data,
            config.stages[stage_index],
            stage_index=stage_index,
            seed=config.run.seed,
            cache_dir=Path(folder),
            eod_id=tokenizer.eod_id,
            pad_id=tokenizer.pad_id,
        )
        lines = []
        if any(not path.is_symlink() for path in Path(folder).iterdir()):
            lines.append(
                "note: the run has not used these data files in this stage: it did not come so far, or files or mix "
                "have changed since (or RUN/cache, which would tell, was deleted)"
            )
        lines += data.length_lines
        for i in rows:
            lines += ["", *row_lines(data.row(i), data.pieces(i), tokenizer, num_shown=num_shown)]
    return lines
