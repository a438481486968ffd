"""The cost model: seconds worked out by hand, choices that must come out as they do, and the same choice everywhere."""

from __future__ import annotations

import json
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moba_kernels import Full, MoBA, Pack
from moba_kernels.pack import planned_pairs_of_lengths
from moba_train.config.schema import HardwareConfig
from moba_train.parallel import context_attend
from moba_train.parallel.cost import choose_transport, compute_pairs, exchange_seconds, transport_cost
from moba_train.parallel.emulation import ThreadGroup, run_threads
from moba_train.parallel.hardware import PRESETS, Hardware, preset_of_device, with_overrides
from moba_train.parallel.measure import measure
from moba_train.parallel.process_groups import group_among
from moba_train.parallel.rules import TRANSPORT_NAMES
from moba_train.parallel.shard import shard
from moba_train.parallel.traffic import Traffic
from moba_train.parallel.volume import Exchange, HeadShape, RowShape, transport_exchanges
from moba_train.train.flops import document_gate_scores
from tests.distributed import run_ranks
from tests.parallel.sharded_case import CASES, check_case, inputs_of

MILLION = 1 << 20
LLAMA = HeadShape(num_heads=32, num_kv_heads=8, head_dim=128, value_dim=128, element_bytes=2)
# One byte a second inside nodes, a tenth of that across; no latency; a pair takes (Dv + D) * 2 = 4 seconds.
SLOW = Hardware(
    name="by hand",
    node_ranks=2,
    node_bytes_s=1.0,
    cross_bytes_s=0.1,
    link_share=1.0,
    latency_s=0.0,
    peer_latency_s=0.0,
    host_read_s=0.0,
    bf16_flops=1.0,
    fp32_flops=1.0,
    attention_share=1.0,
    pick_pairs=0.0,
    overlap=1.0,
    memory_bytes=1.0,
)
ONE_HEAD = HeadShape(num_heads=1, num_kv_heads=1, head_dim=1, value_dim=1, element_bytes=4)


def to_all(num_ranks: int, size: float) -> np.ndarray:
    return size * (1 - np.eye(num_ranks))


def test_an_exchange_takes_as_long_as_its_slower_link() -> None:
    exchange = Exchange("forward/qkv", to_all(4, 10.0))  # each rank: 10 bytes in its node, 20 across
    assert exchange_seconds(exchange, SLOW, node_ranks=2) == 200.0
    assert exchange_seconds(exchange, SLOW, node_ranks=4) == 30.0
    assert exchange_seconds(exchange, replace(SLOW, cross_bytes_s=20.0), node_ranks=2) == 10.0
    assert exchange_seconds(exchange, replace(SLOW, link_share=0.5), node_ranks=4) == 60.0


def test_a_ring_enters_a_node_once_and_goes_on_inside() -> None:
    ring = Exchange("forward/kv", to_all(4, 10.0), ring=True)
    assert exchange_seconds(ring, SLOW, node_ranks=2) == 100.0  # 20 bytes from the other node, shared by two ranks
    assert exchange_seconds(ring, replace(SLOW, cross_bytes_s=20.0), node_ranks=2) == 30.0  # all 30 pass each rank
    assert exchange_seconds(ring, SLOW, node_ranks=1) == 300.0  # nobody to share with


def test_the_busiest_rank_in_the_busier_direction_decides() -> None:
    bytes_NN = np.array([[0.0, 7.0, 7.0], [1.0, 0.0, 9.0], [0.0, 0.0, 0.0]])
    assert exchange_seconds(Exchange("forward/kv", bytes_NN), SLOW, node_ranks=3) == 16.0  # rank 2 receives 7 + 9


def test_latency_counts_calls_and_peers_and_an_empty_exchange_takes_no_time() -> None:
    late = replace(SLOW, latency_s=100.0, peer_latency_s=10.0, host_read_s=5.0, node_bytes_s=1e12)
    exchange = Exchange("forward/kv", to_all(3, 1.0), calls=2, host_reads=1)
    assert exchange_seconds(exchange, late, node_ranks=3) == pytest.approx(2 * (100 + 2 * 10) + 5)
    assert exchange_seconds(Exchange("forward/kv", to_all(3, 0.0), host_reads=1), late, node_ranks=3) == 0.0


