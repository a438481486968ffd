"""Routing: which chunks each query picked. Picks only; the own chunk follows from the position.

Shape letters: T queries at hand, R routing heads (H for select="head", K for "group"), P stored picks (<= topk - 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import bad_argument
from .pack import Pack
from .ranges import TEMPORARY_ELEMENTS, ranges
from .spec import MoBA

NONE_UINT16 = 65535


def stored_picks(spec: MoBA, pack: Pack) -> int:
    """P: picks that any query of this pack can have; slots beyond it would always be empty."""
    return max(0, min(spec.num_picks, pack.chunks(spec.chunk_size).max_chunks_of_doc - 1))


class Routing:
    """The picks of the queries at hand.

    Picks must be chunks of the query's own document that end before its own chunk begins, each once. Those of the gate,
    `random_routing` and `from_chunk_ids` are, and so are parts of them; of others the first call that they are handed
    to makes sure, on a CPU. On other devices they are believed: looking would wait for the device.

    Args:
        picks_TRP: [T,R,P] chunk ids by falling gate score, -1 = none (any integer dtype; kept as uint16 while ids fit).
        spec, pack: what they were picked under.
        q_positions: [T] ascending global token indices of the queries; None = all tokens of the pack.
        complete: every query picked as many chunks as there are, topk - 1 at most. The gate and the random control say
            so of theirs; then a document that topk chunks cover is plain causal attention, and backends run it so.
    """

    def __init__(
        self,
        picks_TRP: Tensor,
        spec: MoBA,
        pack: Pack,
        q_positions: Tensor | None = None,
        *,
        complete: bool = False,
    ) -> None:
        if not isinstance(spec, MoBA) or not isinstance(pack, Pack):
            got = f"{spec!r} and {type(pack).__name__}"
            raise bad_argument("a routing is made under a MoBA spec and a Pack", got, "pass MoBA(...) and Pack(...)")
        if not isinstance(picks_TRP, Tensor):
            raise bad_argument("picks must be a tensor", type(picks_TRP).__name__, "see Routing.from_chunk_ids")
        if picks_TRP.dim() != 3:
            raise bad_argument("picks must be [T,R,P]", tuple(picks_TRP.shape), "see Routing.from_chunk_ids")
        if picks_TRP.shape[2] > spec.num_picks:
            fix = "leave out the own chunk, or raise topk"
            raise bad_argument(f"a query has at most {spec.num_picks} picks under {spec}", picks_TRP.shape[2], fix)
        if picks_TRP.is_floating_point():
            raise bad_argument("picks must be integers", picks_TRP.dtype, "see Routing.from_chunk_ids")
        if q_positions is not None:
            _check_positions(q_positions, pack)
        expected = pack.num_tokens if q_positions is None else q_positions.numel()
        if picks_TRP.shape[0] != expected:
            fix = "pass q_positions with one entry a row"
            raise bad_argument(f"picks must have {expected} rows", picks_TRP.shape[0], fix)
        self.spec = spec
        self.pack = pack
        self.q_positions = q_positions
        self.complete = complete
        self._sound = False
        narrow = pack.chunks(spec.chunk_size).num_chunks < NONE_UINT16
        if picks_TRP.dtype == torch.uint16:
            self._stored = picks_TRP
        elif narrow:  # -1 wraps to 65535; int16 is the step that all devices can narrow to
            self._stored = _narrowed(picks_TRP, torch.int16, NONE_UINT16 - 1).view(torch.uint16)
        else:
            self._stored = _narrowed(picks_TRP, torch.int32, 2**31 - 1)

    def trusted(self) -> Routing:
        """This routing, marked as one whose picks need no look: for those who made them."""
        self._sound = True
        return self

    def validate(self) -> None:
        """ValueError where a pick lies in another document, not before the own chunk, or stands twice; once, not again.

        Reads the device.
        """
        if self._sound:
            return
        geometry = self.pack.chunks(self.spec.chunk_size).tensors(self._stored.device)
        own_T = self.own_chunks
        first_T = geometry.first_chunk_of_doc[geometry.doc_C[own_T]]
        per_query = self._stored.shape[1] * self._stored.shape[2]
        for part in ranges(self.num_queries, TEMPORARY_ELEMENTS // max(1, per_query)):
            _validate(self.picks_of(part), first_T[part, None, None], own_T[part, None, None])
        self._sound = True

    def __getstate__(self) -> dict[str, Any]:  # torch 2.13 cannot unpickle a uint16 tensor
        return {**self.__dict__, "_stored": self.bits}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._stored = _unsigned(self._stored)

    @property
    def stored(self) -> Tensor:
        """[T,R,P] as kept: uint16 with 65535 = none, or int32 with -1 = none."""
        return self._stored

    @property
    def bits(self) -> Tensor:
        """`stored` with uint16 viewed as int16, since few operations take uint16: -1 = none in either width, and ids
        above 32767 are negative numbers below it. Back again by `of_bits`."""
        return self._stored.view(torch.int16) if self._narrow else self._stored

    @classmethod
    def of_bits(
        cls, bits: Tensor, spec: MoBA, pack: Pack, q_positions: Tensor | None = None, *, complete: bool = False
    ) -> Routing:
        """The routing whose `bits` these are; the other arguments as for a Routing."""
        return cls(_unsigned(bits), spec, pack, q_positions, complete=complete)

    @staticmethod
    def unwritten(num_queries: int, routed: int, kept: int, spec: MoBA, pack: Pack, device: torch.device) -> Tensor:
        """Memory for the `bits` of a routing, [T,R,P]: int16 while ids fit, else int32."""
        dtype = torch.int16 if pack.chunks(spec.chunk_size).num_chunks < NONE_UINT16 else torch.int32
        return torch.empty((num_queries, routed, kept), dtype=dtype, device=device)

    def picks_of(self, part: slice) -> Tensor:
        """`picks` of some consecutive queries."""
        return _decoded(self._stored[part])

    @property
    def num_queries(self) -> int:
        return int(self._stored.shape[0])

    @property
    def num_routed_heads(self) -> int:
        return int(self._stored.shape[1])

    @property
    def picks(self) -> Tensor:
        """[T,R,P] int32, -1 = none."""
        return _decoded(self._stored)

    def picks_of_heads(self, num_heads: int) -> Tensor:
        """[T,H,P] int32: under select="group" every query head of a KV head repeats the group's picks."""
        return self.picks.repeat_interleave(num_heads // max(1, self.num_routed_heads), dim=1)

    @property
    def own_chunks(self) -> Tensor:
        """[T] int64: the chunk of each query."""
        own = self.pack.chunks(self.spec.chunk_size).tensors(self._stored.device).chunk_of_token_T
        return own if self.q_positions is None else own[self.q_positions.to(own.device)]

    @property
    def chunk_ids(self) -> Tensor:
        """[T,R,topk] int32: slot 0 the own chunk, then picks by falling gate score, -1 = none."""
        num_queries, num_heads, kept = self._stored.shape
        ids = torch.full((num_queries, num_heads, self.spec.topk), -1, dtype=torch.int32, device=self._stored.device)
        ids[:, :, 0] = self.own_chunks.to(torch.int32)[:, None]
        ids[:, :, 1 : 1 + kept] = self.picks
        return ids

    def select(self, rows: Tensor) -> Routing:
        """The routing of some of the queries at hand; rows: [n] ascending int64 indices into them."""
        device = self._stored.device
        positions = rows.to(device) if self.q_positions is None else self.q_positions[rows.to(self.q_positions.device)]
        return self._part(self.bits[rows.to(device)], positions)

    def of_kv_heads(self, first: int, stop: int, num_kv_heads: int) -> Routing:
        """The routing of the query heads that read KV heads first .. stop - 1 of num_kv_heads; shares storage."""
        heads_of_kv = self.num_routed_heads // num_kv_heads  # H/K for select="head", 1 for "group"
        return self._part(self.bits[:, first * heads_of_kv : stop * heads_of_kv], self.q_positions)

    def in_slots(self, kept: int) -> Routing:
        """The same picks in `kept` slots a query, which must hold them (`stored_picks` does)."""
        if self._stored.shape[2] == kept:
            return self
        bits = self.bits
        if bits.shape[2] > kept:
            bits = bits.gather(2, (bits == -1).to(torch.uint8).argsort(dim=2, stable=True)[:, :, :kept])
        else:
            bits = torch.nn.functional.pad(bits, (0, kept - bits.shape[2]), value=-1)
        return self._part(bits, self.q_positions)

    def _part(self, bits: Tensor, q_positions: Tensor | None) -> Routing:
        part = Routing.of_bits(bits, self.spec, self.pack, q_positions, complete=self.complete)
        return part.trusted() if self._sound else part

    @property
    def _narrow(self) -> bool:
        return self._stored.dtype == torch.uint16

    def equals(self, other: Routing) -> bool:
        """Same queries and the same picks in the same order. Reads the device."""
        return self.chunk_ids.shape == other.chunk_ids.shape and bool(torch.equal(self.chunk_ids, other.chunk_ids))

    @classmethod
    def from_chunk_ids(
        cls,
        chunk_ids: Tensor,
        spec: MoBA,
        pack: Pack,
        q_positions: Tensor | None = None,
        *,
        validate: bool = False,
    ) -> Routing:
        """A forced routing from ids laid out as `chunk_ids`: [T,R,<=topk], slot 0 the own chunk, -1 = none.

        Raises ValueError when slot 0 is not the own chunk, or a pick lies in another document, not before the own
        chunk, or stands twice. Ids on the CPU are always looked at; validate=True also reads those on a device.
        """
        if chunk_ids.dim() != 3 or not 1 <= chunk_ids.shape[2] <= spec.topk:
            fix = "pass ids laid out as Routing.chunk_ids"
            raise bad_argument(f"chunk_ids must be [T,R,1..{spec.topk}]", tuple(chunk_ids.shape), fix)
        routing = cls(chunk_ids[:, :, 1:], spec, pack, q_positions)
        if validate or chunk_ids.device.type == "cpu":
            if bool((chunk_ids[:, :, 0].long() != routing.own_chunks[:, None]).any()):
                raise bad_argument("slot 0 of chunk_ids must be the own chunk", "another chunk", FIX_OF_PICKS)
            routing.validate()
        return routing


FIX_OF_PICKS = "pick chunks of the query's own document that end before its own chunk begins, each once"


def _unsigned(bits: Tensor) -> Tensor:
    return bits.view(torch.uint16) if bits.dtype == torch.int16 else bits


def _decoded(stored: Tensor) -> Tensor:
    """int32, -1 = none, of picks as they are stored."""
    if stored.dtype != torch.uint16:
        return stored
    # As int16 -1 = none stays; ids above 32767 come back as negative numbers below -1.
    signed = stored.view(torch.int16).to(torch.int32)
    return signed.add_((signed < -1).to(torch.int32).mul_(65536))


def _narrowed(picks_TRP: Tensor, dtype: torch.dtype, no_chunk: int) -> Tensor:
    """In `dtype`, a range at a time. What is no chunk must not wrap to one: it becomes -2, or `no_chunk`."""
    narrow = torch.empty_like(picks_TRP, dtype=dtype)  # the strides stay those of the picks
    for part in ranges(len(picks_TRP), TEMPORARY_ELEMENTS // max(1, picks_TRP.shape[1] * picks_TRP.shape[2])):
        narrow[part] = picks_TRP[part].long().clamp(-2, no_chunk)
    return narrow


def _check_positions(q_positions: Tensor, pack: Pack) -> None:
    """Those on the host are tokens of the row."""
    fix = "pass global token indices, or None for all tokens of the pack"
    if q_positions.dtype != torch.int64 or q_positions.dim() != 1:
        got = f"{q_positions.dtype} {tuple(q_positions.shape)}"
        raise bad_argument("q_positions must be int64 [T]", got, fix)
    if q_positions.device.type == "cpu" and q_positions.numel():
        tokens = q_positions.numpy()
        low, high = tokens.min(), tokens.max()
        if low < 0 or high >= pack.num_tokens:
            raise bad_argument(f"q_positions must lie within 0..{pack.num_tokens - 1}", f"{low}..{high}", fix)


def _validate(picks_QRP: Tensor, first_Q11: Tensor, own_Q11: Tensor) -> None:
    ordered = picks_QRP.sort(-1).values
    repeated = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != -1)
    outside = ((picks_QRP < first_Q11) | (picks_QRP >= own_Q11)) & (picks_QRP != -1)
    if bool(outside.any()):
        raise bad_argument("a pick is not a candidate", picks_QRP[outside][:4].tolist(), FIX_OF_PICKS)
    if bool(repeated.any()):
        got = ordered[..., 1:][repeated][:4].tolist()
        raise bad_argument("a chunk is picked twice by one query", got, FIX_OF_PICKS)


def _mix(state: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al., 2014) on wrapping int64; shifts are made logical by masking."""
    state = (state ^ ((state >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    state = (state ^ ((state >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return state ^ ((state >> 31) & 0x1FFFFFFFF)


def _wrapped(value: int) -> int:
    """`value` modulo 2^64 as a signed 64-bit integer."""
    return (value + 2**63) % 2**64 - 2**63


def random_routing(
    spec: MoBA,
    *,
    pack: Pack,
    num_heads: int,
    num_kv_heads: int,
    q_positions: Tensor | None = None,
    seed: int,
    head_offset: int = 0,
    device: torch.device | str,
) -> Routing:
    """A control experiment: as many picks as MoBA would make, uniform over the candidates, without replacement.

    A pure function of (seed, global query position, head): any sharding of the queries gives the same picks, and so
    does one of the heads if each part says as head_offset how many heads that pick lie before it.
    Floyd's subset sampling (Bentley, CACM 30(9), 1987): for j = n-P .. n-1 draw r <= j, take r, or j when r is taken.
    Returns a Routing of [T,R,P] picks on `device`.
    """
    if not isinstance(spec, MoBA):
        raise bad_argument("random_routing needs a MoBA spec", repr(spec), "pass MoBA(chunk_size, topk)")
    if not isinstance(pack, Pack):
        raise bad_argument("pack must be a Pack", type(pack).__name__, "pass moba_kernels.Pack(cu_seqlens)")
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        got = f"{num_heads} query heads, {num_kv_heads} KV heads"
        raise bad_argument("query heads must be a multiple of KV heads", got, "make H % K == 0")
    device = torch.device(device)
    geometry = pack.chunks(spec.chunk_size).tensors(device)
    token_T = torch.arange(pack.num_tokens, device=device) if q_positions is None else q_positions.to(device).long()
    own_T = geometry.chunk_of_token_T[token_T]
    first_T = geometry.first_chunk_of_doc[geometry.doc_C[own_T]] if own_T.numel() else own_T
    routed, kept = spec.routed_heads(num_heads, num_kv_heads), stored_picks(spec, pack)
    candidates_T1 = (own_T - first_T)[:, None]
    head_R = head_offset + torch.arange(routed, device=device)
    stream_TR = _mix(_mix(_mix(token_T.new_full((1, 1), _wrapped(seed))) + token_T[:, None]) + head_R)
    picks = torch.full((token_T.numel(), routed, kept), -1, dtype=torch.int64, device=device)
    for i in range(kept):
        upper_T1 = candidates_T1 - kept + i  # j of Floyd's algorithm where there are more candidates than picks
        draw = (_mix(stream_TR + _wrapped((i + 1) * 0x9E3779B97F4A7C15)) >> 32) & 0x7FFFFFFF
        drawn = (draw * (upper_T1 + 1).clamp_min(1)) >> 31
        taken = (picks[:, :, :i] == drawn[:, :, None]).any(-1)
        sampled = torch.where(taken, upper_T1, drawn)
        every = torch.where(candidates_T1 > i, candidates_T1 - 1 - i, -1)
        picks[:, :, i] = torch.where(candidates_T1 > kept, sampled, every)
    picks = torch.where(picks >= 0, picks + first_T[:, None, None], picks)
    return Routing(picks, spec, pack, q_positions, complete=True).trusted()
