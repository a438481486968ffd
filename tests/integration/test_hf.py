"""Hugging Face checkpoints in and out: the same function, the same bytes, the same training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moba_train.commands.companions import write_companions
from moba_train.commands.convert import run_to_hf
from moba_train.config.schema import EngineConfig
from moba_train.data.needles import special_words
from moba_train.data.row import Row
from moba_train.data.tokenizer import train_tokenizer
from tests.distributed import run_ranks
from tests.integration.hf_case import HF_CASES, converted, logits_of, make_model
from tests.integration.hf_ranks import NUM_TOKENS, OPTIMIZER, STEPS, Found, Job, computed, hf_row, rows_of_step

SAVED = ("qwen2, tied, 8 a group", "qwen3, linear, 1 a group")
TRAINED = (
    "llama, llama3 scaling, 1 query head a group",
    "qwen2, tied, 8 a group",
    "qwen3, llama3 scaling, tied, 4 a group",
)


@dataclass
class Conversions:
    """The models as transformers has them, the folders, and what our ranks made of them."""

    folder: Path
    models: dict[str, PreTrainedModel]
    jobs: list[Job]
    found: list[Found]

    def of(self, name: str) -> Iterator[tuple[Job, Found]]:
        return ((job, found) for job, found in zip(self.jobs, self.found, strict=True) if job.name == name)


@pytest.fixture(scope="module")
def all_models(tmp_path_factory: pytest.TempPathFactory) -> Conversions:
    """Every model, converted, on one rank and on two."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("hf")
    models, jobs = {}, []
    for i, (name, case) in enumerate(HF_CASES.items()):
        models[name] = make_model(case, folder / f"{i}.hf", seed=i)
        config = converted(folder / f"{i}.hf", folder / str(i))
        jobs.append(Job(name, config.model, config.stages, folder / str(i), {}, train=name in TRAINED))
    parallel = [
        replace(job, mesh=mesh, train=job.train and "pp" not in mesh, run_dir=run_dir(job, mesh))
        for i, job in enumerate(jobs)
        for mesh in meshes_of(i)
    ]
    bf16, zero_3 = (
        EngineConfig(device="cpu", precision="bf16"),
        EngineConfig(device="cpu", kind="deepspeed", zero_stage=3),
    )
    rounded = replace(jobs[0], name="rounded", engine=bf16, train=False, run_dir=folder / "rounded")
    jobs.append(rounded)
    parallel.append(replace(jobs[2], mesh={"cp": 2}, engine=zero_3))
    found = run_ranks(computed, 1, jobs)[0] + run_ranks(computed, 2, parallel)[1]
    return Conversions(folder, models, jobs + parallel, found)


def meshes_of(i: int) -> list[dict[str, int]]:
    """Fused tensors are cut by tensor parallelism, so all models have it; the others share the rest."""
    return [{"tp": 2}, *([{"cp": 2}] if i % 2 == 0 else []), *([{"pp": 2}] if i % 2 == 1 or i == 2 else [])]


def run_dir(job: Job, mesh: dict[str, int]) -> Path | None:
    """Where what a mesh has loaded is saved, for some models."""
    return job.path.with_name(f"{job.path.name} {mesh}") if job.name in SAVED else None


@pytest.mark.parametrize("name", HF_CASES)
def test_a_converted_model_computes_what_transformers_computes_on_every_mesh(
    all_models: Conversions, name: str
) -> None:
    row = hf_row(0)
    with torch.no_grad():
        expected = logits_of(all_models.models[name], row)
    log_prob = expected.log_softmax(-1).gather(1, torch.from_numpy(row.labels_S)[:, None])[:, 0]
    for job, found in all_models.of(name):
        if found.logits is not None:
            np.testing.assert_allclose(found.logits[:, :NUM_TOKENS], expected, atol=1e-4, rtol=0)
        np.testing.assert_allclose(found.scores.log_prob_S, log_prob, atol=1e-4, rtol=0, err_msg=str(job.mesh))
        assert np.array_equal(found.scores.argmax_S, expected.argmax(-1)), job.mesh


@pytest.mark.parametrize("name", TRAINED)
def test_fine_tuning_follows_a_plain_loop_over_the_transformers_model(all_models: Conversions, name: str) -> None:
    expected = plain_losses(all_models.models[name])
    assert expected[-1] < expected[0] - 1.0  # there was something to follow
    curves = [(job.mesh, found.losses) for job, found in all_models.of(name) if job.train]
    assert [mesh for mesh, _ in curves[:3]] == [{}, {"tp": 2}, {"cp": 2}]  # and ZeRO-3 for one of them
    for mesh, losses in curves:
        np.testing.assert_allclose(losses, expected, atol=1e-4, rtol=0, err_msg=str(mesh))


