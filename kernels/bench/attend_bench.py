"""Parity gate, then time and memory of the operator against dense attention and the paper's algorithm.

    python kernels/bench/attend_bench.py                  # this CPU, the torch backend
    python kernels/bench/attend_bench.py --device cuda    # this GPU, the triton backend

The second form needs torch, triton and numpy only. Both write <device>.md, <device>.png and <device>.jsonl into
results/, after every shape. Called again, a run goes on where it was cut off, if code, device and settings are the
same. Exit code 1: the parity gate is red (then there are no figures), a shape failed, or, under --strict, a target was
missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import moba_bench  # first: it puts this tree's kernels/ on the import path
import torch
from moba_bench import contestants, figures, memory, parity, records, shapes, tables, targets, timing
from moba_bench.shapes import Shape

from moba_kernels.triton_support import INTERPRETED

DEFAULT_BACKEND = {"cpu": "torch", "cuda": "triton"}
LARGEST_GATE_CHUNK = {"cpu": 64, "cuda": 512}
"""On a GPU chunks from 512 on take the tile of long runs (`triton_config.is_short`); what is timed must be gated."""
GPU_BUDGET_S = 510.0
GRACE_S = 15.0
"""What a shape may take beyond the budget before it is cut off."""
# Guesses until shapes have been timed: FLOP/s of all contestants together, and what a shape costs besides.
FIRST_RATE = {"cpu": 3e10, "cuda": 2e14}
OVERHEAD_S = {"cpu": 3.0, "cuda": 15.0}


@dataclass
class Clock:
    """The time budget: does another shape fit?"""

    device: str
    budget_s: float | None
    start: float = field(default_factory=time.monotonic)
    rate: float = 0.0

    def __post_init__(self) -> None:
        self.rate = FIRST_RATE[self.device]

    @property
    def spent_s(self) -> float:
        return time.monotonic() - self.start

    def fits(self, flops: float) -> bool:
        return self.budget_s is None or self.spent_s + OVERHEAD_S[self.device] + flops / self.rate <= self.budget_s

    def learn(self, flops: float, seconds: float) -> None:
        """From a shape that took `seconds`, overhead aside."""
        if seconds > 3 * OVERHEAD_S[self.device]:
            self.rate = flops / (seconds - OVERHEAD_S[self.device])


@dataclass(frozen=True)
class Bench:
    """One run of the script."""

    options: argparse.Namespace
    environment: records.Environment
    store: records.Store
    command: str
    shapes: Sequence[Shape]
    clock: Clock

    @property
    def path(self) -> Path:
        """Of the results file, with .md for an ending."""
        return self.store.path.with_suffix(".md")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", default=None, help="what is measured; default: torch on cpu, triton on cuda")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads")
    parser.add_argument("--repeats", type=int, default=None, help="runs of each; default: 3 on cpu, 1-10 on cuda")
    parser.add_argument("--only", default="", help="shapes whose name holds this text, e.g. 'T=8192' or '512/4'")
    parser.add_argument("--toy", action="store_true", help="tiny shapes: does it work?")
    parser.add_argument("--budget-s", type=float, default=None, help="start no shape that would end later")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--strict", action="store_true", help="exit code 1 when a target is missed")
    parser.add_argument("--out", type=Path, default=moba_bench.KERNELS / "bench" / "results", help="results folder")
    options = parser.parse_args(arguments)
    options.backend = options.backend or DEFAULT_BACKEND[options.device]
    if options.budget_s is None and options.device == "cuda":
        options.budget_s = GPU_BUDGET_S
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here; try --device cpu --toy")
    if options.backend == "triton" and INTERPRETED and not options.toy:
        parser.error("TRITON_INTERPRET is set: the interpreter's times mean nothing; unset it, or add --toy")
    return options


def prepare(arguments: Sequence[str]) -> Bench:
    options = parse(arguments)
    clock = Clock(options.device, options.budget_s)
    torch.set_num_threads(options.threads)
    chosen = {"cpu": shapes.cpu_shapes, "cuda": shapes.cuda_shapes}[options.device]()
    if options.toy:
        chosen = shapes.toy_shapes("bf16" if options.device == "cuda" else "fp32")
    environment = records.environment_of(options.device, options.threads)
    settings = {name: getattr(options, name) for name in ("backend", "repeats", "toy")}
    suffix = "" if options.backend == DEFAULT_BACKEND[options.device] else f"-{options.backend}"
    suffix += "-toy" if options.toy else ""
    path = options.out / f"{environment.slug}{suffix}.jsonl"
    store = records.Store(path, {**environment.as_json(), **settings}, fresh=options.fresh)
    command = command_of(arguments)
    wanted = [shape for shape in chosen if options.only in shape.name]
    if not wanted:
        names = "".join(f"\n  {shape.name}" for shape in chosen)
        sys.exit(f"--only: no shape's name holds {options.only!r}; there are:{names}")
    return Bench(options, environment, store, command, wanted, clock)


def command_of(arguments: Sequence[str]) -> str:
    """As a person repeats it from the repository's root; where results were written does not matter to them."""
    kept = list(arguments)
    if "--out" in kept:
        at = kept.index("--out")
        del kept[at : at + 2]
    return shlex.join(["python", "kernels/bench/attend_bench.py", *kept])


