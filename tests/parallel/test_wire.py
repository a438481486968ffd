"""The wire: names of exchanges, what a watch is told, and exchanges that travel through host memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moba_kernels import Full, MoBA, Pack
from moba_train.errors import ExchangeError
from moba_train.parallel import collectives, context_attend, key_halo
from moba_train.parallel.emulation import ThreadGroup, run_threads
from moba_train.parallel.rules import TRANSPORT_NAMES, refusals
from moba_train.parallel.shard import shard_length
from moba_train.parallel.traffic import Waits
from moba_train.parallel.watch import Watch, is_broken_exchange, plain_text
from moba_train.parallel.wire import Pending, Wire
from tests.distributed import run_ranks

ROOT = Path(__file__).parents[2]


def _all_collectives(rank: int, n: int, stage: bool) -> list[Tensor]:
    group = dist.group.WORLD
    x = torch.arange(2 * n * 3, dtype=torch.float32).view(2 * n, 3) + 100 * rank
    rows = [(rank + other) % n for other in range(n)]  # symmetric, so that ranks agree; some are 0
    gathered, scattered, moved, total = (
        x.new_empty(2 * n * n, 3),
        x.new_empty(2, 3),
        x.new_empty(sum(rows), 3),
        x.clone(),
    )
    works = [
        collectives.all_gather(gathered, x, group=group, stage=stage),
        collectives.reduce_scatter(scattered, x, group=group, stage=stage),
        collectives.all_to_all(moved, x[: sum(rows)], rows, rows, group=group, stage=stage),
        collectives.all_reduce(total, group=group, stage=stage),
    ]
    if stage:
        assert all(isinstance(work, collectives.Staged) for work in works)
    for work in works:
        work.wait()
    return [gathered, scattered, moved, total]


def _staged(rank: int, n: int) -> None:
    plain, staged = _all_collectives(rank, n, False), _all_collectives(rank, n, True)
    assert all(torch.equal(a, b) for a, b in zip(plain, staged, strict=True))
    assert torch.equal(plain[0][2 * n], torch.tensor([100.0, 101.0, 102.0]))  # the first row of rank 1
    assert torch.equal(plain[1][0], torch.arange(6.0 * rank, 6.0 * rank + 3) * n + 100 * sum(range(n)))


def test_exchanges_through_host_memory_give_the_same_for_ranks_that_share_a_gpu_over_gloo() -> None:
    run_ranks(_staged, 3)


def test_an_exchange_that_breaks_off_is_named_by_rank_layer_transport_and_phase() -> None:
    class Broken:
        def wait(self) -> None:
            raise RuntimeError(
                "[/src/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:4. This is typically caused"
            )

    def wait(group: ThreadGroup) -> str:
        wire = Wire(group, transport="pull", layer=3)
        with pytest.raises(ExchangeError) as caught:
            Pending(Broken(), lambda: torch.empty(0), (), wire, "backward/dkv").wait()
        return str(caught.value)

    assert run_threads(wait, 2)[1] == (
        "an exchange broke off on context-parallel rank 1 of 2: layer 3, transport pull, phase backward/dkv: "
        "Connection closed by peer [::1]:4"
    )


def test_a_watch_knows_the_exchange_that_the_host_waits_in_and_after_one_broke_off_still_does() -> None:
    seen: list[str] = []
    watch = Watch(torch.device("cpu"), clock=lambda: 7.0)

    class Slow:
        def wait(self) -> None:
            seen.append(watch.in_exchange())
            if len(seen) == 2:
                raise RuntimeError("[/gloo/pair.cc:5] gone")

    def wait(group: ThreadGroup) -> None:
        wire = Wire(group, transport="a2a", layer=0, watch=watch).among([0])
        Pending(Slow(), lambda: torch.empty(0), (), wire, "forward/qkv").wait()
        assert watch.in_exchange() == ""
        with pytest.raises(ExchangeError):
            Pending(Slow(), lambda: torch.empty(0), (), wire, "forward/out").wait()

    run_threads(wait, 1)
    assert seen == [f"layer 0, transport a2a, phase forward/{what} (for 0 s)" for what in ("qkv", "out")]
    assert watch.in_exchange() == seen[1]


def test_errors_of_the_program_are_not_taken_for_broken_exchanges() -> None:
    class Failed:
        def wait(self) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def wait(group: ThreadGroup) -> None:
        with pytest.raises(RuntimeError, match=r"^CUDA error") as caught:
            Pending(Failed(), lambda: torch.empty(0), (), Wire(group), "forward/kv").wait()
        assert not isinstance(caught.value, ExchangeError)

    run_threads(wait, 1)
    assert is_broken_exchange(RuntimeError("[/x/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5ms"))
    assert is_broken_exchange(dist.DistBackendError("NCCL")) and is_broken_exchange(ExchangeError("x"))
    assert not is_broken_exchange(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_broken_exchange(ValueError("/gloo/"))
    assert plain_text(RuntimeError("Broken pipe\nException raised from sendBytes at x")) == "Broken pipe"


# What NCCL carries; it refuses int16, for one.
NCCL_DTYPES = {
    *(torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
}


@dataclass(frozen=True)
class _StrictGroup(ThreadGroup):
    """Is as particular as NCCL, and notes what is started in which order."""

    log: list[str] = field(default_factory=list)

    def _note(self, what: str, *tensors: Tensor) -> None:
        self.log.append(what)
        for x in tensors:
            assert x.dtype in NCCL_DTYPES and x.is_contiguous(), (what, x.dtype, x.stride())

    def all_gather(self, received: Tensor, sent: Tensor) -> None:
        self._note(f"all-gather {sent.numel()} {sent.dtype}", received, sent)
        super().all_gather(received, sent)

    def reduce_scatter(self, received: Tensor, sent: Tensor) -> None:
        self._note(f"reduce-scatter {sent.numel()} {sent.dtype}", received, sent)
        super().reduce_scatter(received, sent)

    def all_reduce(self, x: Tensor) -> None:
        self._note(f"all-reduce {x.numel()} {x.dtype}", x)
        super().all_reduce(x)

    def all_to_all(
        self, received: Tensor, sent: Tensor, received_rows: Sequence[int], sent_rows: Sequence[int]
    ) -> None:
        self._note(f"all-to-all of rows {tuple(sent.shape[1:])} {sent.dtype}", received, sent)
        super().all_to_all(received, sent, received_rows, sent_rows)


@pytest.mark.parametrize("transport", TRANSPORT_NAMES)
def test_all_ranks_start_the_same_exchanges_in_one_order_and_wait_for_each_in_types_that_nccl_carries(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that hold nothing, pick nothing or are asked for nothing are no exception."""
    waits: list[None] = []
    monkeypatch.setattr(collectives._Done, "wait", lambda _: waits.append(None))
    specs = (MoBA(4, 3), MoBA(40, 2), MoBA(6, 2, "group"), MoBA(100, 1), Full())
    rows = ((0, 0, 9, 80), (0, 1, 3))  # with the second some ranks hold no token

    def rank_main(thread: ThreadGroup) -> list[str]:
        group = _StrictGroup(thread.table, thread.own_rank)
        for spec, cu_seqlens in product(specs, rows):
            if refusals(transport, spec, num_heads=8, num_kv_heads=4, num_ranks=4):
                continue
            pack = Pack(cu_seqlens)
            length = shard_length(pack.num_tokens, 4, group.rank(), "zigzag")
            generator = torch.Generator().manual_seed(group.rank())
            shapes = ((8, length, 8), (4, length, 8), (4, length, 6))  # heads first in memory
            leaves = [torch.randn(s, generator=generator).bfloat16().requires_grad_() for s in shapes]
            q, k, v = (leaf.transpose(0, 1) for leaf in leaves)
            options = {"layout": "zigzag", "group": group, "transport": transport, "cu_seqlens": pack, "node_ranks": 2}
            # This backend's gradients have the strides of what it is given, so messages meet both kinds.
            result = context_attend(q, k, v, spec, backend="reference", **options)
            torch.autograd.grad(result.out, (q, k, v), torch.ones_like(result.out))
            halo = key_halo(k, 2, num_tokens=pack.num_tokens, layout="zigzag", group=group)
            torch.autograd.grad(halo, k, torch.ones_like(halo))
        return group.log

    logs = run_threads(rank_main, 4)
    assert logs[0] and all(log == logs[0] for log in logs)
    assert len(waits) == sum(len(log) for log in logs)


