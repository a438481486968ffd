"""Check the operator's kernels on a GPU that has torch, triton and numpy, and nothing else:

    python3 tests/gpu/run.py                          # this GPU, the triton backend, within 9 minutes
    python3 tests/gpu/run.py --device cpu --toy       # the same checks of the torch backend on a CPU

Prints pass or FAIL for every case, most important first, and keeps each verdict at once: called again on the same code
and device, a run skips what has passed. The cases run in a child process. One that crashes, hangs or takes the device
along is written down as failed, and a new process goes on with the next. Exit code 0: every case that ran has passed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

from tests.gpu.cases import Case, all_cases  # noqa: E402  (puts kernels/ and kernels/bench/ on the path)

from moba_bench.records import Store, environment_of, replace_text  # noqa: E402  isort: skip

GPU_BUDGET_S = 470.0
GRACE_S = 50.0
"""What a case may take beyond the budget before it is cut off, without a verdict."""
CASE_LIMIT_S = 150.0
"""A case that takes longer hangs: the longest compiles a few kernels and takes seconds otherwise."""
DEVICE_LOST = 70
"""Exit code of a worker whose CUDA context has died; the next worker goes on."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--backend", default=None, help="what is checked; default: torch on cpu, triton on cuda")
    parser.add_argument("--toy", action="store_true", help="small shapes only")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--budget-s", type=float, default=None, help="start no case after this; default: 470 on cuda")
    parser.add_argument("--fresh", action="store_true", help="forget earlier verdicts")
    parser.add_argument("--out", type=Path, default=ROOT / ".bench" / "gpu-test", help="folder of the verdicts")
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)  # what the supervisor's store is about
    options = parser.parse_args(arguments)
    options.backend = options.backend or {"cpu": "torch", "cuda": "triton"}[options.device]
    if options.budget_s is None:
        options.budget_s = GPU_BUDGET_S if options.device == "cuda" else float("inf")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here; try --device cpu --toy")
    return options


def open_store(options: argparse.Namespace) -> Store:
    """A worker takes the account of code and device from its supervisor: all verdicts of a run are together."""
    if options.worker is not None:
        path, run = json.loads(options.worker)
        return Store(Path(path), run)
    environment = environment_of(options.device, torch.get_num_threads())
    run = {**environment.as_json(), "backend": options.backend, "toy": options.toy}
    path = options.out / f"{environment.slug}-{options.backend}{'-toy' if options.toy else ''}.jsonl"
    return Store(path, run, fresh=options.fresh)


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    return [case for case in all_cases(options.device, toy=options.toy) if options.only in case.name]


def running_file(store: Store) -> Path:
    """Names the case that a worker is at."""
    return store.path.with_suffix(".running")


def work(options: argparse.Namespace) -> int:
    """Run what has no verdict yet, in this process."""
    store = open_store(options)
    end = time.monotonic() + options.budget_s
    for case in chosen_cases(options):
        if store.find("case", case.name) is not None:
            continue
        if time.monotonic() > end:
            break
        replace_text(running_file(store), case.name)
        begin = time.monotonic()
        try:
            note, ok = case.run(options.device, options.backend), True
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            note, ok = f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}: {error}", False
        report(store, case.name, ok, note, time.monotonic() - begin)
        if not ok and options.device == "cuda" and device_is_lost():
            return DEVICE_LOST
    running_file(store).unlink(missing_ok=True)
    return 0


def report(store: Store, name: str, ok: bool, note: str, seconds: float) -> None:
    store.add("case", name, {"ok": ok, "note": note, "seconds": round(seconds, 2)})
    print(f"{'pass' if ok else 'FAIL'}  {name}: {note.strip()} ({seconds:.1f} s)", flush=True)


def device_is_lost() -> bool:
    """An illegal address, say, ends every later call of the process too."""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return True
    return False


def supervise(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Start workers until every case has a verdict or the budget is spent."""
    begin = time.monotonic()
    store = open_store(options)
    store.records = [record for record in store.records if record["ok"]]
    names = [case.name for case in chosen_cases(options)]
    passed_before = sum(store.find("case", name) is not None for name in names)
    store.write()
    while time.monotonic() - begin < options.budget_s:
        left_s = options.budget_s - (time.monotonic() - begin)
        account = json.dumps([str(store.path), store.run])
        command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--worker", account]
        running = running_file(store)
        running.unlink(missing_ok=True)
        ended, in_time = watch(start([*command, "--budget-s", str(left_s)]), running, left_s + GRACE_S)
        store.reload()
        if not running.exists():
            if ended:
                print(f"the worker could not start: it {ended}", flush=True)
            break
        name = running.read_text()
        running.unlink()
        if in_time and store.find("case", name) is None:
            report(store, name, False, f"the process {ended}", 0.0)
    return summarise(store, names, passed_before, time.monotonic() - begin)


def start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command)


def watch(worker: subprocess.Popen[bytes], running: Path, limit_s: float) -> tuple[str, bool]:
    """Wait for a worker; end it when one case takes too long or the time is up. (how it ended, was that in time?)"""
    begin, since, name = time.monotonic(), time.monotonic(), ""
    while True:
        try:
            code = worker.wait(timeout=1)
        except subprocess.TimeoutExpired:
            now = running.read_text() if running.exists() else ""
            if now != name:
                name, since = now, time.monotonic()
            late, hung = time.monotonic() - begin > limit_s, time.monotonic() - since > CASE_LIMIT_S
            if late or hung:
                worker.kill()
                worker.wait()
                return f"was ended after {CASE_LIMIT_S:.0f} s: it hung", not late
        else:
            return (f"ended with exit code {code}" if code else ""), True


def summarise(store: Store, names: Sequence[str], passed_before: int, seconds: float) -> int:
    verdicts = {name: store.find("case", name) for name in names}
    failed = [name for name, record in verdicts.items() if record is not None and not record["ok"]]
    not_run = [name for name, record in verdicts.items() if record is None]
    passed = len(names) - len(failed) - len(not_run)
    before = f" ({passed_before} of them before)" if passed_before else ""
    print(f"\n{passed} passed{before}, {len(failed)} failed, {len(not_run)} not run", flush=True)
    for name in failed:
        print(f"FAILED  {name}")
    print(f"{store.path.name}: torch {torch.__version__}, {seconds:.0f} s", flush=True)
    return 1 if failed or not passed else 0


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    return work(options) if options.worker is not None else supervise(options, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
