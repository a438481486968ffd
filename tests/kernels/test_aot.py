"""Kernels compile ahead of time for three GPU generations, within their limits; who breaks one is named."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from moba_kernels import aot
from moba_kernels.aot import TARGETS, Compiled, Job, compile_all, compile_jobs, jobs_of, main, table_of, violations_of
from moba_kernels.attend.triton_key_blocks import key_blocks
from moba_kernels.triton_math import HAS_GLUON, Variant

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def compiled():
    """One form of every kernel in bf16 for all targets, and in each dtype on Hopper; there every form of D = 128 in
    bf16 with 1 and 4 heads a group. `make aot` compiles all."""
    some = ([(64, 64), (128, 128)], [BF16], TARGETS), ([(64, 64)], [FP32, FP16], [90])
    jobs = [job for one in some for job in jobs_of(*one, one_of_each=True)]
    of_128 = jobs_of([(128, 128)], [BF16], [90])
    usual = [job for job in of_128 if not re.search(r"\b(2|8) heads a group", job.label)]
    assert len(usual) > 50
    return compile_jobs(list(dict.fromkeys([*jobs, *usual])))


@pytest.mark.parametrize("module", ["triton_causal", "triton_picks", "triton_keys"])
def test_a_product_of_fp32_starts_at_zero_and_is_added_as_a_whole(module):
    """Else a column would be one chain of additions, whose rounding grows with the number of keys or queries. (The
    interpreter cannot tell: it multiplies by numpy.)"""
    for job in jobs_of([(64, 64)], [FP32], [90], [f"moba_kernels.attend.{module}"], one_of_each=True):
        text = aot.kernel_of(job).asm["ttir"]
        starts = re.findall(r"tt\.dot %\S+, %\S+, (%\S+?),? ", text)
        zeros = re.findall(r"(%\S+) = arith\.constant dense<0\.0+e\+00>", text)
        assert set(starts) <= set(zeros), f"{job.label}: a product starts at {set(starts) - set(zeros)}"
        assert starts or "sum_pieces" in job.label


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_form_of_the_usual_dims_breaks_a_limit_on_any_target():
    of_others = compile_jobs(list(jobs_of([(64, 64), (128, 128)], [BF16, FP32], TARGETS)))
    assert violations_of(of_others) == []
    assert all(0 < one.registers <= 255 for one in of_others)
    assert not any(one.uses_tf32 for one in of_others)


def test_no_kernel_breaks_a_limit_on_any_target(compiled):
    assert violations_of(compiled) == []
    assert {one.job.module for one in compiled} == set(aot.MODULES)
    assert {one.job.target for one in compiled} == set(TARGETS)
    assert all(0 < one.registers <= 255 for one in compiled)


def test_fp32_never_runs_in_tf32(compiled):
    assert not any(one.uses_tf32 for one in compiled)


def test_attention_in_bf16_runs_on_hoppers_wgmma(compiled):
    kernels = {
        "causal_forward",
        "causal_dq",
        "picks_forward",
        "picks_dq",
        "key_gradients_kernel",
        *(["hopper_key_gradients"] if HAS_GLUON else []),
    }
    hopper = [one for one in compiled if one.job.target == 90 and one.job.dtype == BF16]
    found = {one.job.label.split()[0] for one in hopper if one.uses_wgmma}
    assert kernels <= found
    assert not any(one.uses_wgmma for one in compiled if one.job.target == 80)


def test_specialised_warps_serve_what_they_were_written_for_and_no_rows_that_cannot_be_copied_by_16_bytes():
    def serves(dim=128, dtype=BF16, target=90, keys=512, **options):
        return key_blocks(dim, dim, dtype, target, keys, 4, picks=True, **options).specialised

    assert serves() == serves(dtype=FP16) == serves(keys=1 << 20) == HAS_GLUON
    assert not any((serves(dim=64), serves(dtype=FP32), serves(target=80), serves(target=100), serves(keys=64)))
    assert not serves(aligned=False)


def test_attention_in_bf16_stores_its_results_16_bytes_at_a_time(compiled):
    kernels = ("causal_forward", "causal_dq", "picks_forward", "picks_dq", "key_gradients_kernel")
    attention = [one for one in compiled if one.job.dtype == BF16 and one.job.label.split()[0] in kernels]
    forms = {(one.job.label.split()[0], one.job.head_dims, one.job.target) for one in attention}
    assert len(forms) == len(kernels) * 2 * len(TARGETS)
    assert [one.job.label for one in attention if not one.stores_vectors] == []


def test_every_form_is_listed_once_and_all_dtypes_and_dims_are_there():
    jobs = list(jobs_of(aot.ALL_HEAD_DIMS, [BF16, FP16, FP32], [90]))
    assert len({(job.label, job.target) for job in jobs}) == len(jobs)
    keys = [job for job in jobs if job.module == "moba_kernels.attend.triton_keys"]
    assert {(job.head_dims, job.dtype) for job in keys} == {
        (dims, dtype) for dims in aot.ALL_HEAD_DIMS for dtype in (BF16, FP16, FP32)
    }
    one_of_each = list(jobs_of([(64, 64)], [BF16, FP32], [90], one_of_each=True))
    assert {job.module for job in one_of_each} == set(aot.MODULES)
    assert len(one_of_each) < len(jobs) / 10


@triton.jit
def product_kernel(a, b, out, N: tl.constexpr, PRECISION: tl.constexpr):
    """A product of two tiles, with which limits are broken."""
    row = tl.arange(0, N)
    at = row[:, None] * N + row[None, :]
    x = tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION)
    tl.store(out + at, x)


def variants(head_dims, dtypes, target):
    """Makes this file a module of kernels."""
    for (dim, _), dtype in ((dims, dtype) for dims in head_dims for dtype in dtypes):
        element = {BF16: "bf16", FP32: "fp32"}[dtype]
        types = {"a": f"*{element}", "b": f"*{element}", "out": "*fp32"}
        constants = {"N": dim, "PRECISION": "tf32"}
        yield Variant(f"product {dim}", product_kernel, types, constants, 4, 1, dim, dtype, frozenset(types))


def test_a_kernel_that_rounds_fp32_to_tf32_is_reported():
    (one,) = compile_all([(32, 32)], [FP32], [80], [__name__], workers=1)
    (text,) = one.violations
    assert "sm_80 product 32" in text and "tf32" in text


def test_a_kernel_with_too_much_shared_memory_is_reported(monkeypatch):
    (usual,) = compile_all([(32, 32)], [BF16], [80], [__name__], workers=1)
    assert usual.violations == [] and usual.shared > 0
    monkeypatch.setattr(aot, "SHARED_LIMIT", {80: usual.shared - 1})
    assert [text for text in usual.violations if "shared memory" in text and "sm_80 product 32" in text]
    assert "too much" in table_of([usual])


def a_result(dtype, dims=(128, 128), target=90, **numbers):
    usual = {"registers": 200, "stack": 0, "shared": 1000}
    usual |= {"uses_tf32": False, "uses_wgmma": True, "stores_vectors": True}
    return Compiled(Job("module", dims, dtype, target, 0, "kernel"), **(usual | numbers))


def test_spills_are_allowed_only_to_fp32_and_large_head_dims_and_only_few():
    for dtype in (BF16, FP16):
        assert a_result(dtype, stack=0).violations == []
        assert a_result(dtype, stack=8).violations == ["sm_90 kernel: stack 8 > 0 bytes: registers are spilled"]
    for large in (
        a_result(FP32, stack=256),
        a_result(BF16, (192, 128), stack=256),
        a_result(BF16, (256, 256), stack=8),
    ):
        assert large.violations == []
        assert len(replace(large, stack=264).violations) == 1


def test_shared_memory_has_the_limit_of_its_target():
    for target, limit in ((80, 166_912), (90, 232_448), (100, 232_448)):
        assert a_result(BF16, target=target, shared=limit).violations == []
        assert len(a_result(BF16, target=target, shared=limit + 1).violations) == 1


@pytest.mark.parametrize("broken", [False, True])
def test_the_command_prints_a_table_and_fails_when_a_limit_is_broken(broken, monkeypatch, capsys):
    asked = []

    def compile_nothing(*arguments, **options):
        asked.append((arguments, options))
        return [a_result(BF16), a_result(BF16, shared=300_000 if broken else 0)]

    monkeypatch.setattr(aot, "compile_all", compile_nothing)
    assert main(["--head-dims", "64", "128", "--targets", "90"]) == int(broken)
    assert asked[0][0] == (((64, 64), (128, 128)),) and asked[0][1]["targets"] == [90]
    shown = capsys.readouterr().out
    assert "2 compiled forms" in shown and ("300,000 > 232,448" in shown) == broken
    assert main([]) == int(broken)
    assert asked[1][0] == (aot.ALL_HEAD_DIMS,)


def test_the_command_refuses_to_run_under_the_interpreter(monkeypatch, capsys):
    monkeypatch.setattr(aot, "INTERPRETED", True)
    assert main([]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err
