"""Rows of a stage: what they hold, and that every row is a pure function of (seed, stage, i)."""

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from moba_train.config.schema import DataConfig, SourceConfig, SourceLengths, StageConfig
from moba_train.data.indexed import open_indexed, write_indexed
from moba_train.data.sampler import rows_of_step
from moba_train.data.stage_data import StageData
from moba_train.errors import ConfigError, DataError

EOD, PAD = 1, 2


def write_text(tmp_path: Path, num_documents: int = 40, name: str = "text") -> str:
    """Documents whose tokens say where they come from: 1000 * document + place, then EOD."""
    rng = np.random.default_rng(7)
    documents = [
        [1000 * (d + 1) + place for place in range(int(rng.integers(1, 30)))] + [EOD] for d in range(num_documents)
    ]
    write_indexed(tmp_path / name, documents, vocab_size=1 << 20)
    return str(tmp_path / name)


def stage_of(mix: dict[str, float], *, seq_len: int = 16, rows: int = 24, rows_per_step: int = 4) -> StageConfig:
    return StageConfig(tokens=rows * seq_len, tokens_per_step=rows_per_step * seq_len, seq_len=seq_len, mix=mix)


def open_stage(tmp_path: Path, sources: dict[str, SourceConfig], stage: StageConfig, **options) -> StageData:
    return StageData(
        DataConfig(sources=sources),
        stage,
        stage_index=options.get("stage_index", 0),
        seed=options.get("seed", 1),
        cache_dir=tmp_path / options.get("cache", "cache"),
        eod_id=EOD,
        pad_id=PAD,
    )


