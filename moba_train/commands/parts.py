"""What `train` and `eval` have in common: joining the ranks, building the engine, who a run is."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from moba_train import __version__
from moba_train.config.schema import RunConfig
from moba_train.config.validate import check_rows_per_step
from moba_train.data.tokenizer import Tokenizer
from moba_train.errors import ConfigError, UserError
from moba_train.parallel import ranks
from moba_train.parallel.sentry import guarded
from moba_train.quiet import quiet_imports
from moba_train.train.progress import Identity, model_fingerprint

with quiet_imports():
    from moba_train.engine.megatron import MegatronEngine, choose_device
    from moba_train.parallel.topology import Topology, close_topology, init_topology

_PACKAGES = ("torch", "megatron-core", "numpy", "sentencepiece")


@contextmanager
def joined_ranks(config: RunConfig) -> Iterator[Topology]:
    """Join the other ranks of the job for as long as the context is open.

    A UserError, which every rank raises, leaves in good order too: a process that ends while its groups are open may
    be aborted by their threads, and its exit code is lost. After any other error the others may wait in a collective,
    and taking leave of them could wait as well.

    Raises:
        ConfigError: the number of ranks does not fit the mesh, or the rows of a step do not fit the ranks.
        BackendError: the device that the configuration wants is not there.
        ExchangeError: ranks lost each other; the message says which is to blame. Processes end within engine.timeout_s.
    """
    device = choose_device(config.engine.device)
    topology = init_topology(config.parallel, device=device, timeout_s=config.engine.timeout_s)
    try:
        with guarded(topology.watch, timeout_s=config.engine.timeout_s):
            check_rows_per_step(config.stages, topology.dp)
            yield topology
    except UserError:
        close_topology()
        raise
    close_topology()


def build_engine(config: RunConfig, topology: Topology) -> MegatronEngine:
    """The engine with freshly initialised weights, in stage 0."""
    return MegatronEngine(
        config.model,
        config.stages,
        config.engine,
        config.optimizer,
        topology,
        config.parallel,
        seed=config.run.seed,
    )


def make_folder(path: Path, *, where: str) -> None:
    """Make a folder that results go to, on rank 0; collective. ConfigError (naming `where`) when it cannot be made."""

    def make() -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fix = "choose another folder"
            raise ConfigError("the folder cannot be made", where=where, got=str(error), fix=fix) from error

    ranks.from_rank_0(make)


def identity_of(config: RunConfig, tokenizer: Tokenizer, topology: Topology) -> Identity:
    """What a checkpoint of this run is known by."""
    return Identity(
        model=model_fingerprint(config.model),
        tokenizer=tokenizer.fingerprint,
        seed=config.run.seed,
        mesh={"tp": topology.tp, "cp": topology.cp, "pp": topology.pp, "dp": topology.dp},
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    """For the reader of a checkpoint: what it was made with."""
    own = {"moba-train": __version__, "python": platform.python_version()}
    return {**own, **{name: version(name) for name in _PACKAGES}}
