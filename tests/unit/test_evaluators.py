"""The evaluations of the loop, as they are built."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from moba_train.commands.evaluators import build_evaluators
from moba_train.config.load import decode_toml
from moba_train.data.indexed import write_indexed
from moba_train.data.tokenizer import train_tokenizer


@pytest.mark.parametrize(
    ("rows", "is_first_rank", "told"),
    [
        (10_000, True, ["held-out: 1 row(s) of 256 tokens are all there are (eval.rows 10,000)"]),
        (10_000, False, []),
        (1, True, []),
    ],
)
def test_a_run_says_once_that_there_are_fewer_held_out_rows_than_it_wants(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: int, is_first_rank: bool, told: list[str]
) -> None:
    tokenizer = train_tokenizer([Path(shutil.__file__).read_text("utf-8")], tmp_path / "t.model", vocab_size=400)
    for name in ("train", "valid"):
        write_indexed(tmp_path / name, [np.arange(50, dtype=np.int64)] * 8, vocab_size=500)
    config = decode_toml(
        f'run.dir = "{tmp_path / "run"}"\neval.rows = {rows}\nniah.loop_samples = 0\n[[stages]]\nname = "a"\n'
        "seq_len = 256\nmix = { text = 1.0 }\n"
        f'[data]\ntokenizer = "{tokenizer.path}"\nsources.text.path = "{tmp_path}/train"\n'
        f'valid.path = "{tmp_path}/valid"\n'
    )
    engine = cast(Any, SimpleNamespace(topology=SimpleNamespace(is_first_rank=is_first_rank)))
    assert len(build_evaluators(config, engine, tokenizer)) == 1
    assert capsys.readouterr().out.splitlines() == told
