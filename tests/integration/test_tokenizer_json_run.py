"""A model whose tokenizer is a tokenizer.json, as a user goes on training it: prepare, train, take it home."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from moba_train.config.schema import RopeConfig
from moba_train.data.tokenizer import load_tokenizer
from moba_train.model.hf.export import hf_config
from moba_train.model.hf.names import places
from moba_train.model.hf.write import plan_files, write_files
from tests.integration.test_hf_run import LINES, MODEL, run_commands
from tests.unit.data.hf_toys import make_llama3


def make_source(folder: Path) -> int:
    """A model and its tokenizer.json; returns the size of the vocabulary."""
    make_llama3(LINES, folder)
    num_tokens = load_tokenizer(folder / "tokenizer.json").vocab_size
    model = dataclasses.replace(MODEL, vocab_size=num_tokens, qkv_bias=False)
    torch.manual_seed(0)
    parts = [part for place in places(model) for part in place.parts]
    files = plan_files(parts, torch.float32, max_bytes=10_000_000)
    write_files(folder, files, torch.float32, ((part.name, 0.1 * torch.randn(part.shape)) for part in parts))
    tree = hf_config(model, RopeConfig(base=5e5), max_seq_len=128, dtype="float32", token_ids={})
    (folder / "config.json").write_text(json.dumps(tree))
    return num_tokens


def test_a_run_trains_on_the_ids_of_its_models_tokenizer_json(tmp_path: Path) -> None:
    num_tokens = make_source(tmp_path / "source")
    (tmp_path / "text").mkdir()
    for i in range(4):
        (tmp_path / "text" / f"{i}.txt").write_text("".join(LINES[100 * i : 100 * i + 100]) + "<|end_of_text|> 🙂\n")
    prep = "prep text --tokenizer source/tokenizer.json --held-out 0.3 --workers 1"
    train = "train ours/config.toml --data.sources.text.path data/train --data.valid.path data/valid --run-dir run "
    train += "--niah.lengths 128 --niah.depths 1 --niah.loop-samples 1 --eval.rows 1 --optimizer.lr 0.01 "
    train += "--stages.0.tokens 256 --stages.0.tokens-per-step 128 --stages.0.seq-len 128 --stages.0.chunk-size 16"
    told = run_commands(
        tmp_path,
        f"{prep} --out data --needles 128:4",
        f"{prep} --out other --eod <|eot_id|>",
        "convert from-hf source ours",
        f"{train} --data.sources.text.path other/train",
        train,
        "data show run --step 1 --tokens 8",
        "convert to-hf run home",
    )
    assert [code for code, _, _ in told] == [0, 0, 0, 2, 0, 0, 0], [errors for _, _, errors in told]
    assert f"tokenizer data/tokenizer.json: {num_tokens} ids" in told[0][1]
    assert "the documents of the data end in another token" in told[3][2] and "<|eot_id|>" in told[3][2]
    assert "compute(" in told[5][1]

    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    assert records[1]["eval/bits_per_byte_unigram"] > 0 and 0 < records[1]["eval/bits_per_byte_full"] < 20
    assert "eval/niah_full" in records[1]
    used, home = (load_tokenizer(tmp_path / name / "tokenizer.json") for name in ("data", "home"))
    assert (home.fingerprint, home.eod_id, home.begin_ids) == (used.fingerprint, used.eod_id, used.begin_ids)
