"""Refusals and reports: what a caller is told."""

from __future__ import annotations

import inspect
import os
import pickle
import subprocess
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import moba_kernels
from moba_kernels import (
    BackendError,
    ExecutionReport,
    Full,
    MoBA,
    Pack,
    PairTally,
    Routing,
    attend,
    attend_partial,
    attend_partial_backward,
    key_conv,
    mean_keys,
    merge_partials,
    moba_attn_varlen,
    pool_sums,
    random_routing,
    route,
    route_means,
)
from moba_kernels.triton_support import refuse_device, require_triton

from .inputs import make_qkv


def test_a_backend_that_cannot_serve_a_call_refuses_with_every_reason():
    q, k, v, _ = make_qkv([0, 16])  # fp64, head dim 16, on the CPU
    for call in (
        lambda: attend(q, k, v, MoBA(4, 2), backend="triton"),
        lambda: attend(q, k, v, Full(), backend="triton"),
        lambda: route(q, k, MoBA(4, 2), backend="triton"),
    ):
        with pytest.raises(BackendError, match="cannot serve") as caught:
            call()
        assert caught.value.backend == "triton" and len(caught.value.reasons) == 3
        assert all(word in str(caught.value) for word in ("CUDA", "float64", "16", "fix:"))
    assert pickle.loads(pickle.dumps(caught.value)).reasons == caught.value.reasons
    assert "take another" in str(pickle.loads(pickle.dumps(BackendError("flash", ["old"], "take another"))))


def test_a_missing_triton_is_named_with_an_install_hint(monkeypatch):
    q, k, v, _ = make_qkv([0, 16], dtype=torch.float32)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BackendError, match=r"cannot be imported(.|\n)*pip install 'moba-train\[triton\]'"):
        attend(q, k, v, Full(), backend="triton")


def test_a_triton_that_is_too_old_is_refused_with_its_version(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    with pytest.raises(BackendError, match=r"triton >= 3\.4(.|\n)*3\.3\.1"):
        require_triton()


def test_a_gpu_that_the_tiles_do_not_fit_is_refused(monkeypatch):
    gpu = {"capability": (9, 0), "shared": 232_448}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu["capability"])
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(shared_memory_per_block_optin=gpu["shared"]),
    )
    device = torch.device("cuda", 1)
    assert refuse_device(device) == ()
    gpu.update(capability=(8, 0), shared=166_912)
    assert refuse_device(device) == ()
    for capability in ((8, 9), (12, 0)):  # cards for desktops
        gpu.update(capability=capability, shared=101_376)
        (reason,) = refuse_device(device)
        assert "101,376" in reason and "cuda:1" in reason
    gpu.update(capability=(7, 5), shared=65_536)
    (reason,) = refuse_device(device)
    assert "7.5" in reason


def test_every_operation_runs_with_its_tensors_device_current(monkeypatch):
    entered = []

    @contextmanager
    def on_device_of(x):
        entered.append(x)
        yield

    for module in ("moba_kernels.ops", "moba_kernels.key_conv.op"):
        monkeypatch.setattr(import_module(module), "on_device_of", on_device_of)
    spec, pack = MoBA(4, 2), Pack([0, 16])
    q, k, v, dout = make_qkv([0, 16], dtype=torch.float32)
    routing = route(q, k, spec)
    assert len(entered) == 2  # pool_sums and route_means
    out, lse = attend_partial(q, k, v, spec, pack=pack, routing=routing)
    attend_partial_backward(dout, q, k, v, lse, (out * dout).sum(-1), spec, pack=pack, routing=routing)
    assert len(entered) == 4
    leaf = k.clone().requires_grad_()
    attend(q, leaf, v, spec, routing=routing).out.sum().backward()
    assert len(entered) == 6
    key_conv(leaf, torch.zeros(*k.shape[1:], 3), document_offset=torch.arange(16)).sum().backward()
    assert len(entered) == 8


def test_importing_the_operator_imports_no_optional_package():
    optional = "[x for x in ('triton', 'flash_attn') if x in sys.modules]"
    program = f"import sys, moba_kernels; moba_kernels.attend; print({optional})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=_environment()
    )
    assert done.stdout.strip() == "[]"


