"""`moba-train eval niah`: the needle grid of a checkpoint, under MoBA, full attention and random routing."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from moba_train.commands.inputs import check_evaluation_inputs
from moba_train.commands.parts import identity_of, joined_ranks, make_folder, trained_engine
from moba_train.config.load import load_config
from moba_train.config.schema import RunConfig, StageConfig
from moba_train.data.indexed import open_indexed
from moba_train.data.needles import NeedleText, haystack_of, load_words
from moba_train.data.tokenizer import load_tokenizer
from moba_train.engine.base import AttentionMode
from moba_train.eval.niah import NiahResult, run_niah
from moba_train.eval.table import print_niah_table
from moba_train.parallel.topology import Topology
from moba_train.train.manifest import content_name, damages
from moba_train.train.resume import resolve_checkpoint
from moba_train.train.run_folder import CONFIG, FOLDER, STATE, list_checkpoints
from moba_train.train.signals import interrupting

# Lines that say how far an evaluation is, where there is no terminal to draw a bar on.
_PROGRESS_LINES = 10


def run_niah_command(
    path: Path, overrides: Sequence[str], *, attentions: tuple[AttentionMode, ...], out: Path | None
) -> int:
    """Evaluate a run's newest intact checkpoint, or the named one; returns the exit code.

    Args:
        path: run folder or checkpoint folder.
        overrides: command-line words on top of the configuration that the checkpoint was trained with.
        out: folder for niah.jsonl and niah.png; None = the run folder, or that of weights that belong to no run.

    Raises:
        UserError: anything that the user can mend, on every rank.
    """
    config = load_config(_config_of(path), overrides)
    trained_on = config.parallel
    if "WORLD_SIZE" not in os.environ and not any(word.startswith("--parallel.") for word in overrides):
        # A bare process is one rank; scores do not depend on the mesh. Under torchrun the mesh has to fit.
        config = replace(config, parallel=replace(trained_on, tp=1, cp=1, pp=1, dp="auto"))
    check_evaluation_inputs(config)
    console = Console(highlight=False, soft_wrap=True)
    if config.parallel != trained_on:
        mesh = f"tp {trained_on.tp}, cp {trained_on.cp}, pp {trained_on.pp}"
        console.print(f"one process, one rank (trained with {mesh}); torchrun spreads it over more", markup=False)
    with joined_ranks(config) as topology, interrupting():
        try:
            _evaluate(config, path, overrides, topology, attentions, out, console)
        except KeyboardInterrupt:
            if topology.rank == 0:
                kept = "what was scored is kept in niah.jsonl, and the same command goes on from there"
                console.print(f"broken off; {kept}", markup=False)
            raise
    return 0


def _evaluate(
    config: RunConfig,
    path: Path,
    overrides: Sequence[str],
    topology: Topology,
    attentions: tuple[AttentionMode, ...],
    out: Path | None,
    console: Console,
) -> None:
    """Load the checkpoint, score the grid and print it; collective over all ranks."""
    begin = resolve_checkpoint(path)
    assert begin.path is not None
    trained = replace(load_config(begin.path / CONFIG, overrides), parallel=config.parallel)
    if trained != config:  # the newest checkpoint is damaged where only its hashes show it, or newer than a moment ago
        check_evaluation_inputs(config := trained)
    tokenizer = load_tokenizer(config.data.tokenizer)
    engine, progress = trained_engine(config, topology, begin.path, identity_of(config, tokenizer, topology))
    engine.set_stage(progress.stage_index)
    out_dir = out or (begin.path.parent.parent if begin.path.parent.name == FOLDER else begin.path)
    make_folder(out_dir, where="--out")
    if topology.rank == 0:
        for note in begin.notes:
            console.print(note.replace("resuming from", "evaluating"), markup=False)
        for word in _of_other_stages(overrides, progress.stage_index):
            own = f"the checkpoint's stage is --stages.{progress.stage_index}"
            console.print(f"{word} changes nothing here: {own}", markup=False)
    result = run_niah(
        engine,
        NeedleText(tokenizer, load_words()),
        haystack_of(open_indexed(config.data.valid.path), eod_id=tokenizer.eod_id, begin_ids=tokenizer.begin_ids),
        stage=config.stages[progress.stage_index],
        step=progress.step,
        weights=content_name(begin.path),
        lengths=config.niah.lengths,
        depths=config.niah.depths,
        samples=config.niah.samples,
        out_dir=out_dir,
        seed=config.run.seed,
        attentions=attentions,
        function=function_of(config, config.stages[progress.stage_index]),
        progress=_progress_printer(console),
    )
    if topology.rank == 0:
        _print_result(result, console)


def function_of(config: RunConfig, stage: StageConfig) -> str:
    """Digest of what shapes a score beside the weights, the stage's chunks and the samples (`NiahRecord.function`)."""
    layers = (stage.attention, asdict(stage.full_layers), asdict(stage.rope))
    computed = (config.engine.precision, config.engine.attention_backend)
    return hashlib.sha256(json.dumps([layers, computed], sort_keys=True).encode()).hexdigest()[:16]


def _of_other_stages(overrides: Sequence[str], stage_index: int) -> list[str]:
    """The words that set something of a stage that is not evaluated."""
    found = [(word, re.match(r"--stages\.(\d+)\.", word)) for word in overrides]
    return [word.partition("=")[0] for word, stage in found if stage and int(stage[1]) != stage_index]


def _config_of(path: Path) -> Path:
    """The config.toml that the checkpoint was trained with; of a run folder's checkpoints the newest whose files all
    have their sizes. Hashes are compared once the ranks can share the reading.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    if (path / STATE).exists():
        return path / CONFIG
    known = list_checkpoints(path.parent if path.name == FOLDER else path)
    for folder in reversed(known):
        if not any(damages(folder, hashes=False)):
            return folder / CONFIG
    found = resolve_checkpoint(path).path  # says what is wrong with the folder
    assert found is not None
    return found / CONFIG


def _progress_printer(console: Console) -> Callable[[int, int], None]:
    """A line now and then, or one line that is rewritten in place on a terminal."""
    printed = [-1]

    def show(done: int, total: int) -> None:
        share = done * _PROGRESS_LINES // max(1, total)
        if console.is_terminal:
            console.print(f"scored {done:,} of {total:,} samples", end="\r" if done < total else "\n", markup=False)
        elif share != printed[0]:
            printed[0] = share
            console.print(f"scored {done:,} of {total:,} samples", markup=False)

    return show


def _print_result(result: NiahResult, console: Console) -> None:
    if result.num_resumed:
        console.print(f"{result.num_resumed:,} samples were scored by an earlier call", markup=False)
    print_niah_table(result.records, console)
    console.print(f"written: {result.jsonl}, {result.png}", markup=False)
