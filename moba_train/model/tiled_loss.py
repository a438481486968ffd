"""The output head and its cross entropy, one tile of tokens at a time: the logits of a row never exist together.

Forward keeps the log-sum-exp of each token. Backward makes the logits of a tile once more and from them both gradients,
so that a step multiplies by the head four times instead of three, and holds one tile of logits instead of several
copies of S x V (arXiv 2410.10989 computes the gradients in the forward pass, which asks for a sum as the loss; the loss
of each token is wanted here, and evaluation wants no gradient).

Tensor-parallel ranks share the vocabulary, and under Megatron's sequence parallelism the tokens outside of it. A tile
is the same rows of each of the N ranks: gathered before the multiplication, its gradient reduce-scattered after it. All
ranks hold equally many tokens, so they cut equally many tiles.

Shape letters: L tokens of this context-parallel rank's shard, N tensor-parallel ranks, S = L / N tokens that this rank
holds, R rows (of S) of a tile, M hidden size, V vocabulary entries of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from moba_train.model.tiles import tile_rows
from moba_train.parallel.collectives import all_gather, reduce_scatter

TileDirection = Literal["forward", "backward"]
OnTile = Callable[[TileDirection, int, int], None]
"""(direction, tile counted from 0, number of tiles): called before each tile."""


@dataclass(frozen=True)
class Head:
    """The output head as one tensor-parallel rank holds it.

    Attributes:
        weight_VM: its rows of the matrix; the tied embedding or a parameter of its own.
        tp_group: tensor-parallel group; None = one rank.
        tile_rows: rows of this rank in a tile; 0 = `tiles.tile_rows` of the shapes.
        on_tile: is told about every tile.
        padding: rows at the end of the whole vocabulary that stand for no token: their probability is 0.
    """

    weight_VM: Tensor
    tp_group: dist.ProcessGroup | None = None
    tile_rows: int = 0
    on_tile: OnTile | None = None
    padding: int = 0

    @property
    def num_ranks(self) -> int:
        return 1 if self.tp_group is None else self.tp_group.size()

    @property
    def first_token(self) -> int:
        """The vocabulary entry of this rank's first row."""
        return 0 if self.tp_group is None else self.tp_group.rank() * self.weight_VM.shape[0]


def token_losses(hidden_SM: Tensor, labels_L: Tensor, head: Head) -> Tensor:
    """-log softmax(hidden @ weight.T)[label], fp32 [L] on every rank, differentiable in `hidden_SM` and the weight.

    Args:
        hidden_SM: this rank's tokens, fp32 or bf16.
        labels_L: int64, of all N ranks' tokens in rank order.
        head: collective over its group.

    The gradient of the weight is added up over tiles in fp32 and rounded once to the weight's dtype.
    """
    losses: Tensor = _TokenLosses.apply(hidden_SM, head.weight_VM, labels_L, head)  # type: ignore[no-untyped-call]
    return losses


@torch.no_grad()
def token_scores(hidden_SM: Tensor, labels_L: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """The loss of each token, fp32 [L], and the most probable token, int64 [L] (of equals the lowest), on every rank.

    Arguments as for `token_losses`; no gradient.
    """
    losses, best = torch.empty(labels_L.shape, device=hidden_SM.device), torch.empty_like(labels_L)
    for rows in _tiles(hidden_SM, head, "forward"):
        logits = _logits(_gather(hidden_SM[rows], head), head)
        _part(best, rows, head).copy_(_argmax(logits, head).view(head.num_ranks, -1))
        loss, _ = _loss_and_lse(logits, _part(labels_L, rows, head).flatten(), head)
        _part(losses, rows, head).copy_(loss.view(head.num_ranks, -1))
    return losses, best


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_SM: Tensor, weight_VM: Tensor, labels_L: Tensor, head: Head) -> Tensor:
        losses = torch.empty(labels_L.shape, dtype=torch.float32, device=hidden_SM.device)
        lse = torch.empty_like(losses)
        for rows in _tiles(hidden_SM, head, "forward"):
            logits = _logits(_gather(hidden_SM[rows], head), head)
            loss, lse_of_tile = _loss_and_lse(logits, _part(labels_L, rows, head).flatten(), head)
            _part(losses, rows, head).copy_(loss.view(head.num_ranks, -1))
            _part(lse, rows, head).copy_(lse_of_tile.view(head.num_ranks, -1))
        ctx.save_for_backward(hidden_SM, weight_VM, labels_L, lse)
        ctx.head = head
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dloss_L: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_SM, weight_VM, labels_L, lse_L = ctx.saved_tensors
        head: Head = ctx.head
        dhidden = torch.empty_like(hidden_SM)
        dweight = torch.zeros(weight_VM.shape, dtype=torch.float32, device=weight_VM.device)
        for rows in _tiles(hidden_SM, head, "backward"):
            hidden = _gather(hidden_SM[rows], head)
            lse, dloss, labels = (_part(x, rows, head).reshape(-1, 1) for x in (lse_L, dloss_L, labels_L))
            gradient = _logits(hidden, head).sub_(lse).exp_().mul_(dloss)
            index, mine = _own_index(labels, head)
            gradient.scatter_add_(1, index, torch.where(mine, -dloss, 0.0))
            gradient = gradient.to(hidden.dtype)
            _scatter_sum(gradient @ weight_VM, dhidden[rows], head)
            if gradient.dtype == dweight.dtype:
                dweight.addmm_(gradient.t(), hidden)
            else:
                dweight.add_(gradient.t() @ hidden)
        return dhidden, dweight.to(weight_VM.dtype), None, None


