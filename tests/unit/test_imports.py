"""The import rule, and what must not be imported until it is needed."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    "module",
    [
        *("moba_train.cli", "moba_train.config.load", "moba_train.model.plan", "moba_train.plan_view"),
        *("moba_train.report", "moba_train.train.schedule", "moba_train.train.flops"),
        *("moba_kernels", "moba_kernels.spec", "moba_train.model.hf.export", "moba_train.model.hf.names"),
    ],
)
def test_a_pure_module_imports_no_torch(module: str) -> None:
    done = python(f"import sys, {module}\nprint([m for m in ('torch', 'megatron', 'triton') if m in sys.modules])")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_rank_that_trains_on_the_cpu_imports_nothing_that_draws_or_compiles_and_no_other_engine() -> None:
    unwanted = ("matplotlib", "deepspeed", "transformers", "tokenizers", "torch._dynamo", "torch._inductor")
    found = f"[m for m in {unwanted} if m in sys.modules]"
    done = python(f"import sys, moba_train.commands.train\nprint({found})")
    assert done.stdout == "[]\n", done.stderr


def test_plan_runs_without_torch_and_at_once() -> None:
    code = (
        "import sys; from moba_train.cli import main\n"
        f"code = main(['plan', {str(ROOT / 'configs' / 'llama_8b_1m.toml')!r}, '--parallel.cp', '8'])\n"
        "print(code, 'torch' in sys.modules)"
    )
    python(code)  # the first run compiles bytecode
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = python(code)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.endswith("\n0 False\n"), done.stderr
    # processor time: the same on a busy machine as on an idle one
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


def test_the_import_rule_is_kept() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
            "--no-cache",
        ],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 broken." in done.stdout


@pytest.mark.parametrize(
    ("pattern", "files"),
    [
        (r"\bparallel_state\b", {"moba_train/parallel/topology.py"}),
        (r"^\s*(import|from) deepspeed\b", {"moba_train/engine/deepspeed.py"}),
        (r"^\s*(import|from) tokenizers\b", {"moba_train/data/tokenizer_hf.py"}),
        (r"^\s*(import|from) flash_attn\b", set()),
    ],
)
def test_a_library_s_name_stands_in_one_file(pattern: str, files: set[str]) -> None:
    sources = [*(ROOT / "moba_train").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    found = {
        str(path.relative_to(ROOT))
        for path in sources
        if re.search(pattern, re.sub(r'"""(?s:.*?)"""', "", path.read_text("utf-8")), re.MULTILINE)
    }
    assert found <= files


def test_the_operator_s_functions_are_not_hidden_by_the_folders_of_their_names() -> None:
    code = (
        "import moba_kernels.attend, moba_kernels.route, moba_kernels\n"
        "from moba_kernels import attend, route\n"
        "print(callable(attend), callable(route), moba_kernels.attend is attend)\n"
        "print([name for name in moba_kernels.__all__ if not hasattr(moba_kernels, name)])"
    )
    done = python(code)
    assert done.stdout == "True True True\n[]\n", done.stderr


@pytest.mark.parametrize("constraints", ["constraints-cpu.txt", "constraints-latest.txt"])
def test_whatever_the_project_and_its_tests_ask_for_is_pinned(constraints: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    optional = project["optional-dependencies"]
    asked = [*project["dependencies"], *optional["dev"], *optional["deepspeed"]]
    names = {re.match(r"[\w-]+", requirement).group().lower() for requirement in asked} - {"moba-train"}
    lines = (ROOT / constraints).read_text("utf-8").splitlines()
    pinned = {line.split("==")[0].replace("_", "-").lower() for line in lines if not line.startswith("#")}
    assert names <= pinned
