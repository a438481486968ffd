"""Weight files of Hugging Face checkpoints: which tensor goes where, what is not believed, what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moba_train.config.schema import ModelConfig
from moba_train.errors import CheckpointError
from moba_train.model.hf import read
from moba_train.model.hf.names import places, stored_shape
from moba_train.model.hf.read import INDEX, SINGLE, HfWeights
from moba_train.model.hf.write import plan_files, write_files
from moba_train.model.plan import count_parameters

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=12,
    ffn_hidden_size=10,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    vocab_size=16,
    vocab_padding=3,
    tied_head=False,
    qkv_bias=True,
)
MODELS = {
    "biases": MODEL,
    "norms": replace(MODEL, qkv_bias=False, qk_norm=True),
    "tied": replace(MODEL, tied_head=True, qkv_bias=False),
}


def tensors_of(model: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Every tensor of the model with numbers of its own."""
    torch.manual_seed(0)
    return {part.name: torch.randn(part.shape).to(dtype) for place in places(model) for part in place.parts}


def saved(folder: Path, tensors: dict[str, torch.Tensor], num_files: int = 2) -> Path:
    """The tensors in several files, with their index."""
    folder.mkdir(exist_ok=True)
    names = sorted(tensors)
    files = {f"model-{i:05}-of-{num_files:05}.safetensors": names[i::num_files] for i in range(num_files)}
    for file, inside in files.items():
        save_file({name: tensors[name] for name in inside}, folder / file)
    weight_map = {name: file for file, inside in files.items() for name in inside}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_every_row_of_every_tensor_comes_from_one_place(name: str) -> None:
    model = MODELS[name]
    padding = 0
    for place in places(model):
        filled = np.zeros(place.shape[0], int)
        for part in place.parts:
            taken = np.zeros(part.shape[0], int)
            for source, target, rows in place.rows(part):
                taken[source : source + rows] += 1
                filled[target : target + rows] += 1
            assert (taken == 1).all(), part
        padding += int((filled == 0).sum())
        assert filled.max() == 1, place
        assert (filled[: len(filled) - model.vocab_padding] == 1).all(), place
    assert padding == model.vocab_padding * (1 if model.tied_head else 2)


@pytest.mark.parametrize("name", MODELS)
def test_places_are_the_whole_model(name: str) -> None:
    model = MODELS[name]
    shapes = {place.key: stored_shape(place, model) for place in places(model)}
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count_parameters(model)


def test_the_fused_projection_holds_group_after_group(tmp_path: Path) -> None:
    tensors = tensors_of(MODEL)
    weights = HfWeights(saved(tmp_path, tensors), MODEL)
    place = next(place for place in places(MODEL) if place.key.endswith("linear_qkv.weight") and place.layer == 1)
    q, k, v = (tensors[f"model.layers.1.self_attn.{letter}_proj.weight"].view(2, -1, 4, 12) for letter in "qkv")
    assert q.shape[1] == 3  # query heads of a group
    torch.testing.assert_close(weights.assembled(place), torch.cat([q, k, v], 1).flatten(0, 2), rtol=0, atol=0)


@pytest.mark.parametrize("piece_bytes", [1, 100, 1 << 26])
def test_pieces_of_any_size_give_the_same_tensors(tmp_path: Path, monkeypatch, piece_bytes: int) -> None:
    weights = HfWeights(saved(tmp_path, tensors_of(MODEL)), MODEL)
    whole = [weights.assembled(place) for place in places(MODEL)]
    monkeypatch.setattr(read, "PIECE_BYTES", piece_bytes)
    for one, place in zip(whole, places(MODEL), strict=True):
        assert torch.equal(weights.assembled(place), one)
    assert (whole[0][-3:] == 0).all()  # padding of the vocabulary


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("max_bytes", [1, 1000, 10**9])
def test_files_that_are_written_are_what_the_library_reads(tmp_path: Path, name: str, max_bytes: int) -> None:
    tensors = tensors_of(MODELS[name], torch.bfloat16)
    parts = [part for place in places(MODELS[name]) for part in place.parts]
    files = plan_files(parts, torch.bfloat16, max_bytes=max_bytes)
    write_files(tmp_path, files, torch.bfloat16, ((part.name, tensors[part.name]) for part in parts))
    found = {name: tensor for file in files for name, tensor in load_file(tmp_path / file).items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert (tmp_path / INDEX).exists() == (len(files) > 1) == (max_bytes < 10**9)
    HfWeights(tmp_path, MODELS[name])


def changed(tmp_path: Path, model: ModelConfig = MODEL, **changes: torch.Tensor | None) -> HfWeights:
    """Open the model's tensors after changes; None takes one away."""
    tensors = {name: t for name, t in {**tensors_of(model), **changes}.items() if t is not None}
    return HfWeights(saved(tmp_path, tensors), model)


def test_tensors_that_are_missing_or_left_over_are_refused_by_name(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.o_proj.bias": torch.zeros(12), "model.norm.weight": None}
    with pytest.raises(CheckpointError) as caught:
        changed(tmp_path, **extra)
    assert str(caught.value.got) == ("1 missing: model.norm.weight; 1 left over: model.layers.0.self_attn.o_proj.bias")


def test_another_shape_than_configured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="another shape") as caught:
        changed(tmp_path, **{"model.layers.1.mlp.down_proj.weight": torch.zeros(10, 12)})
    assert (caught.value.got, caught.value.allowed) == ("[10, 12]", "[12, 10]")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_that_are_unknown_or_mixed_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(CheckpointError, match="dtype that cannot be taken over"):
        changed(tmp_path, **{"model.norm.weight": torch.zeros(12).to(dtype)})


def test_more_layers_than_there_are_tensors_are_refused_at_once(tmp_path: Path) -> None:
    saved(tmp_path, tensors_of(MODEL))
    with pytest.raises(CheckpointError, match="missing"):
        HfWeights(tmp_path, replace(MODEL, num_layers=10**12))


def test_a_tied_head_may_be_there_if_it_is_the_embedding(tmp_path: Path) -> None:
    tied = MODELS["tied"]
    embedding = tensors_of(tied)["model.embed_tokens.weight"]
    changed(tmp_path / "a", tied, **{"lm_head.weight": embedding.clone()})
    other = embedding.clone()
    other[-1, -1] += 1
    with pytest.raises(CheckpointError, match=r"left over: lm_head\.weight"):
        changed(tmp_path / "b", tied, **{"lm_head.weight": other})


def test_frequencies_of_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    changed(tmp_path, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)})


