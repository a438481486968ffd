"""The flash backend: the paper's algorithm on flash kernels, its cuts, and the adapters of three sets of kernels."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moba_kernels import BackendError, Full, MoBA, Pack, attend, attend_partial, attend_partial_backward, route
from moba_kernels.attend import flash
from moba_kernels.attend.flash_aten import CpuKernels, CudaKernels, device_lists
from moba_kernels.attend.flash_attn_package import PackageKernels
from moba_kernels.attend.flash_lists import Lists

from . import parity, test_attend, test_partial
from .inputs import ROWS, assert_close, make_qkv

SPECS = [Full(), MoBA(8, 1), MoBA(8, 3), MoBA(8, 3, "group"), MoBA(5, 2), MoBA(16, 50)]


def check_against_oracle(cu, spec, **shape):
    test_attend.check_against_oracle(cu, spec, tolerance=1e-13, backends=["flash"], **shape)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("cu", ROWS.values(), ids=ROWS.keys())
def test_output_lse_gradients_and_pairs_are_the_oracles(cu, spec):
    check_against_oracle(cu, spec)


@pytest.mark.parametrize("spec", [Full(), MoBA(8, 3), MoBA(8, 3, "group")], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (4, 1), (8, 1), (6, 2)])
def test_every_gqa_group_size(heads, kv_heads, spec):
    check_against_oracle([0, 11, 50], spec, heads=heads, kv_heads=kv_heads, dim=8)


@pytest.mark.parametrize("value_dim", [1, 8, 24])
def test_values_may_be_narrower_or_wider_than_keys(value_dim):
    for spec in (Full(), MoBA(8, 3)):
        check_against_oracle([0, 50], spec, value_dim=value_dim)


def test_topk_one_runs_the_own_chunk_only():
    q, k, v, _ = make_qkv([0, 37])
    result = attend(q, k, v, MoBA(8, 1), backend="flash")
    chunks_as_documents = attend(q, k, v, Full(), cu_seqlens=[*range(0, 37, 8), 37], backend="reference")
    assert_close(result.out, chunks_as_documents.out, 1e-13)


@pytest.mark.parametrize("cut", ["halves", "inside chunks", "zigzag", "random"])
@pytest.mark.parametrize("spec", test_partial.SPECS, ids=str)
def test_parts_of_queries_and_keys_merge_to_the_whole(spec, cut):
    test_partial.test_parts_of_queries_and_keys_merge_to_the_whole(spec, cut, "flash")


@pytest.mark.parametrize("spec", [Full(), MoBA(8, 3)], ids=str)
def test_queries_without_keys_and_empty_sides(spec):
    test_partial.test_a_query_without_any_key_at_hand_gives_zero_and_minus_infinity(spec, "flash")
    test_partial.test_no_queries_or_no_keys_at_hand(spec, "flash")
    test_attend.test_an_empty_row_gives_empty_results_and_gradients(spec, "flash")


@pytest.mark.parametrize("spec", [Full(), MoBA(4, 3, "group")], ids=str)
def test_gradcheck_with_frozen_routing(spec):
    test_attend.test_gradcheck_with_frozen_routing(spec, "flash")


@pytest.mark.parametrize("spec", [MoBA(128, 2), MoBA(16, 4), MoBA(16, 4, "group")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_that_of_the_plain_same_precision_way(spec, dtype):
    parity.check(parity.Case((0, 90, 256), 4, 2, spec, dtype, seed=1), ("flash",), "cpu")


@pytest.mark.parametrize("spec", [Full(), MoBA(16, 3)], ids=str)
def test_strided_inputs_and_repetition_give_the_same_bits(spec):
    cu = [0, 100, 300]
    q, k, v, dout = make_qkv(cu, dtype=torch.float32)
    fused = torch.cat((q, k, v), 1)
    views = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    first = test_attend.run(q, k, v, dout, spec, cu, backend="flash")
    for inputs in ((q, k, v), views):
        again = test_attend.run(*inputs, dout.transpose(0, 1).contiguous().transpose(0, 1), spec, cu, backend="flash")
        assert torch.equal(first[0].out, again[0].out) and torch.equal(first[0].lse, again[0].lse)
        assert all(torch.equal(a, b) for a, b in zip(first[1:], again[1:], strict=True))


class Recorder(CpuKernels):
    """Remembers the shapes of all calls; poisons nothing, since the CPU kernels allocate their own results."""

    def __init__(self):
        self.calls = []

    def _record(self, q, k, lists):
        assert lists.q_lengths.min() > 0 and lists.k_lengths.min() > 0, "an empty list reached a kernel"
        assert (lists.q_edges[-1], lists.k_edges[-1]) == (len(q), len(k))
        self.calls.append((q.shape[0], q.shape[1], k.shape[0]))

    def forward(self, q, k, v, lists, scale):
        self._record(q, k, lists)
        return super().forward(q, k, v, lists, scale)

    def backward(self, dout, q, k, v, out, lse, lists, scale):
        self._record(q, k, lists)
        return super().backward(dout, q, k, v, out, lse, lists, scale)


@pytest.mark.parametrize("cu", [[0, 0, 1, 50, 70], [0, 3, 6, 40]], ids=str)
@pytest.mark.parametrize("spec", [Full(), MoBA(8, 3), MoBA(40, 2), MoBA(5, 4, "group")], ids=str)
@pytest.mark.parametrize("rows", [2, 7, 30])
def test_any_scratch_limit_gives_the_same_and_no_call_exceeds_it(cu, spec, rows, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(flash, "kernels_for", lambda device: recorder)
    monkeypatch.setattr(flash, "SCRATCH_BYTES", rows * 8 * 16 * 8 * 3 // 2)  # rows of 16 fp64 numbers, eight times
    check_against_oracle(cu, spec)
    assert len(recorder.calls) > 4
    for num_queries, num_heads, num_keys in recorder.calls:
        if num_heads == 1:
            assert num_queries + num_keys <= max(2, rows)
        else:
            assert max(num_queries, num_keys) <= max(1, rows // 6)  # 4 query heads and 2 KV heads a token


def test_own_chunks_are_few_calls_and_a_shard_of_a_row_needs_no_more_than_two_a_piece(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(flash, "kernels_for", lambda device: recorder)
    cu, spec = [0, 512], MoBA(32, 1)
    q, k, v, _ = make_qkv(cu, dtype=torch.float32)
    attend(q, k, v, spec, cu_seqlens=cu, backend="flash")
    assert recorder.calls == [(512, 4, 512)]
    recorder.calls.clear()
    shard = torch.cat((torch.arange(40, 100), torch.arange(300, 350)))  # a zigzag's pieces; they cut chunks
    routing = route(q, k, spec, cu_seqlens=cu).select(shard)
    attend_partial(
        q[shard], k, v, spec, pack=Pack(cu), q_positions=shard, routing=routing, backend="flash"
    )  # fmt: skip
    assert recorder.calls == [(60, 4, 60), (50, 4, 50), (24, 4, 8), (20, 4, 12)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-8, 1.0, 1e8, 1e30], ids=str)
def test_the_stand_in_for_out_has_the_given_delta_at_any_size_of_the_gradient(scale, dtype):
    generator = torch.Generator().manual_seed(0)
    dout = (torch.randn(50, 4, 64, generator=generator, dtype=torch.float64) * scale).to(dtype)
    dout[7] = 0
    dout[8, :, 1:] = 0  # one element speaks
    out = torch.randn(50, 4, 64, generator=generator, dtype=torch.float64)
    delta = (dout.double() * out).sum(-1)
    for kernel_dtype in (dtype, torch.bfloat16):
        made = flash.stand_in(dout, delta.to(dtype), kernel_dtype)
        assert made.dtype == kernel_dtype and torch.isfinite(made).all()
        error = ((dout.double() * made.double()).sum(-1) - delta).abs()
        allowed = 2.0**-22 * delta.abs() + 1e-43
        if kernel_dtype == torch.bfloat16:
            allowed[8] = 2.0**-8 * delta[8].abs() + 1e-43  # no other element to take the rounding
        assert (error <= allowed).all()
    assert (flash.stand_in(dout, delta.to(dtype), dtype)[7] == 0).all()


def test_gradients_of_tiny_and_of_some_zero_upstream_gradients_are_right():
    cu, spec = [0, 70], MoBA(8, 3)
    q, k, v, dout = make_qkv(cu, dtype=torch.float32)
    dout[:50] = 0
    want = test_attend.run(q, k, v, dout, spec, cu, backend="reference")
    got = test_attend.run(q, k, v, dout * 1e-30, spec, cu, backend="flash")
    for exact, mine in zip(want[1:], got[1:], strict=True):
        assert_close(mine.double() * 1e30, exact, 1e-5)


def lists_of(cu_q, cu_k):
    assert cu_q.dtype == cu_k.dtype == torch.int32
    return Lists(cu_q.long().numpy(), cu_k.long().numpy(), False)


def fake_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, softmax_scale, causal):
    """What flash-attn's compiled function does: (out, lse [H,N])."""
    lists = lists_of(cu_q, cu_k)
    assert dropout_p == 0.0 and softmax_scale > 0 and q.shape[2] % 8 == 0 and q.shape[2] == k.shape[2] == v.shape[2]
    assert max_q >= max(2, lists.q_lengths.max()) and max_k == lists.k_lengths.max()
    out, lse = CpuKernels().forward(q, k, v, Lists(lists.q_edges, lists.k_edges, causal), softmax_scale)
    return out, lse.transpose(0, 1).contiguous()