def test_exposed_time_of_an_all_gather_is_worked_out_by_hand() -> None:
    # 2 ranks of 4 tokens under full attention: 36 pairs, 18 a rank in zigzag; one KV head, so one message each way.
    row = RowShape(8, 2, "zigzag")
    cost = transport_cost("all_gather", Full(), ONE_HEAD, [row], SLOW, node_ranks=2)
    kv = 4 * 2 * 4  # tokens, K and V, bytes
    assert cost.communication_s == 3 * kv
    assert cost.exposed_s == 3 * kv  # the only stride has nothing to hide behind
    assert cost.compute_s == 18 * 4 * 3.5
    assert cost.balance == 1.0
    assert cost.received_bytes == cost.sent_bytes == 3 * kv


@pytest.mark.parametrize("transport", ["pull", "route_queries"])
def test_nothing_hides_the_question_that_local_attention_is_queued_behind(transport: str) -> None:
    row = RowShape(64, 2, "contiguous")
    exposed = {}
    for host_read_s in (0.0, 7.0):
        hardware = replace(SLOW, overlap=1.0, host_read_s=host_read_s)
        exposed[host_read_s] = transport_cost(transport, MoBA(4, 3), ONE_HEAD, [row], hardware, node_ranks=2).exposed_s
    first = transport_exchanges(transport, MoBA(4, 3), ONE_HEAD, row, node_ranks=2)[0]
    assert exposed[7.0] - exposed[0.0] == pytest.approx(7.0)
    assert first.host_reads == 1 and exposed[0.0] >= exchange_seconds(replace(first, host_reads=0), SLOW, node_ranks=2)


def test_attention_on_local_keys_hides_what_is_pulled_as_far_as_the_hardware_overlaps() -> None:
    row = RowShape(8, 2, "contiguous")
    exposed = {}
    for overlap in (1.0, 0.75, 0.0):
        cost = transport_cost("pull", Full(), ONE_HEAD, [row], replace(SLOW, overlap=overlap), node_ranks=2)
        exposed[overlap] = cost.exposed_s
    # Rank 1 pulls 4 tokens of K and V, 32 bytes, forward and backward, beside 10 local pairs (40 s, 100 s): all hidden;
    # 32 bytes of gradients go back when there is nothing left to compute.
    assert exposed[1.0] == 32.0
    assert exposed[0.75] == 32.0 + 0.25 * 64
    assert exposed[0.0] == cost.communication_s == 96.0
    assert cost.balance == (10 + 16) / 18


def test_recompute_runs_the_forward_exchanges_twice_but_pools_keys_once() -> None:
    row, spec = RowShape(4096, 4, "zigzag"), MoBA(64, 3)
    for name in TRANSPORT_NAMES:
        once, twice = (
            transport_cost(name, spec, LLAMA, [row], PRESETS["h100"], node_ranks=8, forwards=n) for n in (1, 2)
        )
        for phase, bytes_N in once.received_N.items():
            routed = phase in ("forward/pooled_keys", "forward/straddling_keys")
            times = 2 if phase.startswith("forward") and not routed else 1
            assert np.array_equal(twice.received_N[phase], times * bytes_N), (name, phase)
            assert np.array_equal(twice.sent_N[phase], times * once.sent_N[phase]), (name, phase)
        assert twice.communication_s > once.communication_s


def test_full_attention_is_uneven_in_contiguous_shards_unless_heads_are_swapped() -> None:
    def balance(transport: str, layout: str) -> float:
        row = RowShape(1 << 16, 8, layout)  # type: ignore[arg-type]
        return transport_cost(transport, Full(), LLAMA, [row], PRESETS["h100"], node_ranks=8).balance

    assert balance("all_gather", "contiguous") == pytest.approx(15 / 8, rel=0.01)  # the last eighth of a triangle
    assert balance("all_gather", "zigzag") == pytest.approx(1.0, abs=0.01)
    assert balance("a2a", "contiguous") == 1.0


