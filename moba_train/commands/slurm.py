"""`moba-train slurm submit`: check a job, render launch/slurm.sbatch for it, hand it to sbatch. Imports no torch.

The settings at the top of the script are made here, every value checked and quoted; all below them is taken from
launch/slurm.sbatch as it stands, so a site edits that one file.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import moba_train
from moba_train.config.load import load_config
from moba_train.config.scale import scaled
from moba_train.config.validate import check_ranks_of_job
from moba_train.errors import BackendError, ConfigError

END_OF_SETTINGS = "# ---- end of settings ----\n"
SCRIPT = "slurm.sbatch"
LOG = "slurm-%j.log"

# Slurm cuts #SBATCH lines into words by rules of its own, and replaces %: values that need no quoting are let in.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,+@-]*")
_PATH = re.compile(r"[A-Za-z0-9_./+@=:,~-]+")
_TIME = re.compile(r"(?:(\d+)-)?(\d{1,2}):([0-5]\d):([0-5]\d)")
_OPTION = re.compile(r"([a-z][a-z-]*)(?:=[A-Za-z0-9_.,:@+/*&|\[\]-]+)?")
# The body of the script relies on them, or an option of ours sets them.
_OWN = (
    *("job-name", "nodes", "gpus-per-node", "time", "signal", "output", "error", "partition", "account", "chdir"),
    *("ntasks", "ntasks-per-node", "requeue", "no-requeue", "open-mode", "array", "export", "wrap"),
)
_EARLY_S = 60  # by which Slurm's signal may come before its time


@dataclass(frozen=True)
class SlurmJob:
    """The settings of launch/slurm.sbatch; the defaults are those in the file.

    Attributes:
        name, partition, account: as sbatch takes them; "" = Slurm's default.
        nodes: number of nodes.
        gpus_per_node: 0 = none.
        ranks_per_node: processes that torchrun starts on each node.
        cpus_per_node: CPUs of a node that is shared with other jobs; 0 = whole nodes.
        time: limit of each start of the job, "HH:MM:SS" or "D-HH:MM:SS".
        lead_s: seconds before the limit at which Slurm signals the ranks.
        sbatch_options: further options of sbatch without their dashes ("qos=long").
        workdir: where relative paths start.
        bin: folder of the python3 that has moba-train.
        launcher: launch/torchrun.sh.
        config, run_dir: as for `moba-train train`.
        resume: "auto", "never" or a path, for the first start.
        options: further options of `moba-train train`.
        log: file that Slurm writes the job's output to, with Slurm's patterns (%j = job id).
    """

    name: str = "moba-train"
    partition: str = ""
    account: str = ""
    nodes: int = 1
    gpus_per_node: int = 8
    ranks_per_node: int = 8
    cpus_per_node: int = 0
    time: str = "04:00:00"
    lead_s: int = 300
    sbatch_options: tuple[str, ...] = ()
    workdir: str = "."
    bin: str = ".venv/bin"
    launcher: str = "launch/torchrun.sh"
    config: str = "configs/llama_1b_32k.toml"
    run_dir: str = "runs/llama_1b_32k"
    resume: str = "auto"
    options: tuple[str, ...] = ()
    log: str = LOG


def run_submit(job: SlurmJob, *, scale: str = "", dry_run: bool) -> int:
    """Submit `job` (or, with `dry_run`, print its script); returns the exit code.

    Args:
        job: `config`, `options` and what sbatch needs; the rest is found here.
        scale: "tiny" = the run in miniature, on the nodes of the job.

    Raises:
        ConfigError: the configuration or a value of the job does not fit, the ranks do not fill the mesh.
        BackendError: no sbatch here, or it refused the job.
    """
    _check(job)
    config = load_config(Path(job.config), job.options)
    if scale:
        config = scaled(config, job.nodes * job.ranks_per_node)
        job = replace(job, options=("--scale", scale, *job.options))
    check_ranks_of_job(config, job.nodes * job.ranks_per_node)
    run_dir = Path(config.run.dir).absolute()
    launch = Path(moba_train.__file__).resolve().parents[1] / "launch"
    job = replace(
        job,
        workdir=str(Path.cwd()),
        bin=str(Path(sys.executable).absolute().parent),
        launcher=str(launch / "torchrun.sh"),
        run_dir=str(run_dir),
        log=str(run_dir / LOG),
    )
    script = render(job, _template(launch / SCRIPT))
    if dry_run:
        print(script, end="")
        return 0
    path = run_dir / SCRIPT
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(script, encoding="utf-8")
    except OSError as error:
        fix = "choose another --run-dir, or mend the permissions"
        raise ConfigError("the job's script cannot be written", where="run.dir", got=str(error), fix=fix) from error
    print("\n".join(_told(job, _sbatch(path), path)))
    return 0


def render(job: SlurmJob, template: str) -> str:
    """The script of `job`: its settings, then everything that stands below the settings of `template`.

    Raises:
        ConfigError: a value that a shell or Slurm might read as something else, or that makes no sense.
    """
    _check(job)
    _, _, body = template.partition(END_OF_SETTINGS)
    return _head(job) + END_OF_SETTINGS + body


def _head(job: SlurmJob) -> str:
    words = {
        "job-name": job.name,
        "partition": job.partition,
        "account": job.account,
        "nodes": job.nodes,
        "gpus-per-node": job.gpus_per_node,
        "cpus-per-task": job.cpus_per_node,
    }
    directives = [f"--{name}={value}" for name, value in words.items() if value]
    if not job.cpus_per_node:
        directives += ["--exclusive", "--mem=0"]
    directives += [f"--time={job.time}", f"--signal=USR1@{job.lead_s}", f"--output={job.log}"]
    directives += [f"--{option}" for option in job.sbatch_options]
    lines = "\n".join(f"#SBATCH {directive}" for directive in directives)
    return f"""\
