"""What is measured: the shapes, most important first, and the work that each of them is. Pure; no tensors.

Letters: T tokens of the row, H query heads, K key/value heads, D head dim (of values too), C chunks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from moba_kernels import Full, MoBA, Pack

FORWARD_FLOPS = 4
"""Per pair, head and head dim: two products, a multiplication and an addition each."""
BACKWARD_FLOPS = 10
"""Five products: the scores once more, dP, dV, dQ, dK."""

Dtype = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Shape:
    """One row of the table."""

    documents: tuple[int, ...]
    """Lengths."""
    heads: int
    kv_heads: int
    dim: int
    chunk: int
    topk: int
    select: Literal["head", "group"] = "head"
    dtype: Dtype = "fp32"
    dense: bool = True
    """Is dense attention timed beside it? Where it is not, no speed-up is stated: no figure is extrapolated."""
    paper: bool = True
    """Is the paper's algorithm (the flash backend) timed beside it?"""

    @property
    def tokens(self) -> int:
        return sum(self.documents)

    @property
    def spec(self) -> MoBA:
        return MoBA(self.chunk, self.topk, self.select)

    @property
    def pack(self) -> Pack:
        edges = [0]
        for length in self.documents:
            edges.append(edges[-1] + length)
        return Pack(edges)

    @property
    def name(self) -> str:
        """Tells shapes apart, for people and for resuming."""
        parts = [f"T={self.tokens} H={self.heads} K={self.kv_heads} D={self.dim} {self.dtype} {self.chunk}/{self.topk}"]
        if self.select == "group":
            parts.append("group")
        if len(self.documents) > 1:
            parts.append(f"documents {'+'.join(map(str, self.documents))}")
        return " ".join(parts)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Shape:
        return cls(**{**fields, "documents": tuple(fields["documents"])})


def is_covered(shape: Shape) -> bool:
    """Do topk chunks cover every document? Then MoBA is full attention."""
    return max(shape.documents) <= shape.chunk * shape.topk


def planned_pairs(shape: Shape) -> int:
    """Of one query head."""
    return shape.pack.planned_pairs(shape.spec)


def causal_pairs(shape: Shape) -> int:
    """Of one query head, under full attention."""
    return shape.pack.planned_pairs(Full())


def pair_ratio(shape: Shape) -> float:
    """What sparsity alone could gain: causal pairs divided by planned pairs."""
    return causal_pairs(shape) / planned_pairs(shape)


def attention_flops(shape: Shape, pairs: int, *, backward: bool) -> int:
    """Forward, or forward and backward, over `pairs` pairs a head."""
    return (FORWARD_FLOPS + BACKWARD_FLOPS * backward) * pairs * shape.heads * shape.dim


def gate_flops(shape: Shape) -> int:
    """One product of each query with the mean of each candidate chunk: 2 * T * C/2 * H * D for one long document.

    Under select="group" the gate works on K summed queries. A covered document needs no gate.
    """
    routed = shape.heads if shape.select == "head" else shape.kv_heads
    candidates = 0
    for length in shape.documents:
        whole, tail = divmod(length, shape.chunk)
        if length > shape.chunk * shape.topk:
            candidates += shape.chunk * whole * (whole - 1) // 2 + tail * whole
    return 2 * candidates * routed * shape.dim


def floor_flops(shape: Shape, *, backward: bool) -> int:
    """The work that cannot be avoided: planned pairs and the gate."""
    return attention_flops(shape, planned_pairs(shape), backward=backward) + gate_flops(shape)


