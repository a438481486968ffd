"""The operator can be installed for itself, and is then the one that comes with the framework."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]


def project(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what pip makes of kernels/, and nothing else."""
    work = tmp_path_factory.mktemp("operator")
    source = work / "kernels"  # a copy: setuptools leaves a folder where it builds
    shutil.copytree(ROOT / "kernels", source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "wheel"]
    subprocess.run([*pip, "--no-index", "--no-deps", "--no-build-isolation", "-w", work, source], check=True)
    (wheel,) = work.glob("moba_kernels-*.whl")
    ZipFile(wheel).extractall(work / "installed")
    return work / "installed"


def test_it_asks_for_what_the_framework_asks_for_and_no_more() -> None:
    operator, framework = project(ROOT / "kernels"), project(ROOT)
    for name in ("version", "requires-python", "license"):
        assert operator[name] == framework[name]
    assert set(operator["dependencies"]) <= set(framework["dependencies"])
    assert {one.split(">")[0] for one in operator["dependencies"]} == {"torch", "numpy"}
    assert operator["optional-dependencies"].items() <= framework["optional-dependencies"].items()


def test_every_file_of_it_is_there_and_none_of_the_framework(installed: Path) -> None:
    def files(folder: Path) -> set[str]:
        kinds = ("*.py", "*.c", "*.h", "py.typed")
        return {str(file.relative_to(folder)) for kind in kinds for file in folder.rglob(kind)}

    assert files(installed / "moba_kernels") == files(ROOT / "kernels/moba_kernels")
    (info,) = installed.glob("*.dist-info")
    assert {entry.name for entry in installed.iterdir()} == {"moba_kernels", info.name}
    assert (info / "licenses/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_it_attends_where_there_is_nothing_else_of_the_project(installed: Path) -> None:
    code = f"""
import sys
sys.path[:] = [{str(installed)!r}, *(path for path in sys.path if {str(ROOT / "kernels")!r} not in path)]
sys.modules.update(dict.fromkeys(("megatron", "triton", "moba_train")))  # None: as if it were not installed
import torch
import moba_kernels
from moba_kernels import MoBA, attend
q, k, v = (torch.randn(90, heads, 16, requires_grad=True) for heads in (4, 2, 2))
result = attend(q, k, v, MoBA(8, 3), cu_seqlens=[0, 20, 90])
result.out.sum().backward()
result.report.raise_if_different()
print(moba_kernels.__file__)
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=installed)
    assert done.stdout.strip() == str(installed / "moba_kernels/__init__.py"), done.stderr
