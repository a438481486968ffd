"""The command line: `moba-train prep | preflight | train | eval niah | plan | report | data show | convert |
slurm submit`.

Exit codes: 0 done (a planned stop included), 2 a mistake that the user can mend (one message, no traceback unless
--debug), 3 ranks lost each other (one died, stalled or disagreed), 4 the next stage runs on another mesh (start
again), 1 anything else. Every sub-command imports what it needs when it runs: `plan` answers without torch.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from moba_train import __version__, last_words
from moba_train.commands.parsers import (
    OVERRIDES,
    add_checkpoint,
    add_convert,
    add_data,
    add_preflight,
    add_scale,
    add_slurm,
)
from moba_train.errors import EXIT_RANKS, ConfigError, ExchangeError, UserError
from moba_train.quiet import collection_paused

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER = 2

# When rank 0 fails too, the launcher ends the other ranks well within this time; a rank that outlives it has an error
# of its own, and says so.
_OTHER_RANK_WAIT_S = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit code.

    Args:
        argv: words after the program name; None = sys.argv.
    """
    atexit.register(gc.freeze)  # the end is no time to look for garbage among all that was imported
    args, overrides = build_parser().parse_known_args(argv)
    try:
        return _run(args, overrides)
    except UserError as error:
        last_words.leave(error.message(), code=EXIT_USER)
        _report(error, debug=args.debug)
        return EXIT_USER
    except ExchangeError as error:
        last_words.leave(str(error), code=EXIT_RANKS)
        if args.debug:
            traceback.print_exception(error)
        print(f"moba-train (rank {os.environ.get('RANK', '0')}): error: {error}", file=sys.stderr)
        _end_at_once(EXIT_RANKS)
    except KeyboardInterrupt:
        print("moba-train: interrupted", file=sys.stderr)
        if _is_one_of_many():
            _end_at_once(EXIT_FAILED)
        return EXIT_FAILED
    except BrokenPipeError:
        # The reader of our output has gone (`moba-train plan ... | head`): nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        last_words.leave(f"{type(error).__name__}: {error}", code=EXIT_FAILED)
        if not _is_one_of_many():
            raise
        traceback.print_exc()
        _end_at_once(EXIT_FAILED)


