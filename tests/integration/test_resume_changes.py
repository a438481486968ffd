"""What may change between two jobs of a run, by the command line: data, settings of sources, stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moba_train.cli import main
from moba_train.data.indexed import write_indexed
from moba_train.data.tokenizer import train_tokenizer
from tests.drills.runs import records

CONFIG = """
model = {{ preset = "tiny", vocab_size = 512 }}
data = {{ tokenizer = "{0}/t.model", sources.text.path = "{0}/text", valid.path = "{0}/valid" }}
optimizer = {{ warmup_tokens = 256 }}
eval = {{ rows = 0 }}
niah = {{ loop_samples = 0 }}
stages = [{1}, {2}]
"""
ROWS = "tokens_per_step = 256, seq_len = 128, mix.text = 1.0, chunk_size = 16"
MOBA = f'{{ name = "moba", tokens = 1024, {ROWS} }}'
FULL = f'{{ name = "full", tokens = 512, {ROWS}, attention = "full" }}'


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """c.toml, its data, and `run`, stopped after two of the four steps of its first stage."""
    folder = tmp_path_factory.mktemp("stopped")
    text = Path(shutil.__file__).read_text("utf-8")
    tokens = train_tokenizer([text], folder / "t.model", vocab_size=512).encode(text)
    for name in ("text", "valid"):
        write_indexed(folder / name, documents(tokens, 300), vocab_size=512)
    write_indexed(folder / "other", documents(tokens, 200), vocab_size=512)
    (folder / "c.toml").write_text(CONFIG.format(folder, MOBA, FULL))
    assert train(folder, "--run.stop-after-steps", "2") == 0
    return folder


@pytest.fixture
def folder(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the run, beside the data that it began with."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    (tmp_path / "c.toml").write_text(CONFIG.format(tmp_path, MOBA, FULL))
    return tmp_path


def documents(tokens: list[int], length: int) -> list[list[int]]:
    return [tokens[i : i + length] for i in range(0, 12_000, length)]


def train(folder: Path, *words: str) -> int:
    return main(["train", str(folder / "c.toml"), "--run-dir", str(folder / "run"), *words])


def prepare_other(folder: Path) -> None:
    for file in ("idx", "bin"):
        shutil.copy(folder / f"other.{file}", folder / f"text.{file}")


def test_a_run_does_not_go_on_in_a_stage_whose_documents_were_prepared_anew(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "run" / "config.toml").read_bytes()
    prepare_other(folder)
    assert train(folder, "--run.log-every", "1") == 2
    told = capfd.readouterr().err
    assert "the stage in which the run goes on would draw other rows than it began with" in told
    assert "got:     documents of data.sources.text = sha256 " in told
    assert "allowed: documents of data.sources.text = sha256 " in told
    assert (folder / "run" / "config.toml").read_bytes() == before and len(records(folder / "run")) == 2


def test_the_way_out_that_the_message_names_is_one(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The stage ends where it stands, and the next one draws from the new documents."""
    prepare_other(folder)
    assert train(folder) == 2
    assert (
        "end the stage here (stages.0.tokens = 512) and let one with the new data or settings follow"
        in capfd.readouterr().err
    )
    assert train(folder, "--stages.0.tokens", "512") == 0
    assert [record["stage"] for record in records(folder / "run")] == ["moba"] * 2 + ["full"] * 2


def test_a_run_does_not_go_on_in_a_stage_whose_source_has_another_floor(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(folder, "--data.sources.text.min-doc-tokens", "250") == 2
    told = capfd.readouterr().err
    assert "got:     data.sources.text.min_doc_tokens = 250" in told
    assert "allowed: data.sources.text.min_doc_tokens = 0" in told


def test_data_may_be_moved_and_change_between_stages(folder: Path) -> None:
    for file in ("idx", "bin"):
        (folder / f"text.{file}").rename(folder / f"moved.{file}")
    assert train(folder, "--data.sources.text.path", str(folder / "moved"), "--run.stop-after-steps", "2") == 0
    assert train(folder, "--data.sources.text.path", str(folder / "other"), "--run.stop-after-steps", "1") == 0
    assert len(records(folder / "run")) == 5


def test_a_checkpoint_that_does_not_tell_of_its_sources_goes_on_and_the_next_one_does(folder: Path) -> None:
    """It is of an older version."""
    from moba_train.train.manifest import seal_files, write_manifest

    path = folder / "run" / "checkpoints" / "step_00000002"
    state = json.loads((path / "state.json").read_text())
    del state["stage_rows"]["sources"]
    (path / "state.json").write_text(json.dumps(state))
    write_manifest(path, seal_files(file for file in path.iterdir() if file.name != "manifest.json"))
    assert train(folder, "--data.sources.text.min-doc-tokens", "250", "--run.stop-after-steps", "1") == 0
    assert train(folder, "--run.stop-after-steps", "1") == 2, "from here on it counts"


def test_a_stage_that_is_over_cannot_be_rewritten(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither on the way nor afterwards; configuration and report go on telling what was trained."""
    resolved = folder / "run" / "config.toml"
    for further, steps in ((3, 5), (1, 6)):
        assert train(folder, "--run.stop-after-steps", str(further)) == 0
        before = resolved.read_bytes()
        assert (
            train(folder, "--stages.0.attention", "full", "--stages.0.name", "warm", "--stages.0.rope.base", "500") == 2
        )
        told = capfd.readouterr().err
        assert "the configuration changes stages that are over: 'moba'" in told
        assert "stages.0.name = 'moba'; stages.0.attention = 'moba'; stages.0.rope.base = 10000.0" in told
        assert resolved.read_bytes() == before and len(records(folder / "run")) == steps
    assert train(folder, "--stages.1.topk", "2") == 2, "all is done"
    assert "changes stages that are over: 'full'" in capfd.readouterr().err
    assert resolved.read_bytes() == before


def test_what_changes_within_the_stage_under_way_is_told_and_later_stages_change_silently(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("--stages.0.attention", "full", "--stages.0.rope.base", "500", "--run.stop-after-steps", "1")
    assert train(folder, *words, "--stages.1.topk", "2") == 0
    told = "stage 'moba' changes from step 3: attention 'moba' -> 'full', rope.base 10000.0 -> 500.0"
    assert [line for line in capfd.readouterr().out.splitlines() if " changes from step " in line] == [told]
