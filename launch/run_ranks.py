"""torchrun for people: the same options, and one readable message at the end; launch/torchrun.sh calls it.

    python launch/run_ranks.py --standalone --nproc-per-node 2 -m moba_train train configs/smoke.toml --parallel.cp 2

It runs torchrun's agent, which starts the ranks of one node and watches them, with these rules of its own:

- A rank's exit code is passed on (128 + n for a rank that died of signal n), and no launcher's traceback is printed.
- `--max-restarts N`: ranks that fail are started again up to N times, all nodes together. Exit code 2 (the user has to
  mend something) is final. Exit code 4 (the next stage wants another mesh) starts them again without counting, as long
  as the run gets on. A run that is started again goes on from its newest checkpoint, whatever --resume said.
- Rank 0 writes to the terminal. The others do so too, each line behind "[rank N]"; with `--log-dir DIR` they write to
  DIR/<time>-<host>-<pid>/start_1/rank_N/{stdout,stderr}.log instead.
- SIGUSR1 is ignored here, since torchrun would die of it; the ranks install handlers of their own. So is SIGHUP under
  nohup, whose wish torchrun undoes.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher import api
from torch.distributed.run import config_from_args, get_args_parser

from moba_train.cli import build_parser
from moba_train.config.load import load_config
from moba_train.errors import EXIT_MESH, EXIT_RANKS, UserError
from moba_train.train.manifest import MANIFEST
from moba_train.train.run_folder import list_checkpoints

EXIT_USER = 2  # the rank has said what is wrong
MOST_LINES = 12
# A rank that lost the others, or was ended by the agent, comes after the one that failed by itself; that one's word may
# be this much later, since ranks spend seconds on telling one another.
CONSEQUENCE_S = 10.0
HANDLED_SIGNALS = "TORCHELASTIC_SIGNALS_TO_HANDLE"


@dataclass(frozen=True)
class Failure:
    """How one rank of this node ended."""

    rank: int
    pid: int
    code: int  # as of subprocess: -n = died of signal n
    time_s: float
    message: str = ""
    where: str = ""
    step: int = -1

    @property
    def is_consequence(self) -> bool:
        return self.code in (EXIT_RANKS, -signal.SIGTERM)

    @property
    def exit_code(self) -> int:
        """The code by which a shell knows this end."""
        return 128 - self.code if self.code < 0 else self.code

    @property
    def how(self) -> str:
        if self.code >= 0:
            return f"exit code {self.code}"
        known = {int(known): known.name for known in signal.Signals}
        return known.get(-self.code, f"signal {-self.code}")


def failure_of(rank: int, found: ProcessFailure) -> Failure:
    """What the agent found, with what the rank has left (moba_train/last_words.py)."""
    left = read_last_words(Path(found.error_file))
    time_s = float(left.get("time_s", found.timestamp))
    # A rank that the agent ended while it was telling of its error, or waited for rank 0 to do so, failed by itself.
    code = (found.exitcode == -signal.SIGTERM and left.get("code")) or found.exitcode
    text, where, step = (left.get(key, default) for key, default in (("message", ""), ("where", ""), ("step", -1)))
    return Failure(rank, found.pid, code, time_s, text, where, step)


def read_last_words(path: Path) -> dict[str, Any]:
    """What a rank has left, flattened; {} where it has left nothing that reads."""
    try:
        left = json.loads(path.read_text("utf-8"))["message"]
        return {**left["extraInfo"], "message": left["message"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def first_cause(failures: Sequence[Failure]) -> Failure:
    """The first failure in time; the others are likely to be its consequences."""
    return min(failures, key=lambda failure: failure.time_s + CONSEQUENCE_S * failure.is_consequence)


def describe(failures: Sequence[Failure], logs: Path | None) -> str:
    """Which rank, what, where; empty for a mistake that rank 0 has told on the terminal."""
    cause = first_cause(failures)
    if cause.code == EXIT_USER and any(failure.rank == 0 for failure in failures):
        return ""
    lines = [f"rank {cause.rank} (host {socket.gethostname()}, process {cause.pid}) ended first, with {cause.how}"]
    if cause.where:
        lines.append(f"  in {cause.where}")
    elif cause.code < 0:
        lines += [f"  rank {other.rank} was in {other.where}" for other in failures if other.where][:1]
    told = cause.message.splitlines()
    lines += [f"  {line}" for line in told[:MOST_LINES]]
    lines += ["  ..."] if len(told) > MOST_LINES else []
    if logs is not None and cause.rank != 0:
        lines.append(f"  log: {logs / f'rank_{cause.rank}'}")
    return "\n".join(lines)


class RunFolder:
    """The run that the ranks train, by the words that follow -m; its checkpoints decide how it is started again."""

    def __init__(self, words: Sequence[str]) -> None:
        """words: the program's, "train" first for a training run; anything else is started again as it is."""
        self._path: Path | None = None  # None = started again as it is
        if "train" not in words[:1]:
            return
        args, overrides = build_parser().parse_known_args(words)
        if args.resume != "auto" and not args.help_config:
            try:
                self._path = Path(load_config(args.config, overrides).run.dir)
            except UserError:
                return  # the ranks say so
            self._resume, self._before = args.resume, self._checkpoints()

    def words_again(self, words: Sequence[str]) -> tuple[str, ...]:
        """`words` for another start: --resume never and --resume PATH have done their work once there is a checkpoint
        that was not there before."""
        if self._path is None or (self._resume != "never" and self._checkpoints() <= self._before):
            return tuple(words)
        self._path = None
        return (*words, "--resume", "auto")  # the last one counts

    def _checkpoints(self) -> set[tuple[str, int]]:
        assert self._path is not None
        known = [(path.name, path / MANIFEST) for path in list_checkpoints(self._path)]
        return {(name, manifest.stat().st_mtime_ns) for name, manifest in known if manifest.exists()}


