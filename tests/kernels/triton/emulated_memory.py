"""What a kernel in Gluon sees, on tensors of the CPU: numbers in registers, addresses, shared memory, barriers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Value:
    """A number or tensor in registers, with Triton's rules: the wider of two types, integers divided towards zero."""

    def __init__(self, x: Any) -> None:
        self.x: Tensor = x if isinstance(x, Tensor) else torch.tensor(x, dtype=_type_of(x))

    shape = property(lambda self: tuple(self.x.shape))
    dtype = property(lambda self: self.x.dtype)
    type = property(lambda self: SimpleNamespace(layout=None))

    def to(self, dtype: torch.dtype) -> Value:
        return Value(self.x.to(dtype))

    def __getitem__(self, at: Any) -> Value:
        return Value(self.x[at])

    def __bool__(self) -> bool:
        return bool(self.x)

    def __index__(self) -> int:
        return int(self.x)


def _type_of(x: float) -> torch.dtype:
    return torch.bool if isinstance(x, bool) else torch.int32 if isinstance(x, int) else torch.float32


def operands(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Of one dtype; a number of Python's takes that of the other."""
    a, b = (x if isinstance(x, Value) else torch.tensor(x) for x in (a, b))
    if isinstance(a, Value) and isinstance(b, Value):
        common = torch.promote_types(a.dtype, b.dtype)
        return a.x.to(common), b.x.to(common)
    value, number = (a, b) if isinstance(a, Value) else (b, a)
    common = value.dtype if value.dtype.is_floating_point or not number.is_floating_point() else torch.float32
    return tensor_of(a).to(common), tensor_of(b).to(common)


def tensor_of(x: Any) -> Tensor:
    return x.x if isinstance(x, Value) else torch.as_tensor(x)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b, rounding_mode="trunc")


def _operator(of: Callable[[Tensor, Tensor], Tensor], *, swapped: bool = False) -> Callable[[Any, Any], Any]:
    def apply(a: Any, b: Any) -> Any:
        if isinstance(b, Pointer | Pending):
            return NotImplemented
        return Value(of(*(operands(b, a) if swapped else operands(a, b))))

    return apply


_ARITHMETIC = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "floordiv": _divide, "mod": torch.fmod,
    "and": torch.bitwise_and,
}  # fmt: skip
_COMPARISONS = {"lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge}
for _name, _of in (_ARITHMETIC | _COMPARISONS).items():
    setattr(Value, f"__{_name}__", _operator(_of))
    if _name in _ARITHMETIC:
        setattr(Value, f"__r{_name}__", _operator(_of, swapped=True))


class Pointer:
    """Addresses of elements of a tensor's memory."""

    def __init__(self, memory: Tensor, at: Value) -> None:
        self.memory, self.at = memory, at

    @staticmethod
    def to(x: Tensor) -> Pointer:
        size = x.untyped_storage().nbytes() // x.element_size()
        return Pointer(torch.as_strided(x.detach(), (size,), (1,), 0), Value(torch.tensor(x.storage_offset())))

    dtype = property(lambda self: SimpleNamespace(element_ty=self.memory.dtype))

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.at + other)

    __radd__ = __add__

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        """(index into memory, mask), both of the shape of what is moved. IndexError: outside of it."""
        at, there = torch.broadcast_tensors(self.at.x, torch.tensor(True) if mask is None else tensor_of(mask))
        if bool((there & ((at < 0) | (at >= self.memory.numel()))).any()):
            raise IndexError(f"addresses {int(at[there].min())} .. {int(at[there].max())} of {self.memory.numel()}")
        return at.where(there, 0), there


class Pending:
    """What a product will give; only warpgroup_mma_wait makes a Value of it, and a product may add to it."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self.compute, self.value = compute, None

    def finish(self) -> None:
        self.value = Value(self.compute())


class Shared:
    """A piece of shared memory: what it holds, how often that was written, and whether a fence has come since."""

    def __init__(self, x: Tensor, written: Tensor, unfenced: Tensor) -> None:
        self.x, self.written, self.unfenced = x, written, unfenced

    @staticmethod
    def of(dtype: torch.dtype, shape: tuple[int, ...]) -> Shared:
        x = nonsense(dtype).expand(shape).clone()
        return Shared(x, torch.zeros(shape, dtype=torch.int16), torch.zeros(shape, dtype=torch.bool))

    shape = property(lambda self: tuple(self.x.shape))
    dtype = property(lambda self: self.x.dtype)

    def _of(self, view: Callable[[Tensor], Tensor]) -> Shared:
        return Shared(*(view(part) for part in (self.x, self.written, self.unfenced)))

    def index(self, at: Any) -> Shared:
        at = int(at)
        if not 0 <= at < self.x.shape[0]:
            raise IndexError(f"index {at} of {self.x.shape[0]}")
        return self._of(lambda part: part[at])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return self._of(lambda part: part.narrow(dim, start, length))

    def permute(self, order: Sequence[int]) -> Shared:
        return self._of(lambda part: part.permute(*order))

    def load(self, layout: Any) -> Value:
        return Value(self.x.clone())

    def store(self, value: Value) -> None:
        self.write(value.x)

    def write(self, x: Tensor) -> None:
        self.x.copy_(x)
        self.written += 1
        self.unfenced.fill_(True)


class Barrier:
    """An mbarrier: a phase ends when all arrivals have come."""

    def __init__(self) -> None:
        self.count = self.left = self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.left = count

    def arrive(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise RuntimeError(f"{self.count - self.left} arrivals at a barrier of {self.count}")
        if not self.left:
            self.phase, self.left = self.phase + 1, self.count


class Barriers:
    """Shared memory of barriers, [n, 1]."""

    def __init__(self, n: int) -> None:
        self.each = [Barrier() for _ in range(n)]

    def index(self, at: Any) -> Barrier:
        return self.each[int(at)]


def nonsense(dtype: torch.dtype) -> Tensor:
    """What nobody has written: NaN, or an absurd integer."""
    return torch.tensor(torch.nan if dtype.is_floating_point else 0x3ADE5, dtype=dtype)
