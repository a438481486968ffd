"""Transport "pull": N ranks equal one rank, and what travels is what routing asked for, to the byte.

Shape letters: T tokens, H query heads, K key/value heads, N ranks.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moba_kernels import Full, MoBA, Pack, PairTally, Partial, Routing, random_routing, route
from moba_train.parallel import pull, pull_plan
from moba_train.parallel.cut import Cut
from moba_train.parallel.emulation import ThreadGroup, run_threads
from moba_train.parallel.parts import parts_of, pulled_tokens
from moba_train.parallel.pull import Pull
from moba_train.parallel.pull_plan import HostCopy
from moba_train.parallel.shard import Layout
from moba_train.parallel.traffic import Traffic
from moba_train.parallel.transport import ShardedCall, row_cut
from moba_train.parallel.wire import Group, Wire
from tests.distributed import run_ranks
from tests.parallel.sharded_case import (
    CASES,
    LAYOUTS,
    Case,
    LoggingWire,
    NoHostRead,
    check_case,
    error_of,
    inputs_of,
    my_shard,
    one_rank,
    sharded,
)

STRADDLING = Case("a chunk over several ranks, more KV heads than bits of a byte", (0, 9, 80), MoBA(40, 2), (12, 12))


def _whole_routing(case: Case) -> Routing | None:
    q, k, _, _ = inputs_of(case)
    return route(q, k, case.spec, cu_seqlens=Pack(case.cu_seqlens)) if isinstance(case.spec, MoBA) else None


def _check_cases(group: Group, cases: tuple[Case, ...]) -> None:
    for layout in LAYOUTS:
        for case in cases:
            check_case(case, group, layout, torch.float32, floor=2e-6, transport="pull")
        check_case(CASES[1], group, layout, torch.bfloat16, floor=1e-3, transport="pull")


def _gloo_cases(rank: int, n: int) -> list[str]:
    group = dist.group.WORLD
    assert group is not None
    _check_cases(group, CASES if n == 3 else (CASES[1], CASES[3], CASES[6], CASES[7], STRADDLING))
    return [_wrong_bytes(case, group, layout) for case in (CASES[1], CASES[6]) for layout in LAYOUTS]


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_output_gradients_and_routing_equal_one_rank_and_bytes_are_those_that_routing_asked_for(num_ranks: int) -> None:
    assert run_ranks(_gloo_cases, num_ranks) == [[""] * 4] * num_ranks


@pytest.mark.parametrize("num_ranks", [1, 8])
def test_one_and_eight_ranks_equal_one_rank_though_some_hold_no_token(num_ranks: int) -> None:
    run_threads(lambda group: _check_cases(group, (*CASES, STRADDLING)), num_ranks)


def _same_bits(group: ThreadGroup) -> None:
    for integers in (False, True):
        case = Case("ties of small integers", (0, 64, 96, 101), MoBA(4, 3))
        inputs = inputs_of(case, integers=integers)
        got, routing = sharded(case, inputs, group, "zigzag", torch.float32, transport="pull")
        again, _ = sharded(case, inputs, group, "zigzag", torch.float32, transport="pull")
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
        expected, whole = one_rank(case, inputs, None, torch.float32, "torch")
        assert routing is not None and whole is not None
        assert torch.equal(routing.chunk_ids, my_shard(whole.chunk_ids, group.rank(), group.size(), "zigzag"))
        for x, one in zip(got, expected, strict=True):
            assert error_of(x, my_shard(one, group.rank(), group.size(), "zigzag").double()) < 1e-4


def test_a_second_run_gives_the_same_bits_and_ties_are_broken_alike() -> None:
    run_threads(_same_bits, 5)


@dataclass(frozen=True)
class _Prepared:
    """One rank's call of a transport, below `context_attend`."""

    inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    call: ShardedCall

    @staticmethod
    def of(case: Case, wire: Wire, layout: Layout, routing: Routing | None) -> _Prepared:
        """routing: of the whole row."""
        rank, n, pack = wire.group.rank(), wire.group.size(), Pack(case.cu_seqlens)
        q, k, v, dout = (my_shard(x, rank, n, layout) for x in inputs_of(case))
        cut = row_cut(pack, n, layout)
        positions = torch.from_numpy(cut.positions(rank))
        mine = None if routing is None else routing.select(positions)
        return _Prepared((q, k, v, dout), ShardedCall(case.spec, pack, cut, rank, wire, positions, mine, None, "auto"))

    def run(self, transport: Pull) -> tuple[Tensor, ...]:
        """out, lse, dq, dk, dv."""
        q, k, v, dout = self.inputs
        out, lse, saved, kept = transport.forward(q, k, v, self.call, PairTally())
        return out, lse, *transport.backward(dout, (dout * out).sum(-1), saved, kept, self.call)


