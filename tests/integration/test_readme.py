"""What the README and the pages say, done literally: shell and Python blocks are run, `make` lines name targets."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPERATOR = ROOT / "kernels/moba_kernels/README.md"
# Pages whose shell blocks go on from the README's; those of slurm.md need a Slurm: tests/slurm.
PAGES = [ROOT / "docs" / name for name in ("resume.md", "failures.md")]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def shell_lines(text: str = README) -> list[list[str]]:
    lines = [line for block in blocks("sh", text) for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture
def workspace(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A folder that looks like a checkout but whose data/ and runs/ are its own, and an environment to run in."""
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    source_roots = [str(ROOT), str(ROOT / "kernels")]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(source_roots), "PATH": path, "OMP_NUM_THREADS": "1"}
    return tmp_path, environment


def run(words: list[str], workspace: tuple[Path, dict[str, str]]) -> str:
    folder, environment = workspace
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # a variable in front of the command
        name, _, value = words[0].partition("=")
        words, environment = words[1:], {**environment, name: value}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{shlex.join(words)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_readme_names_only_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {words[1] for words in shell_lines() if words[0] == "make"}
    named |= set(re.findall(r"`make ([a-z-]+)`", README))
    assert {"demo", "test"} <= named <= targets


def test_links_and_pictures_of_the_readmes_exist() -> None:
    for page in (ROOT / "README.md", OPERATOR):
        links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
        links = [link for link in links if "://" not in link]
        assert links
        assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.timeout(900)
def test_the_commands_of_the_readme_and_the_pages_run_as_written(workspace: tuple[Path, dict[str, str]]) -> None:
    commands = [words for words in shell_lines() if words[0] != "make"]
    assert commands[0][:2] == ["moba-train", "prep"]
    for words in commands:
        printed = run(words, workspace)
        if words[1] == "report":
            assert "report:" in printed
    folder, _ = workspace
    for name in ("metrics.jsonl", "niah.jsonl", "niah.png", "report.html", "config.toml", "checkpoints/latest"):
        assert (folder / "runs/smoke_cp2" / name).stat().st_size > 0, name
    for page in PAGES:
        of_page = shell_lines(page.read_text(encoding="utf-8"))
        assert of_page, page
        for words in of_page:
            run(words, workspace)


def test_the_python_of_the_readme_runs_as_written(workspace: tuple[Path, dict[str, str]]) -> None:
    (block,) = blocks("python")
    assert run([sys.executable, "-c", block], workspace).startswith("torch.Size([1000, 8, 64])")


def test_the_python_of_the_operators_readme_runs_as_written(workspace: tuple[Path, dict[str, str]]) -> None:
    (block,) = blocks("python", OPERATOR.read_text(encoding="utf-8"))
    printed = run([sys.executable, "-c", block], workspace)
    assert printed.split("\n")[:2] == ["torch.Size([1000, 8])", "torch.Size([1000, 8, 3])"]
