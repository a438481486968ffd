"""The command line: exit codes, messages, and what each sub-command prints."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from moba_train import __version__, cli
from moba_train.errors import ConfigError

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "configs" / "smoke.toml")


def run_cli(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The program as a user starts it, in a process of its own."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-m", "moba_train", *words],
        env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "100", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_plan_prints_the_plan_and_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", SMOKE, "--parallel.cp", "2", "--run-dir", "runs/elsewhere"]) == 0
    out = capsys.readouterr().out
    assert "tp 1 x cp 2 x pp 1 x dp auto (2 ranks per replica)" in out
    assert "runs/elsewhere" in out
    assert "L0 MoBA 16/3, L1 full" in out


def test_a_mistake_prints_one_message_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", SMOKE, "--stages.0.topk", "0", "--run.log-every", "0"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("moba-train: error: 2 errors in the configuration\n1. log_every must be at least 1")
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_adds_the_traceback(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "no-such-file.toml"]
    assert cli.main(["--debug", *words] if place == "before" else [*words, "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert "moba-train: error: the configuration file does not exist" in err


def test_a_fault_of_the_program_is_not_called_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: argparse.Namespace, overrides: list[str]) -> int:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(cli, "_run", broken)
    with pytest.raises(ZeroDivisionError):  # Python prints the traceback and exits with 1
        cli.main(["plan", SMOKE])


def test_an_interrupt_exits_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(args: argparse.Namespace, overrides: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert cli.main(["plan", SMOKE]) == 1
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_one_rank_of_several_ends_at_once_because_the_others_may_not_answer(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise error

    def ended(code: int) -> NoReturn:
        raise SystemExit(f"at once with {code}")

    monkeypatch.setattr(cli, "_run", broken)
    monkeypatch.setattr(cli.os, "_exit", ended)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="at once with 1"):
        cli.main(["plan", SMOKE])


def test_another_rank_waits_before_it_repeats_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    assert cli.main(["plan", "no-such-file.toml"]) == 2
    assert waited and waited[0] > 1.0
    assert capsys.readouterr().err.startswith("moba-train (rank 3): error: ")
    waited.clear()
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["plan", "no-such-file.toml"]) == 2
    assert waited == []


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["pln", SMOKE],
        ["plan"],
        ["prep"],
        ["prep", "--out", "x", "--needles", "128"],
        ["prep", "--out", "x", "--tokenizer", "t.model", "--vocab-size", "4096"],
        ["eval"],
        ["eval", "niah"],
        ["eval", "niah", "run", "--attentions", "sparse"],
    ],
)
def test_a_wrong_command_line_exits_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert "usage: moba-train" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["report", "run", "--parallel.cp", "2"], ["prep", "--out", "x", "--vocab=2", "--seeds=1"]]
)
def test_options_that_a_command_does_not_have_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert f"unknown option\n  where:   command line\n  got:     {' '.join(words[-2:])}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        *([*command.split(), "-h"] for command in ("prep", "train", "eval niah", "plan", "report", "preflight")),
        *([*command.split(), "-h"] for command in ("checkpoint ls", "checkpoint verify", "checkpoint prune")),
        *([*command.split(), "-h"] for command in ("data show", "slurm submit", "convert from-hf", "convert to-hf")),
    ],
)
def test_every_command_has_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 0
    assert "usage: moba-train" in capsys.readouterr().out


def test_help_config_lists_every_key_with_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", SMOKE, "--help-config"])
    assert not caught.value.code
    out = capsys.readouterr().out
    assert "--stages.1.rope.base FLOAT" in out
    assert "Context-parallel ranks" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"moba-train {__version__}\n"


def test_needles_are_read_as_length_and_samples() -> None:
    assert cli.parse_needles("128:4000,256:2000") == {128: 4000, 256: 2000}
    for text in ("128", "128:", "a:1", "0:5", "128:-1"):
        with pytest.raises(argparse.ArgumentTypeError):
            cli.parse_needles(text)


def test_a_folder_without_a_checkpoint_cannot_be_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "niah", str(tmp_path)]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_a_folder_without_a_run_has_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_training_without_data_names_every_missing_file_and_says_how_to_get_them(tmp_path: Path) -> None:
    config = tmp_path / "smoke.toml"
    config.write_text(Path(SMOKE).read_text("utf-8").replace("data/smoke", str(tmp_path / "data")))
    done = run_cli("train", str(config), "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 2
    assert done.stderr.startswith("moba-train: error: 4 errors in the files that the run needs\n1. tokenizer not found")
    keys = ("data.tokenizer", "data.sources.text.path", "data.sources.needle_64.path", "data.valid.path")
    assert [key for key in keys if f"where:   {key}: {tmp_path}" in done.stderr] == list(keys)
    assert "moba-train prep" in done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert not (tmp_path / "run").exists(), "a run that did not begin leaves nothing behind"


def test_resume_from_nothing_at_all_is_a_wrong_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", SMOKE, "--resume", ""])
    assert caught.value.code == 2
    assert "give auto, never, or the path" in capsys.readouterr().err


def test_ranks_that_do_not_fit_the_mesh_are_a_mistake_and_not_a_crash(tmp_path: Path) -> None:
    done = run_cli("train", SMOKE, "--run-dir", str(tmp_path / "run"), "--parallel.cp", "2")
    assert done.returncode == 2
    assert "the number of ranks does not fit" in done.stderr
    assert "torchrun --nproc-per-node 2" in done.stderr
    assert "Traceback" not in done.stderr


def test_output_may_be_cut_off_by_its_reader() -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    program = subprocess.Popen(
        [sys.executable, "-m", "moba_train", "plan", SMOKE, "--help-config"],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None and program.stderr is not None
    program.stdout.close()
    err = program.stderr.read()
    program.stderr.close()
    assert program.wait(timeout=60) == 1
    assert "Traceback" not in err


def test_all_messages_are_kept_when_errors_travel_between_ranks() -> None:
    import pickle

    from moba_train.errors import ConfigErrors

    errors = ConfigErrors([ConfigError("a is wrong", where="a", got=1), ConfigError("b is wrong", fix="mend b")])
    assert pickle.loads(pickle.dumps(errors)).message() == errors.message()
