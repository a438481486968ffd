"""Runs a kernel in Gluon whose warps are specialised (Hopper) on the CPU: what it computes, and whether its groups of
warps keep to their barriers. Triton's interpreter does not know Gluon.

    Emulated(kernel, seed=0)[grid](*args, **constants)      # as the kernel itself is launched

Programs run one after another. A group of warps is a thread; one runs at a time, and at every barrier a seed draws who
goes on. What happens later on a GPU happens as late as it may here:

- A copy (cp.async) lands when its barrier is told so, at a time that the seed draws. Until then, and from the
  beginning, shared memory is NaN (integers: nonsense).
- A product (wgmma) reads shared memory when it is waited for. By then its operands must be what they were, or the
  stage was given away too early; and what other instructions wrote must have been fenced when it was issued.
- Groups that all wait end in an error, as does an address outside a tensor.

Layouts, registers and what the warps of one group owe to each other are not looked at: the compiler checks the first.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .emulated_memory import Barrier, Barriers, Pending, Pointer, Shared, Value, nonsense, operands, tensor_of

GROUP_THREADS = 128


class _Ended(BaseException):
    """Another group has failed."""


class _Schedule:
    """Groups of warps as threads, of which one runs at a time, and copies that are under way."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.turn = rng, threading.Condition()
        self.running: int | None = None
        self.waits: dict[int, Callable[[], bool]] = {}
        self.copies: list[tuple[int, Callable[[], None]]] = []  # (group, what lands); those of a group in order
        self.error: BaseException | None = None

    def run(self, groups: Sequence[Callable[[], None]]) -> None:
        """All groups to their end. Raises the first error of one of them."""
        threads = [threading.Thread(target=self._body, args=(at, group)) for at, group in enumerate(groups)]
        self.waits = {at: lambda: True for at in range(len(groups))}
        with self.turn:
            self._choose()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def _body(self, me: int, group: Callable[[], None]) -> None:
        try:
            with self.turn:
                self._await_turn(me)
            group()
        except _Ended:
            return
        except BaseException as error:
            self.error = self.error or error
        with self.turn:
            self._choose()

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others go on; until `ready`. Before the groups begin there are no others."""
        me = self.running
        if me is None:
            return
        with self.turn:
            self.waits[me] = ready
            self._choose()
            self._await_turn(me)

    def _await_turn(self, me: int) -> None:
        self.turn.wait_for(lambda: self.running == me or self.error is not None)
        if self.error is not None:
            raise _Ended
        del self.waits[me]

    def _choose(self) -> None:
        """Copies land or a group goes on, as drawn."""
        self.running = None
        while self.error is None:
            firsts = {group: at for at, (group, _) in reversed(list(enumerate(self.copies)))}
            choices = [("copy", at) for at in firsts.values()]
            choices += [("group", at) for at, ready in self.waits.items() if ready()]
            if not choices:
                if self.waits:
                    self.error = RuntimeError(f"groups {sorted(self.waits)} wait for ever")
                break
            kind, at = self.rng.choice(choices)
            if kind == "group":
                self.running = at
                break
            self.copies.pop(at)[1]()
        self.turn.notify_all()


class _Machine:
    """One program: its shared memory, its schedule, and the functions of Gluon that kernels here call."""

    def __init__(self, program: int, rng: random.Random) -> None:
        self.schedule = _Schedule(rng)
        self.memory: list[Shared] = []
        self.issued: dict[int | None, list[Pending]] = {}
        self.unsent: dict[int | None, list[Callable[[], None]]] = {}
        layout = SimpleNamespace(get_default_for=lambda *_: None)
        self.names: dict[str, Any] = {
            "gl": SimpleNamespace(
                **{name: getattr(torch, name) for name in ("float32", "int32", "int64")},
                **dict.fromkeys(("BlockedLayout", "SliceLayout", "NVMMADistributedLayout"), lambda *_, **__: None),
                **dict.fromkeys(("DotOperandLayout", "SwizzledSharedLayout"), lambda *_, **__: None),
                NVMMASharedLayout=layout, constexpr=None, static_range=range,
                program_id=lambda axis: Value((program, 0, 0)[axis]), arange=self._arange, full=self._full,
                load=self._load, store=self._store, where=self._where, convert_layout=lambda x, layout: x,
                exp2=lambda x: Value(x.x.exp2()), cdiv=lambda a, b: (a + (b - 1)) // b,
                max=lambda x, axis: Value(x.x.amax(axis)),
                maximum=lambda a, b: Value(torch.maximum(*operands(a, b))),
                minimum=lambda a, b: Value(torch.minimum(*operands(a, b))),
                allocate_shared_memory=self._allocate, thread_barrier=self.schedule.pause,
                warp_specialize=lambda groups, warps, registers: self.schedule.run(
                    [lambda function=function, args=args: function(*args) for function, args in groups]
                ),
            ),
            "mbarrier": SimpleNamespace(
                MBarrierLayout=lambda: "barriers", init=lambda barrier, count: barrier.init(count), wait=self._wait,
                arrive=self._arrive,
            ),
            "async_copy": SimpleNamespace(
                async_copy_global_to_shared=self._copy, mbarrier_arrive=self._arrive_with_copies
            ),
            "fence_async_shared": self._fence, "warpgroup_mma": self._multiply, "warpgroup_mma_wait": self._products,
        }  # fmt: skip

    @staticmethod
    def _arange(first: int, stop: int, layout: Any) -> Value:
        return Value(torch.arange(first, stop, dtype=torch.int32))

    @staticmethod
    def _full(shape: Sequence[int], x: float, dtype: torch.dtype, layout: Any) -> Value:
        return Value(torch.full(tuple(shape), x, dtype=dtype))

    @staticmethod
    def _where(mask: Value, a: Any, b: Any) -> Value:
        return Value(torch.where(mask.x, *operands(a, b)))

    @staticmethod
    def _load(pointer: Pointer, mask: Any = None, other: Any = None) -> Value:
        at, there = pointer.places(mask)
        x = pointer.memory[at]
        return Value(x.where(there, nonsense(x.dtype) if other is None else torch.tensor(other, dtype=x.dtype)))

    @staticmethod
    def _store(pointer: Pointer, value: Any, mask: Any = None) -> None:
        at, there = pointer.places(mask)
        x = tensor_of(value).to(pointer.memory.dtype).expand(at.shape)
        pointer.memory[at[there]] = x[there]

    def _allocate(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Any:
        if layout == "barriers":
            return Barriers(shape[0])
        self.memory.append(Shared.of(dtype, tuple(shape)))
        return self.memory[-1]

    def _wait(self, barrier: Barrier, parity: Any) -> None:
        parity = int(parity)
        self.schedule.pause(lambda: barrier.phase & 1 != parity)

    def _arrive(self, barrier: Barrier, count: int) -> None:
        barrier.arrive(count)
        self.schedule.pause()

    def _copy(self, to: Shared, pointer: Pointer, mask: Any = None) -> None:
        at, there = pointer.places(mask)
        assert at.shape == to.shape
        x = pointer.memory[at].where(there, torch.zeros((), dtype=to.dtype))
        self.unsent.setdefault(self.schedule.running, []).append(lambda: to.write(x))

    def _arrive_with_copies(self, barrier: Barrier, increment_count: bool) -> None:
        assert not increment_count
        me = self.schedule.running
        copies = self.unsent.pop(me, [])

        def land() -> None:
            for copy in copies:
                copy()
            barrier.arrive(GROUP_THREADS)

        assert me is not None
        self.schedule.copies.append((me, land))
        self.schedule.pause()

    def _fence(self) -> None:
        for part in self.memory:
            part.unfenced.fill_(False)

    def _multiply(self, a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Any:
        shared = [(x, x.written.clone()) for x in (a, b) if isinstance(x, Shared)]
        if any(bool(x.unfenced.any()) for x, _ in shared):
            raise RuntimeError("a product of shared memory without fence_async_shared after it was written")

        def compute() -> Tensor:
            if any(not torch.equal(x.written, before) for x, before in shared):
                raise RuntimeError("shared memory was written to while a product read it")
            product = a.x.float() @ b.x.float()
            if not use_acc:
                return product
            return product + (acc.value if isinstance(acc, Pending) else acc).x

        product = Pending(compute)
        self.issued.setdefault(self.schedule.running, []).append(product)
        return product if is_async else self._products(0, (product,))

    def _products(self, left: int, deps: Sequence[Any]) -> Any:
        """All products but the last `left` are done; deps as Values where they are."""
        self.schedule.pause()
        issued = self.issued.setdefault(self.schedule.running, [])
        while len(issued) > left:
            issued.pop(0).finish()
        done = [dep.value if isinstance(dep, Pending) and dep.value is not None else dep for dep in deps]
        return done[0] if len(done) == 1 else tuple(done)


class Emulated:
    """A kernel in Gluon that is launched like the kernel itself, and runs on tensors of the CPU."""

    def __init__(self, kernel: Any, seed: int = 0) -> None:
        self.kernel, self.seed, self.programs = kernel, seed, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **named: self._launch(grid[0], args, named)

    def _launch(self, programs: int, args: Sequence[Any], named: dict[str, Any]) -> None:
        self.programs += programs
        arguments = dict(zip(self.kernel.arg_names, args, strict=False))
        arguments |= {name: named[name] for name in self.kernel.arg_names if name in named}
        constants = {self.kernel.arg_names[at] for at in self.kernel.constexprs}
        for name, x in arguments.items():
            if isinstance(x, Tensor):
                arguments[name] = Pointer.to(x)
            elif name not in constants:
                arguments[name] = Value(x)
        rng = random.Random(self.seed)
        for program in range(programs):
            _function(self.kernel, _Machine(program, rng).names, {})(**arguments)


def _function(function: Any, names: dict[str, Any], made: dict[str, Any]) -> Any:
    """The Python function of a kernel or device function, which calls `names` in place of Gluon's."""
    namespace = dict(function.fn.__globals__) | names
    result = FunctionType(function.fn.__code__, namespace, function.fn.__name__, function.fn.__defaults__)
    made[function.fn.__name__] = result
    for name in function.fn.__code__.co_names:
        x = namespace.get(name)
        if hasattr(x, "is_gluon"):
            namespace[name] = made.get(x.fn.__name__) or _function(x, names, made)
        elif type(x).__name__ == "constexpr":
            namespace[name] = x.value
    return result
