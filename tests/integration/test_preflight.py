"""Preflight on ranks that really exchange, at the start of a run and from the command line; and `data show`: the rows
that it prints are those that the engine was given."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moba_train import cli
from moba_train.commands.inputs import training_data_errors
from moba_train.commands.train import run_train
from moba_train.config.load import load_config
from moba_train.config.schema import ParallelConfig, RunConfig
from moba_train.data.indexed import write_indexed
from moba_train.data.tokenizer import train_tokenizer
from moba_train.engine.base import StepResult
from moba_train.engine.megatron import MegatronEngine
from moba_train.errors import CheckpointError
from moba_train.parallel.fingerprint import checksum
from moba_train.parallel.topology import Topology, close_topology, init_topology
from moba_train.train import preflight, preflight_facts
from moba_train.train.preflight import PreflightFailed, run_preflight
from moba_train.train.preflight_rules import needs_of
from moba_train.train.run_folder import list_checkpoints
from moba_train.train.weights import weights_state
from tests.distributed import run_ranks

STEPS = {1: "moba", 2: "moba", 3: "whole", 4: "whole"}
CONFIG = """
run = {{ dir = "{0}/run", log_every = 1 }}
model = {{ preset = "tiny", vocab_size = 512 }}
engine.device = "cpu"
eval.rows = 0
niah.loop_samples = 0
[data]
tokenizer = "{0}/t.model"
valid.path = "{0}/text"
sources.text.path = "{0}/text"
sources.short = {{ path = "{0}/short", packing = "whole" }}
[[stages]]
name = "moba"
tokens = 1024
tokens_per_step = 512
seq_len = 128
mix.text = 1.0
chunk_size = 16
[[stages]]
name = "whole"
tokens = 512
tokens_per_step = 256
seq_len = 64
mix = {{ text = 0.5, short = 0.5 }}
attention = "full"
"""


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the table are as wide as the terminal."""
    monkeypatch.setenv("COLUMNS", "160")


@dataclass(frozen=True)
class Told:
    """What one rank saw of preflights: the lines of a sound one, the message of a broken one, that of other code; the
    rows that its engine trained on; what stood in the log of the run."""

    sound: tuple[str, ...]
    broken: str
    other_code: str
    rows: dict[tuple[int, int], str]
    log: str


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preflight")
    text = Path(shutil.__file__).read_text("utf-8")
    tokenizer = train_tokenizer([text], folder / "t.model", vocab_size=512)
    parts = [text[i : i + 700] for i in range(0, len(text), 700)]
    write_indexed(folder / "text", [[*tokenizer.encode(part), tokenizer.eod_id] for part in parts], vocab_size=512)
    write_indexed(folder / "short", [[*tokenizer.encode(p[:40]), tokenizer.eod_id] for p in parts], vocab_size=512)
    (folder / "c.toml").write_text(CONFIG.format(folder))
    return folder


@pytest.fixture(scope="module")
def told(workspace: Path) -> list[Told]:
    return run_ranks(all_of_it, 2, str(workspace))


def all_of_it(rank: int, n: int, workspace: str) -> Told:
    os.environ["COLUMNS"] = "400"  # no cell is folded
    config = load_config(Path(workspace) / "c.toml")
    topology = init_topology(ParallelConfig(cp=2), device=torch.device("cpu"), timeout_s=60.0)
    sound = run_preflight(config, topology, find_data_errors=lambda: training_data_errors(config))
    sound.raise_if_failed()
    with pytest.MonkeyPatch.context() as patch:
        broken = broken_preflight(config, topology, patch)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(preflight_facts, "code_digest", lambda: "0123456789ab")
        other_code = message_of(config, topology)
    close_topology(keep_process_group=True)
    with pytest.MonkeyPatch.context() as patch:
        rows, log = train_with_an_engine_that_remembers(config, patch)
    return Told(sound.lines(), broken, other_code, rows, log)


def message_of(config: RunConfig, topology: Topology) -> str:
    report = run_preflight(config, topology, find_data_errors=lambda: training_data_errors(config))
    with pytest.raises(PreflightFailed) as caught:
        report.raise_if_failed()
    return caught.value.message()


