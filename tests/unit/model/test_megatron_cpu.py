"""megatron-core without CUDA: torch itself stays as it is, and the user's terminal stays quiet."""

from __future__ import annotations

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
