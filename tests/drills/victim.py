"""What a victim of the drills runs, in a process that was forked for it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from moba_train import cli
from moba_train.commands import report, train  # noqa: F401  what a victim needs is imported before it is forked
from moba_train.config.schema import ParallelConfig
from moba_train.errors import UserError
from moba_train.parallel.topology import Topology, init_topology
from moba_train.train.run_lock import run_lock
from tests.drills.faults import Faults
from tests.unit.train import toy


@dataclass
class Job:
    """One victim.

    Attributes:
        run_dir: its run folder.
        log: file that takes its standard output and error.
        fault: arguments of `Faults`; empty = nothing befalls it.
        words: arguments of `moba-train`; empty = the toy run below.
        options: of `toy.ToyRun`.
        environment: variables to set (RANK ... for one of two ranks).
        pause_s: seconds that every step of the toy takes.
        waits: stop (SIGSTOP) before anything is done, until someone lets it go on.
    """

    run_dir: str
    log: str
    fault: dict[str, Any] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    pause_s: float = 0.0
    waits: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class NoMetrics:
    """Only rank 0 writes metrics.jsonl."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        pass

    def write(self, record: dict[str, Any]) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class HalfEngine(toy.ToyEngine):
    """One of two ranks: it holds and learns one of the two weights."""

    def __init__(self, topology: Topology) -> None:
        super().__init__(topology)
        self.weight, self.momentum = self.weight[:1], self.momentum[:1]

    def sharded_state_dict(self, *, is_loading: bool) -> dict[str, Any]:
        mine = (0, self.topology.rank, self.topology.world_size)
        return {
            "model": {"weight": ShardedTensor.from_rank_offsets("weight", self.weight, mine)},
            "optimizer": {"momentum": ShardedTensor.from_rank_offsets("momentum", self.momentum, mine)},
        }


def run(job: Job) -> int:
    """The exit code, as the command line would give it."""
    if job.waits:
        os.kill(os.getpid(), signal.SIGSTOP)
    os.environ.update(job.environment)
    if job.fault:
        Faults(**job.fault).install()
    if job.words:
        return int(cli.main(job.words) or 0)
    try:
        _run_toy(job)
    except UserError as error:
        print(error.message(), file=sys.stderr)
        return 2
    return 0


def _run_toy(job: Job) -> None:
    ranks = int(job.environment.get("WORLD_SIZE", "1"))
    topology = init_topology(ParallelConfig(cp=ranks), device=torch.device("cpu"), timeout_s=30.0)
    if ranks > 1:
        toy.ToyEngine = HalfEngine  # type: ignore[misc]
    if topology.rank > 0:
        toy.JsonlWriter = NoMetrics  # type: ignore[assignment,misc]
    this = toy.ToyRun(Path(job.run_dir), topology, evaluators=(_pause(job.pause_s),), **job.options)
    with run_lock(Path(job.run_dir), say=print) if job.options.get("resume", "auto") == "auto" else nullcontext():
        try:
            this.go()
        finally:
            for line in (*getattr(this, "notes", ()), *this.log.lines):
                print(line)


def _pause(pause_s: float) -> Any:
    def evaluate(step: int, stage: str, is_stage_end: bool) -> dict[str, Any]:
        time.sleep(pause_s)
        return {}

    return evaluate