def test_early_keys_are_asked_more_often_where_queries_travel() -> None:
    row, spec = RowShape(MILLION, 8, "contiguous"), MoBA(4096, 3)
    pairs, _ = compute_pairs("route_queries", spec, LLAMA, row, node_ranks=8)
    assert (np.diff(pairs) < 0).all() and pairs[0] > 2 * pairs.mean()
    even, _ = compute_pairs("all_gather", spec, LLAMA, row, node_ranks=8)
    assert pairs.sum() == pytest.approx(even.sum())


def chosen(
    spec: MoBA | Full, row: RowShape, hardware: Hardware, *, heads: HeadShape = LLAMA, node_ranks: int = 8
) -> str:
    return choose_transport(spec, heads, [row], hardware, node_ranks=node_ranks).transport


def test_where_nothing_costs_anything_the_all_gather_is_taken() -> None:
    free = replace(SLOW, node_bytes_s=1e30, cross_bytes_s=1e30, bf16_flops=1e30, fp32_flops=1e30)
    for spec in (MoBA(4096, 3), Full()):
        assert chosen(spec, RowShape(MILLION, 16, "zigzag"), free) == "all_gather"


def test_what_hardly_shows_beside_attention_is_no_reason_to_leave_the_all_gather() -> None:
    costs = choose_transport(Full(), LLAMA, [RowShape(MILLION, 8, "zigzag")], PRESETS["h100"], node_ranks=8).costs
    cheapest = costs[0]
    gather = next(cost for cost in costs if cost.transport == "all_gather")
    assert cheapest.overhead_s < 0.9 * gather.overhead_s and gather.overhead_s < 0.005 * gather.compute_s
    assert chosen(Full(), RowShape(MILLION, 8, "zigzag"), PRESETS["h100"]) == "all_gather"


def test_within_a_tie_the_simpler_transport_is_taken() -> None:
    choice = choose_transport(MoBA(4096, 12), LLAMA, [RowShape(MILLION, 8, "zigzag")], PRESETS["h100"], node_ranks=8)
    costs = {cost.transport: cost for cost in choice.costs}
    assert costs["a2a"].overhead_s == costs["a2a+all_gather"].overhead_s  # one node: they are the same
    assert choice.transport != "a2a+all_gather"
    assert [cost.overhead_s for cost in choice.costs] == sorted(cost.overhead_s for cost in choice.costs)


def test_documents_much_shorter_than_the_row_are_pulled() -> None:
    row = RowShape(MILLION, 64, "zigzag", tuple(range(0, MILLION + 1, 4096)))
    assert chosen(Full(), row, PRESETS["h100"]) == "pull"
    assert chosen(MoBA(512, 3), row, PRESETS["h100"]) == "pull"


def test_many_ranks_on_a_slow_network_send_queries() -> None:
    slow = replace(PRESETS["h100"], node_bytes_s=5e9, cross_bytes_s=5e9)
    assert chosen(MoBA(1024, 3), RowShape(MILLION, 256, "zigzag"), slow, node_ranks=1) == "route_queries"


def test_a_few_ranks_without_overlap_swap_heads() -> None:
    assert chosen(MoBA(4096, 12), RowShape(MILLION, 8, "zigzag"), replace(PRESETS["h100"], overlap=0.0)) == "a2a"


def test_what_cannot_serve_is_listed_with_its_reasons_and_never_chosen() -> None:
    heads = replace(LLAMA, num_heads=6, num_kv_heads=2)
    choice = choose_transport(Full(), heads, [RowShape(4096, 4, "zigzag")], PRESETS["cpu"], node_ranks=4)
    assert set(choice.refused) == {"a2a", "route_queries"}
    assert "do not divide among 4 ranks" in choice.refused["a2a"][0]
    assert {cost.transport for cost in choice.costs} == set(TRANSPORT_NAMES) - set(choice.refused)
    with pytest.raises(ValueError, match="no transport can serve: route_queries sends queries"):
        choose_transport(
            Full(), heads, [RowShape(4096, 4, "zigzag")], PRESETS["cpu"], node_ranks=4, among=["route_queries"]
        )


