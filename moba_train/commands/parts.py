"""What `train` and `eval` have in common: joining the ranks, building the engine, who a run is."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moba_train import __version__, last_words
from moba_train.config.load import decode_toml, read_text
from moba_train.config.mesh import mesh_key, parallel_of_stage, stages_on_mesh
from moba_train.config.rope_text import describe_rope
from moba_train.config.schema import RunConfig
from moba_train.config.validate import check_rows_per_step, check_world_size
from moba_train.data.tokenizer import Tokenizer
from moba_train.engine.base import Engine
from moba_train.errors import ConfigError, UserError
from moba_train.parallel import ranks
from moba_train.parallel.sentry import guarded
from moba_train.parallel.watch import Watch
from moba_train.parallel.watchdog import ends_within
from moba_train.quiet import quiet_imports
from moba_train.train.checkpoint import load_checkpoint
from moba_train.train.progress import Identity, Progress, model_fingerprint
from moba_train.train.resume import newest_step, resolve_checkpoint
from moba_train.train.run_folder import newest_progress, read_state
from moba_train.train.schedule import build_schedule
from moba_train.train.stopping import process_age_s

with quiet_imports():
    from moba_train.engine.deepspeed import DeepSpeedEngine
    from moba_train.engine.megatron import MegatronEngine, choose_device
    from moba_train.parallel.topology import Topology, close_topology, init_topology, join_ranks

if TYPE_CHECKING:
    from moba_train.train.weights import InitialWeights

# Ranks that write, or open data, wait for one another as long as the watchdog lets them, and leave it time to speak.
_NO_LIMIT_S = 7 * 86400.0
_WATCHDOG_SPEAKS_S = 60.0
_PACKAGES = ("torch", "megatron-core", "numpy", "sentencepiece")


@contextmanager
def joined_ranks(config: RunConfig, *, run_dir: Path | None = None) -> Iterator[Topology]:
    """Join the other ranks of the job for as long as the context is open.

    A UserError, which every rank raises, leaves in good order too: a process that ends while its groups are open may
    be aborted by their threads, and its exit code is lost. After any other error the others may wait in a collective,
    and taking leave of them could wait as well.

    Args:
        run_dir: where stacks of ranks that hang are written, if it exists then.

    Raises:
        ConfigError: the number of ranks does not fit the mesh.
        BackendError: the device that the configuration wants is not there.
        ExchangeError: ranks lost each other; the message says which is to blame. Processes end within engine.timeout_s.
    """
    with ends_within(config.watchdog.start_s):
        device = choose_device(config.engine.device)
        topology = init_topology(
            config.parallel,
            device=device,
            timeout_s=config.engine.timeout_s,
            save_timeout_s=(config.watchdog.save_s or _NO_LIMIT_S) + _WATCHDOG_SPEAKS_S,
            start_timeout_s=(config.watchdog.start_s or _NO_LIMIT_S) + _WATCHDOG_SPEAKS_S,
        )
    try:
        with (
            guarded(
                topology.watch,
                timeout_s=config.engine.timeout_s,
                limits=config.watchdog,
                age_s=process_age_s(),
                run_dir=run_dir,
            ),
            _noted_failures(topology.watch),
        ):
            yield topology
    except UserError:
        close_topology()
        raise
    close_topology()


@contextmanager
def _noted_failures(watch: Watch) -> Iterator[None]:
    """Leave word of an error when it happens: ranks then spend seconds on telling one another."""
    try:
        yield
    except Exception as error:
        last_words.leave(f"{type(error).__name__}: {error}", where=watch.doing())
        raise


def on_mesh_of_next_stage(config: RunConfig, resume: str) -> RunConfig:
    """Meet the other ranks, and replace `parallel` by the mesh of the stage in which the run will go on. Collective.

    Rank 0 looks into the run folder, so that ranks whose view of it lags take the same mesh. It looks at positions
    alone: whether the files of a checkpoint are whole is found out later, on the mesh.

    Raises:
        ConfigError: the number of ranks does not fit the mesh, or the rows of a step do not fit the ranks.
        BackendError: the device that the configuration wants is not there.
    """
    with ends_within(config.watchdog.start_s):
        join_ranks(choose_device(config.engine.device), timeout_s=config.engine.timeout_s)
        progress = ranks.from_rank_0(lambda: newest_progress(Path(config.run.dir), resume))
    try:
        schedule = build_schedule(config.stages, config.optimizer, progress.decided)
        index = schedule.stage_of_next_step(progress)
        mesh = parallel_of_stage(config.parallel, config.stages[index])
        where = mesh_key(config.stages, index)
        where += "" if progress.evaluated else f" (step {progress.step} is to be evaluated there before all else)"
        dp = check_world_size(mesh, ranks.world_size(), where=where)
        last = stages_on_mesh(config.parallel, config.stages, index)
        check_rows_per_step(config.stages[:last], dp, first=index)
    except UserError:
        close_topology()
        raise
    return replace(config, parallel=mesh)


def initial_weights(config: RunConfig, topology: Topology, identity: Identity, *, resume: str) -> InitialWeights | None:
    """What model.init_from names, for a run without a checkpoint of its own; None = weights come from elsewhere.

    Collective: all ranks share the hashing.

    Raises:
        CheckpointError: there is no intact checkpoint, or it is that of another model or vocabulary.
    """
    from moba_train.train.weights import InitialWeights, check_weights

    if not config.model.init_from or ranks.from_rank_0(lambda: newest_step(Path(config.run.dir), resume)) > 0:
        return None
    path = resolve_checkpoint(Path(config.model.init_from), argument="model.init_from").path
    assert path is not None
    state: dict[str, Any] = ranks.from_rank_0(lambda: read_state(path))
    check_weights(path, state, identity.model, identity.tokenizer)
    remarks = ranks.from_rank_0(lambda: other_positions(config, path, state))
    return InitialWeights(path, topology, remarks)


def other_positions(config: RunConfig, path: Path, state: Mapping[str, Any]) -> tuple[str, ...]:
    """A note if the first stage has another position embedding than the weights: an extension, or a mistake that no
    other check would find."""
    known = decode_toml(read_text(path / "config.toml"), source=str(path / "config.toml"))
    before, now = known.stages[state["stage_index"]].rope, config.stages[0].rope
    if before == now or (before.base == now.base and before.scaling == now.scaling == "none"):
        return ()
    told = f"position embedding of stage {config.stages[0].name!r}: {describe_rope(now)}; the weights were trained with"
    return (f"note: {told} {describe_rope(before)}",)


def build_engine(config: RunConfig, topology: Topology, *, fill: InitialWeights | None = None) -> Engine:
    """The engine in stage 0, with weights of `fill` or else of the seed. BackendError where its library is missing."""
    kind: type[MegatronEngine | DeepSpeedEngine] = DeepSpeedEngine if _is_zero(config) else MegatronEngine
    return kind(
        config.model,
        config.stages,
        config.engine,
        config.optimizer,
        topology,
        config.parallel,
        seed=config.run.seed,
        fill=fill,
    )


def trained_engine(config: RunConfig, topology: Topology, path: Path, identity: Identity) -> tuple[Engine, Progress]:
    """The engine with the weights of a verified checkpoint, for an evaluation, and how far they had come; collective.

    Raises CheckpointError: the checkpoint is that of another model, vocabulary or seed.
    """
    from moba_train.train.weights import InitialWeights, check_weights

    state: dict[str, Any] = ranks.from_rank_0(lambda: read_state(path))
    if state.get("weights_only"):
        check_weights(path, state, identity.model, identity.tokenizer)
        return build_engine(config, topology, fill=InitialWeights(path, topology)), Progress()
    engine = build_engine(config, topology)
    return engine, load_checkpoint(path, engine, identity, is_verified=True)


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
        versions=_versions((*_PACKAGES, "deepspeed") if _is_zero(config) else _PACKAGES),
        engine=config.engine.kind,
    )


def _is_zero(config: RunConfig) -> bool:
    return config.engine.kind == "deepspeed"


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    """For the reader of a checkpoint: what it was made with."""
    found = {"moba-train": __version__, "python": platform.python_version()}
    for name in packages:
        with suppress(PackageNotFoundError):  # `build_engine` says what is missing, and how to install it
            found[name] = version(name)
    return found