def check_row(row) -> None:
    """What holds for every row of text, read off the tokens themselves."""
    assert row.tokens_S.dtype == row.labels_S.dtype == np.int64 and row.loss_mask_S.dtype == np.float32
    assert row.cu_seqlens[0] == 0 and row.cu_seqlens[-1] == row.tokens_S.size
    assert all(a < b for a, b in zip(row.cu_seqlens, row.cu_seqlens[1:], strict=False))
    for document, start, end in zip(row.document_ids, row.cu_seqlens, row.cu_seqlens[1:], strict=False):
        tokens, labels, mask = (x[start:end] for x in (row.tokens_S, row.labels_S, row.loss_mask_S))
        if document == -1:
            assert (tokens == PAD).all() and not mask.any()
            continue
        real = tokens != EOD
        assert (tokens[real] // 1000 == document + 1).all()
        assert np.array_equal(labels[:-1], tokens[1:])
        # Also at a cut: the next token of the document, or its end.
        assert ((labels[real] == tokens[real] + 1) | (labels[real] == EOD)).all()
        assert np.array_equal(mask, real.astype(np.float32))


def test_split_rows_hold_the_tokens_of_one_epoch_once(tmp_path):
    path = write_text(tmp_path)
    num_tokens = open_indexed(path).num_tokens
    rows = num_tokens // 16
    data = open_stage(tmp_path, {"text": SourceConfig(path)}, stage_of({"text": 1.0}, rows=rows, rows_per_step=1))
    seen: list[tuple[int, int]] = []
    for i in range(len(data)):
        row = data.row(i)
        check_row(row)
        assert row.sample_id == i and row.source == "text" and -1 not in row.document_ids
        for document, start, end in zip(row.document_ids, row.cu_seqlens, row.cu_seqlens[1:], strict=False):
            seen += [(document, token) for token in row.tokens_S[start:end].tolist()]
    assert len(seen) == len(set(seen)) == 16 * rows
    assert num_tokens - len(seen) < 16  # what does not fill a row


def test_the_rows_of_a_long_document_do_not_follow_one_another(tmp_path):
    write_indexed(tmp_path / "long", [[*range(10, 10 + 8 * 50 - 1), EOD]], vocab_size=1 << 20)
    source = SourceConfig(str(tmp_path / "long"))
    data = open_stage(tmp_path, {"long": source}, stage_of({"long": 1.0}, seq_len=8, rows=50, rows_per_step=1))
    firsts = [int(data.row(i).tokens_S[0]) for i in range(50)]
    assert sorted(firsts) == list(range(10, 10 + 8 * 50, 8))
    followers = sum(b - a == 8 for a, b in pairwise(firsts))
    assert followers < 10


def test_a_label_at_a_cut_is_the_documents_real_next_token(tmp_path):
    write_indexed(tmp_path / "one", [[10, 11, 12, 13, 14, EOD]], vocab_size=100)
    data = open_stage(tmp_path, {"one": SourceConfig(str(tmp_path / "one"))}, stage_of({"one": 1}, seq_len=4, rows=3))
    rows = [data.row(i) for i in range(3)]
    assert [row.tokens_S.tolist() for row in rows] == [[10, 11, 12, 13], [14, EOD, 10, 11], [12, 13, 14, EOD]]
    assert [row.labels_S.tolist() for row in rows] == [[11, 12, 13, 14], [EOD, EOD, 11, 12], [13, 14, EOD, EOD]]
    assert [row.loss_mask_S.tolist() for row in rows] == [[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 0]]
    assert [row.cu_seqlens for row in rows] == [(0, 4), (0, 2, 4), (0, 4)]
    assert data.cut_share == 1.0


def test_a_document_without_end_of_document_predicts_it(tmp_path):
    write_indexed(tmp_path / "bare", [[10, 11, 12, 13]], vocab_size=100)
    data = open_stage(
        tmp_path, {"bare": SourceConfig(str(tmp_path / "bare"))}, stage_of({"bare": 1}, seq_len=4, rows=1)
    )
    assert data.row(0).labels_S.tolist() == [11, 12, 13, EOD]
    assert data.row(0).loss_mask_S.tolist() == [1, 1, 1, 1]


def test_whole_rows_cut_no_document_and_end_in_masked_padding(tmp_path):
    source = SourceConfig(write_text(tmp_path), packing="whole")
    data = open_stage(tmp_path, {"text": source}, stage_of({"text": 1.0}, seq_len=32))
    assert data.cut_share == 0.0
    padded = 0
    for i in range(len(data)):
        row = data.row(i)
        check_row(row)
        padded += row.document_ids[-1] == -1
        for document, start, end in zip(row.document_ids, row.cu_seqlens, row.cu_seqlens[1:], strict=False):
            if document >= 0:
                assert row.tokens_S[start] == 1000 * (document + 1) or row.tokens_S[start] == EOD
                assert row.tokens_S[end - 1] == EOD
    assert padded


def test_only_the_answers_of_needle_documents_count(tmp_path):
    documents = [[10, 11, 12, 13, EOD], [20, 21, 22, 23, EOD]]
    spans = np.array([[0, 1, 2], [0, 3, 4], [1, 2, 4]])
    write_indexed(tmp_path / "needle", documents, vocab_size=100, spans=spans)
    source = SourceConfig(str(tmp_path / "needle"), packing="whole")
    data = open_stage(tmp_path, {"needle": source}, stage_of({"needle": 1}, seq_len=10, rows=1))
    row = data.row(0)
    assert sorted(row.labels_S[row.loss_mask_S > 0].tolist()) == [11, 13, 22, 23]


def test_answers_count_also_where_a_row_boundary_cuts_their_document(tmp_path):
    write_indexed(tmp_path / "n", [[10, 11, 12, 13, 14, EOD]], vocab_size=100, spans=np.array([[0, 2, 5]]))
    data = open_stage(tmp_path, {"n": SourceConfig(str(tmp_path / "n"))}, stage_of({"n": 1}, seq_len=3, rows=2))
    counted = [data.row(i).labels_S[data.row(i).loss_mask_S > 0].tolist() for i in range(2)]
    assert counted == [[12, 13], [14]]


def same(a, b) -> bool:
    return (
        np.array_equal(a.tokens_S, b.tokens_S)
        and np.array_equal(a.labels_S, b.labels_S)
        and np.array_equal(a.loss_mask_S, b.loss_mask_S)
        and (a.cu_seqlens, a.source, a.sample_id, a.document_ids)
        == (b.cu_seqlens, b.source, b.sample_id, b.document_ids)
    )


def mixed(tmp_path: Path, **options) -> StageData:
    sources = {
        "text": SourceConfig(write_text(tmp_path)),
        "code": SourceConfig(write_text(tmp_path, 9, "code"), packing="whole"),
    }
    return open_stage(tmp_path, sources, stage_of({"text": 0.7, "code": 0.3}, seq_len=32, rows=40), **options)


def test_a_row_is_the_same_in_any_process_and_in_any_order(tmp_path):
    one, two = mixed(tmp_path), mixed(tmp_path, cache="elsewhere")
    backwards = {i: two.row(i) for i in reversed(range(len(two)))}
    assert all(same(one.row(i), backwards[i]) for i in range(len(one)))


@pytest.mark.parametrize("change", [{"seed": 2}, {"stage_index": 1}])
def test_another_seed_or_stage_shuffles_anew(tmp_path, change):
    one, two = mixed(tmp_path), mixed(tmp_path, **change)
    assert sum(same(one.row(i), two.row(i)) for i in range(len(one))) < 3


def test_no_row_is_lost_or_repeated_on_any_mesh_and_over_a_resume_on_another(tmp_path):
    data = mixed(tmp_path)
    steps = len(data) // data.rows_per_step

    def ids(first: int, stop: int, dp: int) -> list[int]:
        return [
            data.row(i).sample_id
            for step in range(first, stop)
            for rank in range(dp)
            for i in rows_of_step(step, rows_per_step=data.rows_per_step, dp_rank=rank, dp=dp)
        ]

    expected = list(range(len(data)))
    assert all(ids(0, steps, dp) == expected for dp in (1, 2, 4))
    assert ids(0, 3, 4) + ids(3, 7, 1) + ids(7, steps, 2) == expected


def test_the_mix_has_its_exact_share_of_rows(tmp_path):
    data = mixed(tmp_path)
    names = [data.row(i).source for i in range(len(data))]
    assert data.rows_by_source == {"text": 28, "code": 12}
    assert names.count("code") == 12 and names.count("text") == 28
    assert 5 <= names[:20].count("code") <= 7


def test_the_index_is_built_once(tmp_path, monkeypatch):
    mixed(tmp_path)
    monkeypatch.setattr("moba_train.data.stage_data.build_row_starts", lambda *a, **k: pytest.fail("built again"))
    assert len(mixed(tmp_path)) == 40
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.endswith(".tmp")]