def test_costs_of_several_rows_are_averaged() -> None:
    rows = [RowShape(4096, 4, "zigzag"), RowShape(4096, 4, "zigzag", (0, 1000, 4096))]
    of_each = [transport_cost("pull", MoBA(64, 3), LLAMA, [row], PRESETS["a100"], node_ranks=4) for row in rows]
    together = transport_cost("pull", MoBA(64, 3), LLAMA, rows, PRESETS["a100"], node_ranks=4)
    assert together.exposed_s == pytest.approx(np.mean([cost.exposed_s for cost in of_each]))
    of_ranks = [np.sum(list(cost.received_N.values()), 0) for cost in of_each]
    assert together.received_bytes == pytest.approx(np.mean(of_ranks, 0).max())


def test_every_preset_is_complete_and_named_after_itself() -> None:
    for name, hardware in PRESETS.items():
        assert hardware.name == name
        numbers = [getattr(hardware, field.name) for field in fields(hardware) if field.name != "name"]
        assert all(number >= 0 for number in numbers) and hardware.node_bytes_s >= hardware.cross_bytes_s
    h100 = PRESETS["h100"]
    assert h100.attention_flops(Full(), 2) == pytest.approx(0.46 * 989.4e12)
    assert h100.attention_flops(Full(), 4) == pytest.approx(0.46 * 66.9e12)
    rates = [h100.attention_flops(spec, 2) for spec in (MoBA(128, 8), MoBA(512, 4), MoBA(4096, 12), Full())]
    assert rates == sorted(rates)
    assert h100.attention_flops(MoBA(512, 4), 2) == h100.attention_flops(MoBA(512, 9), 2)


def test_attention_takes_what_it_took_on_an_h200() -> None:
    """Of every shape with long rows in the benchmark's results, forward and backward, gate included."""
    results = Path(__file__).resolve().parents[2] / "kernels" / "bench" / "results" / "nvidia-h200.jsonl"
    records = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    chunks = set()
    for record in records:
        shape = record.get("shape")
        if shape is None or shape["select"] != "head" or len(shape["documents"]) > 1 or shape["documents"][0] < 2**17:
            continue
        spec, (num_tokens,) = MoBA(shape["chunk"], shape["topk"]), shape["documents"]
        pairs = planned_pairs_of_lengths(np.array([num_tokens]), spec)
        scores = document_gate_scores(num_tokens, chunk_size=spec.chunk_size)
        flops = shape["heads"] * shape["dim"] * (14 * pairs + 2 * scores)
        took_s = float(np.median(record["seconds"]["both"]["moba"]))
        assert flops / PRESETS["h200"].attention_flops(spec, 2) == pytest.approx(took_s, rel=0.12), record["name"]
        chunks.add(spec.chunk_size)
    assert chunks == {128, 512, 4096, 8192}


