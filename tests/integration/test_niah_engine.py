"""The needle grid on the real engine: packing and the mesh change neither scores nor routing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from moba_train.config.schema import EngineConfig, ModelConfig, OptimizerConfig, ParallelConfig, StageConfig
from moba_train.data.needles import NeedleText, load_words, special_words
from moba_train.data.tokenizer import load_tokenizer, train_tokenizer
from moba_train.engine.megatron import build_engine
from moba_train.eval.cells import NiahRecord
from moba_train.eval.niah import run_niah
from tests.distributed import run_ranks

LINES = [f"value_{i} = compute(value_{i - 1}, {i * 37 % 101})  # keep the order of the steps\n" for i in range(80)]
STAGE = StageConfig(name="long", seq_len=256, tokens=256, tokens_per_step=256, mix={"a": 1.0}, chunk_size=8, topk=3)
OPTIMIZER = OptimizerConfig(lr=1e-3)
ONE_RANK = ParallelConfig()


def measure(
    rank: int, n: int, model_path: Path, out: Path, row_tokens: int, mesh: ParallelConfig = ONE_RANK
) -> tuple[NiahRecord, ...]:
    tokenizer = load_tokenizer(model_path)
    model = ModelConfig(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=-(-tokenizer.vocab_size // 8) * 8,
        key_conv=3,
    )
    engine = build_engine(model, (STAGE,), EngineConfig(device="cpu"), OPTIMIZER, mesh, seed=5)
    haystack = np.array(tokenizer.encode("".join(LINES)), dtype=np.int64)
    result = run_niah(
        engine,
        NeedleText(tokenizer, load_words()),
        haystack,
        stage=STAGE,
        step=1,
        weights="initial",
        lengths=(24, 60, 128),
        depths=3,
        samples=2,
        out_dir=out,
        seed=3,
        row_tokens=row_tokens,
    )
    return result.records


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(LINES * 3, path, vocab_size=330 + len(special_words()), words=special_words())
    return path


def assert_same(left: tuple[NiahRecord, ...], right: tuple[NiahRecord, ...]) -> None:
    """Equal in everything but the rounding of the log-probability; random picks depend on the row, so they may not."""
    assert [dataclasses.replace(r, log_prob=0.0) for r in left] == [dataclasses.replace(r, log_prob=0.0) for r in right]
    np.testing.assert_allclose([r.log_prob for r in left], [r.log_prob for r in right], rtol=1e-4)


def test_scores_and_routing_do_not_depend_on_ranks_or_packing(model_path: Path, tmp_path: Path) -> None:
    (packed,) = run_ranks(measure, 1, model_path, tmp_path / "packed", 256)
    (alone,) = run_ranks(measure, 1, model_path, tmp_path / "alone", 1)
    for mesh in (ParallelConfig(cp=2), ParallelConfig(tp=2)):
        first, second = run_ranks(measure, 2, model_path, tmp_path / f"cp {mesh.cp}", 256, mesh)
        assert first == second
        assert_same(packed, first)
    assert_same(*(tuple(r for r in records if r.attention != "random") for records in (packed, alone)))
    moba, full, random = ([r for r in packed if r.attention == a] for a in ("moba", "full", "random"))
    # a cell that is dense by construction scores as full attention does, routes everywhere, whatever the picks
    dense = [(m, f, c) for m, f, c in zip(moba, full, random, strict=True) if m.dense]
    assert {m.context_length for m, _, _ in dense} == {24}
    for m, f, c in dense:
        assert (m.routed, c.routed) == (1.0, 1.0)
        assert m.log_prob == pytest.approx(f.log_prob, rel=1e-4)
        assert c.log_prob == pytest.approx(f.log_prob, rel=1e-4)
    # far needles: uniform picks reach the chunk as often as the closed form says
    sparse = [r for r in random if not r.dense and r.routed is not None and r.routed_expected is not None]
    assert np.mean([r.routed for r in sparse]) == pytest.approx(np.mean([r.routed_expected for r in sparse]), abs=0.15)
    assert any(
        m.log_prob != pytest.approx(f.log_prob, rel=1e-4) for m, f in zip(moba, full, strict=True) if not m.dense
    )
