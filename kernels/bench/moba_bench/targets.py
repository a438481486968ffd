"""What the figures should be, and whether they are. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from moba_kernels import MoBA

from .figures import GIB, MODES, Figures, Mode, figures_of
from .records import Record
from .shapes import Shape, is_covered

MILLION, SHORTER = 1 << 20, 1 << 17
ValueOf = Callable[[Record], float | None]


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured."""

    target: str
    limit: float
    at_least: bool
    value: float | None
    """The worst over the shapes that the target speaks of; None = none of them was measured."""
    where: str

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        word = {True: "met", False: "MISSED", None: "not measured"}[self.met]
        got = f": {self.value:.3g} ({self.where})" if self.value is not None else ""
        return f"{word:12} {self.target} {'>=' if self.at_least else '<='} {self.limit:g}{got}"


@dataclass(frozen=True)
class Target:
    """`value` of every shape that it speaks of, None elsewhere, must be at least (at most) `limit`."""

    text: str
    limit: float
    at_least: bool
    value: ValueOf

    def judge(self, records: Sequence[Record]) -> Verdict:
        values = [(self.value(record), str(record["name"])) for record in records]
        known = [(value, name) for value, name in values if value is not None]
        if not known:
            return Verdict(self.text, self.limit, self.at_least, None, "")
        return Verdict(self.text, self.limit, self.at_least, *(min(known) if self.at_least else max(known)))


def _of(mode: Mode, wanted: Callable[[Figures], bool], value: Callable[[Figures], float | None]) -> ValueOf:
    def value_of(record: Record) -> float | None:
        figures = figures_of(record, mode)
        return value(figures) if wanted(figures) else None

    return value_of


def _share_of_ratio(figures: Figures) -> float | None:
    return figures.share_of_ratio


def _times_dense(figures: Figures) -> float | None:
    return 1 / figures.speedup if figures.speedup is not None else None


def _is_main(tokens: int) -> Callable[[Figures], bool]:
    def wanted(figures: Figures) -> bool:
        s = figures.shape
        return (s.documents, s.heads, s.kv_heads, s.spec) == ((tokens,), 8, 2, MoBA(512, 4))

    return wanted


def _peak(tokens: int, unit: int, wanted: Callable[[Shape], bool]) -> ValueOf:
    def value_of(record: Record) -> float | None:
        shape = Shape.from_json(record["shape"])
        return record["memory"]["total"] / unit if shape.documents == (tokens,) and wanted(shape) else None

    return value_of


def _cpu_targets(records: Sequence[Record]) -> Iterator[Target]:
    """The torch backend on two CPU cores."""
    shares: tuple[tuple[Mode, float], ...] = (("both", 0.6), ("forward", 0.5))
    for tokens in (32768, 8192):
        for mode, limit in shares:
            text = f"T={tokens} 512/4, {MODES[mode]}, share of the pair ratio"
            yield Target(text, limit, True, _of(mode, _is_main(tokens), _share_of_ratio))
    slowest: tuple[tuple[Mode, float], ...] = (("both", 1.1), ("forward", 1.25))
    for mode, limit in slowest:
        covered = _of(mode, lambda f: is_covered(f.shape) and f.shape.tokens >= 4096, _times_dense)
        yield Target(f"covered documents, {MODES[mode]}, times dense", 1.05, False, covered)
        sparse = _of(mode, lambda f: f.ratio >= 1.4 and f.shape.tokens >= 4096, _times_dense)
        yield Target(f"pair ratio >= 1.4 and T >= 4096, {MODES[mode]}, times dense", limit, False, sparse)
    text = f"T={MILLION}, forward + backward, peak memory with inputs and gradients in GiB"
    yield Target(text, 4.5, False, _peak(MILLION, GIB, lambda shape: True))
    per_token = {f.shape.tokens: f.ours_s / f.shape.tokens for f in (figures_of(r, "both") for r in records)}
    base = per_token.get(SHORTER)

    def slower(figures: Figures) -> float | None:
        return figures.ours_s / figures.shape.tokens / base if base is not None else None

    text = f"T={MILLION}, forward + backward, time a token, times that at T={SHORTER}"
    yield Target(text, 1.5, False, _of("both", lambda f: f.shape.tokens == MILLION, slower))


def _cuda_targets() -> Iterator[Target]:
    """The triton backend on an H200."""

    def long(figures: Figures) -> bool:
        return max(figures.shape.documents) >= 1 << 17

    def fine(figures: Figures) -> bool:
        return max(figures.shape.documents) == 65536 and figures.shape.spec == MoBA(128, 8)

    def original(shape: Shape) -> bool:
        return (shape.heads, shape.dim, shape.spec) == (8, 128, MoBA(8192, 3))

    floor = _of("both", long, lambda f: f.share_of_floor)
    yield Target("T >= 128K, forward + backward, share of the work floor", 0.7, True, floor)
    coarse = _of("both", lambda f: long(f) and f.shape.chunk >= 2048, _share_of_ratio)
    yield Target("T >= 128K, chunk >= 2048, forward + backward, share of the pair ratio", 0.6, True, coarse)
    paper = _of("both", fine, lambda f: f.over_paper)
    yield Target("documents of 64K, 128/8, forward + backward, times as fast as the paper's", 7.4, True, paper)
    text = "T=524288 H=8 D=128 8192/3, forward + backward, peak memory in GB (1e9 bytes)"
    yield Target(text, 10.7, False, _peak(524288, 10**9, original))


def verdicts(records: Sequence[Record], device: str) -> list[Verdict]:
    """Every target of the device, judged on the shapes that were measured."""
    good = [record for record in records if not record.get("failed")]
    targets = _cpu_targets(good) if device == "cpu" else _cuda_targets()
    return [target.judge(good) for target in targets]