def broken_preflight(config: RunConfig, topology: Topology, patch: pytest.MonkeyPatch) -> str:
    """Much is wrong, and most of it on rank 1 alone."""
    world = dist.group.WORLD
    assert world is not None
    patch.setattr(preflight, "SEEN_WITHIN_S", 0.2)
    if topology.rank == 1:
        versions = preflight_facts.versions_of
        patch.setattr(preflight_facts, "versions_of", lambda config: {**versions(config), "torch": "2.5.0"})
        patch.setattr(preflight_facts, "machine_id", lambda: "node1 its-boot")
        patch.setattr(preflight_facts, "free_host_memory", lambda: 1 << 20)
        leave = preflight_facts.leave_probe

        def leave_elsewhere(folder: Path, rank: int) -> preflight_facts.Probe:
            probe = leave(folder, rank)
            probe.path.unlink()  # as on a disk of its own: nobody else sees it
            return probe

        patch.setattr(preflight_facts, "leave_probe", leave_elsewhere)
        config = replace(config, data=replace(config.data, tokenizer="/no/such.model"))
    return message_of(config, replace(topology, dp_group=world))


def train_with_an_engine_that_remembers(
    config: RunConfig, patch: pytest.MonkeyPatch
) -> tuple[dict[tuple[int, int], str], str]:
    """Train on two data-parallel ranks, without the arithmetic: (step, sample id) -> checksum; the log."""
    rows: dict[tuple[int, int], str] = {}

    def train_step(self: MegatronEngine, given: Any, *, step: int, **_: Any) -> StepResult:
        rows.update({(step, row.sample_id): checksum(row.tokens_S) for row in given})
        return StepResult(1.0, 1, 1.0, skipped=False)

    lines: list[str] = []
    patch.setattr(MegatronEngine, "train_step", train_step)
    patch.setattr("moba_train.train.console.ConsoleLogger.line", lambda self, text: lines.append(text))
    assert run_train(config, resume="auto") == 0
    return rows, "\n".join(lines)


def test_ranks_that_are_sound_pass(told: list[Told], workspace: Path) -> None:
    for of_rank in told:
        assert re.fullmatch(r"preflight: 9 checks passed in \d+\.\d\d s", of_rank.sound[0])
    assert not list(workspace.rglob(".preflight*")), "nothing is left behind"


def test_all_that_is_wrong_on_any_rank_stands_in_one_table_on_all(told: list[Told]) -> None:
    text = told[0].broken
    assert told[1].broken == text
    assert text.startswith("5 of 9 preflight checks failed\n")
    assert re.search(r"versions: torch differs.* rank 1 .* 2\.5\.0 .*as rank 0", text)
    assert re.search(r"versions: configuration differs.* rank 1 ", text)
    assert re.search(r"memory: not enough memory .* rank 1, .*1\.0 MiB", text)
    assert re.search(r"data: tokenizer not found .* rank 1, ", text)
    assert re.search(r"shared storage: rank 0 does .* rank 1, ", text)
    assert re.search(r"collectives: the dp group .* rank 0 .* 2 ranks .* 1, rank 0", text)
    assert re.search(r"collectives: the dp group .* rank 1 .* 2 ranks .* 1, rank 1", text)
    assert "passed: devices, disk, run folder, clocks" in text


def test_ranks_that_run_other_code_do_not_try_exchanges_with_one_another(told: list[Told]) -> None:
    for of_rank in told:
        assert re.search(r"versions: code differs.* rank 1 .* 0123456789ab", of_rank.other_code)
        assert of_rank.other_code.count("not checked: ") == 2


def test_a_run_of_several_ranks_begins_with_the_preflight(told: list[Told]) -> None:
    assert told[0].log.startswith("preflight: 9 checks passed in ")


def test_the_size_that_is_asked_of_the_disk_is_that_of_a_checkpoint(told: list[Told], workspace: Path) -> None:
    path = list_checkpoints(workspace / "run")[-1]
    size = sum(file.stat().st_size for file in path.iterdir())
    config = load_config(workspace / "c.toml")
    assert size == pytest.approx(needs_of(config, ParallelConfig(dp=2), "cpu").checkpoint, rel=0.1)


def shown(run: Path, *words: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["data", "show", str(run), *words]) == 0
    return capsys.readouterr().out


