"""Specs and packs: host geometry, closed forms, refusals."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from moba_kernels import Full, MoBA, Pack

from . import oracle
from .inputs import ROWS


@pytest.mark.parametrize("cu", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("chunk_size", [1, 4, 16, 100])
def test_chunks_are_cut_document_by_document(cu, chunk_size):
    geometry = Pack(cu).chunks(chunk_size)
    table = oracle.chunk_table(cu, chunk_size)
    assert list(zip(geometry.start_C, geometry.end_C, geometry.doc_C, strict=True)) == table
    assert geometry.num_chunks == len(table)
    for document in range(len(cu) - 1):
        first, last = geometry.first_chunk_of_doc[document : document + 2]
        assert [i for i, chunk in enumerate(table) if chunk[2] == document] == list(range(first, last))
    token_chunks = geometry.tensors("cpu").chunk_of_token_T.tolist()
    assert token_chunks == [next(i for i, (a, b, _) in enumerate(table) if a <= t < b) for t in range(cu[-1])]


@pytest.mark.parametrize("cu", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("spec", [Full(), MoBA(8, 1), MoBA(8, 3), MoBA(5, 2, "group"), MoBA(16, 50), MoBA(200, 2)])
def test_planned_pairs_are_what_counting_gives(cu, spec):
    if isinstance(spec, Full):
        count = sum(t + 1 - max(e for e in cu if e <= t) for t in range(cu[-1]))
    else:
        table = oracle.chunk_table(cu, spec.chunk_size)
        count = 0
        for t in range(cu[-1]):
            own = next(i for i, (a, b, _) in enumerate(table) if a <= t < b)
            past = [b - a for a, b, d in table[:own] if d == table[own][2]]
            count += t + 1 - table[own][0] + sum(past[: spec.topk - 1])
    assert Pack(cu).planned_pairs(spec) == count


def test_planned_pairs_of_a_million_tokens_equal_the_formula_summed_in_python():
    spec, tokens = MoBA(4096, 12), 1_000_003
    expected = sum(t % 4096 + 1 + min(11, t // 4096) * 4096 for t in range(tokens))
    assert Pack([0, tokens]).planned_pairs(spec) == expected


def test_density_is_one_when_the_picks_cover_the_document():
    pack = Pack([0, 40, 64])
    assert pack.density(Full()) == 1.0
    assert pack.density(MoBA(8, 5)) == 1.0
    assert 0 < pack.density(MoBA(8, 2)) < 1.0
    assert Pack([0]).density(MoBA(8, 2)) == 1.0


def test_editing_the_source_tensor_later_changes_nothing():
    source = torch.tensor([0, 16, 32], dtype=torch.int32)
    array = np.array([0, 16, 32], dtype=np.int64)
    packs = [Pack(source), Pack(array)]
    source[1] = 8
    array[1] = 8
    for pack in packs:
        assert pack.cu_seqlens == (0, 16, 32)
        assert pack.chunks(16).start_C.tolist() == [0, 16]


def test_geometry_is_computed_once_and_survives_pickling():
    pack = Pack([0, 5, 12])
    geometry = pack.chunks(4)
    assert pack.chunks(4) is geometry
    assert geometry.tensors("cpu") is geometry.tensors(torch.device("cpu"))
    copy = pickle.loads(pickle.dumps(pack))
    assert copy == pack and copy.chunks(4).end_C.tolist() == [4, 5, 9, 12]


@pytest.mark.parametrize(
    ("cu", "message"),
    [
        ([], "non-empty"),
        ([1, 4], "must start at 0"),
        ([0, 4, 3], "must not fall"),
        ([0.0, 4.0], "integers"),
        (torch.zeros(2, 2, dtype=torch.int64), "1-D"),
    ],
)
def test_a_bad_cu_seqlens_is_refused_with_what_got_and_fix(cu, message):
    with pytest.raises(ValueError, match=message) as caught:
        Pack(cu)
    assert "got" in str(caught.value) and "fix:" in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [(0, 1), (-4, 1), (16, 0), (16, -1), (16.0, 2), (16, True), (16, 2, "row")],
)
def test_a_bad_spec_is_refused(arguments):
    with pytest.raises(ValueError, match="fix:"):
        MoBA(*arguments)


def test_specs_are_frozen_hashable_and_refuse_unknown_arguments():
    assert len({MoBA(16, 2), MoBA(16, 2), MoBA(16, 2, "group"), Full(), Full()}) == 3
    with pytest.raises(AttributeError):
        MoBA(16, 2).topk = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        MoBA(chunk_size=16, topk=2, window=4)  # type: ignore[call-arg]
