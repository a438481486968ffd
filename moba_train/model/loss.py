"""The loss of each token: cross entropy over a vocabulary that tensor-parallel ranks may share.

Legend: S tokens of this rank's shard, B rows (1), V vocabulary entries of this rank.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from moba_train.quiet import quiet_imports

with quiet_imports():
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy


def token_losses(logits_SBV: Tensor, labels_SB: Tensor, *, tp: int) -> Tensor:
    """-log softmax(logits)[label], fp32 [S,B], from logits [S,B,V] of any float dtype and labels int64 [S,B].

    With the whole vocabulary at hand PyTorch's fused form is used, which takes half the time of Megatron's on a CPU.
    Megatron's (tp > 1) may overwrite fp32 logits.
    """
    if tp > 1:
        losses: Tensor = vocab_parallel_cross_entropy(logits_SBV, labels_SB)
        return losses
    logits = logits_SBV.flatten(0, 1).float()
    return functional.cross_entropy(logits, labels_SB.flatten(), reduction="none").view(labels_SB.shape)


__all__ = ["token_losses"]
