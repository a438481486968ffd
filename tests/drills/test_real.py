"""The real engine, started as a user starts it and killed in its saves: it ends as ever, and it tells no secret."""

from __future__ import annotations

import shutil
import signal
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


def moba_train(nursery: Nursery, folder: Path, run: str, *words: str, **fault: object) -> Ending:
    """`moba-train ...` with secrets in its environment."""
    faults = {"folder": str(folder / run / "checkpoints"), **fault} if fault else {}
    log = folder / f"{run}.{len(list(folder.glob('*.log')))}.log"
    return nursery.run(Job(str(folder / run), str(log), faults, list(words), environment=SECRETS))


def train(nursery: Nursery, folder: Path, run: str, **fault: object) -> Ending:
    return moba_train(nursery, folder, run, "train", str(folder / "c.toml"), "--run-dir", str(folder / run), **fault)


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


def test_no_secret_of_the_environment_is_told_to_any_file(folder: Path, straight: list[str]) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"metrics.jsonl", "config.toml", "report.html", "manifest.json"} <= {path.name for path in files}
    told = [(path, secret) for path in files for secret in SECRETS.values() if secret.encode() in path.read_bytes()]
    assert told == []
