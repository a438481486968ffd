"""`moba-train eval niah`: the needle grid of a checkpoint, under MoBA, full attention and random routing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from moba_train.commands.inputs import check_evaluation_inputs
from moba_train.commands.parts import identity_of, joined_ranks, make_folder, trained_engine
from moba_train.config.load import load_config
from moba_train.config.schema import RunConfig
from moba_train.data.indexed import open_indexed
from moba_train.data.needles import NeedleText, haystack_of, load_words
from moba_train.data.tokenizer import load_tokenizer
from moba_train.engine.base import AttentionMode
from moba_train.eval.niah import NiahResult, run_niah
from moba_train.eval.table import print_niah_table
from moba_train.parallel.topology import Topology
from moba_train.train.checkpoint import FOLDER, list_checkpoints
from moba_train.train.manifest import MANIFEST, sha256_of
from moba_train.train.resume import resolve_checkpoint
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
    config = load_config(trained_config(path), overrides)
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
            _evaluate(config, path, topology, attentions, out, console)
        except KeyboardInterrupt:
            if topology.rank == 0:
                kept = "what was scored is kept in niah.jsonl, and the same command goes on from there"
                console.print(f"broken off; {kept}", markup=False)
            raise
    return 0


def _evaluate(
    config: RunConfig,
    path: Path,
    topology: Topology,
    attentions: tuple[AttentionMode, ...],
    out: Path | None,
    console: Console,
) -> None:
    """Load the checkpoint, score the grid and print it; collective over all ranks."""
    begin = resolve_checkpoint(path)
    assert begin.path is not None
    tokenizer = load_tokenizer(config.data.tokenizer)
    engine, progress = trained_engine(config, topology, begin.path, identity_of(config, tokenizer, topology))
    engine.set_stage(progress.stage_index)
    out_dir = out or (begin.path.parent.parent if begin.path.parent.name == FOLDER else begin.path)
    make_folder(out_dir, where="--out")
    if topology.rank == 0:
        for note in begin.notes:
            console.print(note.replace("resuming from", "evaluating"), markup=False)
    result = run_niah(
        engine,
        NeedleText(tokenizer, load_words()),
        haystack_of(open_indexed(config.data.valid.path), eod_id=tokenizer.eod_id, begin_ids=tokenizer.begin_ids),
        stage=config.stages[progress.stage_index],
        step=progress.step,
        weights=sha256_of(begin.path / MANIFEST)[:16],
        lengths=config.niah.lengths,
        depths=config.niah.depths,
        samples=config.niah.samples,
        out_dir=out_dir,
        seed=config.run.seed,
        attentions=attentions,
        progress=_progress_printer(console),
    )
    if topology.rank == 0:
        _print_result(result, console)


def trained_config(path: Path) -> Path:
    """The config.toml that the checkpoint (a run folder: its newest one) was trained with.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    if (path / "state.json").exists():
        return path / "config.toml"
    known = list_checkpoints(path.parent if path.name == FOLDER else path)
    if known:
        return known[-1] / "config.toml"
    found = resolve_checkpoint(path).path  # says what is wrong with the folder
    assert found is not None
    return found / "config.toml"


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
