"""May a run go on from a checkpoint: what of a schedule and its data may have changed, and what may not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from moba_train.config.schema import DataConfig, SourceConfig, SourceLengths, StageConfig
from moba_train.data.indexed import write_indexed, write_spans
from moba_train.data.stage_data import source_facts
from moba_train.errors import CheckpointError, DataError
from moba_train.train.past import check_schedule
from moba_train.train.progress import Progress, rows_fingerprint
from moba_train.train.schedule import build_schedule
from tests.unit.train.toy import OPTIMIZER, STAGES

LENGTHS = {"a": SourceLengths(long_doc_tokens=8, long_share=0.5)}
FACTS = {"packing": "split", "min_doc_tokens": 0, "documents": "ab" * 32}
SOURCES = {"a": FACTS, "b": FACTS}


def state_after(step: int, stage_index: int, step_in_stage: int, tokens: int, **changes: Any) -> dict[str, Any]:
    """state.json as it is read again."""
    rows = rows_fingerprint(replace(STAGES[stage_index], **changes), SOURCES)
    state = asdict(Progress(step, stage_index, step_in_stage, tokens)) | {"stage_rows": rows}
    decoded: dict[str, Any] = json.loads(json.dumps(state))
    return decoded


IN_STAGE_2 = state_after(5, 1, 1, 80)


def check(
    state: Mapping[str, Any],
    stages: Sequence[StageConfig] = STAGES,
    *,
    sources: Mapping[str, Any] = SOURCES,
    path: Path = Path("x"),
) -> None:
    check_schedule(state, build_schedule(stages, OPTIMIZER), path, lambda index: sources)


@pytest.mark.parametrize(
    "past", [replace(STAGES[0], tokens=32), replace(STAGES[0], tokens=128), replace(STAGES[0], tokens_per_step=32)]
)
def test_the_past_of_the_schedule_may_not_change(past: StageConfig) -> None:
    with pytest.raises(CheckpointError, match="not those that it was trained with") as caught:
        check(IN_STAGE_2, (past, STAGES[1]))
    assert caught.value.allowed == "step 5 is step 1 of stage 2, 80 tokens"


@pytest.mark.parametrize("change", [{"tokens": 480}, {"mix": {"a": 2.0}}, {"name": "other"}, {"lengths": LENGTHS}])
def test_the_stage_in_which_a_run_goes_on_must_draw_the_same_rows(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="would draw other rows") as caught:
        check(IN_STAGE_2, (STAGES[0], replace(STAGES[1], **change)))
    assert f"stages.1.{next(iter(change))}" in str(caught.value.got)


def test_the_order_of_a_mix_decides_which_of_two_rows_comes_first() -> None:
    begun, turned = {"a": 0.5, "b": 0.5}, {"b": 0.5, "a": 0.5}
    check(state_after(5, 1, 1, 80, mix=begun), (STAGES[0], replace(STAGES[1], mix=begun)))
    with pytest.raises(CheckpointError, match="would draw other rows") as caught:
        check(state_after(5, 1, 1, 80, mix=begun), (STAGES[0], replace(STAGES[1], mix=turned)))
    assert caught.value.got == "stages.1.mix = {'b': 0.5, 'a': 0.5}"


def test_a_checkpoint_from_before_stages_had_lengths_goes_on_where_there_are_none() -> None:
    older = state_after(5, 1, 1, 80)
    del older["stage_rows"]["lengths"]
    check(older)
    with pytest.raises(CheckpointError, match="would draw other rows") as caught:
        check(older, (STAGES[0], replace(STAGES[1], lengths=LENGTHS)))
    assert caught.value.allowed == "stages.1.lengths = {}"


OTHERS = [
    ("documents", "cd" * 32, "documents of data.sources.b = sha256 cdcdcdcdcdcdcdcd..."),
    ("packing", "whole", "data.sources.b.packing = 'whole'"),
    ("min_doc_tokens", 500, "data.sources.b.min_doc_tokens = 500"),
]


@pytest.mark.parametrize(("key", "value", "told"), OTHERS)
def test_the_stage_in_which_a_run_goes_on_must_draw_from_the_same_documents(key: str, value: object, told: str) -> None:
    with pytest.raises(CheckpointError, match="would draw other rows") as caught:
        check(IN_STAGE_2, sources={"a": FACTS, "b": {**FACTS, key: value}})
    assert caught.value.got == told
    assert told.partition(" = ")[0] in caught.value.allowed and told != caught.value.allowed
    assert "end the stage here (stages.1.tokens = 16)" in caught.value.fix


def test_a_stage_that_is_ended_where_it_stands_gives_way_to_one_with_other_data() -> None:
    """As the message says."""
    later = replace(STAGES[1], name="new", tokens=32)
    check(IN_STAGE_2, (STAGES[0], replace(STAGES[1], tokens=16), later), sources={"a": {**FACTS, "documents": "cd"}})


@pytest.mark.parametrize("told", ["absent", 5, {"a": 5}, {"a": {}}, {"other": FACTS}])
def test_what_a_checkpoint_does_not_tell_of_its_sources_is_not_compared(told: object) -> None:
    older = state_after(5, 1, 1, 80)
    older["stage_rows"]["sources"] = told
    if told == "absent":
        del older["stage_rows"]["sources"]
    check(older)


def test_data_of_stages_that_are_over_or_still_to_come_are_not_looked_at() -> None:
    def gone(index: int) -> Mapping[str, Any]:
        raise DataError("data file not found")

    at_end = state_after(4, 0, 4, 64)
    check_schedule(at_end, build_schedule(STAGES, OPTIMIZER), Path("x"), gone)
    check_schedule(state_after(7, 1, 3, 112), build_schedule(STAGES, OPTIMIZER), Path("x"), gone)
    with pytest.raises(DataError):
        check_schedule(IN_STAGE_2, build_schedule(STAGES, OPTIMIZER), Path("x"), gone)


def test_the_facts_of_a_source_follow_its_documents_and_not_its_path(tmp_path: Path) -> None:
    def facts(name: str, lengths: SourceLengths | None = None, **settings: Any) -> dict[str, object]:
        data = DataConfig(
            sources={"a": SourceConfig(str(tmp_path / name), **settings), "not drawn": SourceConfig("none")}
        )
        stage = StageConfig(mix={"a": 1.0}, lengths={"a": lengths} if lengths else {})
        (found,) = source_facts(data, stage).items()
        assert found[0] == "a"
        return found[1]

    for name, last in (("one", 3), ("moved", 3), ("other", 4)):
        write_indexed(tmp_path / name, [[1, 2, last]], vocab_size=9)
    assert facts("one") == facts("moved") != facts("other")
    write_spans(tmp_path / "moved", [[0, 1, 2]])
    assert facts("one") != facts("moved"), "the loss is on other tokens"
    assert facts("one", min_doc_tokens=2) == facts("one") | {"min_doc_tokens": 2}
    floor = SourceLengths(min_doc_tokens=3)
    assert facts("one", floor, min_doc_tokens=2) == facts("one", floor), "the stage's own floor holds"
    with pytest.raises(DataError, match="not found"):
        facts("nothing")


def test_attention_and_stages_that_have_not_begun_may_change() -> None:
    future = (replace(STAGES[0], topk=3), replace(STAGES[1], tokens=480, mix={"b": 1.0}), replace(STAGES[1], name="c"))
    check(state_after(2, 0, 2, 32), future)
    check(state_after(4, 0, 4, 64), (STAGES[0], *future[1:]))


def test_a_run_that_was_cut_shorter_than_its_checkpoint_is_refused() -> None:
    with pytest.raises(CheckpointError, match="shorter than the checkpoint"):
        check(state_after(7, 1, 3, 112), STAGES[:1])


def test_decisions_of_stages_that_are_not_there_are_refused_too() -> None:
    with pytest.raises(CheckpointError, match="not those that it was trained with"):
        check(IN_STAGE_2 | {"stage_index": 7, "decided": {"7": 1}})
