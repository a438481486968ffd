"""The checks of tests/gpu and their runner, at toy size on a CPU: they pass, can fail, the runner survives both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from moba_bench.shapes import Shape

from moba_kernels import Partial, Routing
from moba_kernels.attend import torch as torch_backend
from moba_kernels.pool import torch as torch_pool
from moba_kernels.route import torch as torch_route

from ..gpu import ROOT, cases, checks, context, run

TOY = {case.name: case for case in cases.all_cases("cpu", toy=True)}


@pytest.mark.parametrize(
    "kind", ["pool", "route", "forward", "backward", "full attention", "two runs", "parts", "4 ranks"]
)
def test_every_kind_of_gpu_check_passes_on_the_cpu(kind):
    case = next(case for name, case in TOY.items() if name.startswith(kind))
    assert case.run("cpu", "torch")


@pytest.mark.parametrize(
    ("kind", "module", "name", "change"),
    [
        ("pool", torch_pool, "pool_sums", lambda pair: (pair[0] * 1.001, pair[1])),
        ("route", torch_route, "route_means", lambda r: Routing(r.picks.flip(2), r.spec, r.pack, complete=True)),
        ("forward", torch_backend, "attend_partial", lambda part: Partial(part.out * 1.02, part.lse)),
        ("forward", torch_backend, "attend_partial", lambda part: Partial(part.out, part.lse + 1e-3)),
        ("backward", torch_backend, "attend_partial_backward", lambda g: (g[0], g[1], g[2] * 1.05)),
        ("full attention", torch_backend, "attend_partial", lambda part: Partial(part.out * 1.02, part.lse)),
        ("parts", torch_backend, "attend_partial_backward", lambda g: (g[0], g[1] * 1.001, g[2])),
        ("parts", torch_backend, "attend_partial", lambda p: Partial(p.out, p.lse.clamp_min(-50))),
        (
            "two runs",
            torch_backend,
            "attend_partial",
            lambda p: Partial(p.out + torch.rand(()).to(p.out.dtype) / 8, p.lse),
        ),
    ],
)
def test_every_kind_of_gpu_check_can_fail(monkeypatch, kind, module, name, change):
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **options: change(right(*args, **options)))
    case = next(case for title, case in TOY.items() if title.startswith(kind))
    with pytest.raises(AssertionError):
        case.run("cpu", "torch")


def test_the_check_of_groups_of_one_rank_runs_every_transport():
    shape = Shape((150, 83), 4, 2, 32, 32, 3)
    assert context.check_nccl(shape, "torch", "cpu") == "9 transports over a gloo group of one rank"


def test_new_tensors_are_poisoned_inside_a_check_and_only_there():
    with checks.poisoned():
        assert torch.empty(8).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_cases_have_names_of_their_own_on_every_device():
    for device, toy in (("cpu", True), ("cuda", False)):
        names = [case.name for case in cases.all_cases(device, toy=toy)]
        assert len(set(names)) == len(names)


def gpu_options(out, *arguments):
    return run.parse(["--device", "cpu", "--toy", "--out", str(out), *arguments])


def test_the_runner_says_what_passed(tmp_path):
    command = [sys.executable, "tests/gpu/run.py", "--device", "cpu", "--toy", "--only", "pool", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pass  pool T=233" in done.stdout and "1 passed, 0 failed, 0 not run" in done.stdout


def test_a_failing_case_is_written_down_the_next_one_runs_and_a_rerun_repeats_failures_only(
    tmp_path, monkeypatch, capsys
):
    def fail(device, backend):
        raise AssertionError("wrong by 3")

    some = [cases.Case("bad", fail), cases.Case("good", lambda device, backend: "fine")]
    monkeypatch.setattr(run, "all_cases", lambda device, toy: some)
    options = gpu_options(tmp_path)
    assert run.work(options) == 0
    store = run.open_store(options)
    assert not store.find("case", "bad")["ok"] and store.find("case", "good")["note"] == "fine"
    assert run.summarise(store, ["bad", "good"], 0, 1.0) == 1
    shown = capsys.readouterr().out
    assert "FAIL  bad: AssertionError" in shown and "wrong by 3" in shown and "1 passed, 1 failed" in shown
    monkeypatch.setattr(run, "all_cases", lambda device, toy: some[1:])
    assert run.supervise(gpu_options(tmp_path, "--budget-s", "0"), []) == 0  # it passed before: nothing to run


def test_a_case_that_kills_its_process_is_a_failure_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    some = [
        cases.Case("deadly", lambda device, backend: os.kill(os.getpid(), signal.SIGKILL) or ""),
        cases.Case("good", lambda device, backend: "fine"),
    ]
    monkeypatch.setattr(run, "all_cases", lambda device, toy: some)

    class Forked:
        """A worker forked from this process instead of a new interpreter, so that it knows the cases above."""

        def __init__(self, command):
            account = command[command.index("--worker") + 1]
            self.pid = os.fork()
            if self.pid == 0:
                os._exit(run.work(gpu_options(tmp_path, "--worker", account)))

        def wait(self, timeout=None):
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    monkeypatch.setattr(run, "start", Forked)
    assert run.supervise(gpu_options(tmp_path), []) == 1
    store = run.open_store(gpu_options(tmp_path))
    assert "exit code -9" in store.find("case", "deadly")["note"]
    assert store.find("case", "good")["ok"]


def test_a_case_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "CASE_LIMIT_S", 0.1)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    ended, in_time = run.watch(sleeper, tmp_path / "running", limit_s=60)
    assert "hung" in ended and in_time and sleeper.returncode == -signal.SIGKILL