def test_auto_is_torch_on_the_cpu():
    q, k, v, _ = make_qkv([0, 16])
    assert attend(q, k, v, Full()).report.backend == "torch"


def test_an_unknown_backend_is_a_value_error_that_lists_the_known_ones():
    q, k, v, _ = make_qkv([0, 16])
    with pytest.raises(ValueError, match="allowed: 'auto', 'reference', 'torch', 'triton', 'flash'"):
        attend(q, k, v, Full(), backend="cuda")


def test_no_public_function_swallows_unknown_arguments():
    q, k, v, _ = make_qkv([0, 16])
    with pytest.raises(TypeError):
        attend(q, k, v, Full(), mask=None)  # type: ignore[call-arg]
    public = (getattr(moba_kernels, name) for name in moba_kernels.__all__)  # loaded on first use
    functions = [x for x in public if inspect.isfunction(x)]
    assert len(functions) >= 10
    for function in functions:
        kinds = {p.kind for p in inspect.signature(function).parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}, function


def _environment():
    return {**os.environ, "PYTHONPATH": str(Path(moba_kernels.__file__).parents[1])}


def bad_calls():
    q, k, v, _ = make_qkv([0, 16], dtype=torch.float32)
    spec = MoBA(4, 2)
    routing = route(q, k, spec)
    pack = Pack([0, 16])
    lse = torch.zeros(16, 4)

    twice = Routing(torch.zeros(12, 4, 2).long(), MoBA(4, 3), pack, torch.arange(4, 16))

    def picked(chunk):
        return Routing(torch.full((16, 4, 1), chunk), spec, pack)

    def backward(dout, lse, delta):
        return attend_partial_backward(dout, q, k, v, lse, delta, Full(), pack=pack)

    return {
        "q is 4-D": (lambda: attend(q[None], k, v, spec), "tokens, heads, dim"),
        "k has another dim": (lambda: attend(q, k[..., :8], v, spec), "head dim"),
        "v has other tokens": (lambda: attend(q, k, v[:8], spec), "k's tokens"),
        "k has other tokens": (lambda: attend(q, k[:8], v[:8], Full()), "all 16 tokens"),
        "mixed dtypes": (lambda: attend(q, k.double(), v, spec), "dtype"),
        "integer q": (lambda: attend(q.long(), k.long(), v.long(), spec), "float"),
        "another device": (lambda: attend(q, k.to("meta"), v, spec), "device"),
        "heads do not divide": (lambda: attend(q[:, :3], k, v, spec), "multiple"),
        "spec is a string": (lambda: attend(q, k, v, "full"), "spec must be"),
        "cu_seqlens ends early": (lambda: attend(q, k, v, spec, cu_seqlens=[0, 8]), "must end at 16"),
        "cu_seqlens falls": (lambda: attend(q, k, v, spec, cu_seqlens=[0, 12, 8, 16]), "must not fall"),
        "pack of another row": (lambda: attend(q, k, v, spec, cu_seqlens=Pack([0, 8])), "must end at 16"),
        "routing under Full": (lambda: attend(q, k, v, Full(), routing=routing), "MoBA only"),
        "routing of another spec": (lambda: attend(q, k, v, MoBA(4, 3), routing=routing), "made under"),
        "routing of another row": (lambda: attend(q, k, v, spec, cu_seqlens=[0, 8, 16], routing=routing), "made for"),
        "routing of other heads": (lambda: attend(q[:, :2], k, v, spec, routing=routing), "must cover"),
        "route under Full": (lambda: route(q, k, Full()), "MoBA spec"),
        "partial without routing": (lambda: attend_partial(q, k, v, spec, pack=pack), "needs a routing"),
        "positions fall": (
            lambda: attend_partial(q[:2], k, v, Full(), pack=pack, q_positions=torch.tensor([4, 3])),
            "ascend",
        ),
        "positions beyond the row": (
            lambda: pool_sums(k[:2], pack=pack, chunk_size=4, k_positions=torch.tensor([3, 16])),
            "ascend",
        ),
        "int32 positions": (
            lambda: attend_partial(q[:1], k, v, Full(), pack=pack, q_positions=torch.tensor([4], dtype=torch.int32)),
            "int64",
        ),
        "means of another chunk size": (
            lambda: route_means(q, torch.zeros(2, 2, 16), spec, pack=pack),
            "means must be",
        ),
        "bf16 means": (lambda: route_means(q, torch.zeros(4, 2, 16).bfloat16(), spec, pack=pack), "fp32"),
        "picks of the wrong rank": (lambda: Routing(torch.zeros(16, 1), spec, pack), "picks must be"),
        "more picks than topk - 1": (lambda: Routing(torch.zeros(16, 4, 2), spec, pack), "at most 1 picks"),
        "routing is a tensor": (lambda: attend(q, k, v, spec, routing=routing.chunk_ids), "routing must be a Routing"),
        "float picks": (lambda: Routing(torch.zeros(16, 4, 1), spec, pack), "integers"),
        "backward with bf16 lse": (lambda: backward(q, lse.bfloat16(), lse), "lse must be fp32"),
        "backward with integer dout": (lambda: backward(q.long(), lse, lse), "dout must be a float"),
        "backward with delta elsewhere": (lambda: backward(q, lse, lse.to("meta")), "device"),
        "partials of two shapes": (
            lambda: merge_partials(torch.zeros(4, 2, 8), torch.zeros(4, 1), torch.zeros(4, 2, 8), torch.zeros(4, 1)),
            "both alike",
        ),
        "sums and counts that differ": (lambda: mean_keys(torch.zeros(4, 2, 8), torch.ones(3)), "counts"),
        "pack is a list": (lambda: attend_partial(q, k, v, Full(), pack=[0, 16]), "must be a Pack"),
        "positions are a list": (lambda: attend_partial(q[:1], k, v, Full(), pack=pack, q_positions=[4]), "int64"),
        "ragged cu_seqlens": (lambda: Pack([[0], [1, 2]]), "sequence of integers"),
        "scale is not a number": (lambda: attend(q, k, v, spec, softmax_scale="a"), "finite number"),
        "scale is NaN": (lambda: attend(q, k, v, spec, softmax_scale=float("nan")), "finite number"),
        "means are None": (lambda: route_means(q, None, spec, pack=pack), "means must be a tensor"),
        "sums are None": (lambda: mean_keys(None, torch.ones(4)), "sums must be a tensor"),
        "partials are None": (lambda: merge_partials(None, lse, q, lse), "out_a must be a tensor"),
        "lse of a backward pass is None": (lambda: backward(q, None, lse), "lse must be a tensor"),
        "picks are None": (lambda: Routing(None, spec, pack), "picks must be a tensor"),
        "routing made under Full": (lambda: Routing(routing.picks, Full(), pack), "under a MoBA spec"),
        "random routing of a list": (
            lambda: random_routing(spec, pack=[0, 16], num_heads=4, num_kv_heads=2, seed=0, device="cpu"),
            "must be a Pack",
        ),
        "no longest length": (lambda: moba_attn_varlen(q, k, v, pack, None, 4, 2), "max_seqlen must be an integer"),
        "bf16 cu_seqlens": (lambda: Pack(torch.tensor([0, 16.0]).bfloat16()), "dense tensor of integers"),
        "sparse cu_seqlens": (lambda: Pack(torch.tensor([0, 16]).to_sparse()), "dense tensor of integers"),
        "chunk size is a float that was met as an integer": (lambda: pack.chunks(4) and pack.chunks(4.0), "integer"),
        "chunk size is true": (lambda: pack.chunks(1) and pack.chunks(True), "integer"),
        "random routing of tokens that are not there": (
            lambda: random_routing(
                spec, pack=pack, num_heads=4, num_kv_heads=2, seed=0, device="cpu", q_positions=torch.tensor([-1, 3])
            ),
            "within 0..15",
        ),
        "routing of half tokens": (
            lambda: Routing(torch.zeros(2, 4, 1, dtype=torch.int64), spec, pack, torch.tensor([0.5, 1.5])),
            "int64",
        ),
        "scale beyond fp32": (lambda: attend(q, k, v, spec, softmax_scale=1e39), "finite number of fp32"),
        "scale beyond all floats": (lambda: attend(q, k, v, spec, softmax_scale=10**400), "finite number of fp32"),
        "chunk size beyond 32 bits": (lambda: MoBA(2**32, 1), "at most 2"),
        "topk beyond 32 bits": (lambda: MoBA(4, 2**63), "at most 2"),
        "routing of the same queries in another order": (
            lambda: attend(q, k, v, spec, routing=routing.select(torch.arange(15, -1, -1))),
            "other queries",
        ),
        "chunk size is not an integer": (lambda: pack.chunks(2.5), "integer"),
        "backend is a list": (lambda: attend(q, k, v, spec, backend=["torch"]), "unknown backend"),
        "integer q to route_means": (lambda: route_means(q.long(), torch.zeros(4, 2, 16), spec, pack=pack), "float"),
        "integer k to pool_sums": (lambda: pool_sums(k.long(), pack=pack, chunk_size=4), "float"),
        "random routing under Full": (
            lambda: random_routing(Full(), pack=pack, num_heads=4, num_kv_heads=2, seed=0, device="cpu"),
            "MoBA spec",
        ),
        "random routing of heads that do not divide": (
            lambda: random_routing(spec, pack=pack, num_heads=3, num_kv_heads=2, seed=0, device="cpu"),
            "multiple",
        ),
        "a pick that stands twice": (
            lambda: Routing.from_chunk_ids(torch.tensor([[[3, 1, 1]]]), MoBA(4, 3), pack, torch.tensor([13])),
            "twice",
        ),
        "a pick that is no chunk": (
            lambda: Routing.from_chunk_ids(torch.tensor([[[3, 70]]]), MoBA(4, 2), pack, torch.tensor([13])),
            "not a candidate",
        ),
        "v is None": (lambda: attend(q, k, None, spec), "v must be"),
        "v of a partial is None": (lambda: attend_partial(q, k, None, Full(), pack=pack), "v must be"),
        "q is a list": (lambda: attend_partial(q.tolist(), k, v, Full(), pack=pack), "q must be"),
        "a pick handed in that is no chunk": (lambda: attend(q, k, v, spec, routing=picked(70)), "not a candidate"),
        "a pick handed in that would wrap to a chunk": (
            lambda: attend(q, k, v, spec, routing=picked(65536)),
            "not a candidate",
        ),
        "a pick handed in of the future": (lambda: attend(q, k, v, spec, routing=picked(3)), "not a candidate"),
        "a chunk handed in twice": (
            lambda: attend_partial(q[4:], k, v, twice.spec, pack=pack, q_positions=twice.q_positions, routing=twice),
            "twice",
        ),
        "no head dim": (lambda: attend(q[..., :0], k[..., :0], v, spec), "at least 1"),
        "no value dim": (lambda: attend(q, k, v[..., :0], Full()), "at least 1"),
        "no KV heads": (lambda: attend(q, k[:, :0], v[:, :0], spec), "multiple"),
        "cu_seqlens starts late": (lambda: attend(q, k, v, spec, cu_seqlens=[1, 16]), "must start at 0"),
        "cu_seqlens ends late": (lambda: attend(q, k, v, spec, cu_seqlens=torch.tensor([0, 17])), "must end at 16"),
        "chunks of no token": (lambda: pool_sums(k, pack=pack, chunk_size=0), "chunk_size must be"),
        "picks of too few rows": (lambda: Routing.from_chunk_ids(routing.chunk_ids[:3], spec, pack), "16 rows"),
        "gradient of another shape": (lambda: backward(q[..., :8], lse, lse), "dout must be"),
        "lse of other queries": (lambda: backward(q, lse[:8], lse), "lse must be"),
        "delta of other heads": (lambda: backward(q, lse, lse[:, :2]), "delta must be"),
        "the original's call, max_seqlen too small": (
            lambda: moba_attn_varlen(q, k, v, torch.tensor([0, 4, 16]), 11, 4, 2),
            "longest document, 12",
        ),
    }


