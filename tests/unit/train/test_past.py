"""May a run go on from a checkpoint: what of a schedule and its data may have changed, and what may not."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from moba_train.config.load import to_toml
from moba_train.config.schema import (
    DataConfig,
    FullLayers,
    RopeConfig,
    RunConfig,
    SourceConfig,
    SourceLengths,
    StageConfig,
    StageMesh,
    UntilConfig,
)
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
) -> tuple[str, ...]:
    return check_schedule(state, build_schedule(stages, OPTIMIZER), path, lambda index: sources)


def written(path: Path, stages: Sequence[StageConfig] = STAGES) -> Path:
    """A checkpoint's config.toml, in the folder `path`."""
    (path / "config.toml").write_text(to_toml(RunConfig(stages=tuple(stages))))
    return path


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


def test_stages_that_have_not_begun_may_change_without_a_word(tmp_path: Path) -> None:
    future = (replace(STAGES[1], tokens=480, mix={"b": 1.0}, attention="moba"), replace(STAGES[1], name="c"))
    for state in (state_after(2, 0, 2, 32), state_after(4, 0, 4, 64)):
        assert check(state, (STAGES[0], *future), path=written(tmp_path)) == ()


PAST = [
    ({"attention": "full"}, "attention = 'full'", "attention = 'moba'"),
    ({"topk": 1}, "topk = 1", "topk = 2"),
    ({"chunk_size": 4}, "chunk_size = 4", "chunk_size = 2"),
    ({"select": "group"}, "select = 'group'", "select = 'head'"),
    ({"full_layers": FullLayers(last=1)}, "full_layers.last = 1", "full_layers.last = 0"),
    ({"rope": RopeConfig(base=500.0)}, "rope.base = 500.0", "rope.base = 10000.0"),
    ({"lr": 0.25}, "lr = 0.25", "lr = 'inherit'"),
    ({"name": "warm"}, "name = 'warm'", "name = 'short'"),
    ({"seq_len": 4}, "seq_len = 4", "seq_len = 8"),
    ({"mix": {"b": 1.0}}, "mix = {'b': 1.0}", "mix = {}"),
]


@pytest.mark.parametrize(("change", "got", "allowed"), PAST)
@pytest.mark.parametrize("step", [4, 5, 7], ids=["at its end", "in the next stage", "when all is done"])
def test_a_stage_that_is_over_stays_as_it_was_trained(
    tmp_path: Path, step: int, change: dict[str, Any], got: str, allowed: str
) -> None:
    state = state_after(4, 0, 4, 64) if step == 4 else state_after(step, 1, step - 4, 16 * step)
    with pytest.raises(CheckpointError, match="changes stages that are over: 'short'") as caught:
        check(state, (replace(STAGES[0], **change), STAGES[1]), path=written(tmp_path))
    assert (caught.value.got, caught.value.allowed) == (f"stages.0.{got}", f"stages.0.{allowed}")


def test_the_last_stage_of_a_finished_run_stays_too_and_all_that_differs_is_told(tmp_path: Path) -> None:
    stages = (replace(STAGES[0], topk=3), replace(STAGES[1], attention="moba"), replace(STAGES[1], name="more"))
    with pytest.raises(CheckpointError, match="stages that are over: 'short', 'long'") as caught:
        check(state_after(7, 1, 3, 112), stages, path=written(tmp_path))
    assert caught.value.got == "stages.0.topk = 3; stages.1.attention = 'moba'"
    assert check(state_after(7, 1, 3, 112), (*STAGES, stages[2]), path=written(tmp_path)) == (), "it may go on"


def test_lengths_that_make_up_for_one_another_are_another_past(tmp_path: Path) -> None:
    three = (replace(STAGES[0], tokens=32), replace(STAGES[0], name="second"), STAGES[1])
    turned = (replace(STAGES[0], tokens=64), replace(STAGES[0], name="second", tokens=32), STAGES[1])
    state = state_after(5, 1, 1, 80) | {"step": 7, "stage_index": 2, "tokens": 112}
    assert check(state, three, path=written(tmp_path, three)) == ()
    with pytest.raises(CheckpointError, match="stages that are over: 'short', 'second'") as caught:
        check(state, turned, path=tmp_path)
    assert caught.value.got == "stages.0.tokens = 64; stages.1.tokens = 32"


def test_mesh_and_rules_of_a_stage_that_is_over_may_change_and_its_length_where_a_rule_ended_it(tmp_path: Path) -> None:
    until = UntilConfig(loss_plateau=0.1)
    begun = (replace(STAGES[0], tokens=640, until=until), STAGES[1])
    now = (replace(STAGES[0], tokens=320, mesh=StageMesh(cp=2)), STAGES[1])
    assert check(IN_STAGE_2 | {"decided": {"0": 4}}, now, path=written(tmp_path, begun)) == ()


def test_what_changes_within_a_stage_is_told(tmp_path: Path) -> None:
    other = replace(STAGES[0], attention="full", rope=RopeConfig(base=500.0), until=UntilConfig(loss_plateau=0.1))
    told = "stage 'short' changes from step 3: attention 'moba' -> 'full', rope.base 10000.0 -> 500.0"
    assert check(state_after(2, 0, 2, 32), (other, STAGES[1]), path=written(tmp_path)) == (told,)


def test_what_only_one_version_of_the_program_knows_is_not_compared(tmp_path: Path) -> None:
    tree = tomllib.loads((written(tmp_path) / "config.toml").read_text())
    for stage in tree["stages"]:
        del stage["select"], stage["rope"]["beta_fast"], stage["lengths"]
        stage["window"] = stage["rope"]["window"] = 5
    (tmp_path / "config.toml").write_text(tomli_w.dumps(tree))
    assert check(IN_STAGE_2, path=tmp_path) == ()
    with pytest.raises(CheckpointError, match="stages that are over"):
        check(IN_STAGE_2, (replace(STAGES[0], topk=3), STAGES[1]), path=tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[run]\n", "stages = 5", "stages = [5]", "[[stages]]\n", "= no TOML", "\0", "a" * (1 << 21)]
)
def test_a_checkpoint_that_does_not_tell_of_its_stages_goes_on_and_that_is_said(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    other = (replace(STAGES[0], topk=3), STAGES[1])
    told = ("config.toml of the checkpoint does not tell how its stages were trained: that is not compared",)
    assert check(IN_STAGE_2, other, path=tmp_path) == told == check(IN_STAGE_2, other, path=tmp_path / "nothing")


def test_a_run_that_was_cut_shorter_than_its_checkpoint_is_refused() -> None:
    with pytest.raises(CheckpointError, match="shorter than the checkpoint"):
        check(state_after(7, 1, 3, 112), STAGES[:1])


def test_decisions_of_stages_that_are_not_there_are_refused_too() -> None:
    with pytest.raises(CheckpointError, match="not those that it was trained with"):
        check(IN_STAGE_2 | {"stage_index": 7, "decided": {"7": 1}})