class RankLogs(LogsSpecs):
    """Where output goes: rank 0's to the terminal, that of others to files, which are repeated there unless kept."""

    def __init__(self, folder: Path, *, keep: bool) -> None:
        super().__init__(str(folder))
        self._folder, self._keep, self._starts = folder, keep, 0

    @property
    def root_log_dir(self) -> str:
        return str(self._folder)

    @property
    def of_this_start(self) -> Path:
        return self._folder / f"start_{self._starts}"

    @property
    def kept(self) -> Path | None:
        """Where a user finds the logs of this start, if they are kept."""
        return self.of_this_start if self._keep else None

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Paths by local rank; the agent calls this for every start."""
        self._starts += 1
        of_rank = {local: self.of_this_start / f"rank_{env['RANK']}" for local, env in envs.items()}
        error_files = {local: str(path / "error.json") for local, path in of_rank.items()}
        for local, path in of_rank.items():
            path.mkdir(parents=True)
            envs[local]["TORCHELASTIC_ERROR_FILE"] = error_files[local]
        filed = [local for local, env in envs.items() if env["RANK"] != "0"]
        files = [{local: str(of_rank[local] / name) for local in filed} for name in ("stdout.log", "stderr.log")]
        stdouts, stderrs = ({local: to.get(local, "") for local in envs} for to in files)
        repeated: list[dict[int, str]] = [{}, {}] if self._keep else files
        return LogsDest(stdouts, stderrs, repeated[0], repeated[1], error_files)


class Agent(LocalElasticAgent):
    """torchrun's agent with the rules of this file.

    Args:
        run: what is trained.
        logs: where output goes.
    The rest are torchrun's.
    """

    def __init__(self, run: RunFolder, logs: RankLogs, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._run, self._logs = run, logs
        self._outlives_terminal = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # as nohup wants it
        if self._outlives_terminal:
            handled = os.environ.get(HANDLED_SIGNALS, "SIGTERM,SIGINT,SIGHUP,SIGQUIT").split(",")
            os.environ[HANDLED_SIGNALS] = ",".join(name for name in handled if name != "SIGHUP")
        self._mesh_steps: set[int] = set()
        self._store_of_start: TCPStore | None = None

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        """Meet the other nodes, and give the ranks a key-value store of their own.

        In torchrun's they would find what an earlier start has left: addresses of dead ranks, counts of barriers. The
        nodes also agree on how many restarts are left: one that restarts because of another has not counted it.
        """
        super()._rendezvous(worker_group)
        store, node, nodes = worker_group.store, worker_group.group_rank, worker_group.group_world_size
        if worker_group.spec.rdzv_handler.use_agent_store:
            if node == 0:
                self._store_of_start = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
                store.set("port of this start", str(self._store_of_start.port))
            worker_group.master_port = int(store.get("port of this start"))
        store.set(f"restarts left on node {node}", str(self._remaining_restarts))
        self._remaining_restarts = min(int(store.get(f"restarts left on node {i}")) for i in range(nodes))

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        started: dict[int, Any] = super()._start_workers(worker_group)
        if self._outlives_terminal:  # an older torchrun, which knows no HANDLED_SIGNALS, has put its handler in place
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED:
            failures = [failure_of(rank, found) for rank, found in result.failures.items()]
            self._judge(failures, worker_group.spec.max_restarts)
        return result

    def _judge(self, failures: Sequence[Failure], max_restarts: int) -> None:
        """How many restarts are left after these failures; torchrun's loop then takes one, or ends."""
        cause = first_cause(failures)
        if cause.code == EXIT_USER:
            self._remaining_restarts = 0
        elif cause.code == EXIT_MESH and cause.step >= 0 and cause.step not in self._mesh_steps:
            self._mesh_steps.add(cause.step)
            self._remaining_restarts += 1
            say(f"starting again after step {cause.step}, on the mesh of the next stage")
        elif self._remaining_restarts > 0:
            say(describe(failures, self._logs.kept))
            say(f"starting again, restart {max_restarts - self._remaining_restarts + 1} of at most {max_restarts}")

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if worker_group.state == WorkerState.HEALTHY:
            say("another node starts its ranks again, and so does this one")
        worker_group.spec.args = self._run.words_again(worker_group.spec.args)
        super()._restart_workers(worker_group)