@pytest.mark.parametrize(
    ("device", "preset"),
    [
        ("", "cpu"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("?", "h100"),
    ],
)
def test_a_device_is_known_by_its_name(device: str, preset: str) -> None:
    assert preset_of_device(device) == preset


def test_numbers_of_the_configuration_replace_those_of_the_preset() -> None:
    h100 = PRESETS["h100"]
    assert with_overrides(h100, HardwareConfig()) is h100
    adjusted = with_overrides(
        h100, HardwareConfig(cross_gb_s=12.0, latency_us=3.0, attention_tflops=400.0, node_ranks=4)
    )
    assert adjusted.name == "h100 (adjusted)" and adjusted.node_ranks == 4
    assert adjusted.cross_bytes_s * adjusted.link_share == 12e9  # what is given is what is reached
    assert adjusted.node_bytes_s * adjusted.link_share == h100.node_bytes_s * h100.link_share
    assert adjusted.latency_s == 3e-6
    assert {adjusted.attention_flops(spec, size) for spec in (Full(), MoBA(16, 2)) for size in (2, 4)} == {400e12}
    assert adjusted.host_read_s == h100.host_read_s


def test_measuring_gives_positive_numbers_for_the_links_that_there_are() -> None:
    def of_rank(group: ThreadGroup) -> Hardware:
        return measure(PRESETS["cpu"], group, node_ranks=2, device=torch.device("cpu"), dtype=torch.float32)

    for hardware in run_threads(of_rank, 3):
        assert hardware.name == "measured (cpu)" and hardware.link_share == 1.0
        assert min(hardware.node_bytes_s, hardware.cross_bytes_s, hardware.latency_s, hardware.fp32_flops) > 0
        assert hardware.node_bytes_s != PRESETS["cpu"].node_bytes_s != hardware.cross_bytes_s
    (alone,) = run_threads(of_rank, 1)
    assert alone.node_bytes_s == PRESETS["cpu"].node_bytes_s  # nobody to measure with


def test_the_rate_of_full_attention_is_measured_and_moba_keeps_its_ratio_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moba_train.parallel.measure._attention", lambda *_: (5e9, lambda: time.sleep(0.05)))
    preset = PRESETS["h100"]

    def of_rank(group: ThreadGroup) -> Hardware:
        return measure(preset, group, node_ranks=1, device=torch.device("cpu"), dtype=torch.bfloat16)

    (hardware,) = run_threads(of_rank, 1)
    rate = hardware.attention_flops(Full(), 2)
    assert 0.3 * 5e9 / 0.05 < rate <= 5e9 / 0.05
    ratios = [x.attention_flops(MoBA(512, 4), 2) / x.attention_flops(Full(), 2) for x in (hardware, preset)]
    assert ratios[0] == pytest.approx(ratios[1])


def test_ranks_of_unequal_nodes_meet_in_other_groups_after_measuring() -> None:
    assert run_ranks(meet_after_measuring, 3, timeout_s=60.0) == [3.0] * 3


def meet_after_measuring(rank: int, n: int) -> float:
    group = dist.group.WORLD
    assert group is not None
    measure(PRESETS["cpu"], group, node_ranks=2, device=torch.device("cpu"), dtype=torch.float32)
    group_among(group, (rank,))  # rank 2 was a node by itself: it has had this group
    total = torch.tensor(float(rank))
    dist.all_reduce(total, group=group_among(group, tuple(range(n))))
    return total.item()


def test_auto_takes_the_model_s_choice_on_every_rank_and_still_equals_one_rank() -> None:
    def of_rank(group: ThreadGroup) -> list[set[str]]:
        seen = []
        for case in (CASES[1], CASES[6]):
            check_case(case, group, "zigzag", torch.float32, 2e-6, transport="auto")
            q, k, v, _ = (shard(x, 0, num_ranks=4, rank=group.rank(), layout="zigzag") for x in inputs_of(case))
            phases = []
            for transport in ("auto", choice_of(case.cu_seqlens, case.spec)):
                traffic, pack = Traffic(), Pack(case.cu_seqlens)
                options = {"layout": "zigzag", "group": group, "cu_seqlens": pack, "transport": transport}
                context_attend(q, k, v, case.spec, traffic=traffic, **options)  # type: ignore[arg-type]
                phases.append(traffic.sent)
            assert phases[0] == phases[1]
            seen.append(set(phases[0]))
        return seen

    def choice_of(cu_seqlens: tuple[int, ...], spec: MoBA | Full) -> str:
        dims = (8, 8) if isinstance(spec, MoBA) else (8, 5)
        row = RowShape(cu_seqlens[-1], 4, "zigzag", cu_seqlens)
        return chosen(spec, row, PRESETS["cpu"], heads=HeadShape(4, 2, *dims, 4))

    seen = run_threads(of_rank, 4)
    assert all(of_rank == seen[0] for of_rank in seen)