def pass_gate(bench: Bench) -> bool:
    """Every kind of shape that will be timed, on the measured backend and the paper's algorithm. Is the former green?

    Green verdicts are kept for the next run. If only the paper's algorithm is red, it alone gets no figures.
    """
    device = bench.options.device
    backends = [bench.options.backend]
    checked = [shapes.small_of(s, LARGEST_GATE_CHUNK[device]) for s in bench.shapes]
    if device == "cpu":
        longest = max((shape.tokens for shape in bench.shapes), default=0)
        checked += [gate for gate in shapes.LONG_GATES if gate.tokens <= longest]
    if bench.options.backend != "flash" and any(s.paper for s in bench.shapes):
        reason = contestants.why_not("flash", parity.make_inputs(checked[0], device))
        backends += ["flash"] if reason is None else []
    for small in dict.fromkeys(checked):
        for backend in backends:
            name = f"{backend} {small.name}"
            known = bench.store.find("gate", name)
            if known is not None and known["ok"]:
                continue
            try:
                verdict = parity.check_parity(small, backend, device)
                ok, words = verdict.ok, str(verdict)
            except Exception as error:  # a kernel that cannot run is as red as one that is wrong
                ok, words = False, f"RED: {timing.reason_of(error)}"
            print(f"parity {name}: {words}", flush=True)
            bench.store.add("gate", name, {"ok": ok, "verdict": words, "backend": backend})
    return not is_red(bench, bench.options.backend)


def is_red(bench: Bench, backend: str) -> bool:
    return any(gate["backend"] == backend and not gate["ok"] for gate in bench.store.of_kind("gate"))


def flops_of(shape: Shape, *, dense: bool) -> float:
    """A guess at the work of all runs at this shape, for the time budget. dense: is dense attention among them?"""
    pairs = shapes.floor_flops(shape, backward=False) + shapes.floor_flops(shape, backward=True)
    causal = sum(shapes.attention_flops(shape, shapes.causal_pairs(shape), backward=b) for b in (False, True))
    return 3.0 * (pairs * (1 + 3 * shape.paper) + causal * dense)


def known_dense(bench: Bench, shape: Shape) -> records.Record | None:
    """On a GPU, whose clock hardly wavers, dense attention of one row is timed once for all specs."""
    if bench.options.device != "cuda" or not shape.dense:
        return None
    for record in bench.store.of_kind("shape"):
        other = Shape.from_json(record["shape"])
        same = dataclasses.replace(other, chunk=shape.chunk, topk=shape.topk, select=shape.select, paper=shape.paper)
        if same == shape and not record.get("failed") and figures.dense_runs(record, "both"):
            return record
    return None


def measure(bench: Bench, shape: Shape) -> records.Record:
    """Time and memory at one shape; the fields of its record."""
    load = os.getloadavg()[0]
    fields = measure_in_turns(bench, shape)  # its tensors are freed when it returns
    if bench.options.device == "cpu":
        fields["memory"] = memory.measure_in_child(shape, bench.options.backend, bench.options.threads)
    return {"shape": shape.as_json(), "command": bench.command, "load": load, **fields}


def measure_in_turns(bench: Bench, shape: Shape) -> records.Record:
    """Seconds of every contestant in both modes and, on a GPU, our peak memory."""
    device, backend = bench.options.device, bench.options.backend
    if device == "cuda":
        torch.cuda.empty_cache()
    inputs = parity.make_inputs(shape, device)
    known = known_dense(bench, shape)
    paper = shape.paper and not is_red(bench, "flash")
    able, unable = contestants.contestants(shape, inputs, backend, dense=shape.dense and known is None, paper=paper)
    if paper != shape.paper:
        unable[contestants.PAPER] = "no figures, its parity gate is red"
    seconds = {}
    for mode in figures.MODES:
        actions = {one.name: (one.forward if mode == "forward" else one.both) for one in able}
        seconds[mode], failed = timing.take_turns(actions, device, bench.options.repeats)
        if contestants.OURS in failed:
            raise RuntimeError(f"{backend}, {figures.MODES[mode]}: {failed[contestants.OURS]}")
        unable.update(failed)
        if known is not None:
            seconds[mode].update(figures.dense_runs(known, mode))
    fields: records.Record = {"seconds": seconds, "unable": unable}
    if device == "cuda":
        fields["memory"] = memory.measure_on_gpu(able[0], sum(x.numel() * x.element_size() for x in inputs))
    return fields


