"""The device mesh: from parallel degrees to process groups. The only file that touches Megatron's parallel_state.

Ranks are numbered tensor-parallel first, then context, data, pipeline (Megatron's "tp-cp-ep-dp-pp"): ranks that talk
most are neighbours, and land on one node.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from moba_train.config.schema import ParallelConfig
from moba_train.config.validate import check_world_size
from moba_train.errors import BackendError, ConfigError
from moba_train.quiet import quiet_imports

from .fingerprint import check_agreement
from .process_groups import destroy_process_groups, shared_gloo_devices, start_alone, start_process_group
from .sentry import collective_timeout_s, device_timeout_s
from .watch import Watch

with quiet_imports():
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

# What torchrun (or srun with a wrapper) sets for every rank; all of them or none.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Topology:
    """Where this process stands in the mesh, and whom it talks to. `*_rank` is the rank inside that group."""

    rank: int
    world_size: int
    tp: int
    cp: int
    pp: int
    dp: int
    tp_rank: int
    cp_rank: int
    pp_rank: int
    dp_rank: int
    tp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup
    """Data- and context-parallel ranks together: gradients and losses are reduced over it."""
    control_group: dist.ProcessGroup
    """All ranks, over gloo on every device: what is agreed on the host, before a step."""
    replica_group: dist.ProcessGroup
    """The ranks that hold one copy of the model and work on the same row, over gloo."""
    save_group: dist.ProcessGroup
    """All ranks, over gloo, for the thread that writes checkpoints while training goes on; nothing else may use it."""
    start_group: dist.ProcessGroup
    """All ranks, over gloo, for what may take long on one of them before a stage begins."""
    device: torch.device
    """With an index on CUDA."""
    watch: Watch
    """What this rank is at."""

    @property
    def is_first_rank(self) -> bool:
        """The rank that writes logs and files."""
        return self.rank == 0

    @property
    def replicas(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each replica, by data-parallel rank."""
        return replica_ranks(tp=self.tp, cp=self.cp, pp=self.pp, dp=self.dp)


def init_topology(
    parallel: ParallelConfig,
    *,
    device: torch.device,
    timeout_s: float,
    save_timeout_s: float = 0.0,
    start_timeout_s: float = 0.0,
) -> Topology:
    """Join the other ranks and build all groups. Collective over all ranks of the job.

    Under torchrun, RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* say who the others are; without any of them this process
    is a job of one rank. A default process group that exists already is used as it is. gloo on CPU, NCCL on CUDA.

    Args:
        parallel: degrees of the mesh; dp = "auto" takes what tp * cp * pp leaves.
        device: torch.device("cpu") or ("cuda"); LOCAL_RANK chooses among several CUDA devices.
        timeout_s: a rank that others wait for longer than this has ended the job, and all have said so (sentry.py).
        save_timeout_s: of `save_group`, where longer: one rank may write for longer than the others.
        start_timeout_s: of `start_group`, where longer: the others wait while rank 0 builds an index of the data.

    Raises ConfigError when the degrees do not multiply to the number of ranks, ranks disagree about them, or the
    launcher's variables are incomplete; BackendError when this process has no CUDA device to itself, or some ranks use
    CUDA and some do not; ExchangeError when some do not come.
    """
    env = _launcher_variables()
    world_size = dist.get_world_size() if dist.is_initialized() else int(env.get("WORLD_SIZE", "1"))
    dp = check_world_size(parallel, world_size)
    device = _own_device(device, int(env.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        _join(env, device, timeout_s)
    with shared_gloo_devices():
        return _mesh_of(parallel, dp, device, timeout_s, save_timeout_s, start_timeout_s)


def _mesh_of(
    parallel: ParallelConfig,
    dp: int,
    device: torch.device,
    timeout_s: float,
    save_timeout_s: float,
    start_timeout_s: float,
) -> Topology:
    """All groups over the default one."""
    limit_s = collective_timeout_s(timeout_s)
    control_group = _all_over_gloo(limit_s)
    # Groups are made by all ranks in one order, so ranks that mean different meshes would wait for each other.
    mesh = {"mesh": f"tp {parallel.tp}, cp {parallel.cp}, pp {parallel.pp}, dp {dp}"}
    check_agreement(mesh, {}, group=control_group, replicas=[], where="the start of the job")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        context_parallel_size=parallel.cp,
        pipeline_model_parallel_size=parallel.pp,
        distributed_timeout_minutes=device_timeout_s(timeout_s, device) / 60,
        order="tp-cp-ep-dp-pp",
    )
    if device.type == "cuda":
        # Megatron forks this tracker wherever it would draw dropout; our models draw none, so the seed has no effect.
        model_parallel_cuda_manual_seed(0)
    replicas = replica_ranks(tp=parallel.tp, cp=parallel.cp, pp=parallel.pp, dp=dp)
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp=parallel.tp,
        cp=parallel.cp,
        pp=parallel.pp,
        dp=dp,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        control_group=control_group,
        replica_group=_group_of_replica(replicas, control_group, limit_s),
        save_group=dist.new_group(backend="gloo", timeout=timedelta(seconds=max(limit_s, save_timeout_s))),
        start_group=dist.new_group(backend="gloo", timeout=timedelta(seconds=max(limit_s, start_timeout_s))),
        device=device,
        watch=Watch(device),
    )