def _is_one_of_many() -> bool:
    """Is this process one rank of several, as a launcher says it?"""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _end_at_once(code: int) -> NoReturn:
    """End without taking leave of ranks that no longer answer: collectives under way would hold the process back."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def build_parser() -> argparse.ArgumentParser:
    """The argument parser; words that it does not know are configuration overrides."""
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
    parser = argparse.ArgumentParser(
        prog="moba-train",
        description="Train GPTs whose attention is MoBA, with context parallelism.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"moba-train {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_prep(commands, common)
    add_preflight(commands, common)
    _add_train(commands, common)
    _add_eval(commands, common)
    _add_plan(commands, common)
    _add_report(commands, common)
    add_checkpoint(commands, common)
    add_convert(commands, common)
    add_data(commands, common)
    add_slurm(commands, common)
    return parser


def _add_prep(commands: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    prep = commands.add_parser(
        "prep", parents=[common], allow_abbrev=False, help="text -> tokenizer and .bin/.idx data"
    )
    prep.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="folders of text or code, .txt, .jsonl[.gz|.zst], .parquet; "
        '"stdlib" (the default): Python\'s own library as text',
    )
    prep.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    ids = prep.add_mutually_exclusive_group()
    ids.add_argument("--vocab-size", type=int, default=4096, metavar="N", help="of the tokenizer to train [4096]")
    ids.add_argument("--tokenizer", type=Path, metavar="PATH", help="take this .model or tokenizer.json, train none")
    prep.add_argument(
        "--eod", default="", metavar="TOKEN", help="of a tokenizer.json: it ends documents [its eos_token]"
    )
    prep.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="renders conversations [the one beside tokenizer.json]"
    )
    prep.add_argument(
        "--needles",
        type=parse_needles,
        default={},
        metavar="LEN:N,...",
        help="also write needle samples: 128:4000,256:2000 = 4000 of 128 tokens, 2000 of 256",
    )
    prep.add_argument(
        "--held-out", type=float, default=0.02, metavar="SHARE", help="share of held-out documents [0.02]"
    )
    prep.add_argument("--seed", type=int, default=1234, help="of the needle samples [1234]")
    prep.add_argument("--workers", type=int, default=0, metavar="N", help="processes; 0 = one per core [0]")
    prep.add_argument("--skip-bad", action="store_true", help="count broken records instead of stopping at the first")
    prep.add_argument(
        "--join", action="store_true", help="put all text into one long document, the held-out text into another"
    )
    prep.add_argument(
        "--max-mib", type=float, default=0.0, metavar="M", help="read at most this much text; 0 = all [0]"
    )


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    train = commands.add_parser("train", parents=[common], allow_abbrev=False, help="train", epilog=OVERRIDES)
    train.add_argument("config", type=Path, metavar="CONFIG", help="TOML file")
    train.add_argument(
        "--resume",
        type=parse_resume,
        default="auto",
        metavar="auto|never|PATH",
        help="auto: go on from the run folder's newest intact checkpoint, if it has one; never: start in an unused "
        "folder; PATH: go on from that run or checkpoint folder [auto]",
    )
    add_scale(train)
    train.add_argument("--help-config", action="store_true", help="list every key that can be overridden, and exit")


def _add_eval(commands: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    evaluations = commands.add_parser("eval", help="evaluate a checkpoint").add_subparsers(
        dest="evaluation", required=True, metavar="EVALUATION"
    )
    niah = evaluations.add_parser(
        "niah", parents=[common], allow_abbrev=False, help="needle in a haystack: a grid of lengths and depths",
        epilog=OVERRIDES,
    )  # fmt: skip
    niah.add_argument(
        "path", type=Path, metavar="RUN_OR_CHECKPOINT", help="run folder (newest checkpoint) or checkpoint"
    )
    niah.add_argument("--lengths", type=int, nargs="+", metavar="L", help="context lengths in tokens [niah.lengths]")
    niah.add_argument("--depths", type=int, metavar="N", help="depths from 0 to 100 percent [niah.depths]")
    niah.add_argument("--samples", type=int, metavar="N", help="samples per cell [niah.samples]")
    niah.add_argument(
        "--attentions",
        nargs="+",
        choices=("moba", "full", "random"),
        default=["moba", "full", "random"],
        help="attentions to score under [all three]; random = MoBA with random picks, the control",
    )
    niah.add_argument("--out", type=Path, metavar="DIR", help="folder for niah.jsonl and niah.png [the run folder]")
    niah.add_argument("--help-config", action="store_true", help="list every key that can be overridden, and exit")


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    plan = commands.add_parser(
        "plan", parents=[common], allow_abbrev=False, help="show what a configuration will do", epilog=OVERRIDES
    )
    plan.add_argument("config", type=Path, metavar="CONFIG", help="TOML file")
    add_scale(plan)
    plan.add_argument("--help-config", action="store_true", help="list every key that can be overridden, and exit")


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    report = commands.add_parser("report", parents=[common], allow_abbrev=False, help="write a run's HTML report")
    report.add_argument("run", type=Path, metavar="RUN", help="run folder")
    report.add_argument("--out", type=Path, metavar="FILE", help="file to write [RUN/report.html]")


def parse_needles(text: str) -> dict[int, int]:
    """ "128:4000,256:2000" -> {128: 4000, 256: 2000}; ArgumentTypeError when it does not read like that."""
    needles: dict[int, int] = {}
    for part in filter(None, text.split(",")):
        length, _, count = part.partition(":")
        if not (length.isdecimal() and count.isdecimal() and int(length) > 0 and int(count) > 0):
            raise argparse.ArgumentTypeError(f"{part!r} is not LENGTH:SAMPLES, two whole numbers (128:4000)")
        needles[int(length)] = int(count)
    return needles


def parse_resume(text: str) -> str:
    """auto, never or a path; ArgumentTypeError for nothing at all, as from an unset shell variable."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; give auto, never, or the path of a run or checkpoint")
    return text


