"""The needle grid on an engine whose scores are known: every number in a record is checked against the formula."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moba_train.config.schema import StageConfig
from moba_train.data.needles import NeedleText, build_niah_sample, load_words, special_words
from moba_train.data.tokenizer import load_tokenizer, train_tokenizer
from moba_train.errors import ConfigError, DataError
from moba_train.eval.cells import expected_share, token_chunks
from moba_train.eval.niah import NiahResult, niah_summary, run_niah
from moba_train.eval.records import read_records
from tests.distributed import run_ranks

from .toy import COPIED, FAILED, ToyEngine, is_copied

STAGE = StageConfig(name="long", seq_len=256, chunk_size=16, topk=3)
LENGTHS, DEPTHS, SAMPLES, SEED = (48, 64, 256), 3, 3, 11
LINES = [f"value_{i} = compute(value_{i - 1}, {i * 37 % 101})  # keep the order of the steps\n" for i in range(80)]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(LINES * 3, path, vocab_size=330 + len(special_words()), words=special_words())
    return path


def load_text(model_path: Path) -> tuple[NeedleText, NDArray[np.int64]]:
    tokenizer = load_tokenizer(model_path)
    return NeedleText(tokenizer, load_words()), np.array(tokenizer.encode("".join(LINES)), dtype=np.int64)


def measure(model_path: Path, engine: ToyEngine, out: Path, **changes: Any) -> NiahResult:
    text, haystack = load_text(model_path)
    settings = {"stage": STAGE, "step": 7, "weights": "f0", "lengths": LENGTHS, "depths": DEPTHS, "samples": SAMPLES}
    return run_niah(engine, text, haystack, **(settings | {"out_dir": out, "seed": SEED} | changes))


@pytest.fixture(scope="module")
def whole(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[NiahResult, ToyEngine]:
    engine = ToyEngine(STAGE.chunk_size)
    return measure(model_path, engine, tmp_path_factory.mktemp("whole")), engine


def test_every_record_has_the_score_that_the_formula_gives(
    whole: tuple[NiahResult, ToyEngine], model_path: Path
) -> None:
    text, haystack = load_text(model_path)
    result, _ = whole
    assert len(result.records) == 3 * len(LENGTHS) * DEPTHS * SAMPLES
    for record in result.records:
        sample = build_niah_sample(
            text,
            haystack,
            length=record.context_length,
            depth_percent=record.depth_percent,
            seed=SEED,
            index=record.sample,
        )
        copied = is_copied(sample.tokens, record.attention)
        assert record.score == float(copied)
        assert record.log_prob == pytest.approx(COPIED if copied else FAILED)
        assert (record.model_response == record.expected) == copied
        assert (record.expected, record.key) == (sample.value, sample.key)
        assert record.dense == (record.attention != "full" and record.context_length == 48)


def test_scores_differ_between_attentions_as_the_formula_does(whole: tuple[NiahResult, ToyEngine]) -> None:
    result, _ = whole
    assert result.mean("full") == 1.0
    assert result.mean("random") == 0.0
    assert 0.2 < (result.mean("moba") or 0.0) < 0.8


def test_routed_counts_the_layer_and_head_that_found_the_value(
    whole: tuple[NiahResult, ToyEngine], model_path: Path
) -> None:
    text, haystack = load_text(model_path)
    size = STAGE.chunk_size
    seen = set()
    for record in whole[0].records:
        if record.attention == "full":
            assert record.routed is None and record.routed_expected is None
            continue
        sample = build_niah_sample(
            text,
            haystack,
            length=record.context_length,
            depth_percent=record.depth_percent,
            seed=SEED,
            index=record.sample,
        )
        value = token_chunks(sample.value_start, sample.value_end, chunk_size=size)
        asked = range(sample.answer_start - 1, sample.answer_end - 1)
        own = [query // size in value for query in asked]
        # head 0 of layer 0 picked it for every query; the other three pairs only where it is the own chunk
        assert record.routed == pytest.approx(np.mean([1.0 if mine else 0.25 for mine in own]))
        assert record.routed_expected == expected_share(asked, value, chunk_size=size, topk=STAGE.topk)
        assert record.needle_chunk == sample.value_start // size
        seen.update(own)
    assert seen == {True, False}


def test_samples_of_one_length_share_rows_of_at_most_the_stages_length(whole: tuple[NiahResult, ToyEngine]) -> None:
    _, engine = whole
    lengths = [sorted(set(np.diff(row.cu_seqlens))) for row, _ in engine.rows]
    assert all(len(kinds) == 1 for kinds in lengths)
    sizes = [row.tokens_S.size for row, _ in engine.rows]
    assert max(sizes) <= STAGE.seq_len
    cells = DEPTHS * SAMPLES
    assert len(engine.rows) == 3 * (-(-cells // 5) + -(-cells // 4) + cells)  # 5 of 48, 4 of 64, 1 of 256
    # a row counts nothing but answers, and every document of it is a whole sample
    assert all(row.loss_mask_S.sum() < 0.2 * row.tokens_S.size for row, _ in engine.rows)


def test_samples_of_another_function_are_scored_anew(model_path: Path, tmp_path: Path) -> None:
    few = {"lengths": (48,), "depths": 2, "samples": 1}
    resumed = [
        measure(model_path, ToyEngine(STAGE.chunk_size), tmp_path, function=function, **few).num_resumed
        for function in ("one", "other", "one")
    ]
    assert resumed == [0, 0, 3 * 2]


def test_packing_does_not_change_the_scores(
    whole: tuple[NiahResult, ToyEngine], model_path: Path, tmp_path: Path
) -> None:
    alone = measure(model_path, ToyEngine(STAGE.chunk_size), tmp_path, row_tokens=1)
    assert alone.records == whole[0].records


def test_random_routing_gets_another_row_number_for_every_row(whole: tuple[NiahResult, ToyEngine]) -> None:
    numbers = [row.sample_id for row, attention in whole[1].rows if attention == "random"]
    assert len(set(numbers)) == len(numbers)


def test_an_interrupted_evaluation_goes_on_where_it_stopped(
    whole: tuple[NiahResult, ToyEngine], model_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        measure(model_path, ToyEngine(STAGE.chunk_size, fail_after=10), tmp_path)
    done = len(read_records(tmp_path / "niah.jsonl"))
    assert 0 < done < len(whole[0].records)
    content = (tmp_path / "niah.jsonl").read_bytes()
    (tmp_path / "niah.jsonl").write_bytes(content[:-9])
    shown: list[tuple[int, int]] = []
    engine = ToyEngine(STAGE.chunk_size)
    result = measure(model_path, engine, tmp_path, progress=lambda now, total: shown.append((now, total)))
    assert result.num_resumed == done - 1
    assert result.records == whole[0].records
    assert sorted(map(repr, read_records(tmp_path / "niah.jsonl"))) == sorted(map(repr, whole[0].records))
    assert shown[-1] == (len(result.records), len(result.records))
    again = ToyEngine(STAGE.chunk_size)
    assert measure(model_path, again, tmp_path).records == whole[0].records
    assert again.rows == []


@pytest.mark.parametrize(
    "change",
    [{"weights": "f1"}, {"seed": 12}, {"stage": dataclasses.replace(STAGE, topk=4)}],
    ids=lambda c: next(iter(c)),
)
def test_other_weights_seeds_and_settings_are_measured_anew(
    model_path: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    small = {"lengths": (48,), "depths": 1, "samples": 1, "attentions": ("moba",)}
    measure(model_path, ToyEngine(STAGE.chunk_size), tmp_path, **small)
    engine = ToyEngine(STAGE.chunk_size)
    assert measure(model_path, engine, tmp_path, **(small | change)).num_resumed == 0
    assert len(engine.rows) == 1


def test_the_picture_is_written_beside_the_records(whole: tuple[NiahResult, ToyEngine]) -> None:
    assert whole[0].png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("grid", [{"lengths": ()}, {"depths": 0}, {"samples": 0}, {"lengths": (0,)}], ids=str)
def test_an_empty_grid_is_refused(model_path: Path, tmp_path: Path, grid: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"niah\.lengths"):
        measure(model_path, ToyEngine(STAGE.chunk_size), tmp_path, **grid)


def test_a_length_without_room_for_the_needle_is_refused(model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="do not fit"):
        measure(model_path, ToyEngine(STAGE.chunk_size), tmp_path, lengths=(8,))


def test_the_summary_for_the_loop_agrees_with_the_grid(whole: tuple[NiahResult, ToyEngine], model_path: Path) -> None:
    text, haystack = load_text(model_path)
    metrics = niah_summary(
        ToyEngine(STAGE.chunk_size),
        text,
        haystack,
        stage=STAGE,
        lengths=LENGTHS,
        depths=DEPTHS,
        samples=SAMPLES,
        seed=SEED,
    )
    middle = [r for r in whole[0].records if r.depth_percent == 50.0]
    moba = [r for r in middle if r.attention == "moba"]
    assert metrics["eval/niah_full"] == 1.0
    assert metrics["eval/niah_moba"] == pytest.approx(np.mean([r.score for r in moba]))
    assert metrics["eval/niah_log_prob_moba"] == pytest.approx(np.mean([r.log_prob for r in moba]))
    assert metrics["eval/niah_routed_moba"] == pytest.approx(np.mean([r.routed for r in moba]))
    assert "eval/niah_routed_full" not in metrics


def _measure_on_rank(rank: int, n: int, model_path: Path, out: Path, cp: int) -> Any:
    device = torch.device("cpu")
    topology = SimpleNamespace(rank=rank, world_size=n, dp=n // cp, dp_rank=rank // cp, device=device)
    engine = ToyEngine(STAGE.chunk_size, topology=topology)
    small = {"lengths": (48, 64), "samples": 2, "attentions": ("moba", "full")}
    result = measure(model_path, engine, out, **small)
    return result.records, len(engine.rows)


@pytest.mark.parametrize(("ranks", "cp"), [(2, 2), (2, 1)])
def test_ranks_agree_and_only_rank_0_writes(model_path: Path, tmp_path: Path, ranks: int, cp: int) -> None:
    small = {"lengths": (48, 64), "samples": 2, "attentions": ("moba", "full")}
    alone = measure(model_path, ToyEngine(STAGE.chunk_size), tmp_path / "alone", **small)
    results = run_ranks(_measure_on_rank, ranks, model_path, tmp_path / "ranks", cp)
    assert [records for records, _ in results] == [alone.records] * ranks
    assert len((tmp_path / "ranks" / "niah.jsonl").read_text().splitlines()) == len(alone.records)
    rows = [count for _, count in results]
    assert sum(rows) == 8 * cp if cp == 1 else rows == [8, 8]