def _check_call(prepared: _Prepared, transport: Pull, whole: list[Tensor]) -> None:
    """out, lse, dq, dk and dv of the shard are those of the whole row."""
    call = prepared.call
    for got, expected in zip(prepared.run(transport), whole, strict=True):
        mine = expected[torch.from_numpy(call.cut.positions(call.rank))]
        assert error_of(got, mine.double()) < 1e-5, (call.spec, call.rank)


def _check_strides(group: ThreadGroup) -> None:
    for case in (CASES[1], CASES[6]):
        plain, routing = one_rank(case, inputs_of(case), None, torch.float32, "torch")
        prepared, transport = _Prepared.of(case, Wire(group), "zigzag", routing), Pull(stride_bytes=1)
        assert transport.strides(*prepared.inputs[1:3], prepared.call) == [(0, 1), (1, 2)]
        _check_call(prepared, transport, plain)


def test_one_kv_head_at_a_time_gives_the_same() -> None:
    run_threads(_check_strides, 3)


def test_strides_of_kv_heads_follow_from_the_row_alone() -> None:
    k, v = torch.zeros(1, 6, 8), torch.zeros(1, 6, 4)
    bytes_of_token = (8 + 4) * 4

    def strides(cu_seqlens: list[int], layout: Layout, stride_bytes: int) -> list[tuple[int, int]]:
        pack, group = Pack(cu_seqlens), ThreadGroup.__new__(ThreadGroup)
        call = ShardedCall(Full(), pack, row_cut(pack, 4, layout), 0, Wire(group), torch.arange(0), None, None, "auto")
        return Pull(stride_bytes).strides(k, v, call)

    assert strides([0, 1000], "zigzag", 4000 * bytes_of_token) == [(0, 4), (4, 6)]
    assert strides([0, 10, 1000], "zigzag", 4000 * bytes_of_token) == [(0, 4), (4, 6)]
    assert strides(list(range(0, 1001, 50)), "zigzag", 300 * bytes_of_token) == [(0, 3), (3, 6)]  # 2 pieces, 50 tokens
    assert strides(list(range(0, 1001, 50)), "contiguous", 300 * bytes_of_token) == [(0, 6)]


