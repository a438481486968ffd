"""Every recipe in configs/ in miniature (`--scale tiny`), as a user rehearses it, and docs/extend.md as it is written.

Most commands run one after another in one process: what costs is importing, not training.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from moba_train.cli import build_parser
from moba_train.commands.miniature import in_miniature
from moba_train.config.load import load_config
from moba_train.config.mesh import parallel_of_stage
from moba_train.config.scale import scaled
from moba_train.config.schema import RunConfig
from moba_train.config.validate import check_world_size
from moba_train.errors import ConfigError
from moba_train.train.memory_plan import GIB, estimate_memory

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
RECIPES = ("llama_8b_1m", "llama_1b_128k", "qwen3_8b_256k", "llama_8b_1m_sft")
OTHERS = sorted({path.stem for path in (ROOT / "configs").glob("*.toml")} - set(RECIPES))
pytestmark = pytest.mark.timeout(900)  # a minute of one core, which others may want too
STOP = 4  # of llama_1b_128k, inside the stage whose end is to be decided

# Runs what it is given, one after another: words of a command, Python code, or a folder to copy.
SCRIPT = """
import contextlib, io, json, shutil, sys, traceback
from moba_train.cli import main

for kind, what in json.load(open(sys.argv[1])):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        if kind == "copy":
            code = 0 if shutil.copytree(*what) else 1
        elif kind == "python":
            exec(what, {})
            code = 0
        else:
            code = main(what)
    print(json.dumps([kind, what, code, out.getvalue(), errors.getvalue()]), file=sys.__stdout__, flush=True)