HOSTILE_FILES = [
    "../outside.safetensors",
    "/etc/passwd",
    "sub/model.safetensors",
    "model.bin",
    "..",
    "",
    7,
    None,
    "\ud800.safetensors",
]


@pytest.mark.parametrize("file", HOSTILE_FILES, ids=repr)
def test_an_index_does_not_lead_out_of_the_folder(tmp_path: Path, file: object) -> None:
    inside = saved(tmp_path / "model", tensors_of(MODEL))
    save_file({"model.norm.weight": torch.zeros(12)}, tmp_path / "outside.safetensors")
    tree = json.loads((inside / INDEX).read_text())
    tree["weight_map"]["model.norm.weight"] = file
    (inside / INDEX).write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match="a file of the checkpoint cannot be used") as caught:
        HfWeights(inside, MODEL)
    assert "not the name of a safetensors file" in str(caught.value.got)


def test_an_index_that_lies_about_its_files_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, tensors_of(MODEL))
    tree = json.loads((folder / INDEX).read_text())
    one, other = sorted(set(tree["weight_map"].values()))
    name = next(name for name, file in tree["weight_map"].items() if file == one)
    for change, told in (
        ({name: other}, f"it holds {name}, which"),
        ({"model.norm.extra": one}, "model.norm.extra is not in it"),
    ):
        (folder / INDEX).write_text(json.dumps({"weight_map": {**tree["weight_map"], **change}}))
        with pytest.raises(CheckpointError) as caught:
            HfWeights(folder, MODEL)
        assert told in str(caught.value.got)


def test_of_one_file_and_an_index_the_file_counts_as_in_transformers(tmp_path: Path) -> None:
    folder = saved(tmp_path, tensors_of(MODEL))
    save_file({name: tensor + 1 for name, tensor in tensors_of(MODEL).items()}, folder / SINGLE)
    weights = HfWeights(folder, MODEL)
    (norm,) = (place for place in places(MODEL) if place.key == "decoder.final_layernorm.weight")
    assert torch.equal(weights.assembled(norm), tensors_of(MODEL)["model.norm.weight"] + 1)


@pytest.mark.parametrize("tree", [{}, {"weight_map": {}}, {"weight_map": []}], ids=["none", "empty", "list"])
def test_an_index_without_tensors_is_refused(tmp_path: Path, tree: dict[str, object]) -> None:
    (tmp_path / INDEX).write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match="cannot be used"):
        HfWeights(tmp_path, MODEL)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    torch.save(tensors_of(MODEL), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no weights in safetensors form") as caught:
        HfWeights(tmp_path, MODEL)
    assert caught.value.got == "pytorch_model.bin"


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, tensors_of(MODEL), num_files=1)
    (folder / INDEX).unlink()
    content = (folder / "model-00000-of-00001.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"] = [0, 1 << 40]
    lying = json.dumps(header).encode()
    for damaged in (
        b"",
        content[:100],
        content[:-1],
        (1 << 60).to_bytes(8, "little") + content[8:],
        b"\xff" * len(content),
        len(lying).to_bytes(8, "little") + lying + content[8 + length :],
    ):
        (folder / SINGLE).write_bytes(damaged)
        with pytest.raises(CheckpointError, match="a file of the checkpoint cannot be used"):
            HfWeights(folder, MODEL)
    (folder / SINGLE).write_bytes(content)
    HfWeights(folder, MODEL)
