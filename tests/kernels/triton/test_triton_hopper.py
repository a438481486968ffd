"""Kernels of specialised warps on the CPU (emulated_gluon.py): dK and dV of Hopper against the reference in fp64, and
that the emulation sees what goes wrong between groups of warps."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import triton

from moba_kernels import Full, MoBA
from moba_kernels.attend import triton_keys
from moba_kernels.attend.triton_key_blocks import KeyBlocks
from moba_kernels.triton_support import GLUON_TRITON, release_of

from .emulated_gluon import Emulated
from .test_triton_keys import BF16, FP16, check, hot_routing

HAS_GLUON = release_of(triton.__version__) in GLUON_TRITON
pytestmark = pytest.mark.skipif(not HAS_GLUON, reason="the kernels in Gluon are not for this Triton")
if HAS_GLUON:
    from moba_kernels.attend import triton_keys_hopper as hopper

CU = [0, 30, 330]  # a tile of one document, whole tiles, and one cut short
BLOCKS = KeyBlocks(64, 128, 4, 4, specialised=True)


@pytest.fixture
def take(monkeypatch):
    """Makes a kernel that of all key gradients; returns it emulated."""

    def kernel(function, seed=0):
        emulated = Emulated(function, seed)
        constants = {"STAGES": BLOCKS.num_stages, "DIM": 128, "VALUE_DIM": 128, "BLOCK_N": BLOCKS.block_n}
        monkeypatch.setattr(triton_keys, "key_blocks", lambda *_, **__: BLOCKS)
        monkeypatch.setattr(triton_keys, "_kernel_of", lambda *_: (emulated, constants))
        return emulated

    return kernel


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("spec", [Full(), MoBA(128, 2), MoBA(100, 3, "group"), MoBA(150, 1)], ids=str)
def test_error_is_at_most_twice_that_of_the_plain_same_precision_way(take, spec, seed):
    emulated = take(hopper.hopper_key_gradients, seed)
    check(CU, spec, (BF16, FP16)[seed], heads=4, kv_heads=2, dim=128)
    assert emulated.programs


@pytest.mark.parametrize("spec", [Full(), MoBA(128, 3)], ids=str)
def test_a_tile_with_much_work_is_cut_into_pieces_that_add_up(take, monkeypatch, spec):
    monkeypatch.setattr(triton_keys, "MIN_UNITS", 2)
    emulated = take(hopper.hopper_key_gradients)
    routing = hot_routing(spec, [0, 400], 2) if isinstance(spec, MoBA) else None
    check([0, 400], spec, BF16, heads=2, kv_heads=1, dim=128, routing=routing)
    assert emulated.programs > 400 // BLOCKS.block_n + 1


def broken(source: str, tmp_path: Path, old: str, new: str):
    """The kernel of a file in which `old` reads `new`."""
    assert old in source
    path = tmp_path / "broken.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("broken", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.hopper_key_gradients


WAIT_ALL = "dv_NE, dk_ND = warpgroup_mma_wait(0, deps=(dv_NE, dk_ND))"
GIVE_BACK = "mbarrier.arrive(empty.index(stage), count=1)"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("mbarrier.wait(full.index(stage), turn // STAGES & 1)", "pass", "while a product read it"),
        ("fence_async_shared()  # what", "pass  # what", "without fence_async_shared"),
        (WAIT_ALL, f"{GIVE_BACK}; {WAIT_ALL}", "arrivals|while a product read it"),
        ("init(empty.index(stage), count=2)", "init(empty.index(stage), count=1)", "while a product read it|for ever"),
        ("init(empty.index(stage), count=2)", "init(empty.index(stage), count=3)", "for ever"),
        ("s_NM = warpgroup_mma_wait(1", "s_NM = warpgroup_mma_wait(2", "'Pending'"),
        ("row_sums + sums_row_M * 2)", "row_sums + sums_row_M * 4)", "addresses"),
    ],
    ids=[
        "read too early",
        "not fenced",
        "given back too early",
        "by one for both",
        "by nobody",
        "not waited for",
        "outside",
    ],
)
def test_what_goes_wrong_between_groups_is_seen(take, tmp_path, old, new, told):
    take(broken(Path(hopper.__file__).read_text(), tmp_path, old, new))
    with pytest.raises((RuntimeError, TypeError, IndexError), match=told):
        check([0, 330], MoBA(128, 3), BF16, heads=2, kv_heads=1, dim=128)