def fake_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_q, cu_k, softmax_scale, causal):
    assert softmax_lse.shape == q.shape[:2][::-1] and softmax_lse.is_contiguous() and softmax_scale > 0
    lists = Lists(lists_of(cu_q, cu_k).q_edges, lists_of(cu_q, cu_k).k_edges, causal)
    grads = CpuKernels().backward(dout, q, k, v, out, softmax_lse.transpose(0, 1), lists, softmax_scale)
    for into, grad in zip((dq, dk, dv), grads, strict=True):
        into.copy_(grad)


def interface_2_6():
    """The signatures of flash_attn 2.6: one window pair, eight results."""

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size=(-1, -1), softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None,
        leftpad_k=None, seqused_k=None,
    ):  # fmt: skip
        assert window_size == (-1, -1) and softcap == 0.0 and alibi_slopes is None and not return_softmax
        out, lse = fake_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal
        )
        return out, q, k, v, out, lse, None, None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert window_size == (-1, -1) and softcap == 0.0 and alibi_slopes is None and deterministic is False
        fake_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)

    return _flash_attn_varlen_forward, _flash_attn_varlen_backward


def interface_2_8():
    """The signatures of flash_attn 2.7 and 2.8: two window numbers, four results."""

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert (window_size_left, window_size_right, softcap, alibi_slopes) == (-1, -1, 0.0, None)
        assert not return_softmax
        out, lse = fake_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal
        )
        return out, lse, None, None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert (window_size_left, window_size_right, softcap, alibi_slopes) == (-1, -1, 0.0, None)
        assert deterministic is False
        fake_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)

    return _flash_attn_varlen_forward, _flash_attn_varlen_backward