def test_ranks_that_start_at_once_build_the_same_index(tmp_path):
    path, stage = write_text(tmp_path), stage_of({"text": 1.0}, rows=30)
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda _: open_stage(tmp_path, {"text": SourceConfig(path)}, stage), range(4)))
    assert all(same(built[0].row(i), other.row(i)) for other in built for i in range(30))
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".json", ".npy", ".npy"]


def test_other_data_under_the_same_name_does_not_reuse_the_index(tmp_path):
    source = {"text": SourceConfig(str(tmp_path / "text"))}
    write_text(tmp_path, 40)
    open_stage(tmp_path, source, stage_of({"text": 1}))
    write_text(tmp_path, 41)
    open_stage(tmp_path, source, stage_of({"text": 1}))
    assert len(list((tmp_path / "cache").glob("rows-*.npy"))) == 2


def test_a_damaged_index_is_named(tmp_path):
    mixed(tmp_path)
    path = next((tmp_path / "cache").glob("rows-*.npy"))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match="cached row index"):
        mixed(tmp_path)


@pytest.mark.parametrize(
    ("mix", "message"),
    [({"txt": 1.0}, "unknown source"), ({}, "no source"), ({"text": 0.0}, "no source"), ({"text": -1.0}, "weight")],
)
def test_a_mix_that_cannot_be_drawn_is_refused(tmp_path, mix, message):
    with pytest.raises(ConfigError, match=message):
        open_stage(tmp_path, {"text": SourceConfig(write_text(tmp_path))}, stage_of(mix))


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(DataError, match="not found") as caught:
        open_stage(tmp_path, {"text": SourceConfig(str(tmp_path / "nowhere"))}, stage_of({"text": 1}))
    assert "nowhere.idx" in caught.value.where


def test_a_row_outside_the_stage_is_an_index_error(tmp_path):
    data = mixed(tmp_path)
    for i in (-1, len(data)):
        with pytest.raises(IndexError):
            data.row(i)


