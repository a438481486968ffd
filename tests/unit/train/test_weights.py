"""Folders that hold weights alone: written and read tensor by tensor, checked against the run, taken home."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moba_train.commands.convert import run_from_hf, run_to_hf
from moba_train.config.load import to_toml
from moba_train.config.schema import DataConfig, ModelConfig, RunConfig, StageConfig
from moba_train.data.tokenizer import train_tokenizer
from moba_train.errors import CheckpointError
from moba_train.model.hf.names import places, stored_shape
from moba_train.train.manifest import seal_files, write_manifest
from moba_train.train.progress import model_fingerprint
from moba_train.train.resume import resolve_checkpoint
from moba_train.train.weights import WeightReader, WeightWriter, check_weights, weights_state
from tests.full_disk import full_disk

MODEL = ModelConfig(
    num_layers=3, hidden_size=8, ffn_hidden_size=6, num_heads=2, num_kv_heads=1, head_dim=4, vocab_size=10
)


def make_weights(folder: Path, model: ModelConfig, *, file_bytes: int = 1 << 30) -> dict[tuple[str, int | None], Any]:
    """A folder of weights as a conversion leaves it; returns the tensors."""
    folder.mkdir()
    torch.manual_seed(0)
    writer = WeightWriter(folder, file_bytes=file_bytes)
    tensors = {}
    for place in places(model):
        tensor = torch.randn(place.shape)
        tensors[place.key, place.layer] = tensor
        writer.write(place.key, tensor, shape=stored_shape(place, model), layer=place.layer)
    writer.close()
    config = RunConfig(model=model, stages=(StageConfig(name="full", seq_len=64),))
    (folder / "config.toml").write_text(to_toml(config))
    (folder / "state.json").write_text(json.dumps(weights_state(model, [], {})))
    write_manifest(folder, seal_files(sorted(folder.iterdir())))
    return tensors


@pytest.mark.parametrize("file_bytes", [1, 5000, 1 << 30])
def test_what_is_written_is_read(tmp_path: Path, file_bytes: int) -> None:
    tensors = make_weights(tmp_path / "ours", MODEL, file_bytes=file_bytes)
    reader = WeightReader(tmp_path / "ours")
    for place in places(MODEL):
        found = reader.read(place.key, shape=stored_shape(place, MODEL), layer=place.layer)
        assert torch.equal(found, tensors[place.key, place.layer]), place.key
    files = len(list((tmp_path / "ours").glob("*.distcp")))
    assert files == {1: len(tensors), 5000: files, 1 << 30: 1}[file_bytes]


def test_a_layer_is_read_out_of_a_shard_that_holds_several(tmp_path: Path) -> None:
    writer, stacked = WeightWriter(tmp_path), torch.randn(4, 6)
    writer.write("norms", stacked, shape=(4, 6), layer=None)
    writer.close()
    write_manifest(tmp_path, seal_files(sorted(tmp_path.iterdir())))
    reader = WeightReader(tmp_path)
    for layer in range(4):
        assert torch.equal(reader.read("norms", shape=(4, 6), layer=layer), stacked[layer])


def test_a_folder_of_weights_is_a_checkpoint_like_any_other(tmp_path: Path) -> None:
    make_weights(tmp_path / "ours", MODEL)
    assert resolve_checkpoint(tmp_path / "ours").path == tmp_path / "ours"
    shard = tmp_path / "ours" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="the checkpoint is damaged"):
        resolve_checkpoint(tmp_path / "ours")


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    make_weights(tmp_path / "ours", MODEL)
    reader = WeightReader(tmp_path / "ours")
    for key, shape, got in (
        ("nothing.weight", (3, 8), "nothing.weight is missing"),
        ("decoder.final_layernorm.weight", (9,), "decoder.final_layernorm.weight [8]"),
    ):
        with pytest.raises(CheckpointError, match="does not hold the tensor") as caught:
            reader.read(key, shape=shape, layer=None)
        assert caught.value.got == got


def test_a_shard_that_is_no_archive_is_not_read(tmp_path: Path) -> None:
    make_weights(tmp_path / "ours", MODEL)
    reader = WeightReader(tmp_path / "ours")
    shard = tmp_path / "ours" / "__0_0.distcp"
    shard.write_bytes(b"\x80" * shard.stat().st_size)
    place = next(places(MODEL))
    with pytest.raises(CheckpointError, match="a file of the checkpoint cannot be read"):
        reader.read(place.key, shape=stored_shape(place, MODEL), layer=place.layer)


def test_weights_begin_a_run_of_the_same_model_and_vocabulary_alone(tmp_path: Path) -> None:
    state = weights_state(MODEL, ["abc", "def"], {})
    check_weights(tmp_path, state, model_fingerprint(replace(MODEL, init_from="ours", init_std=1.0)), "def")
    with pytest.raises(CheckpointError, match="another vocabulary"):
        check_weights(tmp_path, state, model_fingerprint(MODEL), "xyz")
    with pytest.raises(CheckpointError, match="another model") as caught:
        check_weights(tmp_path, state, model_fingerprint(replace(MODEL, qkv_bias=True)), "abc")
    assert caught.value.got == "model.qkv_bias = True in this run"
    check_weights(tmp_path, weights_state(MODEL, [], {}), model_fingerprint(MODEL), "xyz")  # nothing is known of it


def test_a_checkpoint_from_before_a_setting_existed_has_its_default(tmp_path: Path) -> None:
    state = weights_state(MODEL, [], {})
    del state["model"]["qkv_bias"], state["model"]["vocab_padding"]
    check_weights(tmp_path, state, model_fingerprint(MODEL), "xyz")


def test_a_key_convolution_is_left_out_on_request_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = make_weights(tmp_path / "ours", replace(MODEL, key_conv=3))
    with pytest.raises(CheckpointError, match="key convolution") as caught:
        run_to_hf(tmp_path / "ours", tmp_path / "home", tokenizer=None, drop=False, max_file_gib=1.0)
    assert "36 parameters" in str(caught.value.got) and "--drop" in caught.value.fix
    assert not (tmp_path / "home").exists()
    run_to_hf(tmp_path / "ours", tmp_path / "home", tokenizer=None, drop=True, max_file_gib=1.0)
    assert "WARNING: the key convolution is left out" in capsys.readouterr().out
    found = load_file(tmp_path / "home" / "model.safetensors")
    assert torch.equal(found["model.norm.weight"], tensors["decoder.final_layernorm.weight", None])
    assert not [name for name in found if "conv" in name]


@pytest.mark.parametrize("there", ["a file", "a full folder", "leftovers"])
def test_nothing_is_overwritten(tmp_path: Path, there: str) -> None:
    make_weights(tmp_path / "ours", MODEL)
    if there == "a file":
        (tmp_path / "home").write_text("mine")
    else:
        name = "home" if there == "a full folder" else "home.tmp"
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="the folder cannot be written"):
        run_to_hf(tmp_path / "ours", tmp_path / "home", tokenizer=None, drop=False, max_file_gib=1.0)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("num_bytes", [1000, 20_000])
def test_a_full_disk_is_told_and_nothing_is_left_there(tmp_path: Path, num_bytes: int) -> None:
    make_weights(tmp_path / "ours", MODEL)
    run_to_hf(tmp_path / "ours", tmp_path / "home", tokenizer=None, drop=False, max_file_gib=1.0)
    with pytest.raises(CheckpointError, match="the folder cannot be written") as caught, full_disk(num_bytes):
        run_from_hf(tmp_path / "home", tmp_path / "back")
    assert "File too large" in str(caught.value.got)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "ours"]


def test_the_folder_that_one_stands_in_may_be_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_weights(tmp_path / "ours", MODEL)
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    run_to_hf(Path("../ours"), Path("."), tokenizer=None, drop=False, max_file_gib=1.0)
    assert (tmp_path / "home" / "model.safetensors").exists()
    with pytest.raises(CheckpointError, match="the folder cannot be written"):
        run_to_hf(tmp_path / "ours", Path("/"), tokenizer=None, drop=False, max_file_gib=1.0)


def test_a_model_trained_from_nothing_takes_its_own_vocabulary_home(tmp_path: Path) -> None:
    lines = [f"value_{i} = compute(value_{i - 1}, {i * 37 % 101})  # keep the order of the steps\n" for i in range(400)]
    ours = train_tokenizer(lines, tmp_path / "tokenizer.model", vocab_size=330)
    (tmp_path / "tokenizer.json").write_text("{}")  # of another model: nothing says that it is the same vocabulary
    model = replace(MODEL, vocab_size=330)
    make_weights(tmp_path / "run", model)
    config = RunConfig(
        model=model, data=DataConfig(tokenizer=str(ours.path)), stages=(StageConfig(name="full", seq_len=64),)
    )
    for known, names in (
        ([ours.fingerprint], {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"}),
        ([], set()),
    ):
        (tmp_path / "run" / "config.toml").write_text(to_toml(config))
        (tmp_path / "run" / "state.json").write_text(json.dumps(weights_state(model, known, {})))
        files = [path for path in (tmp_path / "run").iterdir() if path.name != "manifest.json"]
        write_manifest(tmp_path / "run", seal_files(sorted(files)))
        home = tmp_path / f"home {len(known)}"
        run_to_hf(tmp_path / "run", home, tokenizer=None, drop=False, max_file_gib=1.0)
        assert {path.name for path in home.iterdir()} == {"config.json", "model.safetensors"} | names
        tree = json.loads((home / "config.json").read_text())
        assert tree.get("eos_token_id") == (ours.eod_id if known else None)
        assert tree["max_position_embeddings"] == 64
    ours.path.unlink()
    (tmp_path / "run" / "state.json").write_text(json.dumps(weights_state(model, [ours.fingerprint], {})))
    write_manifest(tmp_path / "run", seal_files(sorted(files)))
    with pytest.raises(CheckpointError, match="the tokenizer of the model is not where it was"):
        run_to_hf(tmp_path / "run", tmp_path / "third", tokenizer=None, drop=False, max_file_gib=1.0)
    assert not list(tmp_path.glob("third*"))  # nothing half-made is left