def install_fake_package(monkeypatch, version, functions):
    package, interface = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.flash_attn_interface")
    package.__version__ = version
    package.__spec__ = types.SimpleNamespace(name="flash_attn")
    for function in functions:
        setattr(interface, function.__name__, function)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)


@pytest.mark.parametrize(("version", "interface"), [("2.6.3", interface_2_6), ("2.8.3.post1", interface_2_8)])
@pytest.mark.parametrize("spec", [Full(), MoBA(8, 3)], ids=str)
def test_the_package_adapter_speaks_both_generations_of_flash_attn(spec, version, interface, monkeypatch):
    install_fake_package(monkeypatch, version, interface())
    monkeypatch.setattr(flash, "kernels_for", lambda device: PackageKernels())
    for scale in (None, -0.3, 0.0):
        check_against_oracle([0, 1, 1, 30, 73], spec, scale=scale, dim=12, value_dim=20)  # padded to 24
    pack, rows = Pack([0, 1, 1, 30, 73]), torch.arange(10, 50)
    q, k, v, dout = make_qkv(pack.cu_seqlens, dim=8)
    routing = route(q, k, spec, cu_seqlens=pack).select(rows) if isinstance(spec, MoBA) else None
    options = {"pack": pack, "q_positions": rows, "routing": routing}
    parts = [attend_partial(q[rows], k, v, spec, backend=name, **options) for name in ("flash", "reference")]
    assert_close(parts[0].out, parts[1].out, 1e-12)
    delta = (parts[1].out * dout[rows]).sum(-1)
    grads = [
        attend_partial_backward(dout[rows], q[rows], k, v, parts[1].lse, delta, spec, backend=name, **options)
        for name in ("flash", "reference")
    ]
    for got, want in zip(*grads, strict=True):
        assert_close(got, want, 1e-12)