def test_context_attention_and_its_gpu_check_need_no_package_but_torch_and_numpy() -> None:
    code = (
        "import sys\n"
        "for name in ('megatron', 'tyro', 'sentencepiece', 'pytest', 'hypothesis'): sys.modules[name] = None\n"
        "import tests.gpu.context, moba_train.parallel.context_attention, moba_train.parallel.halo\n"
        "print('imported')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("imported\n", 0), done.stderr


def _waits(rank: int, n: int) -> float:
    """Seconds that this rank waited for an exchange that rank 1 comes to late."""
    group = dist.group.WORLD
    assert group is not None
    wire = Wire(group)
    wire.all_gather(torch.ones(1), phase="forward/x").wait()
    before_s = wire.traffic.waits.seconds()
    dist.barrier()
    if rank == 1:
        time.sleep(2.0)
    wire.all_gather(torch.ones(1), phase="forward/x").wait()
    return wire.traffic.waits.seconds() - before_s


def test_a_rank_knows_how_long_it_waited_for_the_others() -> None:
    ahead_s, late_s = run_ranks(_waits, 2)
    assert ahead_s > 1.0 and late_s < 1.0


def test_waits_of_a_gpu_are_timed_by_its_events_and_only_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(100))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at_ms = next(clock) ** 2

        def synchronize(self) -> None:
            synchronised.append(self.at_ms)

        def elapsed_time(self, later: Event) -> float:
            return later.at_ms - self.at_ms

    synchronised: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    timed, untimed = Waits(on_device=True), Waits()
    for _ in range(2):
        for waits in (timed, untimed):
            with waits.timed(is_cuda=True):
                pass
    assert timed.seconds() == pytest.approx((1 + 5) / 1e3) and synchronised == [9]  # 0, 1; 4, 9
    assert untimed.seconds() == 0.0
