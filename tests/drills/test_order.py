"""The order of a save as the kernel sees it: everything is on the disk before anything is renamed to mean it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.drills.runs import Drill

CALLS = "openat,write,pwrite64,writev,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir"


@dataclass(frozen=True)
class Call:
    """A system call that succeeded, with the path that it is about (and a second one for a rename)."""

    name: str
    path: str
    to: str = ""


def traced(drill: Drill) -> list[Call]:
    """The calls of a run that goes on for one save, in the order in which they were done."""
    assert shutil.which("strace"), "strace is needed: apt-get install strace"
    out = drill.folder / "strace.txt"
    pid = drill.nursery.start(job := drill.job(stop_after_steps=2, waits=True))
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)
    words = ["strace", "-f", "-y", "-s", "0", "-e", f"trace={CALLS}", "-o", str(out), "-p", str(pid)]
    tracer = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    line = tracer.stderr.readline()
    if "attached" not in line:
        tracer.kill()
        os.kill(pid, signal.SIGKILL)
        pytest.fail(f"strace cannot attach: {line}; it needs the permission to trace (CAP_SYS_PTRACE)")
    os.kill(pid, signal.SIGCONT)
    ending = drill.nursery.wait(pid)
    tracer.communicate(timeout=60)
    assert ending.code == 0, f"{job}: {ending.log}"
    return parsed(out.read_text())


def parsed(text: str) -> list[Call]:
    """strace's lines as calls; a call that another thread interrupted counts where it ended."""
    begun: dict[str, str] = {}
    calls = []
    for line in text.splitlines():
        thread, _, rest = line.partition(" ")
        rest = rest.strip()
        if rest.endswith("<unfinished ...>"):
            begun[thread] = rest.removesuffix("<unfinished ...>").rstrip()
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>(.*)", rest):
            rest = begun.pop(thread, "") + resumed[1]
        if (found := re.match(r"(\w+)\((.*)\)\s+= (-?\d+)(?:<(.*)>)?$", rest)) and not found[3].startswith("-"):
            calls.append(_call(found[1], found[2], found[4] or ""))
    return calls


def _call(name: str, arguments: str, result: str) -> Call:
    texts = re.findall(r'"([^"]*)"', arguments)
    folders = re.findall(r"<([^>]*)>", arguments)
    if name == "openat":
        is_written = re.search(r"O_WRONLY|O_RDWR|O_CREAT", arguments)
        return Call("open" if is_written else "read", result)
    if name in ("fsync", "fdatasync", "write", "pwrite64", "writev"):
        return Call("fsync" if "sync" in name else "write", folders[0])
    paths = [text if text.startswith("/") else os.path.join(folders[0] if folders else "", text) for text in texts]
    kind = "rename" if name.startswith("rename") else "unlink" if name in ("unlink", "unlinkat", "rmdir") else name
    return Call(kind, *paths[:2])


@pytest.fixture
def calls(drill: Drill) -> list[Call]:
    """Paths below the run folder, relative to it."""
    root = f"{drill.run_dir}/"
    found = [call for call in traced(drill) if f"{call.path}/".startswith(root)]
    return [Call(c.name, c.path.removeprefix(root), c.to.removeprefix(root)) for c in found]


def test_a_checkpoint_is_on_the_disk_before_it_is_named_and_named_before_the_one_before_goes(calls: list[Call]) -> None:
    folder, pointer = "checkpoints/step_00000006", "checkpoints/latest"
    aside = folder + ".tmp"

    def only(call: Call) -> int:
        assert calls.count(call) == 1, f"{call}: {calls.count(call)} times"
        return calls.index(call)

    def first(call: Call, after: int) -> int:
        return calls.index(call, after)

    published = only(Call("rename", aside, folder))
    moved = only(Call("rename", pointer + ".tmp", pointer))

    # 1. every file of the folder is flushed after its last write, and before the folder gets its name
    known_as = {call.path: call.to for call in calls if call.name == "rename" and call.path.startswith(aside + "/")}
    inside = [(i, c.name, known_as.get(c.path, c.path)) for i, c in enumerate(calls) if c.path.startswith(aside + "/")]
    names = {path for _, name, path in inside if name == "open"}
    assert len(names) >= 7, names
    for path in names:
        written = max(i for i, name, of in inside if of == path and name in ("open", "write"))
        assert any(written < i < published for i, name, of in inside if of == path and name == "fsync"), path

    # 2. the manifest comes last; then the folder's own entries are flushed
    made = [i for i, name, _ in inside if name in ("open", "rename")]
    assert max(made) == calls.index(Call("open", aside + "/manifest.json"))
    assert first(Call("fsync", aside), max(made)) < published

    # 3. the name is flushed before the pointer is written, the pointer before it moves, the move before anything goes
    named = first(Call("fsync", "checkpoints"), published)
    begun = only(Call("open", pointer + ".tmp"))
    assert named < begun < first(Call("fsync", pointer + ".tmp"), begun) < moved
    durable = first(Call("fsync", "checkpoints"), moved)
    gone = [
        i
        for i, call in enumerate(calls)
        if i > max(made) and (call.name == "unlink" or (call.name == "rename" and call.to.endswith(".old")))
    ]
    assert gone and durable < min(gone)

    # 4. the metrics that lead up to the checkpoint are flushed before it gets its name
    recorded = max(i for i, call in enumerate(calls[:published]) if call == Call("write", "metrics.jsonl"))
    assert Call("fsync", "metrics.jsonl") in calls[recorded:published]


def test_calls_that_threads_interrupt_are_put_together() -> None:
    lines = ["7  fsync(3</a> <unfinished ...>", '8  rename("/a", "/b") = 0', "7  <... fsync resumed>) = 0"]
    text = "\n".join([*lines, '8  unlink("/c") = -1 ENOENT'])
    assert parsed(text) == [Call("rename", "/a", "/b"), Call("fsync", "/a")]
