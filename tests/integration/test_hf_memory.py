"""Conversions hold one tensor at a time, however large the model is: measured as the peak of a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from moba_train.config.schema import ModelConfig, RopeConfig
from moba_train.model.hf.export import hf_config
from moba_train.model.hf.names import places
from moba_train.model.hf.write import plan_files, write_files
from moba_train.model.plan import count_parameters

MIB = 1 << 20
# The embedding is the largest tensor; the rest, in all, is more than twice as large.
MODEL = ModelConfig(
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=16384,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=98304,
    tied_head=True,
)
LARGEST = MODEL.vocab_size * MODEL.hidden_size * 4

SCRIPT = """
import ctypes, gc, re, sys
from pathlib import Path
from moba_train.commands.convert import run_from_hf, run_to_hf

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))

def grown(convert):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what could go while it runs goes before it is counted
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = peak()
    convert()
    return peak() - before

source, ours, back = map(Path, sys.argv[1:])
first = grown(lambda: run_from_hf(source, ours))
second = grown(lambda: run_to_hf(ours, back, tokenizer=None, drop=False, max_file_gib=0.1))
print(first, second)
"""


def test_a_conversion_holds_less_than_two_of_the_largest_tensor(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    parts = [part for place in places(MODEL) for part in place.parts]
    files = plan_files(parts, torch.float32, max_bytes=200 * MIB)
    write_files(source, files, torch.float32, ((part.name, torch.zeros(part.shape)) for part in parts))
    config = hf_config(MODEL, RopeConfig(), max_seq_len=64, dtype="float32", token_ids={})
    (source / "config.json").write_text(json.dumps(config))
    assert 4 * count_parameters(MODEL) > 3 * LARGEST  # so that holding all of it would be seen
    arguments = [sys.executable, "-c", SCRIPT, str(source), str(tmp_path / "ours"), str(tmp_path / "back")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    for grown in map(int, done.stdout.splitlines()[-1].split()):
        assert LARGEST < grown < 2 * LARGEST, f"{grown / MIB:.0f} MiB"