def _run(args: argparse.Namespace, overrides: list[str]) -> int:
    if args.command in ("prep", "report", "data", "convert", "checkpoint") and overrides:
        fix = f"moba-train {args.command} --help lists the options"
        raise ConfigError("unknown option", where="command line", got=" ".join(overrides), fix=fix)
    if args.command == "prep":
        return _prep(args)
    if args.command == "convert":
        return _convert(args)
    if args.command == "checkpoint":
        return _checkpoint(args)
    if args.command == "report":
        return _report_run(args)
    if args.command == "data":
        from moba_train.commands.data_show import run_data_show

        return run_data_show(args.run, step=args.step, row=args.row, num_shown=args.tokens)
    if args.command == "eval":
        return _niah(args, overrides)
    if args.command == "slurm":
        return _submit(args, overrides)
    from moba_train.config.load import load_config

    if args.help_config:
        overrides = ["--help"]
    config = load_config(args.config, overrides)
    if args.scale:
        from moba_train.commands.miniature import in_miniature

        config = in_miniature(config, make=args.command != "plan")
    if args.command == "plan":
        from moba_train.plan_view import build_plan, render_plan

        print(render_plan(build_plan(config), config), end="")
        return EXIT_DONE
    if args.command == "preflight":
        from moba_train.commands.preflight import run_preflight_command

        return run_preflight_command(config)
    from moba_train.config.validate import check_ranks_of_job

    check_ranks_of_job(config, int(os.environ.get("WORLD_SIZE", "1")))  # before anything slow is imported
    if not _is_one_of_many():  # ranks tell in one table, once they have met
        from moba_train.commands.inputs import check_training_inputs

        check_training_inputs(config)
    with collection_paused():
        from moba_train.commands.train import run_train
    gc.freeze()  # what was imported lives as long as the process: no collection looks at it again

    return run_train(config, resume=args.resume)


def _prep(args: argparse.Namespace) -> int:
    from moba_train.commands.prep import run_prep

    return run_prep(
        sources=tuple(args.sources) or ("stdlib",),
        out=args.out,
        vocab_size=args.vocab_size,
        tokenizer=args.tokenizer,
        eod=args.eod,
        chat_template=args.chat_template,
        needles=args.needles,
        held_out=args.held_out,
        seed=args.seed,
        workers=args.workers,
        skip_bad=args.skip_bad,
        join=args.join,
        max_mib=args.max_mib,
    )


def _checkpoint(args: argparse.Namespace) -> int:
    from moba_train.commands.checkpoint import run_ls, run_prune, run_verify

    if args.action == "ls":
        return run_ls(args.run)
    if args.action == "verify":
        return run_verify(args.run, step=args.step, every=args.all)
    return run_prune(
        args.run,
        keep_last=args.keep_last,
        keep_every=args.keep_every,
        stage_ends=args.stage_ends,
        abandoned=args.abandoned,
        dry_run=args.dry_run,
    )


def _convert(args: argparse.Namespace) -> int:
    from moba_train.commands.convert import run_from_hf, run_to_hf

    if args.action == "from-hf":
        return run_from_hf(args.source, args.out)
    return run_to_hf(
        args.checkpoint, args.out, tokenizer=args.tokenizer, drop=args.drop, max_file_gib=args.max_file_gib
    )


def _report_run(args: argparse.Namespace) -> int:
    from moba_train.commands.report import run_report

    return run_report(args.run, out=args.out)


def _submit(args: argparse.Namespace, overrides: list[str]) -> int:
    from moba_train.commands.slurm import SlurmJob, run_submit

    job = SlurmJob(
        name=args.job_name or "-".join(filter(None, (args.config.stem, args.scale))),
        partition=args.partition,
        account=args.account,
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        ranks_per_node=args.ranks_per_node or args.gpus_per_node,
        cpus_per_node=args.cpus_per_node,
        time=args.time,
        lead_s=args.lead,
        sbatch_options=tuple(args.sbatch),
        config=str(args.config),
        resume=args.resume,
        options=tuple(word for word in overrides if word != "--"),
    )
    return run_submit(job, scale=args.scale, dry_run=args.dry_run)


def _niah(args: argparse.Namespace, overrides: list[str]) -> int:
    from moba_train.commands.niah import run_niah_command

    words = list(overrides)
    for name in ("lengths", "depths", "samples"):
        value = getattr(args, name)
        if value is not None:
            words += [f"--niah.{name}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
    if args.help_config:
        words = ["--help"]
    return run_niah_command(args.path, words, attentions=tuple(args.attentions), out=args.out)


def _report(error: UserError, *, debug: bool) -> None:
    """Print the message, on rank 0 alone when all ranks fail."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(_OTHER_RANK_WAIT_S)
    if debug:
        traceback.print_exception(error)
    name = "moba-train" if rank == "0" else f"moba-train (rank {rank})"
    print(f"{name}: error: {error.message()}", file=sys.stderr, flush=True)
