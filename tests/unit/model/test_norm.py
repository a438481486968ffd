from __future__ import annotations

import pytest
import torch

from moba_train.model.norm import RmsNorm
from moba_train.quiet import quiet_imports

with quiet_imports():
    from megatron.core.transformer.transformer_config import TransformerConfig


def config(tp: int) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
    )


@pytest.mark.parametrize("tp", [1, 2])
def test_the_weight_says_whether_ranks_share_the_tokens_it_saw(tp: int) -> None:
    norm = RmsNorm(config=config(tp), hidden_size=8, eps=1e-5)
    assert norm.weight.sequence_parallel is (tp > 1)  # type: ignore[attr-defined]
    assert list(norm.state_dict()) == ["weight"]


def test_bf16_is_normalised_in_fp32() -> None:
    torch.manual_seed(0)
    norm = RmsNorm(config=config(1), hidden_size=256, eps=1e-5)
    x = 30 * torch.randn(64, 256).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    found = norm.bfloat16()(x)
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().div(exact.abs()).max() <= 2**-8  # one rounding, at the end


def test_every_token_is_normalised_by_itself() -> None:
    torch.manual_seed(0)
    norm, x = RmsNorm(config=config(2), hidden_size=8, eps=1e-5), torch.randn(6, 1, 8)
    assert torch.equal(torch.cat([norm(x[:3]), norm(x[3:])]), norm(x))