def say(text: str) -> None:
    if text:
        print(f"launch: {text}", file=sys.stderr, flush=True)


@contextmanager
def log_folder(named: str | None) -> Iterator[Path]:
    """A fresh folder below the one that was named, or one that lasts as long as the ranks."""
    if named is None:
        with tempfile.TemporaryDirectory(prefix="moba-train-") as folder:
            yield Path(folder)
    else:
        path = Path(named) / f"{time.strftime('%Y%m%d-%H%M%S')}-{socket.gethostname()}-{os.getpid()}"
        try:
            path.mkdir(parents=True)
        except OSError as error:
            say(f"the folder for logs cannot be made: {error}")
            sys.exit(EXIT_USER)
        yield path


def main(words: Sequence[str]) -> int:
    """Run ranks as torchrun's options say; returns the exit code."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # lines of other ranks pass through it
    # They repeat, rank by rank, the failure that is summarised below.
    for name in ("multiprocessing.api", "agent.server.api", "agent.server.local_elastic_agent"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    options = get_args_parser().parse_args(words)
    if (options.redirects, options.tee, options.logs_specs) != ("0", "0", None):
        say("--redirects, --tee and --logs-specs are not taken; --log-dir DIR keeps the output of the ranks")
        return EXIT_USER
    is_alone = options.standalone or options.nnodes in ("1", "1:1")
    if not is_alone and (options.rdzv_backend != "c10d" or not options.rdzv_endpoint):
        say("several nodes need --rdzv-backend c10d --rdzv-endpoint host:port, the same on all of them")
        return EXIT_USER
    if is_alone and not options.rdzv_endpoint:
        options.rdzv_backend, options.rdzv_endpoint, options.rdzv_id = "c10d", "localhost:0", str(os.getpid())
    with log_folder(options.log_dir) as folder:
        return launch(options, RankLogs(folder, keep=options.log_dir is not None))


def launch(options: Any, logs: RankLogs) -> int:
    """One launch, restarts included."""
    options.log_dir = os.devnull  # torchrun would leave a temporary folder
    config, command, words = config_from_args(options)
    config.logs_specs, config.log_line_prefix_template = logs, "[rank ${rank}] "
    run = RunFolder(options.training_script_args)
    api.LocalElasticAgent = partial(Agent, run, logs)  # type: ignore[misc]  # where torchrun looks for it
    try:
        api.elastic_launch(config, command)(*words)
    except ChildFailedError as error:
        failures = [failure_of(rank, found) for rank, found in error.failures.items()]
        say(describe(failures, logs.kept))
        return first_cause(failures).exit_code
    except SignalException as stop:
        say(f"{signal.Signals(stop.sigval).name} was passed on to the ranks")
        return 128 + int(stop.sigval)
    except RendezvousError as error:
        # Another node may have ended for a reason that ranks of this one know too, and have left word of.
        left = [read_last_words(path) for path in logs.of_this_start.glob("*/error.json")]
        say(f"the nodes of the job have lost each other, or have not come together ({error})")
        return next((words["code"] for words in left if words.get("code")), EXIT_RANKS)
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # A signal while torchrun ends its ranks can leave threads of its own behind, which an ordinary exit would wait for.
    os._exit(code)
