"""megatron-core without CUDA: torch itself stays as it is, and the user's terminal stays quiet."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from moba_train.model import megatron_cpu

SCRIPT = """
import warnings; warnings.simplefilter("default")
import torch
from moba_train.engine.megatron import MegatronEngine
from moba_train.model import megatron_cpu
megatron_cpu.adapt_megatron(); megatron_cpu.adapt_megatron()
import megatron.core.optimizer.clip_grads as inside
assert inside.torch.zeros(1, device="cuda").device.type == "cpu"
assert inside.torch.cuda.current_device() == torch.device("cpu")
assert inside.torch.nn is torch.nn
try:
    torch.zeros(1, device="cuda")
except (AssertionError, RuntimeError):
    pass
else:
    raise SystemExit("torch itself was changed")
"""


def test_only_megatrons_view_of_torch_changes_and_imports_say_nothing() -> None:
    paths = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=paths, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and done.stdout == ""


def test_tensors_answer_cuda_questions_only_inside_the_context() -> None:
    x = torch.zeros(1)
    with megatron_cpu.cuda_calls_on_cpu():
        assert x.type() == "torch.cuda.FloatTensor"
        assert x.bfloat16().type() == "torch.cuda.BFloat16Tensor"
        assert x.cuda() is x
        assert torch.zeros(1, device="cuda").device.type == "cpu"
        assert x.type(torch.float64).dtype == torch.float64
    assert x.type() == "torch.FloatTensor"


ON_THE_CPU_OF_A_MACHINE_WITH_GPUS = """
import torch
torch.cuda.is_available = lambda: True  # what a GPU would be asked for raises here
torch.optim.AdamW._accelerator_graph_capture_health_check = lambda self: None  # PyTorch's own question to its GPUs
import megatron.core.optimizer.clip_grads as inside
from moba_train.model import megatron_cpu
from tests.integration.engine_case import CASES, engine_of, packed_row
for name in ("mixed", "recomputed"):
    engine = engine_of(CASES[name])
    assert torch.isfinite(torch.tensor(engine.train_step([packed_row(0)], lr=1e-3).loss))
    state = engine._sharded_state(is_loading=False)
assert inside.torch is not torch
megatron_cpu.compute_on(torch.device("cuda"))
assert inside.torch is torch and not megatron_cpu.needed()
import megatron.core.tensor_parallel.random as random
assert random._get_cuda_rng_state.__module__ == random.__name__
"""


def test_models_on_the_cpu_of_a_machine_with_gpus_ask_none_of_them() -> None:
    """As `--scale tiny` does there."""
    paths = {"PYTHONPATH": ":".join(path for path in (os.getcwd(), *sys.path) if path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ON_THE_CPU_OF_A_MACHINE_WITH_GPUS],
        env=paths,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