def _wanted(case: Case, routing: Routing | None, cut: Cut) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """[N,K,T]: keys that a rank's queries attend to and that it does not hold, token by token."""
    num_tokens, num_kv_heads = cut.num_tokens, case.heads[1]
    heads_of_kv = 1 if routing is None else routing.num_routed_heads // num_kv_heads
    chunk_T = np.zeros(num_tokens, dtype=np.int64)
    size = case.spec.chunk_size if isinstance(case.spec, MoBA) else num_tokens
    starts = [s for a, b in zip(case.cu_seqlens, case.cu_seqlens[1:], strict=False) for s in range(a, b, size)]
    for chunk, start in enumerate(starts):
        chunk_T[start:] = chunk
    wanted = np.zeros((cut.num_ranks, num_kv_heads, num_tokens), dtype=bool)
    for rank in range(cut.num_ranks):
        local = cut.positions(rank)
        for token in local:
            wanted[rank] |= (chunk_T == chunk_T[token]) & (np.arange(num_tokens) <= token)
            for head, picks in enumerate(() if routing is None else routing.picks[token].numpy()):
                wanted[rank, head // heads_of_kv] |= np.isin(chunk_T, picks)
        wanted[rank][:, local] = False
    return wanted


def _expected_traffic(case: Case, routing: Routing | None, cut: Cut, rank: int) -> tuple[Counter[str], Counter[str]]:
    """(sent, received) bytes of one rank by phase, fp32."""
    wanted, owner_T = _wanted(case, routing, cut), cut.owner_of_token()
    out, into = int(wanted[:, :, owner_T == rank].sum()), int(wanted[rank].sum())
    of_row = 4 * sum(case.dims)
    sent = Counter({"forward/kv": out * of_row, "backward/kv": out * of_row, "backward/dkv": into * of_row})
    received = Counter({"forward/kv": into * of_row, "backward/kv": into * of_row, "backward/dkv": out * of_row})
    if routing is not None and routing.picks.shape[2]:
        chunk_T = routing.pack.chunks(routing.spec.chunk_size).chunk_of_token_T
        edges = np.append(True, (np.diff(chunk_T) != 0) | (np.diff(owner_T) != 0))
        parts_N = np.bincount(owner_T[edges], minlength=cut.num_ranks)
        bytes_N = -(-case.heads[1] * parts_N // 8)
        sent["forward/request"] = int(bytes_N.sum() - bytes_N[rank])
        received["forward/request"] = int((cut.num_ranks - 1) * bytes_N[rank])
    return sent, received


def _wrong_bytes(case: Case, group: Group, layout: Layout, routing: Routing | None = None) -> str:
    """What is wrong with the bytes that this rank counted; "" = nothing."""
    routing = _whole_routing(case) if routing is None else routing
    traffic = Traffic()
    prepared = _Prepared.of(case, Wire(group, traffic), layout, routing)
    prepared.run(Pull())
    cut = prepared.call.cut
    sent, received = _expected_traffic(case, routing, cut, group.rank())
    if (traffic.sent, traffic.received) != (sent, received):
        return f"{case.name}, {layout}, rank {group.rank()}: {traffic}, expected {sent}, {received}"
    gathered = (cut.num_ranks - 1) * cut.longest * case.heads[1] * sum(case.dims) * 4
    assert max(sent["forward/kv"], received["forward/kv"]) <= gathered
    return ""


@pytest.mark.parametrize("num_ranks", [3, 8])
def test_bytes_are_those_that_routing_asked_for(num_ranks: int) -> None:
    def rank_main(group: ThreadGroup) -> list[str]:
        cases = (*CASES[:8], STRADDLING)
        return [_wrong_bytes(case, group, layout) for case in cases for layout in LAYOUTS]

    assert {wrong for of_rank in run_threads(rank_main, num_ranks) for wrong in of_rank} == {""}


def test_a_frozen_or_random_routing_moves_what_it_asks_for_and_gives_one_ranks_output() -> None:
    case = CASES[1]
    assert isinstance(case.spec, MoBA)
    pack = Pack(case.cu_seqlens)
    drawn = random_routing(case.spec, pack=pack, num_heads=4, num_kv_heads=2, seed=5, device="cpu")
    exact, _ = one_rank(case, inputs_of(case), drawn, torch.float64, "reference")

    def rank_main(group: ThreadGroup) -> str:
        _check_call(_Prepared.of(case, Wire(group), "zigzag", drawn), Pull(), exact)
        return _wrong_bytes(case, group, "zigzag", drawn)

    assert run_threads(rank_main, 4) == [""] * 4


def test_ranks_that_pick_nothing_remote_move_no_keys() -> None:
    case = Case("two chunks a rank", (0, 64), MoBA(8, 3), (2, 2))
    nothing = Routing(torch.full((64, 2, 2), -1), case.spec, Pack(case.cu_seqlens))  # type: ignore[arg-type]
    no_slots = Routing(nothing.picks[:, :, :0], case.spec, nothing.pack)  # type: ignore[arg-type]
    one_of_them = nothing.picks.clone()
    one_of_them[63, 1, 0] = 0  # the last rank's last token picks the first chunk for the second head
    one_pick = Routing(one_of_them, case.spec, nothing.pack)  # type: ignore[arg-type]

    def rank_main(group: ThreadGroup) -> list[dict[str, int]]:
        received = []
        for routing in (no_slots if group.rank() == 1 else nothing, one_pick):
            traffic = Traffic()
            exact, _ = one_rank(case, inputs_of(case), routing, torch.float64, "reference")
            _check_call(_Prepared.of(case, Wire(group, traffic), "contiguous", routing), Pull(), exact)
            received.append(dict(+traffic.received))
        return received

    request, chunk = {"forward/request": 3}, 8 * 16 * 4
    quiet = [request, request]
    first = [request, {**request, "backward/dkv": chunk}]
    last = [request, {**request, "forward/kv": chunk, "backward/kv": chunk}]
    assert run_threads(rank_main, 4) == [first, quiet, quiet, last]


def test_full_attention_and_own_chunks_alone_ask_nobody_and_pull_what_lies_before() -> None:
    one_document = Case("one document", (0, 64), Full(), (2, 2))
    short_documents = Case("short documents", tuple(range(0, 65, 4)), Full(), (2, 2))
    own_chunks = Case("own chunks", (0, 64), MoBA(16, 1), (2, 2))

    def rank_main(group: ThreadGroup) -> list[int]:
        counted = []
        for case in (one_document, short_documents, own_chunks):
            for layout in LAYOUTS:
                traffic = Traffic()
                _Prepared.of(case, Wire(group, traffic), layout, _whole_routing(case)).run(Pull())
                assert set(traffic.sent) == {"forward/kv", "backward/kv", "backward/dkv"}
                counted.append(traffic.received["forward/kv"] // (2 * 16 * 4))
        return counted

    tokens = np.array(run_threads(rank_main, 4)).T.tolist()
    nothing = [0, 0, 0, 0]
    zigzag = [48, 40, 32, 24]  # all before the last piece, less the first piece, which is held: 64 - 8 - 8 - 8r
    contiguous = [0, 16, 32, 48]
    half_a_chunk = [8, 8, 8, 8]  # chunks of two pieces: the later one wants the earlier one
    assert tokens == [zigzag, contiguous, nothing, nothing, half_a_chunk, nothing]


@pytest.mark.parametrize(("num_ranks", "layout"), [(8, "zigzag"), (32, "contiguous")])
def test_rows_pulled_under_uniform_routing_are_those_of_the_closed_form(num_ranks: int, layout: Layout) -> None:
    case = Case("uniform", (0, 100, 100, 1800, 2048), MoBA(12, 2), (8, 4), (1, 1))
    assert isinstance(case.spec, MoBA)
    pack = Pack(case.cu_seqlens)
    drawn = random_routing(case.spec, pack=pack, num_heads=8, num_kv_heads=4, seed=7, device="cpu")

    def rank_main(group: ThreadGroup) -> float:
        traffic = Traffic()
        prepared = _Prepared.of(case, Wire(group, traffic), layout, drawn)
        q, k, v, _ = prepared.inputs
        Pull().forward(q, k, v, prepared.call, PairTally())
        return traffic.received["forward/kv"] / (2 * 4 * 4)

    received, cut = np.array(run_threads(rank_main, num_ranks)), row_cut(pack, num_ranks, layout)
    expected = pulled_tokens(parts_of(cut, pack.cu_seqlens, case.spec), draws=2).sum(0)
    everything = pulled_tokens(parts_of(cut, pack.cu_seqlens, Full()), draws=0).sum(0)
    assert received.sum() == pytest.approx(expected.sum(), rel=0.02)
    assert np.abs(received - expected).max() < 0.15 * expected.mean()
    assert expected.sum() < 0.8 * everything.sum()  # routing does decide here


@pytest.mark.parametrize("select", ["head", "group"])
def test_picked_chunks_are_marked_whatever_the_number_of_picks_at_a_time(
    monkeypatch: pytest.MonkeyPatch, select: Literal["head", "group"]
) -> None:
    spec, pack = MoBA(1, 4, select), Pack([0, 40, 100])
    everyone = random_routing(spec, pack=pack, num_heads=4, num_kv_heads=2, seed=3, device="cpu")
    routing = everyone.select(torch.arange(50, 61))
    expected = torch.zeros(2, 100, dtype=torch.bool)
    for row in routing.picks:
        for head, picks in enumerate(row):
            expected[head * 2 // len(row), picks[picks >= 0].long()] = True
    assert 0 < expected.sum() < 200
    for at_once in (1, 25, 1 << 20):
        monkeypatch.setattr(pull_plan, "PICKS_AT_ONCE", at_once)
        assert torch.equal(pull_plan.picked_chunks(routing, 2, 100), expected)


def _logs(case: Case, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What rank 1 of 2 does in turn, forward and backward, one KV head at a time; attention itself is left out."""
    logs: tuple[list[str], ...] = ([], [])
    rank_of_thread: dict[int, int] = {}

    def log(what: str) -> None:
        logs[rank_of_thread[threading.get_ident()]].append(what)

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any, q_positions: Tensor, **__: Any) -> Partial:
        log(f"{q.shape[0]} queries, {q.shape[1]} heads")
        return Partial(q.new_zeros((*q.shape[:2], v.shape[2])), q.new_zeros(q.shape[:2]))

    def attend_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        log(f"gradients, {q.shape[1]} heads")
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

    def read(self: HostCopy) -> Any:
        log("read sizes")
        return self.host.numpy()

    monkeypatch.setattr(pull, "attend_partial", attend)
    monkeypatch.setattr(pull, "attend_partial_backward", attend_backward)
    monkeypatch.setattr(HostCopy, "wait", read)
    routing = _whole_routing(case)

    def rank_main(group: ThreadGroup) -> None:
        rank_of_thread[threading.get_ident()] = group.rank()
        prepared = _Prepared.of(case, LoggingWire(group, logs=logs), "contiguous", routing)
        q, k, v, dout = prepared.inputs
        with NoHostRead():  # type: ignore[no-untyped-call]
            _, lse, saved, kept = Pull(stride_bytes=1).forward(q, k, v, prepared.call, PairTally())
            Pull(stride_bytes=1).backward(dout, lse, saved, kept, prepared.call)

    run_threads(rank_main, 2)
    return logs[1]


REST = [
    *("start forward/kv", "32 queries, 2 heads", "wait forward/kv", "32 queries, 2 heads"),
    *("start backward/kv", "gradients, 4 heads", "wait backward/kv"),
    *("start backward/kv", "gradients, 2 heads", "start backward/dkv"),
    *("wait backward/kv", "gradients, 2 heads", "wait backward/dkv", "start backward/dkv", "wait backward/dkv"),
]


def test_exchanges_start_before_what_does_not_need_them_and_the_host_reads_sizes_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picks = _logs(Case("picks", (0, 64), MoBA(8, 4)), monkeypatch)
    asking = ["start forward/request", "wait forward/request", "16 queries, 4 heads", "read sizes"]
    second_half = ["start forward/kv", "16 queries, 4 heads", "wait forward/kv"]
    assert picks == [*asking, *second_half, *REST]
    known = ["start forward/kv", "32 queries, 4 heads", "wait forward/kv"]
    assert _logs(Case("full", (0, 64), Full()), monkeypatch) == [*known, *REST]


def test_rows_and_heads_are_found_where_their_product_is_past_2_to_the_31() -> None:
    num_heads, num_tokens = 4096, (1 << 20) + 3
    pack = Pack([0, num_tokens - 1, num_tokens])  # the last token is a document, and so a part, of its own
    cut = row_cut(pack, 2, "contiguous")

    def rank_main(group: ThreadGroup) -> None:
        spec, nothing = MoBA(1 << 17, 2), torch.zeros(0)
        call = ShardedCall(spec, pack, cut, group.rank(), Wire(group), nothing, None, None, "auto")
        geometry = pull_plan._geometry(call, torch.device("cpu"))
        last_KP = torch.zeros(num_heads, len(geometry.start_P), dtype=torch.bool)
        last_KP[:, -1] = True
        of_rank_0, of_rank_1 = (np.array([[one] * num_heads, [not one] * num_heads], np.int64) for one in (True, False))
        asked_NKQ = torch.stack([last_KP[:, geometry.held], torch.zeros_like(last_KP[:, geometry.held])])
        plan = pull_plan.PullPlan(geometry, last_KP, asked_NKQ, wanted_NK=of_rank_1, asked_NK=of_rank_0)
        if group.rank() == 1:
            row = (1 << 19) * num_heads  # of the last token of this shard
            assert plan.sent_index(0, num_heads).tolist() == [row + head for head in range(num_heads)]
        else:
            rows, tokens = plan.pulled_index(num_heads - 1, plan.received_places(0, num_heads)[-1])
            assert (rows.tolist(), tokens.tolist()) == ([num_heads - 1], [num_tokens - 1])

    run_threads(rank_main, 2)