@pytest.mark.parametrize(
    ("mix", "stage_index", "expected"),
    [
        ({"text": 1.0}, 0, "e945bcef6f24d2a2"),
        ({"text": 0.7, "code": 0.3}, 1, "e500763d5268a7eb"),
        ({"code": 0.2, "long": 0.5, "text": 0.3}, 2, "f8cf065411b03aa5"),
        ({"long": 1.0}, 0, "3589f4fd909597ca"),
    ],
)
def test_rows_and_cached_files_are_those_that_runs_have_begun_with(tmp_path, mix, stage_index, expected):
    """Digests of rows, names and contents of the cache, made before stages had `lengths`: old runs go on with them."""

    def source(name: str, seed: int, num_documents: int) -> str:
        rng = np.random.default_rng(seed)
        sizes = [int(rng.integers(1, 30)) for _ in range(num_documents)]
        documents = [[*range(1000 * d, 1000 * d + size), EOD] for d, size in enumerate(sizes, start=1)]
        write_indexed(tmp_path / name, documents, vocab_size=1 << 20)
        return str(tmp_path / name)

    sources = {
        "text": SourceConfig(source("text", 7, 40)),
        "code": SourceConfig(source("code", 8, 9), packing="whole"),
        "long": SourceConfig(source("long", 9, 25), min_doc_tokens=12),
    }
    stage = stage_of(mix, seq_len=32, rows=60)
    data = open_stage(tmp_path, sources, stage, stage_index=stage_index, seed=3)
    digest = hashlib.sha256()
    for row in (data.row(i) for i in range(len(data))):
        for array in (row.tokens_S, row.labels_S, row.loss_mask_S):
            digest.update(array.tobytes())
        digest.update(repr((row.cu_seqlens, row.source, row.sample_id, row.document_ids)).encode())
    digest.update(repr((data.rows_by_source, data.cut_share)).encode())
    for path in sorted((tmp_path / "cache").iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    assert digest.hexdigest()[:16] == expected


def divided(tmp_path: Path, share: float, *, rows: int, floor: int | str = "inherit", **options) -> StageData:
    """Rows of `text`, documents of 20 tokens and more counting as long, and of `code`, three to one."""
    sources = {
        "text": SourceConfig(write_text(tmp_path, 60), packing=options.get("packing", "split")),
        "code": SourceConfig(write_text(tmp_path, 9, "code")),
    }
    stage = stage_of({"text": 0.75, "code": 0.25}, seq_len=32, rows=rows)
    lengths = {"text": SourceLengths(floor, 20, share)}  # type: ignore[arg-type]
    return open_stage(tmp_path, sources, replace(stage, lengths=lengths), **options)


def sides(data: StageData) -> list[str]:
    """Of each row: "code", or which side of 20 tokens all its documents of `text` lie on."""
    found = []
    for i in range(len(data)):
        row, pieces = data.row(i), data.pieces(i)
        of_row = {"long" if piece.size >= 20 else "short" for piece in pieces} if row.source == "text" else {"code"}
        assert len(of_row) == 1, "a row has documents of one side alone"
        found.append(of_row.pop())
    return found


@pytest.mark.parametrize("packing", ["split", "whole"])
@pytest.mark.parametrize(("share", "long"), [(0.6, 36), (0.125, 8), (1.0, 60), (0.004, 0)])
def test_long_documents_have_their_exact_share_of_rows_evenly_spread(tmp_path, packing, share, long):
    data = divided(tmp_path, share, rows=80, packing=packing, seed=long)
    assert data.rows_by_source == {"text": 60, "code": 20}, "the mix of sources stays as it is"
    found = sides(data)
    assert Counter(found) == Counter({"long": long, "short": 60 - long, "code": 20})
    for stop in range(1, 81):  # a stage may end early
        for side, count in Counter(found).items():
            assert abs(found[:stop].count(side) - count * stop / 80) <= 3
    for i in range(80):
        check_row(data.row(i))


def test_an_epoch_of_either_side_has_each_of_its_tokens_once(tmp_path):
    sizes = open_indexed(write_text(tmp_path, 60)).sizes(np.arange(60))
    for seed in range(3):
        for floor in (0, 5):
            tokens = {"long": sizes[sizes >= 20].sum(), "short": sizes[(sizes < 20) & (sizes >= floor)].sum()}
            rows = {side: int(count) // 8 for side, count in tokens.items()}
            num_rows = sum(rows.values())
            stage = stage_of({"text": 1.0}, seq_len=8, rows=num_rows, rows_per_step=1)
            stage = replace(stage, lengths={"text": SourceLengths(floor, 20, rows["long"] / num_rows)})
            source = {"text": SourceConfig(str(tmp_path / "text"))}
            data = open_stage(tmp_path, source, stage, seed=seed)
            seen, begun, cut = Counter(), set(), set()
            for piece in (piece for i in range(num_rows) for piece in data.pieces(i)):
                seen.update((piece.document, place) for place in range(piece.first, piece.stop))
                begun |= {piece.document} if piece.first == 0 else set()
                cut |= {piece.document} if piece.stop < piece.size else set()
            assert set(seen.values()) == {1}
            for side, count in tokens.items():
                of_side = [d for d, _ in seen if (sizes[d] >= 20) == (side == "long")]
                assert count - len(of_side) < 8, "but for what does not fill a row"
            assert all(sizes[document] >= floor for document, _ in seen)
            assert data.cut_share == len(cut) / len(begun)


def test_divided_rows_are_the_same_in_any_process_and_another_seed_or_stage_shuffles_them_anew(tmp_path):
    one, two = divided(tmp_path, 0.5, rows=40), divided(tmp_path, 0.5, rows=40, cache="elsewhere")
    backwards = {i: two.row(i) for i in reversed(range(40))}
    assert all(same(one.row(i), backwards[i]) for i in range(40))
    for change in ({"seed": 2}, {"stage_index": 1}):
        other = divided(tmp_path, 0.5, rows=40, **change)
        assert sum(same(one.row(i), other.row(i)) for i in range(40)) < 3
    assert len(list((tmp_path / "cache").glob("docs-*.npy"))) == 1, "the lists of documents serve every stage"


@pytest.mark.parametrize(("of_source", "of_stage", "floor"), [(0, 15, 15), (20, 5, 5), (15, "inherit", 15), (20, 0, 0)])
def test_the_floor_of_a_stage_takes_the_place_of_that_of_the_source(tmp_path, of_source, of_stage, floor):
    path, stage = write_text(tmp_path), stage_of({"text": 1.0})
    with_lengths = replace(stage, lengths={"text": SourceLengths(of_stage)})
    data = open_stage(tmp_path, {"text": SourceConfig(path, min_doc_tokens=of_source)}, with_lengths)
    expected = open_stage(tmp_path, {"text": SourceConfig(path, min_doc_tokens=floor)}, stage)
    assert all(same(data.row(i), expected.row(i)) for i in range(len(data))) and not data.length_lines


def test_the_log_line_tells_how_much_more_often_long_documents_come(tmp_path):
    write_indexed(tmp_path / "text", [[*range(10, 29), EOD]] * 10 + [[*range(10, 69), EOD]] * 10, vocab_size=99)
    stage = stage_of({"text": 1.0}, seq_len=20, rows=120)
    for packing, share, floor, expected in (
        ("split", 0.9, 0, "108 of its 120 rows (90 % asked for) from documents of >= 60 tokens, which are 75 % of its "
         "tokens: 1.2 times as often; 3.6 epochs of them, 1.2 of the others"),
        ("split", 1.0, 0, "120 of its 120 rows (100 % asked for) from documents of >= 60 tokens, which are 75 % of its "
         "tokens: 1.3 times as often; 4 epochs of them, none of the others"),
        ("split", 1.0, 30, "120 of its 120 rows (100 % asked for) from documents of >= 60 tokens, which are 100 % of "
         "its tokens: 1 times as often; 4 epochs of them, none of the others"),
    ):  # fmt: skip
        of_stage = replace(stage, lengths={"text": SourceLengths(floor, 60, share)})
        source = {"text": SourceConfig(str(tmp_path / "text"), packing=packing)}
        assert open_stage(tmp_path, source, of_stage).length_lines == (f"text: {expected}",)
    wide = replace(stage_of({"text": 1.0}, seq_len=60, rows=30), lengths={"text": SourceLengths(0, 60, 0.5)})
    whole = {"text": SourceConfig(str(tmp_path / "text"), packing="whole")}
    assert open_stage(tmp_path, whole, wide).length_lines[0].endswith("; 1.5 epochs of them, 4.5 of the others")


def test_lengths_that_cannot_be_are_refused_without_validation_too(tmp_path):
    text, stage = {"text": SourceConfig(write_text(tmp_path))}, stage_of({"text": 1.0})
    with pytest.raises(ConfigError, match="does not exist"):
        open_stage(tmp_path, text, replace(stage, lengths={"txt": SourceLengths(5)}))
    with pytest.raises(DataError, match="length that the stage wants"):
        open_stage(tmp_path, text, replace(stage, lengths={"text": SourceLengths(0, 99, 0.5)}))
