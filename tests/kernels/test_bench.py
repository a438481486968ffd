"""The benchmark at toy size on a CPU: gate before figures, resuming, budget, verdicts."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from moba_kernels import Partial, Routing
from moba_kernels.attend import torch as torch_backend
from moba_kernels.pool import torch as torch_pool
from moba_kernels.route import torch as torch_route

from ..gpu import ROOT

bench = import_module("attend_bench")  # tests/gpu puts kernels/bench on the path
contestants, figures, memory, records, shapes, tables, targets, timing = (
    import_module(f"moba_bench.{name}")
    for name in ("contestants", "figures", "memory", "records", "shapes", "tables", "targets", "timing")
)
ONE = "T=190"  # one of the toy shapes


def run_bench(out, *arguments):
    """Exit code of a toy run in this process, on as many threads as it has."""
    fixed = ["--toy", "--repeats", "1", "--threads", str(torch.get_num_threads()), "--out", str(out)]
    return bench.main([*fixed, *arguments])


@pytest.fixture
def no_child(monkeypatch):
    """Peak memory without a process of its own."""
    monkeypatch.setattr(memory, "measure_in_child", lambda *_: {"total": 3 << 30, "beyond": 1 << 30})


def wrong_output(part):
    return Partial(part.out * 1.01, part.lse)


def spoil(monkeypatch, module=torch_backend, name="attend_partial", change=wrong_output):
    """Make one operation of the torch backend slightly wrong."""
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **options: change(right(*args, **options)))


def test_the_script_prints_figures_and_writes_them_with_device_commit_and_command(tmp_path):
    command = [sys.executable, "kernels/bench/attend_bench.py", "--toy", "--threads", "1", "--only", ONE]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parity torch" in done.stdout and "of ratio" in done.stdout and done.stdout.count(ONE) >= 3
    (page,) = (path.read_text() for path in tmp_path.glob("*.md"))
    environment = records.environment_of("cpu", 1)
    assert environment.device in page and environment.commit in page and environment.torch in page
    assert "python kernels/bench/attend_bench.py --toy --threads 1 --only T=190\n" in page
    assert "T=190 H=4 K=2 D=64 fp32 64/3" in page and str(tmp_path) not in page
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".jsonl", ".md", ".png"]


def test_a_wrong_result_turns_the_gate_red_and_no_figure_is_shown(tmp_path, monkeypatch, capsys, no_child):
    spoil(monkeypatch)
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("measured behind a red gate"))
    assert run_bench(tmp_path) == 1
    shown = capsys.readouterr().out
    assert "RED: out: error" in shown and "no figures" in shown and "over dense" not in shown
    assert not list(tmp_path.glob("*.md")) and not list(tmp_path.glob("*.png"))


def test_if_only_the_papers_algorithm_is_wrong_it_alone_gets_no_figures(tmp_path, monkeypatch, no_child):
    spoil(monkeypatch, import_module("moba_kernels.attend.flash"))
    assert run_bench(tmp_path, "--only", ONE) == 1
    page = next(tmp_path.glob("*.md")).read_text()
    assert "paper: no figures, its parity gate is red" in page
    cells = [line.split(" | ") for line in page.splitlines() if line.startswith(f"| {ONE}")]
    assert [line[4] for line in cells] == ["-", "-"] and all(line[2] != "-" for line in cells)


@pytest.mark.parametrize(
    ("module", "name", "change"),
    [
        (torch_backend, "attend_partial_backward", lambda grads: (grads[0], grads[1] * 1.01, grads[2])),
        (torch_backend, "attend_partial_backward", lambda grads: (grads[0] * torch.nan, *grads[1:])),
        (torch_route, "route_means", lambda r: Routing(r.picks.flip(2), r.spec, r.pack, complete=True)),
        (torch_pool, "pool_sums", lambda pair: (pair[0].flip(0), pair[1])),
    ],
    ids=["dk", "NaN in dq", "order of picks", "means"],
)
def test_the_gate_sees_every_part_of_the_operator(monkeypatch, module, name, change):
    spoil(monkeypatch, module, name, change)
    assert not import_module("moba_bench.parity").check_parity(shapes.toy_shapes("fp32")[0], "torch", "cpu").ok


def test_a_backend_that_cannot_run_is_as_red_as_one_that_is_wrong(tmp_path, monkeypatch, capsys):
    def explode(*_):
        raise RuntimeError("no such kernel")

    spoil(monkeypatch, change=explode)
    assert run_bench(tmp_path, "--only", ONE) == 1
    assert "no such kernel" in capsys.readouterr().out


def test_a_rerun_measures_only_what_is_missing_and_other_code_starts_over(tmp_path, monkeypatch, capsys, no_child):
    monkeypatch.setattr(records, "source_digest", lambda: "one")
    assert run_bench(tmp_path, "--only", ONE) == 0
    measured = []
    whole = bench.measure
    monkeypatch.setattr(bench, "measure", lambda b, shape: measured.append(shape.name) or whole(b, shape))
    assert run_bench(tmp_path, "--only", "64/3") == 0
    assert len(measured) == 2 and not any(ONE in name for name in measured)
    assert f"{ONE} H=4 K=2 D=64 fp32 64/3: done before" in capsys.readouterr().out
    page = next(tmp_path.glob("*.md")).read_text()
    assert page.count(f"| {ONE}") == 2 and "--only T=190" in page and "--only 64/3" in page
    measured.clear()
    assert run_bench(tmp_path, "--only", ONE, "--fresh") == 0 and len(measured) == 1
    monkeypatch.setattr(records, "source_digest", lambda: "two")
    assert run_bench(tmp_path, "--only", ONE) == 0 and len(measured) == 2


def test_a_spent_budget_starts_no_shape_and_says_which_are_missing(tmp_path, monkeypatch, capsys, no_child):
    assert run_bench(tmp_path, "--only", ONE) == 0
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("started in spite of the budget"))
    assert run_bench(tmp_path, "--budget-s", "0") == 0
    shown = capsys.readouterr().out
    assert shown.count("the time budget was spent") == 3
    assert "the time budget was spent" in next(tmp_path.glob("*.md")).read_text()


def test_the_clock_refuses_what_would_end_too_late_and_learns_how_fast_the_machine_is():
    clock = bench.Clock("cuda", budget_s=100.0)
    assert clock.fits(50 * clock.rate) and not clock.fits(90 * clock.rate)
    clock.learn(flops=1e15, seconds=215.0)
    assert clock.rate == 5e12
    assert bench.Clock("cpu", budget_s=None).fits(1e30)


def test_a_shape_that_takes_longer_than_the_budget_is_cut_off_and_what_is_known_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "GRACE_S", 0.0)
    monkeypatch.setattr(bench, "pass_gate", lambda b: True)
    monkeypatch.setattr(bench, "measure", lambda *_: time.sleep(60))
    monkeypatch.setitem(bench.OVERHEAD_S, "cpu", 0.0)
    assert run_bench(tmp_path, "--only", ONE, "--budget-s", "2") == 0
    assert "the time budget was spent" in capsys.readouterr().out

    monkeypatch.setattr(bench, "pass_gate", lambda b: time.sleep(60))
    assert run_bench(tmp_path, "--budget-s", "1") == 1
    assert "run again" in capsys.readouterr().out


def test_another_backend_gets_a_page_of_its_own(tmp_path, no_child):
    assert run_bench(tmp_path, "--only", ONE) == run_bench(tmp_path, "--only", ONE, "--backend", "flash") == 0
    pages = {path.stem: path.read_text() for path in tmp_path.glob("*.md")}
    (flash,) = (page for stem, page in pages.items() if stem.endswith("-flash-toy"))
    assert len(pages) == 2 and "Measured: the flash backend" in flash


def test_a_name_that_no_shape_has_is_refused_with_those_that_there_are(tmp_path):
    with pytest.raises(SystemExit, match="T=448"):
        run_bench(tmp_path, "--only", "T=17")


def test_figures_from_a_busy_machine_say_so(tmp_path, monkeypatch, no_child):
    monkeypatch.setattr(bench.os, "getloadavg", lambda: (torch.get_num_threads() + 3.5, 0.0, 0.0))
    assert run_bench(tmp_path, "--only", ONE) == 0
    assert "the machine was busy" in next(tmp_path.glob("*.md")).read_text()


def test_a_shape_that_fails_is_reported_and_the_others_are_measured(tmp_path, monkeypatch, capsys, no_child):
    whole = bench.measure

    def measure(b, shape):
        if ONE in shape.name:
            raise RuntimeError("out of luck")
        return whole(b, shape)

    monkeypatch.setattr(bench, "measure", measure)
    assert run_bench(tmp_path, "--only", "64/3") == 1
    page = next(tmp_path.glob("*.md")).read_text()
    assert "failed, RuntimeError: out of luck" in page and "| T=448 H=4 K=2" in page


def test_a_contestant_that_cannot_run_is_named_with_its_reason(tmp_path, monkeypatch, no_child):
    monkeypatch.setattr(contestants, "why_not", lambda backend, inputs: f"no {backend} here")
    assert run_bench(tmp_path, "--only", ONE) == 0
    assert "paper: no flash here" in next(tmp_path.glob("*.md")).read_text()


def record(shape, both, forward=None, total=0, **more):
    seconds = {"both": both, "forward": forward or both}
    return {
        "kind": "shape", "name": shape.name, "shape": shape.as_json(), "seconds": seconds,
        "memory": {"total": total, "beyond": total}, "unable": {}, "load": 0.0, **more,
    }  # fmt: skip


def test_figures_by_hand():
    shape = shapes.Shape((64,), 2, 1, 8, 16, 2)
    causal, planned = 64 * 65 // 2, 4 * (16 * 17 // 2) + 3 * 16 * 16
    gate = 2 * 8 * 2 * 16 * (1 + 2 + 3)
    f = figures.figures_of(record(shape, {"moba": [3.0, 1.0, 2.0], "a": [9.0], "b": [8.0], "paper": [5.0]}), "both")
    assert (f.ours_s, f.dense, f.dense_s, f.paper_s) == (2.0, "b", 8.0, 5.0)
    assert f.ratio == causal / planned and f.speedup == 4.0 and f.share_of_ratio == pytest.approx(4 * planned / causal)
    assert f.over_paper == 2.5
    floor = (14 * 8 * 2 * planned + gate) / (14 * 8 * 2 * causal / 8.0)
    assert f.share_of_floor == pytest.approx(floor / 2.0)
    assert f.tflops == pytest.approx((14 * 8 * 2 * planned + gate) / 2.0 / 1e12)
    alone = figures.figures_of(record(shape, {"moba": [2.0]}), "forward")
    assert alone.speedup is alone.share_of_ratio is alone.share_of_floor is alone.over_paper is None


@pytest.mark.parametrize("select", ["head", "group"])
def test_the_gates_work_is_counted_query_by_query(select):
    shape = shapes.Shape((70, 33, 1, 90), 4, 2, 8, 16, 3, select)
    candidates = sum(t // 16 for length in (70, 90) for t in range(length))  # 33 <= 3 * 16 is covered
    assert shapes.gate_flops(shape) == 2 * 8 * (4 if select == "head" else 2) * candidates


def test_targets_are_met_missed_or_not_measured():
    main = shapes.cpu_shapes()[0]
    ratio = shapes.pair_ratio(main)
    known = [record(main, {"moba": [1.0], "dense": [0.59 * ratio]}, {"moba": [1.0], "dense": [0.5 * ratio]})]
    words = [str(verdict) for verdict in targets.verdicts(known, "cpu")]
    assert words[0].startswith("MISSED") and ">= 0.6: 0.59" in words[0]
    assert words[1].startswith("met") and words[2].startswith("not measured")


def test_the_million_token_targets_read_total_memory_and_time_a_token():
    shorter, million = (s for s in shapes.cpu_shapes() if s.chunk == 1024 and s.kv_heads == 1)
    known = [record(shorter, {"moba": [1.0]}), record(million, {"moba": [11.0]}, total=5 << 30)]
    by_text = {verdict.target: verdict for verdict in targets.verdicts(known, "cpu")}
    assert [v.value for text, v in by_text.items() if "GiB" in text] == [5.0]
    assert [v.value for text, v in by_text.items() if "time a token" in text] == [11 / 8]
    assert [v.met for text, v in by_text.items() if "T=1048576" in text] == [False, True]


def test_a_missed_target_ends_the_run_well_unless_strict(tmp_path, monkeypatch, no_child):
    missed = targets.Verdict("speed", 2.0, True, 1.0, "here")
    monkeypatch.setattr(targets, "verdicts", lambda *_: [missed])
    small = replace(shapes.toy_shapes("fp32")[1], dense=False, paper=False)
    monkeypatch.setattr(shapes, "cpu_shapes", lambda: (small,))
    options = ["--repeats", "1", "--threads", str(torch.get_num_threads()), "--out", str(tmp_path)]
    assert bench.main(options) == 0
    assert "MISSED       speed >= 2: 1 (here)" in next(tmp_path.glob("*.md")).read_text()
    assert bench.main([*options, "--strict"]) == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shapes_have_names_of_their_own_and_every_target_speaks_of_one(device):
    known = shapes.cpu_shapes() if device == "cpu" else shapes.cuda_shapes()
    assert len({shape.name for shape in known}) == len(known)
    both = {"moba": [1.0], "dense": [1.0], "paper": [1.0]}
    assert all(verdict.value is not None for verdict in targets.verdicts([record(s, both) for s in known], device))


@pytest.mark.parametrize("shape", [*shapes.cpu_shapes(), *shapes.cuda_shapes()], ids=lambda shape: shape.name)
def test_the_gates_small_shapes_are_of_the_same_kind(shape):
    small = shapes.small_of(shape, 64)
    assert small.tokens <= 1024
    assert shapes.is_covered(small) == shapes.is_covered(shape)
    assert small.heads // small.kv_heads == shape.heads // shape.kv_heads
    assert (small.dim, small.dtype, small.select) == (shape.dim, shape.dtype, shape.select)
    assert any(length % small.chunk for length in small.documents)


def test_dense_attention_of_a_document_is_what_the_others_are_compared_with():
    shape = shapes.Shape((40, 24), 4, 2, 16, 64, 1)
    inputs = import_module("moba_bench.parity").make_inputs(shape, "cpu")
    (dense,) = [made for _, made in contestants.dense_contestants(shape, inputs)]
    dense.forward()
    dense.both()
    able, unable = contestants.contestants(shape, inputs, "torch", dense=True, paper=True)
    assert [one.name for one in able] == ["moba", "dense", "paper"] and not unable


def test_a_kernel_without_native_gqa_gets_repeated_keys_and_one_that_cannot_run_a_reason(monkeypatch):
    shape = shapes.Shape((40, 24), 4, 2, 16, 64, 1)
    inputs = import_module("moba_bench.parity").make_inputs(shape, "cpu")
    groups = []

    def without_gqa(q, k, v, *, is_causal, enable_gqa):
        if enable_gqa:
            raise RuntimeError("no GQA")
        groups.append(q.shape[1] // k.shape[1])
        return scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    monkeypatch.setattr(contestants, "scaled_dot_product_attention", without_gqa)
    contestants._dense_on_gpu("dense", shape, inputs, nullcontext).both()
    assert groups == [1] * 3  # the trial and two documents
    only_cudnn = partial(sdpa_kernel, [SDPBackend.CUDNN_ATTENTION])
    monkeypatch.setattr(contestants, "scaled_dot_product_attention", scaled_dot_product_attention)
    assert "was found" in contestants._dense_on_gpu("dense", shape, inputs, only_cudnn)


def test_on_a_gpu_dense_attention_of_a_row_is_timed_once_for_all_specs():
    first, second, other = shapes.cuda_shapes()[0], shapes.cuda_shapes()[1], shapes.cuda_shapes()[3]
    known = record(first, {"moba": [1.0], "dense-flash": [2.0]})
    gpu = SimpleNamespace(options=SimpleNamespace(device="cuda"), store=SimpleNamespace(of_kind=lambda kind: [known]))
    assert bench.known_dense(gpu, second) is known and bench.known_dense(gpu, other) is None
    gpu.options.device = "cpu"
    assert bench.known_dense(gpu, second) is None


def test_peak_memory_is_that_of_the_child_and_not_of_the_process_that_started_it():
    ballast = torch.ones(1 << 28)  # 1 GiB
    shape = shapes.Shape((4096,), 2, 1, 64, 512, 2)
    peak = memory.measure_in_child(shape, "torch", 1)
    least = 4 * 4096 * 64 * (2 + 1 + 1 + 2)  # inputs alone
    assert least < peak["total"] < 1 << 28 < ballast.numel() * 4
    assert peak["beyond"] <= peak["total"]


def test_a_child_that_fails_says_why():
    with pytest.raises(RuntimeError, match="nonesuch"):
        memory.measure_in_child(shapes.toy_shapes("fp32")[0], "nonesuch", 1)


def test_contestants_take_turns_and_a_failing_one_does_not_stop_the_others():
    calls = []

    def fail():
        raise RuntimeError("no")

    actions = {"a": lambda: calls.append("a"), "bad": fail, "b": lambda: calls.append("b")}
    seconds, failed = timing.take_turns(actions, "cpu", 2)
    assert calls == ["a", "b", "a", "b", "a", "b"]  # the first of each warms up
    assert {name: len(runs) for name, runs in seconds.items()} == {"a": 2, "b": 2}
    assert failed == {"bad": "RuntimeError: no"}


def test_a_terminal_gets_a_table_and_a_log_gets_lines(monkeypatch, capsys):
    known = [record(shapes.cpu_shapes()[0], {"moba": [1.0], "dense": [4.0]}, total=1 << 30)]
    tables.show(known)
    lines = capsys.readouterr().out.splitlines()
    assert any("4x" in line and "1.00 / 1.00" in line for line in lines) and not any("┃" in line for line in lines)
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True, write=sys.stdout.write, flush=lambda: None))
    tables.show(known)
    assert "forward + backward" in capsys.readouterr().out


def test_without_matplotlib_there_is_no_picture_and_the_run_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    reason = tables.draw([record(shapes.cpu_shapes()[0], {"moba": [1.0], "dense": [1.0]})], tmp_path / "x.png", "")
    assert "matplotlib is not installed" in reason and not list(tmp_path.iterdir())
