"""The unit that travels from the data to the loss: one packed row.

Legend: S tokens of a row (global, before context-parallel sharding).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Row:
    """One packed training sequence; every rank of a context-parallel group holds the same row and cuts its own shard.

    Attributes:
        tokens_S: int64 [S], token ids.
        labels_S: int64 [S], the token that follows inside the same document; the last token of a document predicts
            end-of-document.
        loss_mask_S: float32 [S], 1 where the label counts (0 on padding, on an end-of-document token, and outside the
            answers of a needle document or the assistant's words of a conversation).
        cu_seqlens: document boundaries, from 0 to S; padding is a document of its own at the end of the row.
        source: name of the source that the row was drawn from.
        sample_id: index of the row in its stage (0, 1, ...): with seed and stage it names the data exactly.
        document_ids: index of each document in its source, in row order (padding: -1).
    """

    tokens_S: NDArray[np.int64]
    labels_S: NDArray[np.int64]
    loss_mask_S: NDArray[np.float32]
    cu_seqlens: tuple[int, ...]
    source: str = ""
    sample_id: int = 0
    document_ids: tuple[int, ...] = ()
