"""Kernels in C for the CPU, compiled by this machine's C compiler, once, and kept in the user's cache.

The library's name is a digest of the sources, the flags and the compiler's own macros, which name the instructions that
it may use here: a home directory that different nodes share holds one library for each kind.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import bad_argument

SOURCES = ("attend.c", "gate.c", "threads.c")
HEADERS = ("call.h", "masks.h", "products.h", "rows.h", "threads.h", "vectors.h")
# Without -ffast-math: sums keep the order that they are written in, and NaN stays NaN.
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-pthread")
# "This machine's instructions": compilers for x86 know the first, those for Arm the second.
MACHINE_FLAGS = ("-march=native", "-mcpu=native")
# Tuned for some machines GCC for x86 takes single sums apart again, in tiles of one row alone: their bits would differ.
GCC_X86_FLAGS = ("--param=avoid-fma-max-bits=0",)
TIMEOUT_S = 120.0
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the numbers are those of rows.h


class NativeUnavailable(Exception):
    """There is no library; the message says why, and what to do."""


_logger = logging.getLogger(__name__)


def serves(q_THD: Tensor) -> bool:
    """On CPU, in any dtype but fp64, for tensors that have memory of their own (not fake ones)."""
    plain = type(q_THD) in (Tensor, torch.nn.Parameter)
    return q_THD.device.type == "cpu" and q_THD.dtype in DTYPES and plain and available()


@cache
def available() -> bool:
    """Are there compiled kernels? If not, a warning says why, once: PyTorch's own operations take their place."""
    try:
        library()
    except (NativeUnavailable, OSError, ValueError) as error:  # no place for the library; $CC that is no command
        _logger.warning("attention on CPU runs without its compiled kernels, at about half the speed: %s", error)
        return False
    return True


class Rows(ctypes.Structure):
    """A tensor [tokens, heads, dim]: rows.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("token", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    )


class Arguments:
    """A structure as a kernel takes it; holds on to what it points to."""

    def __init__(self, to: Any) -> None:
        self.to = to
        self._held: list[object] = []

    def rows(self, name: str, x: Tensor) -> None:
        """[tokens, heads, dim], read where it lies if its last dim is dense."""
        x = x.resolve_neg()  # the sign of a view (c.conj().imag) is no part of its memory
        x = x if x.stride(-1) == 1 else x.contiguous()
        setattr(self.to, name, Rows(self._address(x), x.stride(0), x.stride(1), DTYPES[x.dtype]))

    def tensor(self, name: str, x: Tensor) -> None:
        """A contiguous tensor."""
        assert x.is_contiguous()
        setattr(self.to, name, self._address(x))

    def picks(self, x: Tensor) -> None:
        """[tokens, heads, picks], read where they lie if the last dim is dense: some heads of a routing, say."""
        x = x if x.stride(-1) == 1 else x.contiguous()
        self.sizes(picks_token=x.stride(0), picks_head=x.stride(1))
        self.to.picks = self._address(x)

    def _address(self, x: Tensor) -> int:
        """Where its data lies; raises ValueError where there is none: a fake or distributed tensor, a freed storage."""
        self._held.append(x)
        address = x.data_ptr()
        if not address and x.numel():
            got, fix = f"{type(x).__name__} {tuple(x.shape)}", "pass plain tensors, DTensor.to_local() say"
            raise bad_argument("kernels on the CPU need tensors with memory of their own", got, fix)
        return address

    def array(self, name: str, x: npt.NDArray[Any], dtype: type = np.int64) -> None:
        x = np.ascontiguousarray(x, dtype=dtype)
        self._held.append(x)
        setattr(self.to, name, x.ctypes.data)

    def sizes(self, **values: int) -> None:
        for name, value in values.items():
            setattr(self.to, name, value)

    def run(self, function: str, *flags: int) -> None:
        """Raises MemoryError."""
        if library()[function](ctypes.byref(self.to), *flags):
            raise MemoryError(f"on CPU: no memory for what the threads of {function} work in")


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels, from the cache or made now (2 to 3 s). Raises NativeUnavailable."""
    if platform.system() == "Windows":
        raise NativeUnavailable("the kernels need POSIX threads, which Windows does not have")
    compiler = _compiler()
    machine, macros = _machine(compiler)
    folder = Path(__file__).parent
    digest = hashlib.sha256(macros + repr((compiler, machine, FLAGS, platform.libc_ver())).encode())
    for name in (*SOURCES, *HEADERS):
        digest.update((folder / name).read_bytes())
    name = f"kernels-{digest.hexdigest()[:32]}.so"
    try:
        kept = _cache_folder() / name
        if _is_ours(kept):
            try:
                return ctypes.CDLL(str(kept))
            except OSError:  # no library at all, or one for another system
                kept.unlink()
        return _made(compiler, machine, folder, kept)
    except (OSError, RuntimeError) as error:  # no home directory that can be written to: for this process only
        with tempfile.TemporaryDirectory(prefix="moba_kernels-", ignore_cleanup_errors=True) as own:
            _logger.info("the compiled kernels are not kept: %s", error)
            return _made(compiler, machine, folder, Path(own) / name)


def _compiler() -> tuple[str, ...]:
    """$CC, or the first of cc, gcc and clang."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        words = shlex.split(name)
        if words and (path := shutil.which(words[0])):
            return (path, *words[1:])
    raise NativeUnavailable("no C compiler was found; install gcc or clang, or name one in CC")


def _machine(compiler: tuple[str, ...]) -> tuple[tuple[str, ...], bytes]:
    """(the flags for this machine's instructions, as far as the compiler has them; the macros that it defines then)."""
    for flags in (*((flag,) for flag in MACHINE_FLAGS), ()):
        done = _run([*compiler, *flags, "-dM", "-E", "-x", "c", os.devnull])
        if done.returncode == 0:
            gcc_x86 = b"__x86_64__" in done.stdout and b"__clang__" not in done.stdout
            return (*flags, *(GCC_X86_FLAGS if gcc_x86 else ())), done.stdout
    raise NativeUnavailable(f"{compiler[0]} does not run: {_told(done)}")


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, capture_output=True, check=False, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{command[0]} does not run: {error}") from None


def _told(done: subprocess.CompletedProcess[bytes]) -> str:
    return done.stderr.decode(errors="replace").strip()[-500:] or f"exit code {done.returncode}"


def _cache_folder() -> Path:
    """A folder that nobody else can write to. Raises OSError, or RuntimeError where there is no home directory."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moba_kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = folder.resolve()
    if not _is_ours(folder) or not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} can be written to by others, or not by this user")
    return folder


def _is_ours(path: Path) -> bool:
    """Code is loaded from it: it exists, and this user alone can change it."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _made(compiler: tuple[str, ...], machine: tuple[str, ...], folder: Path, to: Path) -> ctypes.CDLL:
    """Compiled aside, so that ranks which begin together never see halves; the first one to be ready stays, since
    others may run it. Raises OSError where `to` cannot be written or loaded.
    """
    handle, aside = tempfile.mkstemp(prefix=".making-", suffix=".so", dir=to.parent)
    os.close(handle)
    try:
        sources = (str(folder / name) for name in SOURCES)
        done = _run([*compiler, *FLAGS, *machine, "-o", aside, *sources, "-lm", "-ldl"])
        if done.returncode:
            raise NativeUnavailable(f"{compiler[0]} could not compile the kernels: {_told(done)}")
        os.chmod(aside, 0o700)
        if not _is_ours(to):
            os.replace(aside, to)
    finally:
        Path(aside).unlink(missing_ok=True)
    return ctypes.CDLL(str(to))