def small_of(shape: Shape, largest_chunk: int) -> Shape:
    """A shape of the same kind that the dense fp64 reference can check: its dtype, head dim, group size, selection and
    documents; fewer heads, chunks of at most `largest_chunk` tokens, a tail chunk."""
    chunk, topk = min(shape.chunk, largest_chunk), min(shape.topk, 4)
    kv_heads = min(shape.kv_heads, 2)
    tokens = chunk * topk if is_covered(shape) else chunk * (topk + 3)
    longest = max(shape.documents)
    documents = tuple(max(1, length * tokens // longest - chunk // 3) for length in shape.documents)
    return replace(
        shape,
        documents=documents,
        heads=kv_heads * shape.heads // shape.kv_heads,
        kv_heads=kv_heads,
        chunk=chunk,
        topk=topk,
    )


LONG_GATES = Shape((4300,), 4, 2, 64, 512, 4), Shape((4300,), 2, 1, 64, 16, 100)
"""On a CPU, backends take other ways for long rows (attend/fused.py): the gate must go them too."""


def cpu_shapes() -> tuple[Shape, ...]:
    """fp32 on a few cores. Dense attention and the paper's algorithm stop where one run would take minutes."""
    main = Shape((32768,), 8, 2, 64, 512, 4)
    long = Shape((1 << 20,), 2, 1, 64, 1024, 3, dense=False, paper=False)
    return (
        main,
        replace(main, documents=(8192,)),
        # Covered documents are full attention, and must cost no more than that.
        replace(main, documents=(8192,), chunk=2048),
        replace(main, documents=(2048, 2048, 1024, 3072), chunk=1024, topk=3),
        # Around the edge where sparsity begins to pay.
        replace(main, documents=(4096,)),
        replace(main, documents=(4096,), chunk=64, topk=8),
        replace(main, documents=(4096,), chunk=16, topk=64),
        # Most of many short chunks picked: the gate weighs most, and lists are least worth their while.
        replace(main, documents=(4096,), chunk=16, topk=100),
        Shape((8192,), 2, 1, 64, 16, 200),
        replace(main, documents=(8192,), chunk=128, topk=8),
        replace(main, documents=(4096, 2048, 1024, 1024), chunk=256, topk=3),
        # A million tokens, and what its time a token is compared with.
        replace(long, documents=(1 << 17,)),
        long,
        # Group sizes, selection, and the paper's own setting.
        replace(main, documents=(8192,), kv_heads=8),
        replace(main, documents=(8192,), kv_heads=1),
        replace(main, documents=(8192,), select="group"),
        replace(main, documents=(8192,), chunk=128, topk=8, select="group"),
        Shape((65536,), 2, 1, 64, 4096, 12),
    )


def cuda_shapes() -> tuple[Shape, ...]:
    """bf16 on one GPU. From 512K on with 8 query heads, so that dense attention stays affordable."""
    main = Shape((1 << 17,), 32, 8, 128, 512, 4, dtype="bf16")
    long = Shape((1 << 20,), 8, 2, 128, 512, 4, dtype="bf16")
    settings = ((4096, 12), (512, 4), (128, 8))
    return (
        *(replace(main, chunk=chunk, topk=topk) for chunk, topk in settings),
        # The setting that FlashMoBA publishes (arXiv 2511.11571): batch 2 of 64K tokens, 16 heads.
        Shape((65536, 65536), 16, 16, 128, 128, 8, dtype="bf16"),
        # The shape at which the original needs 33.5 GB.
        Shape((524288,), 8, 8, 128, 8192, 3, dtype="bf16"),
        replace(main, chunk=128, topk=8, select="group"),
        replace(main, select="group"),
        *(replace(main, documents=(65536,), chunk=chunk, topk=topk) for chunk, topk in settings),
        replace(main, kv_heads=32),
        replace(main, kv_heads=4),
        *(replace(main, documents=(8192,), chunk=chunk, topk=topk) for chunk, topk in settings),
        *(replace(long, chunk=chunk, topk=topk) for chunk, topk in settings),
        *(replace(main, documents=(32768,), chunk=chunk, topk=topk) for chunk, topk in settings),
        *(replace(long, documents=(1 << 19,), chunk=chunk, topk=topk) for chunk, topk in settings),
    )


def toy_shapes(dtype: Dtype) -> tuple[Shape, ...]:
    """Seconds anywhere: shows that the scripts work, says nothing about speed."""
    main = Shape((448,), 4, 2, 64, 64, 3, dtype=dtype)
    return (
        main,
        replace(main, documents=(190,)),
        replace(main, documents=(250, 1, 120), chunk=32, select="group"),
        replace(main, dense=False, paper=False, kv_heads=4),
    )