def join_ranks(device: torch.device, *, timeout_s: float) -> None:
    """Meet the other ranks of the job, if that has not been done, before it is known which mesh they will form.

    Arguments and errors as in `init_topology`, which goes on from here.
    """
    env = _launcher_variables()
    if not dist.is_initialized():
        _join(env, _own_device(device, int(env.get("LOCAL_RANK", "0"))), timeout_s)


def replica_ranks(*, tp: int, cp: int, pp: int, dp: int) -> tuple[tuple[int, ...], ...]:
    """The ranks of each of the dp replicas, ascending, under the numbering of this mesh."""
    of_stage = tp * cp
    return tuple(
        tuple(stage * dp * of_stage + replica * of_stage + i for stage in range(pp) for i in range(of_stage))
        for replica in range(dp)
    )


def close_topology(*, keep_process_group: bool = False) -> None:
    """Take all groups down, so that `init_topology` may be called again. Harmless when there is none.

    keep_process_group leaves the default group up: for a caller that made it before `init_topology`.
    """
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if not keep_process_group:
        destroy_process_groups()


def _launcher_variables() -> dict[str, str]:
    """The rank variables of the environment: all of them, or {} for a process started by itself."""
    found = {name: os.environ[name] for name in RANK_VARIABLES if name in os.environ}
    if "RANK" not in found and "WORLD_SIZE" not in found:
        return {}
    if dist.is_initialized():
        return found  # the caller has met the other ranks already
    missing = [name for name in RANK_VARIABLES if name not in found]
    if missing:
        raise ConfigError(
            "the environment describes a job of several ranks only in part",
            where="environment variables",
            got=f"{', '.join(sorted(found))} set; {', '.join(missing)} missing",
            allowed=", ".join(RANK_VARIABLES),
            fix="launch with torchrun, or unset RANK and WORLD_SIZE to run one rank",
        )
    return found


def _own_device(device: torch.device, local_rank: int) -> torch.device:
    """The device of this process: CPU, or the CUDA device of its local rank (made current)."""
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if count == 1 and os.environ.get("SLURM_LOCALID") == str(local_rank):
        local_rank = 0  # srun has started this rank as a task of its own, and shows it its own device alone
    if local_rank >= count:
        raise BackendError(
            "this rank has no CUDA device to itself",
            where=f"local rank {local_rank}",
            got=f"{count} CUDA devices on this machine",
            fix='start at most one rank per device, or set engine.device = "cpu"',
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _all_over_gloo(timeout_s: float) -> dist.ProcessGroup:
    """All ranks, over gloo. The default group is taken where it serves."""
    everyone: dist.ProcessGroup | None = dist.group.WORLD
    if dist.get_backend() != "gloo":
        everyone = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    assert everyone is not None
    return everyone


def _group_of_replica(
    replicas: tuple[tuple[int, ...], ...], everyone: dist.ProcessGroup, timeout_s: float
) -> dist.ProcessGroup:
    """The ranks of this replica, over gloo."""
    if len(replicas) == 1:
        return everyone
    mine = everyone
    for ranks in replicas:
        group = dist.new_group(list(ranks), backend="gloo", timeout=timedelta(seconds=timeout_s))
        mine = group if dist.get_rank() in ranks else mine
    return mine


def _join(env: dict[str, str], device: torch.device, timeout_s: float) -> None:
    """Build the default process group: with the ranks that the launcher named, or of one rank."""
    timeout = timedelta(seconds=device_timeout_s(timeout_s, device))
    if env:
        start_process_group(int(env["RANK"]), int(env["WORLD_SIZE"]), device, timeout=timeout)
    else:
        start_alone(device, timeout=timeout)
