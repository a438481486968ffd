"""Where the compiled kernel comes from: this machine's compiler, once, into a folder that is the user's alone."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moba_kernels import Full, attend, native

from . import native_threads
from .native_threads import threads_of

COMPILER = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), "")

pytestmark = pytest.mark.skipif(not COMPILER, reason="no C compiler here")


@pytest.fixture
def build(monkeypatch, tmp_path):
    """`library`, asked anew, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(native, "FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in native.FLAGS))  # soon made
    return native.library.__wrapped__


@pytest.fixture
def commands(monkeypatch):
    """What was run to compile; asking for macros aside."""
    seen = []
    real = native._run
    monkeypatch.setattr(native, "_run", lambda command: (seen.append(command), real(command))[1])
    return lambda: [command for command in seen if "-E" not in command]


def test_it_is_compiled_once_and_then_found(build, commands, tmp_path):
    build()
    (kept,) = (tmp_path / "moba_kernels").iterdir()
    assert kept.suffix == ".so" and kept.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "moba_kernels").stat().st_mode & 0o777 == 0o700
    build()
    assert len(commands()) == 1
    assert list((tmp_path / "moba_kernels").iterdir()) == [kept]


def test_other_instructions_have_a_library_of_their_own(build, monkeypatch, tmp_path):
    build()
    monkeypatch.setenv("CC", f"{COMPILER} -DOTHER=1")
    build()
    assert len(list((tmp_path / "moba_kernels").iterdir())) == 2


@pytest.mark.parametrize("spoiled", ["folder", "library"])
def test_what_others_can_write_to_is_never_loaded(build, commands, tmp_path, spoiled):
    build()
    folder = tmp_path / "moba_kernels"
    (kept,) = folder.iterdir()
    (folder if spoiled == "folder" else kept).chmod(0o777)
    build()
    assert len(commands()) == 2  # made again, in a folder that is gone at once, or in its place
    assert spoiled == "folder" or kept.stat().st_mode & 0o777 == 0o700


def test_without_a_folder_to_keep_it_in_it_is_made_for_this_process(build, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build().moba_attend


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("", "no C compiler was found; install gcc or clang, or name one in CC"),
        ("false", "false does not run: exit code 1"),
        ('cc "-O', "No closing quotation"),
        (f"{COMPILER} -Dmoba_attend=0", "could not compile the kernels"),
    ],
)
def test_why_there_is_none_is_said_once_and_pytorch_takes_its_place(build, compiler, reason, monkeypatch, caplog):
    monkeypatch.setenv("CC", compiler)
    if not compiler:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(native, "library", build)
    available = native.available.__wrapped__
    with caplog.at_level(logging.WARNING):
        assert not available()
    (line,) = caplog.messages
    assert reason in line and line.startswith("attention on CPU runs without its compiled kernels")
    monkeypatch.setattr(native, "available", lambda: False)
    q = torch.randn(8, 1, 4)
    assert attend(q, q, q, Full()).report.backend == "torch"


AGAINST_FP64 = """
import torch
from moba_kernels import Full, MoBA, Pack, Routing, attend, native, route

assert native.available()
for spec in (Full(), MoBA(8, 3)):
    x = [torch.randn(90, heads, dim, dtype=torch.float64) for heads, dim in ((4, 40), (2, 40), (2, 72))]
    dout, found = torch.randn(90, 4, 72, dtype=torch.float64), []
    routing = route(x[0], x[1], spec) if isinstance(spec, MoBA) else None
    for dtype in (torch.float64, torch.float32):
        leaves = [y.to(dtype).requires_grad_() for y in x]
        out = attend(*leaves, spec, routing=routing, backend="torch").out
        found.append((out, *torch.autograd.grad(out, leaves, dout.to(dtype))))
    for exact, got in zip(*found):
        assert (got - exact).abs().max() < 1e-5

# Scores of small integers are exact, and tie.
q, k = (torch.randint(-2, 3, (300, heads, 24)).float() for heads in (4, 2))
for spec in (MoBA(4, 4), MoBA(4, 50), MoBA(4, 20, "group")):
    assert route(q, k, spec).equals(route(q.double(), k.double(), spec))

# A list of one row, then of two, against a last panel of one vector.
for size in (8, 24, 100):
    pack, spec, t = Pack([0, 4 * size]), MoBA(size, 3), 2 * size
    x = [torch.randn(4 * size, 1, 64) for _ in range(3)]
    picks = torch.full((4 * size, 1, 2), -1)
    picks[t, 0, 0] = 0
    alone = attend(*x, spec, cu_seqlens=pack, routing=Routing(picks.clone(), spec, pack)).out[t]
    picks[t + 5, 0, 0] = 0
    assert torch.equal(alone, attend(*x, spec, cu_seqlens=pack, routing=Routing(picks, spec, pack)).out[t])
print("equal")
"""


def test_what_is_no_library_is_made_again(build, commands, monkeypatch, tmp_path):
    build()
    (kept,) = (tmp_path / "moba_kernels").iterdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))  # a process finds what it has loaded by its path
    spoiled = tmp_path / "other" / "moba_kernels" / kept.name
    spoiled.parent.mkdir(parents=True, mode=0o700)
    spoiled.write_text("no library")
    spoiled.chmod(0o700)
    assert build().moba_attend and len(commands()) == 2
    assert spoiled.read_bytes() == kept.read_bytes()


def test_a_rank_that_is_ready_later_leaves_the_library_that_others_run(build, monkeypatch, tmp_path):
    build()
    (kept,) = (tmp_path / "moba_kernels").iterdir()
    before, answers = kept.stat().st_ino, iter([True, False, True])  # the folder, not yet there, there
    monkeypatch.setattr(native, "_is_ours", lambda path: next(answers))
    build()
    assert kept.stat().st_ino == before


def test_work_runs_on_the_threads_that_pytorch_keeps_and_leaves_them_in_place(build):
    library = build()
    first = threads_of(library, 4)
    assert len(first) == 4 and threading.get_native_id() in first
    if hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        for parts in (1, 2, 3):  # a team of fewer would end the others
            native_threads.run(library, 4, parts, lambda _: None)
        assert threads_of(library, 4) == first


@pytest.mark.parametrize("words", [(), ("fork",)], ids=["without torch", "in a fork"])
def test_work_runs_on_threads_of_its_own_where_pytorch_has_none(build, tmp_path, words):
    build()
    (kept,) = (tmp_path / "moba_kernels").iterdir()
    command = [sys.executable, native_threads.__file__, str(kept), "3", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stdout == "3\n", done.stderr


def test_tensors_without_memory_are_not_served():
    with FakeTensorMode():
        assert not native.serves(torch.empty(2, 1, 4))


@pytest.mark.parametrize("flags", ["-mno-avx512f", "-mno-avx512f -mtune=znver3", "-mno-avx512f -mno-avx2"])
def test_narrower_vectors_give_the_same_numbers(flags, tmp_path):
    """What machines with other instructions compile."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "avx" not in cpuinfo.read_text():
        pytest.skip("these flags are for x86")
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "CC": f"{COMPILER} {flags}",
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": str(root / "kernels"),
    }
    done = subprocess.run(
        [sys.executable, "-c", AGAINST_FP64], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.stdout == "equal\n", done.stderr
