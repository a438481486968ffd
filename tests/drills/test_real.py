"""The real engine, started as a user starts it: killed in its saves it ends as ever; errors and limits have their exit
codes; it tells no secret."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from moba_train.data.indexed import write_indexed
from moba_train.data.tokenizer import train_tokenizer
from tests.drills.faults import read_trace
from tests.drills.nursery import Ending, Nursery
from tests.drills.runs import digests_of, records
from tests.drills.victim import Job

STEPS = 6
CONFIG = """
model = {{ preset = "tiny", vocab_size = 512, key_conv = 3 }}
data = {{ tokenizer = "{0}/t.model", sources.text.path = "{0}/text", valid.path = "{0}/text" }}
eval = {{ every_steps = 0, rows = 1, buckets = 4 }}
niah.loop_samples = 0
checkpoint = {{ every_steps = 2, keep_last = 1 }}
stages = [{{ name = "moba", tokens = 1536, tokens_per_step = 256, seq_len = 128, mix.text = 1.0, chunk_size = 16 }}]
"""
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "wJalr-not-to-be-told-1",
    "HF_TOKEN": "hf_not-to-be-told-2",
    "WANDB_API_KEY": "not-to-be-told-3",
    "PGPASSWORD": "not-to-be-told-4",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small corpus and c.toml, a run of STEPS steps."""
    folder = tmp_path_factory.mktemp("real")
    text = Path(shutil.__file__).read_text("utf-8")
    tokenizer = train_tokenizer([text], folder / "t.model", vocab_size=512)
    write_indexed(folder / "text", [tokenizer.encode(text)], vocab_size=512)
    (folder / "c.toml").write_text(CONFIG.format(folder))
    return folder


def moba_train(
    nursery: Nursery, folder: Path, run: str, *words: str, variables: Mapping[str, str] = {}, **fault: object
) -> Ending:
    """`moba-train ...` with secrets in its environment, and `variables`."""
    faults = {"folder": str(folder / run / "checkpoints"), **fault} if fault else {}
    log = folder / f"{run}.{len(list(folder.glob('*.log')))}.log"
    return nursery.run(Job(str(folder / run), str(log), faults, list(words), environment={**SECRETS, **variables}))


def train(
    nursery: Nursery, folder: Path, run: str, *words: str, variables: Mapping[str, str] = {}, **fault: object
) -> Ending:
    command = ("train", str(folder / "c.toml"), "--run-dir", str(folder / run), *words)
    return moba_train(nursery, folder, run, *command, variables=variables, **fault)


@pytest.fixture(scope="module")
def straight(nursery: Nursery, folder: Path) -> list[str]:
    """The moments of a run that was not disturbed (FOLDER/straight), with a report."""
    trace = folder / "trace"
    ending = train(nursery, folder, "straight", trace=str(trace))
    assert ending.code == 0, ending.log
    report = moba_train(nursery, folder, "straight", "report", str(folder / "straight"))
    assert report.code == 0, report.log
    return read_trace(trace, folder / "straight" / "checkpoints")


@pytest.mark.parametrize(
    ("moment", "newest"),
    [
        ("fsync step_00000004.tmp/__0_0.distcp", 2),
        ("rename step_00000004.tmp -> step_00000004", 2),
        ("remove step_00000002.old/manifest.json", 4),
    ],
)
def test_a_training_run_killed_in_a_save_goes_on_to_the_same_end(
    nursery: Nursery, folder: Path, straight: list[str], moment: str, newest: int
) -> None:
    run = folder / f"killed_{newest}_{moment.split()[0]}"
    number = 1 + straight.index(moment)
    killed = train(nursery, folder, run.name, kill_at=number)
    assert killed.code == -signal.SIGKILL, killed.log
    resumed = train(nursery, folder, run.name)
    assert resumed.code == 0, resumed.log
    assert f"resuming from {run}/checkpoints/step_{newest:08d}" in resumed.log
    last = f"checkpoints/step_{STEPS:08d}"
    assert digests_of(run / last) == digests_of(folder / "straight" / last)
    assert records(run) == records(folder / "straight")


def test_a_write_that_fails_is_an_error_in_the_log_and_in_the_exit_code(
    nursery: Nursery, folder: Path, straight: list[str]
) -> None:
    number = 1 + straight.index("fsync step_00000004.tmp/manifest.json")
    failed = train(nursery, folder, "failed", fail_at=number, fail_errno=errno.EIO)
    assert failed.code == 2 and "Traceback" not in failed.log, failed.log
    told = os.strerror(errno.EIO)
    (line, *_) = [line for line in failed.log.splitlines() if "ERROR: step_00000004 was not saved" in line]
    assert told in line
    _, error = failed.log.split("moba-train: error: the checkpoint could not be written; the one before is untouched\n")
    assert told in error and f"where:   {folder}/failed/checkpoints/step_00000004\n" in error
    assert (folder / "failed" / "checkpoints" / "latest").read_text() == "step_00000002\n"
    assert not (folder / "failed" / "outcome.json").exists()


def test_a_start_too_late_for_a_step_is_a_planned_stop_under_slurm_and_a_mistake_under_stop_after(
    nursery: Nursery, folder: Path
) -> None:
    late = train(nursery, folder, "late", variables={"SLURM_JOB_END_TIME": str(int(time.time()) + 50)})
    assert late.code == 0, late.log
    outcome = json.loads((folder / "late" / "outcome.json").read_text())
    assert (outcome["finished"], outcome["step"]) == (False, 0)
    assert outcome["reason"].startswith("the end of the Slurm job, SLURM_JOB_END_TIME: ")
    assert f"stopped ({outcome['reason']}) after step 0/{STEPS}\n" in late.log
    assert records(folder / "late") == [] and not (folder / "late" / "checkpoints").exists()
    short = train(nursery, folder, "late", "--stop-after", "50s")
    assert short.code == 2 and "error: the deadline is too near to begin a step" in short.log
    assert not (folder / "late" / "outcome.json").exists()


def test_a_run_that_diverges_ends_with_code_2_and_everything_saved(nursery: Nursery, folder: Path) -> None:
    absurd = ("--optimizer.lr", "1e30", "--optimizer.warmup-tokens", "0", "--optimizer.clip-grad", "0")
    diverged = train(nursery, folder, "diverged", *absurd, "--run.max-bad-steps", "2")
    assert diverged.code == 2 and "Traceback" not in diverged.log, diverged.log
    assert "step 3 skipped on all ranks" in diverged.log and "2 in a row (run.max_bad_steps 2)" in diverged.log
    assert "moba-train: error: the loss or the gradient norm was not finite for 2 steps in a row" in diverged.log
    assert digests_of(folder / "diverged" / "checkpoints" / "step_00000003")
    assert records(folder / "diverged")[-1]["step"] == 3


def test_no_secret_of_the_environment_is_told_to_any_file(folder: Path, straight: list[str]) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"metrics.jsonl", "config.toml", "report.html", "manifest.json"} <= {path.name for path in files}
    told = [(path, secret) for path in files for secret in SECRETS.values() if secret.encode() in path.read_bytes()]
    assert told == []
