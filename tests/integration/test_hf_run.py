"""From a Hugging Face folder to a run and back, as a user does it: the commands, one after another, in one process."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from moba_train.config.schema import ModelConfig, RopeConfig
from moba_train.data.tokenizer import load_tokenizer, train_tokenizer
from moba_train.model.hf.export import hf_config
from moba_train.model.hf.names import places
from moba_train.model.hf.tokenizer import tokenizer_files
from moba_train.model.hf.write import plan_files, write_files

ROOT = Path(__file__).parents[2]
LINES = [f"value_{i} = compute(value_{i - 1}, {i * 37 % 101})  # keep the order of the steps\n" for i in range(400)]
NUM_TOKENS = 330
MODEL = ModelConfig(
    num_layers=1,
    hidden_size=16,
    ffn_hidden_size=24,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    vocab_size=NUM_TOKENS,
    tied_head=False,
    qkv_bias=True,
)

# Each line is one command; it stands for what a user types.
SCRIPT = """
import contextlib, io, json, sys
from moba_train.cli import main

told = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        code = main(words)
    told.append([code, out.getvalue(), errors.getvalue()])
print(json.dumps(told))
"""


def run_commands(folder: Path, *commands: str) -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of each command."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([command.split() for command in commands])],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [(code, out, errors) for code, out, errors in json.loads(done.stdout.splitlines()[-1])]


def make_source(folder: Path) -> None:
    """A model whose head is zero, so that every token is equally probable, and its tokenizer."""
    folder.mkdir()
    torch.manual_seed(0)
    parts = [part for place in places(MODEL) for part in place.parts]
    tensors = {part.name: torch.randn(part.shape) for part in parts} | {"lm_head.weight": torch.zeros(NUM_TOKENS, 16)}
    files = plan_files(parts, torch.float32, max_bytes=10_000)
    write_files(folder, files, torch.float32, ((part.name, tensors[part.name]) for part in parts))
    tree = hf_config(MODEL, RopeConfig(base=5e5), max_seq_len=64, dtype="float32", token_ids={"eos_token_id": 1})
    train_tokenizer(LINES, folder / "tokenizer.model", vocab_size=NUM_TOKENS)
    for name, content in {**tokenizer_files(folder / "tokenizer.model"), "config.json": tree}.items():
        (folder / name).write_text(json.dumps(content))


def test_a_run_begins_with_converted_weights_goes_on_from_its_own_and_goes_home(tmp_path: Path) -> None:
    make_source(tmp_path / "source")
    (tmp_path / "text").mkdir()
    for i in range(4):
        (tmp_path / "text" / f"{i}.txt").write_text("".join(LINES[100 * i : 100 * i + 100]))
    train_tokenizer(LINES, tmp_path / "other.model", vocab_size=NUM_TOKENS - 5)
    data = "--data.sources.text.path data/train --data.valid.path data/valid --niah.loop-samples 0 --eval.rows 1"
    train = f"train ours/config.toml {data} --run-dir run --stages.0.tokens 256 --stages.0.chunk-size 16 "
    train += "--optimizer.lr 0.01"
    told = run_commands(
        tmp_path,
        "prep text --out data --tokenizer source/tokenizer.json --held-out 0.3",
        "convert from-hf source ours",
        "convert from-hf source ours",
        f"{train} --data.tokenizer other.model",
        f"{train} --model.head-dim 16",
        f"{train} --resume ours",
        f"{train} --run.stop-after-steps 2",
        "convert to-hf run home",
        f"{train} --model.init-from gone",
        f"{train} --run-dir second --model.init-from run --run.stop-after-steps 1",
        "convert to-hf second farther",
        "eval niah ours --data.valid.path data/valid --lengths 80 --depths 1 --samples 1 --attentions full",
    )
    codes = [code for code, _, _ in told]
    assert codes == [0, 0, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0], told[-1]
    _, _, again, other_tokenizer, other_model, resumed, first, home, second, chained, farther, niah = told
    assert "ours is there already" in again[2]
    assert 'tokenizer = "ours/tokenizer.json"' in (tmp_path / "ours" / "config.toml").read_text()
    assert "the weights know another vocabulary" in other_tokenizer[2] or "another tokenizer" in other_tokenizer[2]
    assert (
        "model.head_dim = 16 in this run" in other_model[2] and "Copy [model] from ours/config.toml" in other_model[2]
    )
    assert "model.init_from" in resumed[2]
    assert "initial weights: ours" in first[1]
    assert "resuming from run/checkpoints/step_00000002" in second[1] and "initial weights" not in second[1]
    assert "tokenizer files of ours" in home[1]
    assert "initial weights: run/checkpoints/step_00000004" in chained[1]
    assert "tokenizer.json of ours/tokenizer.json" in farther[1]  # where the run began is not there any more
    assert "evaluating ours" in niah[1] and (tmp_path / "ours" / "niah.jsonl").exists()

    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert abs(records[0]["train/loss"] - math.log(NUM_TOKENS)) < 1e-6  # padding of the vocabulary is never predicted
    (after,) = [json.loads(line) for line in (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()]
    assert (after["step"], after["train/lr"]) == (1, records[0]["train/lr"])
    assert after["train/loss"] < records[0]["train/loss"] - 0.01  # it begins where the first has ended
    weights = load_file(tmp_path / "home" / "model.safetensors")
    assert weights["lm_head.weight"].shape == (NUM_TOKENS, 16) and weights["lm_head.weight"].abs().max() > 0
    for name in ("home", "farther"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["model_type"], config["rope_theta"], config["eos_token_id"]) == ("qwen2", 5e5, 1)
        assert config["max_position_embeddings"] == 64
    source, exported = (load_tokenizer(tmp_path / name / "tokenizer.model") for name in ("source", "home"))
    assert source.fingerprint == exported.fingerprint
