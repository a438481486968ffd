"""Parsers of sub-commands: what `moba-train --help` shows. Imported by `cli` at once, so it imports nothing slow."""

from __future__ import annotations

import argparse
from pathlib import Path

Commands = argparse._SubParsersAction
"""What `ArgumentParser.add_subparsers` returns."""

OVERRIDES = (
    "Every key of the configuration can be overridden: --section.key VALUE, for instance --parallel.cp 2 or "
    "--stages.0.tokens 4096; --run-dir PATH is short for --run.dir PATH, --stop-after 3h50m for --run.stop-after. "
    "--help-config lists all of them."
)


def add_scale(parser: argparse.ArgumentParser) -> None:
    """`--scale tiny` of plan, preflight, train and slurm submit."""
    parser.add_argument(
        "--scale",
        choices=("tiny",),
        default="",
        help="the run in miniature, as a rehearsal: the same stages and code paths with rows of about 1024 tokens, a "
        "few steps each, on a CPU (on GPUs with --engine.device cuda), with text and random weights that it makes "
        "itself in the folder `miniature` beside the run folder. Overrides apply to the run first, and the miniature "
        "is that of the result; its run folder ends in -tiny",
    )


def add_preflight(commands: Commands[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    """`preflight CONFIG`."""
    preflight = commands.add_parser(
        "preflight",
        parents=[common],
        allow_abbrev=False,
        help="check everything that a run needs, in seconds",
        description="Check versions, devices, memory, disk, run folder, collectives, data and clocks, and show all "
        "that is wrong in one table. Under torchrun, started as `train` would be, it checks every rank; by itself, "
        "what one process can see. `train` does the same first.",
        epilog=OVERRIDES,
    )
    preflight.add_argument("config", type=Path, metavar="CONFIG", help="TOML file")
    add_scale(preflight)
    preflight.add_argument("--help-config", action="store_true", help="list every key that can be overridden, and exit")


def add_data(commands: Commands[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    """`data show RUN`."""
    actions = commands.add_parser("data", help="look at a run's data").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    show = actions.add_parser(
        "show",
        parents=[common],
        allow_abbrev=False,
        help="print the documents of a step",
        description="Print the documents of any step, past or future: their index in the source, which tokens of "
        "them, and how the text begins and ends. The same on every mesh.",
    )
    show.add_argument("run", type=Path, metavar="RUN", help="run folder")
    show.add_argument("--step", type=int, required=True, metavar="N", help="step, from 1, as log and metrics count")
    show.add_argument("--row", type=int, metavar="I", help="this row alone, by its sample id [all rows of the step]")
    show.add_argument(
        "--tokens", type=int, default=24, metavar="K", help="tokens shown of each document's begin and end [24]"
    )


def add_slurm(commands: Commands[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    """`slurm submit CONFIG`."""
    actions = commands.add_parser("slurm", help="run under Slurm").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    submit = actions.add_parser(
        "submit",
        parents=[common],
        allow_abbrev=False,
        help="submit a training run",
        description="Render launch/slurm.sbatch for a run, write it to the run folder and submit it. The job goes on "
        "by itself, over time limits and preemptions, until the run is finished.",
        epilog=OVERRIDES,
    )
    submit.add_argument("config", type=Path, metavar="CONFIG", help="TOML file")
    add_scale(submit)
    submit.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes [1]")
    submit.add_argument("--gpus-per-node", type=int, default=0, metavar="G", help="GPUs, and ranks, of each node")
    submit.add_argument("--ranks-per-node", type=int, default=0, metavar="R", help="ranks [--gpus-per-node]")
    submit.add_argument(
        "--cpus-per-node", type=int, default=0, metavar="C", help="share nodes, taking C of their CPUs [whole nodes]"
    )
    submit.add_argument("--time", required=True, metavar="HH:MM:SS", help="limit of each start; D-HH:MM:SS for days")
    submit.add_argument("--lead", type=int, default=300, metavar="S", help="seconds before it to begin to stop [300]")
    submit.add_argument("--partition", default="", metavar="P", help="Slurm partition [the cluster's default]")
    submit.add_argument("--account", default="", metavar="A", help="account to charge [your default]")
    submit.add_argument("--job-name", default="", metavar="NAME", help="name of the job [the configuration's]")
    submit.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="another option of sbatch: --sbatch qos=long"
    )
    submit.add_argument(
        "--resume", default="auto", metavar="auto|never|PATH", help="as for train, of the first start [auto]"
    )
    submit.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")


def add_convert(commands: Commands[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    """`convert from-hf DIR OUT` and `convert to-hf CHECKPOINT DIR`."""
    actions = commands.add_parser("convert", help="Hugging Face checkpoints in and out").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    source = actions.add_parser(
        "from-hf",
        parents=[common],
        allow_abbrev=False,
        help="weights of a Hugging Face checkpoint, for model.init_from",
        description="Read a Llama 2 or 3.x, Qwen2, 2.5 or 3 (dense) checkpoint and write its weights in the form that "
        "any mesh loads, with a configuration to start from. One tensor is in memory at a time.",
    )
    source.add_argument("source", type=Path, metavar="DIR", help="folder with config.json and *.safetensors")
    source.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    target = actions.add_parser(
        "to-hf",
        parents=[common],
        allow_abbrev=False,
        help="a checkpoint, as transformers loads it",
        description="Write a checkpoint of any mesh as safetensors, config.json and tokenizer files. The exported "
        "model runs under full attention: MoBA has no weights.",
    )
    target.add_argument(
        "checkpoint", type=Path, metavar="RUN_OR_CHECKPOINT", help="run folder (newest checkpoint) or checkpoint"
    )
    target.add_argument("out", type=Path, metavar="DIR", help="folder to make")
    target.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="take the tokenizer files of this folder [the model's own]"
    )
    target.add_argument(
        "--drop", action="store_true", help="leave out what Hugging Face's form cannot hold (the key convolution)"
    )
    target.add_argument("--max-file-gib", type=float, default=5.0, metavar="G", help="size of a file of weights [5]")


def add_checkpoint(commands: Commands[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    """`checkpoint ls | verify | prune RUN`."""
    actions = commands.add_parser("checkpoint", help="look at a run's checkpoints").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    listing = actions.add_parser("ls", parents=[common], allow_abbrev=False, help="list them")
    verify = actions.add_parser(
        "verify",
        parents=[common],
        allow_abbrev=False,
        help="compare their contents with the manifests",
        description="Hash every file of the newest checkpoint (or of the one after STEP steps, or of all) and compare "
        "with its manifest. Ends with code 2 if anything is damaged.",
    )
    verify.add_argument("--all", action="store_true", help="every checkpoint of the run")
    prune = actions.add_parser(
        "prune",
        parents=[common],
        allow_abbrev=False,
        help="delete old ones",
        description="Delete checkpoints that no rule keeps, and what interrupted saves left behind. The newest "
        "checkpoint whose contents are whole is never deleted. Refused while a job is writing to the run folder.",
    )
    for parser in (listing, verify, prune):
        parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    verify.add_argument("step", type=int, nargs="?", metavar="STEP", help="the checkpoint after this step alone")
    prune.add_argument("--keep-last", type=_positive, required=True, metavar="N", help="newest that are kept")
    prune.add_argument(
        "--keep-every", type=_positive, default=0, metavar="M", help="keep steps that are a multiple of M as well"
    )
    prune.add_argument("--stage-ends", action="store_true", help="delete ends of stages too, which are kept otherwise")
    prune.add_argument("--abandoned", action="store_true", help="delete what was set aside (step_X.abandoned) as well")
    prune.add_argument("--dry-run", action="store_true", help="only say what would be deleted")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)