def test_data_show_prints_the_rows_that_the_engine_was_given(
    told: list[Told], workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = {**told[0].rows, **told[1].rows}
    assert len(trained) == len(told[0].rows) + len(told[1].rows) == 16 and not {*told[0].rows} & {*told[1].rows}
    for step, stage in STEPS.items():
        out = shown(workspace / "run", "--step", str(step), capsys=capsys)
        found = re.findall(r"^row (\d+): source .* checksum ([0-9a-f]{8})$", out, re.MULTILINE)
        assert {(step, int(row)): digest for row, digest in found} == {
            (at, row): digest for (at, row), digest in trained.items() if at == step
        }
        assert f"{stage!r}" in out.splitlines()[0] and "note:" not in out


def test_preflight_alone_shows_a_table_and_what_it_did_not_check(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["preflight", str(workspace / "c.toml"), "--run-dir", str(workspace / "new" / "run")]
    assert cli.main([*words, "--parallel.cp", "2"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^data +ok +tokenizer, 2 source", out, re.MULTILINE)
    assert "torchrun --nproc-per-node 2 -m moba_train preflight" in out
    assert cli.main(words) == 0
    assert "preflight: 9 checks passed" in capsys.readouterr().out
    assert not (workspace / "new").exists()


def test_a_preflight_that_fails_ends_with_code_2_and_the_table(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "preflight",
        str(workspace / "c.toml"),
        "--run-dir",
        "/proc/nowhere/run",
        "--data.tokenizer",
        "/no/t.model",
    ]
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("moba-train: error: 3 of 9 preflight checks failed\nwhat ")
    assert "run folder: cannot write there" in err and "data: tokenizer not found" in err


def test_data_of_another_vocabulary_is_a_row_of_the_table(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_indexed(workspace / "other", [[1, 2, 600]], vocab_size=700)
    words = ["preflight", str(workspace / "c.toml"), "--run-dir", str(workspace / "none")]
    assert cli.main([*words, "--data.sources.text.path", str(workspace / "other")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("moba-train: error: 1 of 9 preflight checks failed\n")
    assert re.search(r"^data: the data holds ids that .*data\.sources\.text\.path", err, re.MULTILINE), err


def test_weights_to_begin_with_that_are_missing_or_of_another_model_are_rows_of_the_table(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["preflight", str(workspace / "c.toml"), "--run-dir", str(workspace / "none"), "--model.init-from"]
    assert cli.main([*words, str(workspace / "nowhere")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    weights = workspace / "weights"
    weights.mkdir()
    model = load_config(workspace / "c.toml", []).model
    (weights / "state.json").write_text(json.dumps(weights_state(replace(model, num_layers=7), [], {})))
    assert cli.main([*words, str(weights)]) == 2
    err = capsys.readouterr().err
    assert "data: the weights belong to" in err and "model.num_layers = 2 in this" in err, err
    (weights / "state.json").write_text(json.dumps(weights_state(model, [], {})))
    assert cli.main([*words, str(weights)]) == 0


def test_a_run_of_one_process_fails_its_preflight_before_weights_are_built(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(*_: object) -> None:
        raise AssertionError("weights were built")

    monkeypatch.setattr("moba_train.commands.train.build_engine", build)
    monkeypatch.setattr(preflight_facts, "free_host_memory", lambda: 1 << 20)
    run = workspace / "poor"
    assert cli.main(["train", str(workspace / "c.toml"), "--run-dir", str(run)]) == 2
    assert "memory: not enough memory for the plan" in capsys.readouterr().err
    assert not run.exists()


def test_how_an_earlier_job_ended_is_forgotten_as_soon_as_another_one_holds_the_run(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scripts decide by outcome.json whether a job goes on; one that fails must not leave another one's."""

    def build(*_: object, **__: object) -> None:
        raise CheckpointError("something that the user can mend")

    monkeypatch.setattr("moba_train.commands.train.build_engine", build)
    run = workspace / "again"
    run.mkdir()
    (run / "outcome.json").write_text('{"finished": true}')
    assert cli.main(["train", str(workspace / "c.toml"), "--run-dir", str(run)]) == 2
    assert "something that the user can mend" in capsys.readouterr().err
    assert not (run / "outcome.json").exists()
