"""The plan of a stage's transports: one choice for each kind of layer, in words, and bytes of the busiest rank."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from moba_train.config.schema import EngineConfig, FullLayers, ModelConfig, ParallelConfig, StageConfig
from moba_train.errors import ConfigError
from moba_train.model.transport_plan import TransportPlan, format_bytes, format_seconds, transport_plan
from moba_train.parallel.hardware import PRESETS
from moba_train.parallel.rules import LayerTransports

MODEL = ModelConfig(num_layers=4, num_heads=8, num_kv_heads=2, head_dim=64)
STAGE = StageConfig(name="s", seq_len=8192, chunk_size=256, topk=3, full_layers=FullLayers(last=1))
PARALLEL = ParallelConfig(cp=4)
ENGINE = EngineConfig(precision="bf16")


def plan_of(
    *,
    model: ModelConfig = MODEL,
    stage: StageConfig = STAGE,
    parallel: ParallelConfig = PARALLEL,
    recompute: bool = False,
) -> TransportPlan:
    engine = replace(ENGINE, recompute="full" if recompute else "none")
    plan = transport_plan(model, stage, parallel, engine, PRESETS["h100"])
    assert plan is not None
    return plan


def test_one_rank_needs_no_transport() -> None:
    assert transport_plan(MODEL, STAGE, ParallelConfig(), ENGINE, PRESETS["h100"]) is None


def test_what_the_configuration_names_is_taken_for_its_kind_of_layer() -> None:
    both = plan_of(parallel=replace(PARALLEL, transport="a2a"))
    assert both.transports == LayerTransports("a2a", "a2a")
    apart = plan_of(parallel=replace(PARALLEL, transport="route_queries", transport_full="pull"))
    assert apart.transports == LayerTransports("route_queries", "pull")
    assert [(kind.title, kind.num_layers) for kind in apart.kinds] == [("MoBA", 3), ("full", 1)]


def test_what_cannot_serve_is_a_mistake_in_the_configuration() -> None:
    with pytest.raises(ConfigError, match="full attention, which picks no chunk"):
        plan_of(parallel=replace(PARALLEL, transport="route_queries"))


def test_evaluation_under_the_other_attention_has_a_transport_too() -> None:
    plan = plan_of(stage=replace(STAGE, attention="full"))
    assert [kind.title for kind in plan.kinds] == ["full"]
    assert plan.transports.moba != "auto" and plan.transports.full != "auto"


def test_the_line_for_the_log_names_transport_bytes_and_exposed_time() -> None:
    plan = plan_of(parallel=replace(PARALLEL, transport="pull", transport_full="a2a"))
    moba, full = plan.kinds
    assert plan.describe() == (
        f"transports: MoBA layers pull (predicted {format_bytes(moba.cost.received_bytes)} a layer a rank, exposed "
        f"{1e3 * moba.cost.exposed_s:.3g} ms), full layers a2a (predicted {format_bytes(full.cost.received_bytes)} a "
        f"layer a rank, exposed {1e3 * full.cost.exposed_s:.3g} ms); hardware h100, 8 CP ranks a node"
    )


def test_tensor_parallel_ranks_share_heads_and_nodes() -> None:
    one, two = (plan_of(parallel=replace(PARALLEL, tp=tp, transport="all_gather")) for tp in (1, 2))
    assert two.full.cost.received_bytes == one.full.cost.received_bytes / 2
    assert (one.node_ranks, two.node_ranks) == (8, 4)


def test_bytes_of_a_step_are_those_of_all_layers_and_rows_of_the_busiest_pipeline_rank() -> None:
    plan = plan_of(model=replace(MODEL, key_conv=3), parallel=replace(PARALLEL, transport="all_gather"))
    moba, full = (kind.cost.received_bytes for kind in plan.kinds)
    # three other ranks' two pieces of 2 tokens, 2 KV heads of 64, in bf16 forward and fp32 back
    halo = 3 * 2 * 2 * 2 * 64 * (2 + 4)
    assert plan.predicted("received", 5)[""] == 5 * (3 * moba + full + 4 * halo)
    assert plan.predicted("sent", 5) == plan.predicted("received", 5)  # of an all-gather
    staged = plan_of(model=replace(MODEL, key_conv=3), parallel=replace(PARALLEL, pp=2, transport="all_gather"))
    assert staged.predicted("received", 1)[""] == max(2 * moba, moba + full) + 2 * halo


def test_exposed_time_of_a_step_is_that_of_all_layers_and_rows_of_the_slowest_pipeline_rank() -> None:
    plan = plan_of(parallel=replace(PARALLEL, transport="all_gather"))
    moba_s, full_s = (kind.cost.exposed_s for kind in plan.kinds)
    assert 0 < moba_s != full_s > 0
    assert plan.predicted_exposed_s(5) == pytest.approx(5 * (3 * moba_s + full_s))
    staged = plan_of(parallel=replace(PARALLEL, pp=2, transport="all_gather"))
    assert staged.predicted_exposed_s(1) == pytest.approx(max(2 * moba_s, moba_s + full_s))


def test_the_busiest_rank_is_the_one_that_counts() -> None:
    full = replace(STAGE, attention="full")
    plan = plan_of(stage=full, parallel=replace(PARALLEL, layout="contiguous", transport="pull"))
    shard = 8192 // 4 * 2 * 128  # elements of K and V of a shard
    # Full attention, contiguous: the last rank pulls three shards twice and returns their gradients; the first sends
    # its shard to three ranks twice, whose gradients it receives.
    assert plan.predicted("received", 1)["forward/kv"] == 4 * 3 * shard * 2
    assert plan.predicted("received", 1)["backward/dkv"] == 4 * 3 * shard * 4
    assert plan.predicted("received", 1)[""] == 4 * 12 * shard
    assert plan.predicted("sent", 1)[""] == 4 * 12 * shard


def test_recompute_sends_forward_phases_again_but_not_the_pooled_keys() -> None:
    once, twice = (
        plan_of(
            model=replace(MODEL, key_conv=3), parallel=replace(PARALLEL, transport="all_gather"), recompute=recompute
        ).predicted("received", 1)
        for recompute in (False, True)
    )
    again = {phase for phase in once if phase and twice[phase] == 2 * once[phase]}
    assert again == {"forward/kv", "forward/halo"}
    assert all(twice[phase] == once[phase] for phase in once if phase and phase not in again)


def test_documents_of_the_rows_decide_what_pull_moves() -> None:
    arguments = (MODEL, STAGE, replace(PARALLEL, transport="pull"), ENGINE, PRESETS["h100"])
    long = transport_plan(*arguments)
    short = transport_plan(*arguments, documents=[tuple(range(0, 8193, 512))])
    assert long is not None and short is not None
    assert short.full.cost.received_bytes < 0.01 * long.full.cost.received_bytes


def test_a_plan_can_be_handed_to_the_other_ranks() -> None:
    plan = plan_of()
    assert pickle.loads(pickle.dumps(plan)).describe() == plan.describe()


def test_times_are_written_in_the_unit_that_suits_them() -> None:
    assert [format_seconds(s) for s in (0.0, 4.56e-5, 0.0123, 1.234)] == ["0 ms", "0.0456 ms", "12.3 ms", "1.23 s"]


@pytest.mark.parametrize(("size", "text"), [(16, "16 B"), (789_000, "789 KB"), (12.34e6, "12.3 MB"), (4.5e9, "4.5 GB")])
def test_bytes_are_written_with_three_digits(size: float, text: str) -> None:
    assert format_bytes(size) == text