def _tiles(hidden_SM: Tensor, head: Head, direction: TileDirection) -> Iterator[slice]:
    """Rows of each tile."""
    num_rows, hidden_size = hidden_SM.shape
    rows = head.tile_rows or tile_rows(
        num_rows,
        hidden_size,
        head.weight_VM.shape[0],
        num_ranks=head.num_ranks,
        cpu=hidden_SM.device.type == "cpu",
    )
    for start in range(0, num_rows, rows):
        if head.on_tile is not None:
            head.on_tile(direction, start // rows, -(-num_rows // rows))
        yield slice(start, min(start + rows, num_rows))


def _part(x_L: Tensor, rows: slice, head: Head) -> Tensor:
    """A view [N,R] of the tokens of a tile: the same rows of every rank."""
    return x_L.view(head.num_ranks, -1)[:, rows]


def _gather(hidden_RM: Tensor, head: Head) -> Tensor:
    """[R,M] of every rank -> [N*R,M]."""
    if head.num_ranks == 1:
        return hidden_RM
    whole = hidden_RM.new_empty((head.num_ranks * hidden_RM.shape[0], hidden_RM.shape[1]))
    all_gather(whole, hidden_RM.contiguous(), group=head.tp_group).wait()
    return whole


def _scatter_sum(partial: Tensor, own_RM: Tensor, head: Head) -> None:
    """Fill `own_RM` with this rank's rows of the sum over ranks of `partial` [N*R,M]."""
    if head.num_ranks == 1:
        own_RM.copy_(partial)
    else:
        reduce_scatter(own_RM, partial, group=head.tp_group).wait()


def _logits(hidden: Tensor, head: Head) -> Tensor:
    """[N*R,V] of this rank's vocabulary: multiplied in the weight's dtype, in fp32 from then on."""
    logits = (hidden @ head.weight_VM.detach().t()).float()
    if head.padding:
        num_tokens = head.num_ranks * head.weight_VM.shape[0] - head.padding
        logits[:, max(0, num_tokens - head.first_token) :] = -torch.inf
    return logits


def _own_index(labels: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Where in this rank's vocabulary each label stands (0 where another rank has it), and whether it stands there."""
    index = labels - head.first_token
    mine = (index >= 0) & (index < head.weight_VM.shape[0])
    return torch.where(mine, index, 0), mine


def _loss_and_lse(logits: Tensor, labels: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp over the whole vocabulary of each token of a tile, fp32 [N*R]. Overwrites the logits."""
    top = logits.amax(1)
    if head.num_ranks > 1:
        dist.all_reduce(top, dist.ReduceOp.MAX, group=head.tp_group)
    index, mine = _own_index(labels, head)
    logits.sub_(top[:, None])
    target = torch.where(mine, logits.gather(1, index[:, None])[:, 0], 0.0)
    sums = torch.stack((logits.exp_().sum(1), target))
    if head.num_ranks > 1:
        dist.all_reduce(sums, group=head.tp_group)
    log_total = sums[0].log()
    return log_total - sums[1], log_total + top


def _argmax(logits: Tensor, head: Head) -> Tensor:
    """int64 [N*R]: the lowest token id with the largest logit over all ranks."""
    values, tokens = logits.max(1)
    if head.num_ranks == 1:
        return tokens
    all_values = values.new_empty((head.num_ranks, *values.shape))
    all_tokens = tokens.new_empty((head.num_ranks, *tokens.shape))
    going = [
        all_gather(all_values.view(-1), values, group=head.tp_group),
        all_gather(all_tokens.view(-1), tokens + head.first_token, group=head.tp_group),
    ]
    for work in going:
        work.wait()
    winner = all_values.max(0).indices  # the first of equals: ranks hold rising token ids
    return all_tokens.gather(0, winner[None])[0]


__all__ = ["Head", "OnTile", "token_losses", "token_scores"]
