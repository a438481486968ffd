"""RoPE against formulas written out here, and its independence of where in a row a document lies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moba_kernels import Full, MoBA, attend_partial, mean_keys, pool_sums, route_means
from moba_train.config.schema import RopeConfig
from moba_train.model.rope import RopeTable, attention_factor, inverse_frequencies, rope_table
from moba_train.model.row_context import document_offsets, row_context


def llama3_frequency(i: int, dim: int, rope: RopeConfig) -> float:
    """As published with Llama 3.1, branch by branch."""
    frequency = 1.0 / rope.base ** (2 * i / dim)
    wave = 2 * math.pi / frequency
    if wave < rope.original_seq_len / rope.high_freq_factor:
        return frequency
    if wave > rope.original_seq_len / rope.low_freq_factor:
        return frequency / rope.factor
    smooth = (rope.original_seq_len / wave - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return (1 - smooth) * frequency / rope.factor + smooth * frequency


def yarn_frequency(i: int, dim: int, rope: RopeConfig) -> float:
    """As in the reference code of YaRN: a ramp between two rounded dimensions."""
    plain = rope.base ** (2 * i / dim)
    low, high = (
        dim * math.log(rope.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(rope.base))
        for turns in (rope.beta_fast, rope.beta_slow)
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
    ramp = min(max((i - low) / (high - low), 0.0), 1.0)
    kept = 1 - ramp
    return (1 / (rope.factor * plain)) * (1 - kept) + (1 / plain) * kept


@pytest.mark.parametrize(
    ("rope", "formula"),
    [
        (RopeConfig(base=5e5), lambda i, d, r: 1 / r.base ** (2 * i / d)),
        (RopeConfig(base=1e4, scaling="linear", factor=8.0), lambda i, d, r: 1 / r.base ** (2 * i / d) / 8),
        (RopeConfig(base=5e5, scaling="llama3", factor=8.0, original_seq_len=8192), llama3_frequency),
        (RopeConfig(base=1e4, scaling="yarn", factor=16.0, original_seq_len=4096), yarn_frequency),
    ],
    ids=["none", "linear", "llama3", "yarn"],
)
@pytest.mark.parametrize("dim", [32, 128])
def test_frequencies_follow_the_published_formulas(rope: RopeConfig, formula, dim: int) -> None:
    expected = [formula(i, dim, rope) for i in range(dim // 2)]
    np.testing.assert_allclose(inverse_frequencies(rope, dim).numpy(), expected, rtol=1e-12)


def test_only_yarn_scales_queries_and_keys() -> None:
    assert attention_factor(RopeConfig(scaling="yarn", factor=16.0)) == pytest.approx(0.1 * math.log(16) + 1)
    assert attention_factor(RopeConfig(scaling="yarn", factor=1.0)) == 1.0
    assert attention_factor(RopeConfig(scaling="llama3", factor=8.0)) == 1.0
    table = rope_table(RopeConfig(scaling="yarn", factor=16.0), 8, torch.arange(3))
    assert table.cos[0, 0, 0].item() == pytest.approx(0.1 * math.log(16) + 1)


def test_rotation_turns_pairs_half_a_head_apart() -> None:
    x = torch.randn(5, 2, 8, dtype=torch.float64)
    positions = torch.tensor([0, 1, 7, 1000, 65536])
    turned = rope_table(RopeConfig(), 8, positions).rotate(x)
    for s, position in enumerate(positions.tolist()):
        for i in range(4):
            angle = position * 10000.0 ** (-2 * i / 8)
            a, b = x[s, 1, i].item(), x[s, 1, i + 4].item()
            assert turned[s, 1, i].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-6)
            assert turned[s, 1, i + 4].item() == pytest.approx(b * math.cos(angle) + a * math.sin(angle), abs=1e-6)


def test_angles_are_right_at_ten_million_tokens() -> None:
    position = 10_000_019
    table = rope_table(RopeConfig(), 8, torch.tensor([position]))
    expected = [math.cos(position * 10000.0 ** (-2 * i / 8)) for i in range(4)]
    np.testing.assert_allclose(table.cos[0, 0].numpy(), expected, atol=1e-7)


def test_the_gradient_of_a_rotation_is_the_rotation_back() -> None:
    x = torch.randn(6, 3, 4, requires_grad=True)
    table = rope_table(RopeConfig(scaling="yarn", factor=4.0), 4, torch.arange(6))
    weight = torch.randn(6, 3, 4)
    (table.rotate(x) * weight).sum().backward()
    back = RopeTable(table.cos, -table.sin).rotate(weight)
    torch.testing.assert_close(x.grad, back, rtol=0, atol=0)


def test_rotation_keeps_the_dtype_of_its_input() -> None:
    assert rope_table(RopeConfig(), 4, torch.arange(2)).rotate(torch.randn(2, 1, 4).bfloat16()).dtype == torch.bfloat16


def test_document_offsets_start_anew_in_each_document_and_skip_empty_ones() -> None:
    offsets = document_offsets(np.array([0, 2, 3, 4, 6]), (0, 3, 3, 5, 7))
    assert offsets.tolist() == [0, 2, 0, 1, 1]


@pytest.mark.parametrize("spec", [Full(), MoBA(8, 3)], ids=["full", "moba"])
def test_a_document_gives_the_same_output_at_offset_0_and_at_offset_2_to_the_20(spec) -> None:
    length, offset = 50, 2**20
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(length, 2, 4, generator=generator) for _ in range(3))

    def output(start: int) -> torch.Tensor:
        bounds, cpu = ([0, start, start + length] if start else [0, length]), torch.device("cpu")
        context = row_context(bounds, (spec,), RopeConfig(), head_dim=4, layout="zigzag", cp_group=None, device=cpu)
        pack = context.pack
        assert context.rope is not None and context.positions_S is not None
        here = slice(start, start + length)
        table = RopeTable(context.rope.cos[here], context.rope.sin[here])
        where = context.positions_S[here]
        rotated_q, rotated_k = table.rotate(q), table.rotate(k)
        routing = None
        if isinstance(spec, MoBA):
            means = mean_keys(*pool_sums(rotated_k, pack=pack, chunk_size=spec.chunk_size, k_positions=where))
            routing = route_means(rotated_q, means, spec, pack=pack, q_positions=where)
        options = {"pack": pack, "q_positions": where, "k_positions": where, "routing": routing}
        return attend_partial(rotated_q, rotated_k, v, spec, **options).out

    torch.testing.assert_close(output(offset), output(0), rtol=0, atol=0)