@pytest.mark.parametrize("case", bad_calls())
def test_a_bad_argument_is_refused_with_what_got_and_fix(case):
    call, message = bad_calls()[case]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "got" in str(caught.value) and "fix:" in str(caught.value)


def test_a_routing_survives_pickling():
    q, k, _, _ = make_qkv([0, 32])
    routing = route(q, k, MoBA(8, 3))
    assert pickle.loads(pickle.dumps(routing)).equals(routing)


def test_picks_are_looked_at_once_and_those_of_the_gate_and_their_parts_never(monkeypatch):
    q, k, v, _ = make_qkv([0, 32])
    spec, pack, rows = MoBA(8, 3), Pack([0, 32]), torch.arange(8, 32)
    looks = []
    monkeypatch.setattr("moba_kernels.routing._validate", lambda *picks: looks.append(picks))

    def use(routing, rows=None, heads=slice(None), kv_heads=slice(None)):
        queries = q[:, heads] if rows is None else q[rows, heads]
        parts = queries, k[:, kv_heads], v[:, kv_heads]
        attend_partial(*parts, spec, pack=pack, q_positions=rows, routing=routing)

    gate = route(q, k, spec)
    drawn = random_routing(spec, pack=pack, num_heads=4, num_kv_heads=2, seed=0, device="cpu")
    for routing in (gate, drawn, pickle.loads(pickle.dumps(gate))):
        use(routing)
        use(routing.select(rows), rows)
        use(routing.of_kv_heads(0, 1, 2), heads=slice(2), kv_heads=slice(1))
    assert not looks
    made_by_hand = Routing(gate.picks, spec, pack)
    for _ in range(2):
        use(made_by_hand)
        use(made_by_hand.select(rows), rows)
    assert len(looks) == 1
    use(Routing.from_chunk_ids(gate.chunk_ids, spec, pack))
    assert len(looks) == 2


