"""`moba-train checkpoint ls | verify | prune`, on checkpoints whose tensors are of no interest."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from moba_train.cli import main
from moba_train.commands import checkpoint as commands
from moba_train.config.schema import StageConfig
from moba_train.train.manifest import OnBytes, damages, seal_files, write_manifest
from moba_train.train.progress import Progress, rows_fingerprint


def checkpoint(run_dir: Path, step: int, *, stage_end: bool = False) -> Path:
    """A folder that is a checkpoint to everything but PyTorch."""
    path = run_dir / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(bytes(1000))
    state = {
        **asdict(Progress(step, 0, step, 1000 * step)),
        "stage_end": stage_end,
        "stage_rows": rows_fingerprint(StageConfig(name="warm\x1b[31mup"), {}),
        "model": {},
        "tokenizer": "ab",
        "seed": 1,
        "mesh": {"tp": 1, "cp": 2, "pp": 1, "dp": 4},
        "engine": "deepspeed",
    }
    (path / "state.json").write_text(json.dumps(state))
    write_manifest(path, seal_files(path.iterdir()))
    (run_dir / "checkpoints" / "latest").write_text(path.name + "\n")
    return path


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Steps 2 (end of a stage), 4, 6 and 8."""
    for step in (2, 4, 6, 8):
        checkpoint(tmp_path / "run", step, stage_end=step == 2)
    return tmp_path / "run"


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir())


def test_ls_shows_what_is_there_and_what_is_wrong(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_dir / "checkpoints"
    (folder / "step_00000006" / "__0_0.distcp").write_bytes(bytes(999))
    shutil.rmtree(folder / "step_00000004")
    shutil.copytree(folder / "step_00000008", folder / "step_00000009.abandoned")
    (folder / "step_00000010.tmp").mkdir()
    assert main(["checkpoint", "ls", str(run_dir)]) == 0
    head, *rows, told = capsys.readouterr().out.splitlines()
    assert head.split() == ["checkpoint", "step", "stage", "tokens", "size", "mesh", "engine", "written", "files"]
    assert rows[0].startswith("step_00000002               2  warm?[31mup (end)   2,000  1.")
    assert rows[0].split()[-9:-4] == ["tp1", "cp2", "pp1", "dp4", "deepspeed"] and rows[0].endswith("all there")
    assert rows[1].endswith("__0_0.distcp has 999 bytes instead of 1000")
    assert rows[2].startswith("step_00000008 <- latest") and rows[3].startswith("step_00000009.abandoned")
    assert rows[4].startswith("step_00000010.tmp") and "cut short" in rows[4] and "verify" in told


def test_ls_of_a_run_without_checkpoints_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "ls", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no checkpoint in {tmp_path}/checkpoints\n"
    assert main(["checkpoint", "ls", str(tmp_path / "none")]) == 2


def test_verify_compares_contents_and_ends_with_2_on_damage(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run_dir / "checkpoints" / "step_00000004" / "__0_0.distcp"
    file.write_bytes(b"\1" + bytes(999))
    (file.parent / "state.json").unlink()
    assert main(["checkpoint", "verify", str(run_dir)]) == 0
    assert capsys.readouterr().out.startswith("step_00000008: whole, 2 files, 1.")
    assert main(["checkpoint", "verify", str(run_dir), "4"]) == 2
    assert main(["checkpoint", "verify", str(run_dir), "--all"]) == 2
    out, err = capsys.readouterr()
    assert "step_00000004: DAMAGED: state.json is missing\n" in out
    assert "step_00000004: DAMAGED: __0_0.distcp has the right size but another SHA-256\n" in out
    assert "step_00000002: whole" in out and "1 of 4 checkpoints are damaged" in err
    assert main(["checkpoint", "verify", str(run_dir), "5"]) == 2


def test_a_checkpoint_that_the_job_deletes_while_it_is_verified_is_not_called_damaged(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(folder: Path, *, on_bytes: OnBytes | None = None) -> Iterator[str]:
        if folder.name == "step_00000004":
            shutil.rmtree(folder)
        return damages(folder, on_bytes=on_bytes)

    monkeypatch.setattr(commands, "damages", slow)
    assert main(["checkpoint", "verify", str(run_dir), "--all"]) == 0
    assert "step_00000004: deleted meanwhile" in capsys.readouterr().out


def test_prune_keeps_the_newest_the_multiples_and_the_ends_of_stages(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "checkpoints" / "step_00000010.tmp").mkdir()
    prune = ["checkpoint", "prune", str(run_dir), "--keep-last", "1"]
    before = names(run_dir)
    assert main([*prune, "--dry-run"]) == 0 and names(run_dir) == before
    assert capsys.readouterr().out.count("would delete") == 3
    assert main([*prune, "--keep-every", "3"]) == 0
    assert names(run_dir) == ["step_00000002", "step_00000006", "step_00000008"]
    assert main([*prune, "--stage-ends"]) == 0 and names(run_dir) == ["step_00000008"]


def test_prune_keeps_what_the_run_itself_keeps_for_ever(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "config.toml").write_text("[checkpoint]\nkeep_every = 3\n")
    assert main(["checkpoint", "prune", str(run_dir), "--keep-last", "1"]) == 0
    assert names(run_dir) == ["step_00000002", "step_00000006", "step_00000008"]
    assert "multiples of 3 steps are kept" in capsys.readouterr().out
    assert main(["checkpoint", "prune", str(run_dir), "--keep-last", "1", "--keep-every", "1000"]) == 0
    assert names(run_dir) == ["step_00000002", "step_00000008"]


def test_prune_never_deletes_the_newest_whole_checkpoint(run_dir: Path) -> None:
    for step in (6, 8):
        (run_dir / "checkpoints" / f"step_{step:08d}" / "__0_0.distcp").write_bytes(b"\1" + bytes(999))
    assert main(["checkpoint", "prune", str(run_dir), "--keep-last", "1", "--stage-ends"]) == 0
    assert names(run_dir) == ["step_00000004", "step_00000008"]


def test_prune_is_refused_while_a_job_holds_the_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run_dir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["checkpoint", "prune", str(run_dir), "--keep-last", "1"]) == 2
    assert "another job is writing to the run folder" in capsys.readouterr().err and len(names(run_dir)) == 4


def test_these_commands_answer_without_torch(run_dir: Path) -> None:
    program = (
        "import sys; from moba_train.cli import main; main(sys.argv[1:]); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'megatron')))"
    )
    for words in (["ls"], ["verify"], ["prune", "--keep-last", "1"]):
        command = [sys.executable, "-c", program, "checkpoint", words[0], str(run_dir), *words[1:]]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0
