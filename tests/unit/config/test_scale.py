"""`--scale tiny`: what a miniature keeps of a run, and what it makes small."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from moba_train.config.load import decode_toml, load_config, to_toml
from moba_train.config.mesh import parallel_of_stage
from moba_train.config.scale import MIN_CHUNK, MIN_ROW, ROW_TOKENS, describe_scale, miniature_paths, row_factor, scaled
from moba_train.config.schema import FullLayers, ParallelConfig, RunConfig, SourceLengths, StageMesh
from moba_train.config.validate import validate
from moba_train.model.plan import full_layer_numbers
from moba_train.train.schedule import build_schedule

FOLDER = Path(__file__).parents[3] / "configs"
CONFIGS = sorted(FOLDER.glob("*.toml"))
every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def config_of(name: str, *words: str) -> RunConfig:
    return load_config(FOLDER / f"{name}.toml", words)


def with_stages(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, stages=tuple(replace(stage, **changes) for stage in config.stages))


@every_config
def test_the_miniature_of_every_configuration_is_valid_for_any_number_of_ranks(path: Path) -> None:
    for world_size in (1, 2, 3, 4, 6, 8):
        tiny = scaled(load_config(path), world_size)
        validate(tiny)
        assert decode_toml(to_toml(tiny)) == tiny
        for stage in tiny.stages:
            mesh = parallel_of_stage(tiny.parallel, stage)
            assert mesh.dp == "auto" and world_size % (mesh.tp * mesh.cp * mesh.pp) == 0
            assert stage.tokens_per_step // stage.seq_len % (world_size // (mesh.tp * mesh.cp * mesh.pp)) == 0


@every_config
def test_stages_keep_all_but_their_size(path: Path) -> None:
    config = load_config(path)
    tiny = scaled(config)
    kept = ("name", "attention", "select", "full_layers", "mix", "until", "lr")
    assert [[getattr(stage, key) for key in kept] for stage in tiny.stages] == [
        [getattr(stage, key) for key in kept] for stage in config.stages
    ]
    for full, small in zip(config.stages, tiny.stages, strict=True):
        for key in ("base", "scaling", "factor"):
            assert getattr(small.rope, key) == getattr(full.rope, key)
        assert (small.rope.original_seq_len > small.seq_len) == (full.rope.original_seq_len > full.seq_len)
        assert (small.mesh == StageMesh()) == (full.mesh == StageMesh())
        assert list(small.lengths) == list(full.lengths)
    assert max(stage.seq_len for stage in tiny.stages) <= ROW_TOKENS
    assert min(stage.seq_len for stage in tiny.stages) >= MIN_ROW


@every_config
def test_the_model_keeps_its_kind(path: Path) -> None:
    config = load_config(path)
    full, small = config.model, scaled(config).model
    for key in ("tied_head", "qk_norm", "qkv_bias", "key_conv", "norm_eps"):
        assert getattr(small, key) == getattr(full, key)
    assert small.num_heads * full.num_kv_heads == full.num_heads * small.num_kv_heads
    assert small.num_layers <= full.num_layers and small.hidden_size <= 128
    assert (small.hidden_size == small.num_heads * small.head_dim) == (
        full.hidden_size == full.num_heads * full.head_dim
    )


def test_chunks_and_rows_shrink_alike_so_that_density_stays() -> None:
    config = config_of("llama_8b_1m")
    for full, small in zip(config.stages, scaled(config).stages, strict=True):
        assert full.seq_len == 1024 * small.seq_len and full.chunk_size == 1024 * small.chunk_size
        assert (small.topk, small.rope.original_seq_len) == (12, 8)
    small = scaled(config_of("llama_1b_128k")).stages[0]
    assert (small.seq_len, small.chunk_size, small.topk) == (1024, 8, 16)


def test_where_chunks_cannot_shrink_as_much_topk_does() -> None:
    config = with_stages(config_of("llama_8b_1m"), chunk_size=1024, topk=48)
    small = scaled(config).stages[-1]
    assert (small.seq_len, small.chunk_size, small.topk) == (1024, MIN_CHUNK, 48 * 1024 // 1024 // MIN_CHUNK)
    least = scaled(with_stages(config, topk=3)).stages[-1]
    assert (least.chunk_size, least.topk) == (MIN_CHUNK, 2), "it still picks a chunk"
    assert scaled(with_stages(config, topk=1)).stages[-1].topk == 1, "its own chunk alone"


def test_a_run_that_is_small_is_not_made_larger() -> None:
    config = config_of("smoke")
    tiny = scaled(config)
    assert row_factor(config) == 1.0
    assert [stage.seq_len for stage in tiny.stages] == [stage.seq_len for stage in config.stages]
    assert tiny.model.num_layers == 2


@pytest.mark.parametrize(
    "layers",
    [
        FullLayers(),
        FullLayers(last=10),
        FullLayers(first=2, last=3),
        FullLayers(every=4),
        FullLayers(first=1, last=1, every=3),
        FullLayers(first=32),
    ],
    ids=str,
)
@pytest.mark.parametrize("pp", [1, 2])
def test_full_layers_mean_what_they_did_and_moba_layers_remain(layers: FullLayers, pp: int) -> None:
    config = with_stages(config_of("llama_8b_1m", "--parallel.pp", str(pp)), full_layers=layers)
    tiny = scaled(config, 2 * pp)
    number = tiny.model.num_layers
    full = full_layer_numbers(layers, number)
    assert tiny.stages[0].full_layers == layers and number % pp == 0
    assert set(range(layers.first)) | set(range(number - layers.last, number)) <= full
    if layers.every:
        assert layers.every - 1 in full
    sparse = 32 - len(full_layer_numbers(layers, 32))
    assert number - len(full) >= min(2, sparse)
    validate(tiny)


def test_a_mesh_that_changes_still_does_where_ranks_allow() -> None:
    config = config_of("llama_8b_1m")  # cp 4, then cp 16; tp 4

    def degrees(world_size: int) -> list[tuple[int, int]]:
        tiny = scaled(config, world_size)
        meshes = [parallel_of_stage(tiny.parallel, stage) for stage in tiny.stages]
        return [(mesh.cp, mesh.tp) for mesh in meshes]

    assert degrees(1) == [(1, 1)] * 5
    assert degrees(2) == [(1, 2)] * 2 + [(2, 1)] * 3
    assert degrees(8) == [(1, 2)] * 2 + [(2, 2)] * 3


def test_ranks_go_to_cp_then_tp_then_pp_and_the_rest_are_data_parallel() -> None:
    config = config_of("llama_8b_128k", "--parallel.pp", "2")
    found = [scaled(config, world_size).parallel for world_size in (1, 2, 4, 8, 16, 3)]
    assert [(mesh.cp, mesh.tp, mesh.pp) for mesh in found] == [
        *((1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2), (1, 1, 1))
    ]


@pytest.mark.parametrize("heads", [(32, 8), (32, 32), (28, 4), (8, 1), (64, 8)], ids=str)
def test_any_transport_of_a_run_can_serve_its_miniature(heads: tuple[int, int]) -> None:
    config = config_of("llama_1b_128k")
    model = replace(config.model, num_heads=heads[0], num_kv_heads=heads[1])
    for transport, tp in product(("all_gather", "a2a", "a2a+all_gather", "pull", "route_queries"), (1, 2)):
        if tp > heads[1]:
            continue
        mesh = ParallelConfig(tp=tp, cp=2, transport=transport, transport_full="all_gather")  # type: ignore[arg-type]
        run = replace(config, model=model, parallel=mesh)
        validate(run)
        for world_size in (1, 2, 4):
            validate(scaled(run, world_size))


def test_warm_up_and_decay_end_and_begin_in_the_same_part_of_the_same_stage() -> None:
    config = config_of("llama_1b_128k")
    tiny = scaled(config)
    moba, full = tiny.stages
    assert moba.tokens // moba.tokens_per_step == config.stages[0].until.evaluations + 2
    assert tiny.eval.every_steps == 1
    assert tiny.optimizer.warmup_tokens == round(moba.tokens * 50 / 2150)
    assert tiny.optimizer.decay_tokens == pytest.approx(full.tokens * 200 / 240, abs=1)
    assert tiny.optimizer.lr == config.optimizer.lr and tiny.optimizer.schedule == "wsd"
    schedule = build_schedule(tiny.stages, tiny.optimizer)
    rates = [schedule.lr(step) for step in range(schedule.total_steps)]
    assert rates[1] == rates[moba.tokens // moba.tokens_per_step - 1] == 2e-5 and rates[-1] < 2e-5


def test_lengths_of_documents_shrink_down_to_what_the_text_of_the_miniature_has() -> None:
    tiny = scaled(config_of("llama_1b_128k"))
    assert tiny.stages[0].lengths["web"] == SourceLengths(long_doc_tokens=128, long_share=0.5)
    assert tiny.stages[0].lengths["books"] == SourceLengths(min_doc_tokens=256)
    assert tiny.data.valid.min_doc_tokens == 1024
    rule = SourceLengths(min_doc_tokens=131_072, long_doc_tokens=131_073, long_share=0.5)
    config = config_of("llama_1b_128k")
    for run in (with_stages(config, lengths={"web": rule}), with_stages(config_of("smoke"), lengths={"text": rule})):
        (small,) = scaled(run).stages[0].lengths.values()
        assert small.min_doc_tokens == 1024 < small.long_doc_tokens <= 2048
    whole = scaled(with_stages(config_of("llama_8b_1m_sft"), lengths={"chat_32k": rule}, mix={"chat_32k": 1.0}))
    (small,) = whole.stages[0].lengths.values()
    assert (small.min_doc_tokens, small.long_doc_tokens) == (0, MIN_ROW // 2), "conversations are short"
    validate(whole)


def test_a_miniature_runs_in_fp32_on_a_cpu_unless_the_run_names_cuda() -> None:
    words = ("--engine.offload", "host", "--engine.attention-backend", "triton")
    engine = scaled(config_of("llama_8b_1m", *words)).engine
    assert (engine.device, engine.precision, engine.offload, engine.attention_backend) == (
        "cpu",
        "fp32",
        "none",
        "auto",
    )
    assert engine.recompute == "full" and engine.kind == "megatron"
    on_gpu = config_of("llama_8b_1m", *words, "--engine.device", "cuda").engine
    assert scaled(config_of("llama_8b_1m", *words, "--engine.device", "cuda")).engine == on_gpu


def test_the_material_lies_beside_the_run_folder_and_is_shared() -> None:
    tiny = scaled(config_of("llama_8b_1m", "--run-dir", "some/where/run/"))
    assert tiny.run.dir == "some/where/run-tiny"
    assert miniature_paths("some/where/run-tiny").root == miniature_paths("some/where/run/").root
    named = [tiny.data.tokenizer, tiny.model.init_from, *(source.path for source in tiny.data.sources.values())]
    assert all(name.startswith("some/where/miniature/") for name in named)
    sft = scaled(config_of("llama_8b_1m_sft", "--run-dir", "some/where/sft"))
    assert sft.model.init_from != tiny.model.init_from, "it begins with the positions that the run before ended with"
    assert scaled(config_of("qwen3_8b_256k", "--run-dir", "some/where/q")).model.init_from != tiny.model.init_from
    assert scaled(config_of("smoke")).model.init_from == ""
    assert [source.path for source in sft.data.sources.values()] == [
        f"some/where/miniature/chat-{longest}/train" for longest in (64, 256, 1024)
    ]
    assert sft.data.valid.path == "some/where/miniature/text/valid"


def test_the_reader_is_told_what_a_miniature_cuts_and_what_it_keeps() -> None:
    config = config_of("llama_8b_1m")
    first, cut, made, kept, _ = describe_scale(config, scaled(config, 2), 2)
    assert first.startswith("MINIATURE of the run (--scale tiny), run folder runs/llama_8b_1m-tiny: ")
    for words in ("divided by 1,024", "10 of 26,000 steps", "5 of 32 layers", "width 128 of 4096", "for 2 rank(s)"):
        assert words in cut
    assert "vocabulary 1,024 of 128,256" in cut and "precision fp32 for bf16" in cut and "topk" not in cut
    assert made.endswith("in runs/miniature") and " topk, " in kept


def test_the_reader_is_told_of_a_topk_that_had_to_fall_and_of_nothing_that_stays() -> None:
    config = with_stages(config_of("llama_8b_1m", "--engine.device", "cuda"), chunk_size=1024, topk=48)
    _, cut, _, kept, _ = describe_scale(config, scaled(config))
    assert "topk 12 for 48 in '128k'" in cut and "topk" not in kept
    assert "device" not in cut and "precision" not in cut, "on GPUs they are those of the run"


def test_a_run_folder_that_is_named_as_a_miniatures_is_not_renamed_again() -> None:
    # A Slurm job is told the folder of the miniature, and the ranks that it starts scale the run themselves.
    config = config_of("llama_8b_1m")
    tiny = scaled(config, 64)
    assert scaled(config_of("llama_8b_1m", "--run-dir", tiny.run.dir), 64) == tiny