def test_the_report_catches_a_routing_with_fewer_picks_than_planned():
    q, k, v, _ = make_qkv([0, 32])
    routing = route(q, k, MoBA(8, 3))
    ids = routing.chunk_ids.clone()
    ids[31, 0, 2] = -1
    forced = Routing.from_chunk_ids(ids, MoBA(8, 3), Pack([0, 32]))
    report = attend(q, k, v, MoBA(8, 3), routing=forced).report
    assert report.computed_pairs == report.planned_pairs - 8
    with pytest.raises(RuntimeError, match="planned"):
        report.raise_if_different()
    attend(q, k, v, MoBA(8, 3), routing=routing).report.raise_if_different()


def test_the_report_bounds_wasted_work():
    q, k, v, _ = make_qkv([0, 256], heads=2, kv_heads=1)
    report = attend(q, k, v, MoBA(16, 3)).report
    report.check(tile_padding=2.0)
    with pytest.raises(RuntimeError, match="multiplied out"):
        report.check(tile_padding=1.0)


def test_the_tally_is_read_only_when_asked():
    tally = PairTally()
    tally.add(torch.tensor(5), 8)
    tally.add(torch.tensor(2), 4)
    report = ExecutionReport("torch", 7, tally)
    assert (report.computed_pairs, report.scored_pairs) == (7, 12)