def plain_losses(model: PreTrainedModel) -> list[float]:
    """Losses of some steps of AdamW, without weight decay on norms and biases."""
    decaying = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decaying, "weight_decay": OPTIMIZER.weight_decay}, {"params": others, "weight_decay": 0.0}]
    betas = (OPTIMIZER.beta1, OPTIMIZER.beta2)
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.lr, betas=betas, eps=OPTIMIZER.eps)
    losses = []
    for step in range(STEPS):
        loss = mean_loss(model, rows_of_step(step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad)
        optimizer.step()
        losses.append(loss.item())
    return losses


def mean_loss(model: PreTrainedModel, rows: list[Row]) -> torch.Tensor:
    """sum(loss * mask) / sum(mask) over all rows."""
    total, count = torch.zeros(()), 0.0
    for row in rows:
        labels, mask = torch.from_numpy(row.labels_S), torch.from_numpy(row.loss_mask_S)
        total = total + (functional.cross_entropy(logits_of(model, row), labels, reduction="none") * mask).sum()
        count += float(mask.sum())
    return total / count


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_of_any_mesh_goes_back_bit_for_bit(all_models: Conversions, name: str) -> None:
    runs = [job.run_dir for job, _ in all_models.of(name) if job.run_dir is not None]
    assert len(runs) >= 2
    for run in runs:
        back = run.with_name(run.name + " back")
        run_to_hf(run, back, tokenizer=None, drop=False, max_file_gib=5.0)
        assert_same_weights(weights_in(next(all_models.of(name))[0].path.with_suffix(".hf")), weights_in(back))


def test_a_run_in_bf16_begins_with_rounded_weights(all_models: Conversions) -> None:
    ((job, _),) = all_models.of("rounded")
    run_to_hf(job.run_dir, all_models.folder / "rounded back", tokenizer=None, drop=False, max_file_gib=5.0)
    source = {name: tensor.bfloat16() for name, tensor in weights_in(job.path.with_suffix(".hf")).items()}
    assert_same_weights(source, weights_in(all_models.folder / "rounded back"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_comes_back_bit_for_bit_and_loads_as_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    for i, case in enumerate(HF_CASES.values()):
        source, ours, back = (tmp_path / f"{name}{i}" for name in ("source", "ours", "back"))
        model = make_model(replace(case, dtype=dtype), source)
        converted(source, ours)
        run_to_hf(ours, back, tokenizer=None, drop=False, max_file_gib=2e-5)
        assert len(list(back.glob("*.safetensors"))) > 1
        assert_same_weights(weights_in(source), weights_in(back))
        loaded = AutoModelForCausalLM.from_pretrained(back, attn_implementation="eager")
        assert loaded.dtype == dtype
        assert loaded.config.rope_parameters == model.config.rope_parameters | extra_of_yarn(loaded)
        if dtype == torch.float32:  # equal weights need not give equal bits: files map them to other addresses
            with torch.no_grad():
                torch.testing.assert_close(logits_of(loaded, hf_row(0)), logits_of(model, hf_row(0)))


def assert_same_weights(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    """Same names, dtypes, shapes and bits."""
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (after[name].dtype, after[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name


def extra_of_yarn(model: PreTrainedModel) -> dict[str, float]:
    """What the export spells out and transformers takes for granted."""
    return {name: value for name, value in model.config.rope_parameters.items() if name.startswith("beta_")}


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


HOSTILE = [
    *(
        "",
        " ",
        "\n\n",
        "two  spaces and\ttabs\r\n",
        "\x00\x01\x7f\ufeff\u200b",
        "日本語 中文 한국어 عربى",
        "e\u0301 é ﬁ",
    ),
    *("😀👨‍👩‍👧‍👦🏽 🇪🇺", "1234567 89", "x" * 5000, "def f(x):\n    return x ** 2\n", "▁ marks a space"),
    "".join(chr(0x20 + 37 * i) for i in range(400)),
]


def test_a_vocabulary_of_ours_gives_transformers_the_same_ids(tmp_path: Path) -> None:
    words = special_words()[:40]
    lines = [f"value_{i} = compute(value_{i - 1}, {i * 37 % 101})  # keep the order\n" for i in range(80)]
    ours = train_tokenizer(lines * 3, tmp_path / "tokenizer.model", vocab_size=380, words=words)
    exported = tmp_path / "exported"
    exported.mkdir()
    write_companions(exported, None, tmp_path / "tokenizer.model", {ours.fingerprint})
    theirs = AutoTokenizer.from_pretrained(exported)
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (ours.eod_id, ours.pad_id, ours.vocab_size)
    for text in (*HOSTILE, *lines[:5], " ".join(words), "".join(words), f"x{words[0]} {words[1]}s"):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == text.replace("▁", " ")
