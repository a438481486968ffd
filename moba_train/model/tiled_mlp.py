"""Megatron's MLP, one tile of tokens at a time: the inner activations [S, 2 * ffn] never exist together.

It belongs to layers under full activation recompute, and costs no operation more than these. The first pass keeps
nothing. The second pass, inside the layer's backward, does not run the MLP at all: what comes out of it has been used
already, and its value enters no gradient (it is only added to the residual). Its backward then makes the inner
activations of a tile again and leaves their gradients at once. So the MLP runs forward twice and backward once, as
under plain recompute. (The tiling is that of arXiv 2506.13996.)

Under sequence parallelism a tile is the same rows of every tensor-parallel rank, gathered and scattered by Megatron's
own layers inside the tile; ranks hold equally many rows, so they cut equally many tiles.

Shape letters: S tokens that this rank holds, B rows (1), M hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moba_train.model.tiles import tile_rows
from moba_train.quiet import quiet_imports

with quiet_imports():
    from megatron.core.tensor_parallel.random import is_checkpointing

Run = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def tile_mlp(mlp: nn.Module, *, num_ranks: int) -> None:
    """Make a Megatron MLP without biases run by tiles. Parameters, names and state dict stay as they are.

    Args:
        mlp: of a layer that is alone in its recomputed segment (recompute_num_layers = 1): another layer in it would
            read what the second pass leaves out.
        num_ranks: tensor-parallel ranks, which share the tokens.
    """
    mlp.forward = _TiledForward(mlp.forward, tuple(mlp.parameters()), num_ranks)


@dataclass(frozen=True)
class _TiledForward:
    """Stands in for the `forward` of an MLP; `run` is its own."""

    run: Run
    weights: tuple[nn.Parameter, ...]
    num_ranks: int

    def __call__(self, hidden_SBM: Tensor, padding_mask: None = None) -> tuple[Tensor, None]:
        """[S,B,M] -> [S,B,M] and no bias. Megatron passes a padding mask for mixtures of experts only."""
        second_pass = torch.is_grad_enabled() and is_checkpointing()
        out: Tensor = _TiledMlp.apply(hidden_SBM, self, second_pass, *self.weights)  # type: ignore[no-untyped-call]
        return out, None

    def tiles(self, hidden_SBM: Tensor) -> Iterator[slice]:
        """Rows of each tile."""
        num_rows, hidden_size = hidden_SBM.shape[0], hidden_SBM.shape[-1]
        inner = sum(weight.numel() for weight in self.weights) // hidden_size  # both branches and their product
        cpu = hidden_SBM.device.type == "cpu"
        rows = tile_rows(num_rows, hidden_size, inner, num_ranks=self.num_ranks, cpu=cpu)
        for start in range(0, num_rows, rows):
            yield slice(start, min(start + rows, num_rows))


class _TiledMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_SBM: Tensor, mlp: _TiledForward, second_pass: bool, *weights: nn.Parameter) -> Tensor:
        ctx.save_for_backward(hidden_SBM)
        ctx.mlp = mlp
        if second_pass:
            return hidden_SBM.new_zeros(1).expand(hidden_SBM.shape)
        out = torch.empty_like(hidden_SBM)
        for rows in mlp.tiles(hidden_SBM):
            out[rows] = mlp.run(hidden_SBM[rows])[0]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout_SBM: Tensor) -> tuple[Tensor | None, ...]:
        (hidden_SBM,) = ctx.saved_tensors
        mlp: _TiledForward = ctx.mlp
        dhidden = torch.empty_like(hidden_SBM)
        totals = [torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) for weight in mlp.weights]
        for rows in mlp.tiles(hidden_SBM):
            tile = hidden_SBM[rows].detach().requires_grad_()
            with torch.enable_grad():
                out = mlp.run(tile)[0]
            dtile, *dweights = torch.autograd.grad(out, (tile, *mlp.weights), dout_SBM[rows])
            dhidden[rows] = dtile
            for total, dweight in zip(totals, dweights, strict=True):
                total.add_(dweight)
        dtypes = (weight.dtype for weight in mlp.weights)
        return dhidden, None, None, *(total.to(dtype) for total, dtype in zip(totals, dtypes, strict=True))


__all__ = ["tile_mlp"]