class TimeUp(BaseException):
    """The budget is more than spent. No Exception, so that nothing takes it for a failure of a shape."""


def ring_after(seconds: float | None) -> None:
    """Raise TimeUp after so many seconds (None: never), between two calls into PyTorch."""

    def ring(signum: int, frame: object) -> None:
        raise TimeUp

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.0 if seconds is None else max(seconds, 0.001))


def measure_all(bench: Bench) -> list[str]:
    """Measure what is not known yet, writing after every shape; returns the names that the budget did not allow."""
    left_out: list[str] = []
    for shape in bench.shapes:
        if bench.store.find("shape", shape.name) is not None:
            print(f"{shape.name}: done before", flush=True)
            continue
        work = flops_of(shape, dense=shape.dense and known_dense(bench, shape) is None)
        if not bench.clock.fits(work):
            left_out.append(shape.name)
            continue
        begin = time.monotonic()
        try:
            fields = measure(bench, shape)
        except TimeUp:
            left_out.append(shape.name)
            continue
        except Exception as error:  # the shapes that were measured are kept, those that follow are tried
            fields = {"shape": shape.as_json(), "failed": timing.reason_of(error), "command": bench.command}
        took_s = time.monotonic() - begin
        record = bench.store.add("shape", shape.name, fields)
        publish(bench, left_out)
        print(f"{shape.name}: {outcome_of(record)} ({took_s:.0f} s)", flush=True)
        if "failed" not in record:
            bench.clock.learn(work, took_s)
        elif bench.options.device == "cuda":
            torch.cuda.synchronize()  # raises where the failure took the device along: a rerun goes on after it
    return left_out


def outcome_of(record: records.Record) -> str:
    if "failed" in record:
        return f"FAILED, {record['failed']}"
    f = figures.figures_of(record, "both")
    share = f"{f.share_of_ratio:.2f} of the pair ratio" if f.share_of_ratio is not None else "dense was not run"
    return f"forward + backward {f.ours_s:.4g} s, {share}"


def publish(bench: Bench, left_out: Sequence[str]) -> tables.Page:
    """Write the results file from all that is known."""
    known = bench.store.of_kind("shape")
    commands = tuple(dict.fromkeys(record["command"] for record in known)) or (bench.command,)
    page = tables.Page(
        environment=bench.environment,
        commands=commands,
        gates=bench.store.of_kind("gate"),
        shapes=known,
        verdicts=[] if bench.options.toy else targets.verdicts(known, bench.options.device),
        left_out=left_out,
        backend=bench.options.backend,
        toy=bench.options.toy,
    )
    tables.write(page, bench.path)
    return page


def main(arguments: Sequence[str]) -> int:
    bench = prepare(arguments)
    print(f"{bench.environment.device}, torch {bench.environment.torch}, commit {bench.environment.commit}", flush=True)
    ring_after(None if bench.options.budget_s is None else bench.options.budget_s + GRACE_S)
    try:
        green = pass_gate(bench)
        left_out = measure_all(bench) if green else []
    except TimeUp:
        print("The time budget was spent before the parity gate was passed; run again to go on.", flush=True)
        return 1
    finally:
        ring_after(None)
    if not green:
        print("The parity gate is red: no figures.", flush=True)
        return 1
    page = publish(bench, left_out)
    tables.show(page.shapes)
    print()
    for line in [*page.verdicts, *tables.notes_of(page)]:
        print(line)
    no_picture = tables.draw(page.shapes, bench.path.with_suffix(".png"), bench.environment.device)
    print(no_picture or f"picture: {bench.path.with_suffix('.png').name}")
    print(f"results: {bench.path.name} ({bench.clock.spent_s:.0f} s)", flush=True)
    missed = any(verdict.met is False for verdict in page.verdicts)
    failed = any(record.get("failed") for record in page.shapes)
    red = is_red(bench, "flash")
    return int(failed or red or (bench.options.strict and missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