"""


class Told(NamedTuple):
    code: int
    out: str
    errors: str


def run_all(folder: Path, work: list[tuple[str, Any]]) -> dict[str, Told]:
    """What each piece of work printed, by its words."""
    (folder / "work.json").write_text(json.dumps(work))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "work.json"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=840,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    told = {}
    for kind, what, code, out, errors in map(json.loads, done.stdout.splitlines()):
        told[shlex.join(what) if kind == "command" else kind] = Told(code, out, errors)
        assert code == 0, (what, out[-2000:], errors[-2000:])
    return told


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    python_path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": python_path, "PATH": path, "OMP_NUM_THREADS": "1"}


def make_workspace(folder: Path) -> Path:
    """A folder that looks like a checkout, with long and short documents and nothing else."""
    for name in ("configs", "launch"):
        (folder / name).symlink_to(ROOT / name)
    lines = [f"value_{i} = compute(value_{i - 1}, {i * 37 % 101})  # keep the order of the steps\n" for i in range(400)]
    for name, count in (("books", 400), ("web", 40)):
        (folder / name).mkdir()
        for i in range(8):
            (folder / name / f"{i}.txt").write_text("".join(lines[(50 * i) % 360 :][:count]))
    return folder


def on_two_ranks(folder: Path, *words: str) -> str:
    command = ["launch/torchrun.sh", "2", *words]
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def recipe(name: str) -> RunConfig:
    return load_config(ROOT / "configs" / f"{name}.toml")


def page_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def page_commands() -> list[list[str]]:
    return [shlex.split(line) for block in page_blocks("sh") for line in block.splitlines()]


def train(name: str) -> str:
    return f"train configs/{name}.toml --scale tiny"


def header(name: str) -> list[str]:
    """Lines of the comment that a recipe begins with."""
    text = (ROOT / "configs" / f"{name}.toml").read_text(encoding="utf-8").replace("\\\n#", "")
    return [line.removeprefix("#") for line in text.partition("\n[run]")[0].splitlines()]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_the_gpus_that_it_names(name: str) -> None:
    config, told = recipe(name), " ".join(" ".join(header(name)).split())
    gpus, gib = map(int, re.findall(r"(\d+) GPUs of 80 GB \(about (\d+) GiB\)", told)[0])
    assert round(estimate_memory(config).total / GIB) == gib < 60
    for stage in config.stages:
        check_world_size(parallel_of_stage(config.parallel, stage), gpus)


@pytest.mark.parametrize("name", [*RECIPES, *OTHERS])
def test_the_commands_above_a_recipe_are_commands_of_this_program(name: str) -> None:
    commands = [line.strip() for line in header(name) if line.startswith("   moba-train ")]
    for command in commands:
        words = shlex.split(re.split(r" {3,}", command)[0])
        args, overrides = build_parser().parse_known_args(words[1:])
        if args.command in ("plan", "train"):
            load_config(ROOT / args.config, overrides)
    assert name not in RECIPES or any("--scale tiny" in command for command in commands)


class Rehearsal(NamedTuple):
    folder: Path
    two_ranks: str
    told: dict[str, Told]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    folder = make_workspace(tmp_path_factory.mktemp("recipes"))
    words = ("configs/llama_1b_128k.toml", "--scale", "tiny", "--run.stop-after-steps", str(STOP))
    two_ranks = on_two_ranks(folder, *words)
    work: list[tuple[str, Any]] = []
    for words_of_line in page_commands():
        assert words_of_line[0] == "moba-train"
        if words_of_line[1:3] == ["convert", "from-hf"]:  # the page's reader has one; here it is that of the rehearsal
            work.append(("copy", [f"{scaled(recipe('llama_8b_1m')).model.init_from}-hf", words_of_line[3]]))
        work.append(("command", words_of_line[1:]))
    work += [("command", train(name).split()) for name in RECIPES[1:]]
    work += [("python", block) for block in page_blocks("python")]
    return Rehearsal(folder, two_ranks, run_all(folder, work))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_through_all_its_stages(rehearsal: Rehearsal, name: str) -> None:
    tiny = scaled(recipe(name))
    run = rehearsal.folder / tiny.run.dir
    assert json.loads((run / "outcome.json").read_text())["finished"]
    rows = records(run)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert list(dict.fromkeys(row["stage"] for row in rows)) == [stage.name for stage in recipe(name).stages]
    stages = {stage.name: stage for stage in tiny.stages}
    for row in rows:
        stage = stages[row["stage"]]
        # Random weights know nothing: every token is about as probable as any other.
        assert abs(row["train/loss"] - math.log(tiny.model.vocab_size)) < 0.2
        if stage.attention == "full":
            assert row["train/density"] == 1.0
        elif stage.seq_len > 2 * stage.topk * stage.chunk_size:
            assert row["train/density"] < 0.95
    for stage in tiny.stages:
        ends = [row for row in rows if row["stage"] == stage.name][-1]
        assert ends["eval/loss_moba"] > 0 and ends["eval/niah_full"] >= 0


def test_fine_tuning_counts_the_assistants_words_alone(rehearsal: Rehearsal) -> None:
    tiny = scaled(recipe("llama_8b_1m_sft"))
    tokens = {stage.name: stage.tokens_per_step for stage in tiny.stages}
    rows = records(rehearsal.folder / tiny.run.dir)
    for row in rows:
        assert 0.02 < row["train/loss_tokens"] / tokens[row["stage"]] < 0.6
    assert rows[-1]["train/density"] < 0.95, "its prompts are long enough for MoBA to leave something out"


def test_a_run_that_decides_goes_on_from_two_ranks_on_one(rehearsal: Rehearsal) -> None:
    run = rehearsal.folder / "runs/llama_1b_128k-tiny"
    assert f"stopped (stop_after_steps) after step {STOP}/" in rehearsal.two_ranks
    told = rehearsal.told[train("llama_1b_128k")]
    assert f"resuming from runs/llama_1b_128k-tiny/checkpoints/step_{STOP:08d}" in told.out
    assert "2 rank(s) of cpu: tp 1, cp 2, pp 1, dp 1" in rehearsal.two_ranks
    assert "1 rank(s) of cpu: tp 1, cp 1, pp 1, dp 1" in told.out
    rows = [row for row in records(run) if row["stage"] == "moba_128k"]
    until = recipe("llama_1b_128k").stages[0].until
    decided = rows[-1]["until/decided"]
    assert (len(rows) < until.evaluations + 2) == bool(decided), "it ends early if and only if that was decided"


def test_two_ranks_that_start_at_once_make_each_part_of_the_material_once(rehearsal: Rehearsal) -> None:
    made = re.findall(r"made (runs/miniature/\S+): ", rehearsal.two_ranks)
    assert len(made) == len(set(made)) == 4
    later = "".join(told.out for told in rehearsal.told.values())
    assert not set(made) & set(re.findall(r"made (runs/miniature/\S+): ", later))
    assert not [path for path in (rehearsal.folder / "runs/miniature").iterdir() if path.name.startswith(".")]


def test_the_plan_says_that_it_is_one_of_a_miniature(rehearsal: Rehearsal, capsys: pytest.CaptureFixture[str]) -> None:
    full = rehearsal.told["plan configs/llama_8b_1m.toml"].out
    assert "MINIATURE" not in full and "1,048,576" in full
    assert rehearsal.told[train("llama_8b_1m")].out.startswith("MINIATURE of the run (--scale tiny)")
    in_miniature(recipe("llama_8b_1m"), make=False)
    assert capsys.readouterr().out.startswith("MINIATURE")


def test_the_page_on_extending_a_llama_leaves_what_it_promises(rehearsal: Rehearsal) -> None:
    run = rehearsal.folder / "runs/llama_8b_1m-tiny"
    for name in ("niah.png", "niah.jsonl", "report.html", "config.toml", "metrics.jsonl"):
        assert (run / name).stat().st_size > 0, name
    weights = rehearsal.folder / "weights/llama-3.1-8b"
    assert {"config.toml", "manifest.json", "tokenizer.json"} <= {path.name for path in weights.iterdir()}
    for name in ("data/long", "data/short"):
        counts = json.loads((rehearsal.folder / name / "prep.json").read_text())
        assert counts["documents"]["train"] > 0 and counts["documents"]["valid"] > 0
    home = json.loads((rehearsal.folder / "models/llama-8b-1m-tiny/config.json").read_text())
    last = scaled(recipe("llama_8b_1m")).stages[-1]
    assert home["max_position_embeddings"] == last.seq_len and home["rope_scaling"]["factor"] == last.rope.factor
    shown = rehearsal.told["python"].out.splitlines()
    assert shown[0] == str(last.seq_len) and "def read(path):" in "".join(shown[1:])


def test_a_run_that_begins_with_other_positions_than_its_weights_says_so(rehearsal: Rehearsal) -> None:
    from moba_train.commands.parts import other_positions

    weights = rehearsal.folder / "weights/llama-3.1-8b"  # those of the miniature: they know 8 tokens
    (note,) = other_positions(recipe("llama_8b_1m"), weights, {"stage_index": 0})
    assert "stage '128k': base 500,000, llama3 scaling, factor 8 from 8,192 tokens; " in note
    assert note.endswith("trained with base 500,000, llama3 scaling, factor 8 from 8 tokens")
    assert not [name for name in RECIPES if "position embedding" in rehearsal.told[train(name)].out]


def test_a_folder_that_is_no_miniature_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    theirs = tmp_path / "runs/miniature/thesis.tex"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    with pytest.raises(ConfigError, match="not a miniature") as caught:
        in_miniature(recipe("smoke"), make=True)
    assert caught.value.where == "runs/miniature"
    theirs.unlink()
    theirs.with_name("miniature.json").write_text('{"miniature": 0}\n')
    with pytest.raises(ConfigError, match="another version"):
        in_miniature(recipe("smoke"), make=True)
    theirs.with_name("miniature.json").unlink()
    theirs.parent.joinpath("lock").unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        in_miniature(load_config(ROOT / "configs/smoke.toml", ["--run-dir", "file/run"]), make=True)


def test_what_an_interrupted_process_has_left_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    left = tmp_path / "runs/miniature/.new/text"
    left.mkdir(parents=True)
    (left / "source.jsonl").write_text("half a li")
    (tmp_path / "runs/miniature/miniature.json").write_text('{"miniature": 1}\n')
    tiny = in_miniature(recipe("million_cpu"), make=True)
    assert sorted(path.name for path in left.parents[1].iterdir()) == ["lock", "miniature.json", "text", "tokenizer"]
    before = (tmp_path / f"{tiny.data.valid.path}.bin").read_bytes()
    shutil.rmtree(tmp_path / "runs/miniature")
    in_miniature(recipe("million_cpu"), make=True)
    assert (tmp_path / f"{tiny.data.valid.path}.bin").read_bytes() == before, "the same bytes whenever it is made"


def test_damaged_weights_of_the_miniature_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = Path(in_miniature(recipe("llama_8b_1m"), make=True).model.init_from)
    (shard,) = weights.glob("*.distcp")
    before = shard.read_bytes()
    shard.write_bytes(before[:-100] + bytes(100))
    capsys.readouterr()
    in_miniature(recipe("llama_8b_1m"), make=True)
    assert shard.read_bytes() == before
    assert f"making {weights} anew: {shard.name} has the right size but another SHA-256" in capsys.readouterr().out
    in_miniature(recipe("llama_8b_1m"), make=True)
    assert "anew" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_other_configurations_run_in_miniature(tmp_path: Path) -> None:
    run_all(make_workspace(tmp_path), [("command", train(name).split()) for name in OTHERS])
    for name in OTHERS:
        config = recipe(name)
        rows = records(tmp_path / scaled(config).run.dir)
        assert list(dict.fromkeys(row["stage"] for row in rows)) == [stage.name for stage in config.stages]
        assert all(math.isfinite(row["train/loss"]) for row in rows)


@pytest.mark.slow
def test_a_recipe_that_changes_its_mesh_has_the_losses_of_one_rank(tmp_path: Path) -> None:
    folder = make_workspace(tmp_path)
    told = on_two_ranks(folder, "configs/llama_8b_1m.toml", "--scale", "tiny", "--run-dir", "runs/two")
    assert "2 rank(s) of cpu: tp 2, cp 1" in told and "2 rank(s) of cpu: tp 1, cp 2" in told
    run_all(folder, [("command", [*train("llama_8b_1m").split(), "--run-dir", "runs/one"])])
    one, two = ([row["train/loss"] for row in records(folder / f"runs/{name}-tiny")] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)