#!/usr/bin/env bash
# A training run as a Slurm job that goes on by itself until the run is finished; docs/slurm.md explains it.
#
# By hand: edit the settings, then `sbatch launch/slurm.sbatch`. `moba-train slurm submit` writes its own settings, and
# takes everything below them from this file.
{lines}
# One task per node: torchrun starts the ranks. Leave these three as they are.
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append

workdir={shlex.quote(job.workdir)}  # relative paths start here; "." is the folder in which sbatch was called
bin={shlex.quote(job.bin)}  # the python3 that has moba-train
launcher={shlex.quote(job.launcher)}
config={shlex.quote(job.config)}
run_dir={shlex.quote(job.run_dir)}
resume={shlex.quote(job.resume)}  # of the first start; a job that is started again takes the newest checkpoint
ranks_per_node={job.ranks_per_node}
options=({shlex.join(job.options)})  # more options of `moba-train train`
lead_s={job.lead_s}  # as in --signal above
"""


def _check(job: SlurmJob) -> None:
    """Raise ConfigError for the first value that does not fit."""
    if not job.ranks_per_node:
        fix = "give --gpus-per-node, or --ranks-per-node on nodes without GPUs"
        raise ConfigError("the job has no ranks", where="--ranks-per-node", got=0, fix=fix)
    for option, least, value in (
        ("--nodes", 1, job.nodes),
        ("--gpus-per-node", 0, job.gpus_per_node),
        ("--ranks-per-node", 1, job.ranks_per_node),
        ("--cpus-per-node", 0, job.cpus_per_node),
        ("--lead", 1, job.lead_s),
    ):
        if value < least:
            raise ConfigError("the number is too small", where=option, got=value, allowed=f">= {least}")
    for option, name in (("--job-name", job.name), ("--partition", job.partition), ("--account", job.account)):
        if name and not _NAME.fullmatch(name):
            raise ConfigError("not a name that sbatch takes", where=option, got=repr(name), allowed=_letters(".,+@-_"))
    if not _PATH.fullmatch(job.run_dir):
        allowed, fix = _letters("/._+@=:,~-"), "choose another --run-dir"
        raise ConfigError(
            "Slurm cannot write a log there", where="run.dir", got=repr(job.run_dir), allowed=allowed, fix=fix
        )
    if not job.resume.strip():
        allowed = "auto, never, or the path of a run or checkpoint"
        raise ConfigError("the value is empty", where="--resume", got=repr(job.resume), allowed=allowed)
    for word in (job.workdir, job.bin, job.launcher, job.config, job.resume, *job.options):
        if re.search(r"[\0\r\n]", word):
            raise ConfigError("a value has a line break in it", where="command line", got=repr(word))
    _check_time(job)
    _check_sbatch_options(job)


def _check_sbatch_options(job: SlurmJob) -> None:
    for option in job.sbatch_options:
        found = _OPTION.fullmatch(option)
        if not found:
            allowed = "an option of sbatch without its dashes: qos=long, reservation=night, mail-type=END"
            raise ConfigError("not an option of sbatch", where="--sbatch", got=repr(option), allowed=allowed)
        if found[1] in _OWN:
            fix = "moba-train slurm submit --help lists the options that set it, or edit launch/slurm.sbatch"
            raise ConfigError("the script sets this option itself", where="--sbatch", got=option, fix=fix)


def _check_time(job: SlurmJob) -> None:
    found = _TIME.fullmatch(job.time)
    if not found:
        allowed = "HH:MM:SS or D-HH:MM:SS (Slurm reads 04:00 as four minutes)"
        raise ConfigError("not a time limit", where="--time", got=repr(job.time), allowed=allowed)
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    limit_s = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if limit_s <= job.lead_s + _EARLY_S:
        raise ConfigError(
            "the job would be told to stop as soon as it has started",
            where="--time",
            got=f"{limit_s} s; Slurm signals {job.lead_s} s (--lead) before the end, or up to {_EARLY_S} s earlier",
            allowed=f"> {job.lead_s + _EARLY_S} s",
            fix="raise --time, or lower --lead",
        )


def _letters(signs: str) -> str:
    return f"letters, digits and {' '.join(signs)}"


def _template(path: Path) -> str:
    """Text of launch/slurm.sbatch; ConfigError when it is not there or its settings have no end."""
    fix = "install moba-train from a checkout (pip install -e .), whose launch/ folder it uses"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError("the script to render is not there", where=str(path), got=str(error), fix=fix) from error
    if END_OF_SETTINGS not in text:
        fix = f"put the line {END_OF_SETTINGS.strip()!r} back behind the settings"
        raise ConfigError("the script does not say where its settings end", where=str(path), fix=fix)
    return text


def _sbatch(script: Path) -> str:
    """Submit; the job's id."""
    fix = "run this where Slurm's commands are (a login node), or print the script with --dry-run"
    try:
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    except OSError as error:
        raise BackendError("cannot run sbatch", where="PATH", got=str(error), fix=fix) from error
    if done.returncode != 0:
        fix = "mend the option it names, then submit again"
        raise BackendError("sbatch refused the job", where=str(script), got=done.stderr.strip(), fix=fix)
    return done.stdout.strip().partition(";")[0]  # "ID" or "ID;CLUSTER"


def _told(job: SlurmJob, job_id: str, script: Path) -> Sequence[str]:
    again = shlex.join(["sbatch", str(script)])
    return (
        f"submitted job {job_id}: {job.nodes} node(s) x {job.ranks_per_node} rank(s), {job.time} each time it runs",
        f"  log:     tail -F {shlex.quote(job.log.replace('%j', job_id))}",
        f"  queue:   squeue -j {job_id}",
        f"  stop:    scancel --signal=USR1 {job_id}    (saves after the current step, ends with code 0, stays ended)",
        f"  kill:    scancel {job_id}    (30 s to save, as Slurm is set up by default; stays ended)",
        f"  go on:   {again}    (after a stop; at the time limit and after a preemption it goes on by itself)",
    )