def test_routing_is_returned_only_on_request():
    q, k, v, _ = make_qkv([0, 16])
    assert attend(q, k, v, MoBA(4, 2)).routing is None
    assert attend(q, k, v, MoBA(4, 2), return_routing=True).routing.equals(route(q, k, MoBA(4, 2)))
    assert attend(q, k, v, Full(), return_routing=True).routing is None


def test_a_routing_frozen_from_an_earlier_call_is_the_one_used():
    q, k, v, _ = make_qkv([0, 32])
    first = attend(q, k, v, MoBA(4, 2), return_routing=True)
    second = attend(-q, k, v, MoBA(4, 2), routing=first.routing, return_routing=True)
    assert second.routing is first.routing
    assert not attend(-q, k, v, MoBA(4, 2), return_routing=True).routing.equals(first.routing)


@pytest.mark.parametrize("first", ["moba_kernels.spec", "moba_kernels.dispatch", "moba_kernels.attend.torch"])
def test_specs_need_no_torch_and_folders_never_hide_the_functions_of_their_name(first):
    program = (
        f"import sys, {first}; print('torch' in sys.modules)\n"
        "import moba_kernels; print(callable(moba_kernels.attend), callable(moba_kernels.route))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=_environment()
    )
    assert done.stdout.split() == [str(first != "moba_kernels.spec"), "True", "True"]