class Arguments(TorchDispatchMode):
    """Remembers what every op was called with, and the scales."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.scales = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func.__name__, args))
        self.scales += [kwargs["scale"]] if kwargs and "scale" in kwargs else []
        return func(*args, **(kwargs or {}))

    def of(self, name):
        return [args for called, args in self.calls if called.startswith(name)]


@pytest.mark.skipif(torch.__version__ < "2.7", reason="PyTorch 2.6 pads the log-sum-exp: refused, see the next test")
def test_the_built_in_cuda_adapter_calls_the_kernels_as_pytorch_declares_them():
    lists = {
        True: Lists(torch.tensor([0, 1, 5]).numpy(), torch.tensor([0, 1, 5]).numpy(), True),
        False: Lists(torch.tensor([0, 2, 5]).numpy(), torch.tensor([0, 4, 9]).numpy(), False),
    }
    for causal, problem in lists.items():
        q, k, v, dout, out = (
            torch.empty(n, heads, 64, dtype=torch.bfloat16, device="meta")
            for n, heads in ((5, 4), (problem.k_edges[-1], 2), (problem.k_edges[-1], 2), (5, 4), (5, 4))
        )
        with Arguments() as seen_forward:
            got, lse = CudaKernels().forward(q, k, v, problem, -0.125)
        assert got.shape == q.shape and got.dtype == torch.bfloat16
        assert lse.shape == (5, 4) and lse.dtype == torch.float32
        with Arguments() as seen:
            grads = CudaKernels().backward(dout, q, k, v, out, lse.contiguous(), problem, -0.125)
        assert seen_forward.scales == seen.scales == [0.125]  # the sign goes with the queries
        assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
        (arguments,) = seen.of("_flash_attention_backward")
        assert arguments[5].shape == (4, 5) and arguments[5].is_contiguous()  # the kernel reads it as [H,N]
        assert [x.dtype for x in arguments[6:8]] == [torch.int32] * 2
        assert arguments[8:12] == (4 if causal else 3, 4 if causal else 5, 0.0, causal)


def test_a_cuda_kernel_that_pads_the_log_sum_exp_of_lists_is_refused(monkeypatch):
    def padded(q, *rest, **named):  # [lists, heads, longest list], as PyTorch 2.6 returns it
        return torch.empty_like(q), torch.empty(2, 4, 4)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", padded)
    edges = torch.tensor([0, 1, 5]).numpy()
    q, k = torch.zeros(5, 4, 64), torch.zeros(5, 2, 64)
    with pytest.raises(BackendError, match="pads the log-sum-exp of lists"):
        CudaKernels().forward(q, k, k, Lists(edges, edges, True), 0.125)


def test_one_query_a_list_is_told_to_the_kernel_as_two():
    edges_q, edges_k, most_q, most_k = device_lists(
        Lists(torch.tensor([0, 1, 2]).numpy(), torch.tensor([0, 4, 9]).numpy(), False), torch.device("cpu")
    )
    assert (edges_q.tolist(), edges_k.tolist(), most_q, most_k) == ([0, 1, 2], [0, 4, 9], 2, 5)


def test_every_reason_to_refuse_is_named(monkeypatch):
    assert flash.refuse(torch.zeros(1, 1, 300, dtype=torch.float64)) == ()
    (reason,) = flash.refuse(torch.zeros(1, 1, 8, device="meta"))
    assert "CPU and CUDA" in reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with FakeTensorMode():
        q, v = torch.zeros(1, 1, 64, device="cuda"), torch.zeros(1, 1, 320, device="cuda")
        reasons = flash.refuse(q, v)
        assert [any(word in x for x in reasons) for word in ("float32", "320", "7.5")] == [True] * 3
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        means = torch.zeros(3, 1, 64, device="cuda")  # fp32 by design, whatever q is
        assert flash.refuse(q.to(torch.bfloat16), means) == ()
        install_fake_package(monkeypatch, "2.5.9", ())
        (reason,) = flash.refuse(q.to(torch.float16))
        assert "2.6.3" in reason and "2.5.9" in reason
        install_fake_package(monkeypatch, "2.8.0", ())
        assert flash.refuse(q.to(torch.float16)) == ()
        monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", None)  # an import that fails
        (reason,) = flash.refuse(q.to(torch.float16))
        assert "cannot be imported" in reason


def test_a_refusal_reaches_the_caller_as_a_backend_error():
    q, k, v = (torch.zeros(4, 1, 8, device="meta") for _ in range(3))
    with pytest.raises(BackendError, match="CPU and CUDA"):
        attend(q, k, v, Full(), backend="flash")
