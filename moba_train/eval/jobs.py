"""What the needle grid asks for: jobs (one sample under one attention), how they are built, and how they share rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moba_train.data.needles import NeedleSample, NeedleText, build_niah_sample
from moba_train.data.row import Row
from moba_train.errors import ConfigError

if TYPE_CHECKING:
    from moba_train.engine.base import AttentionMode


@dataclass(frozen=True)
class Job:
    """One sample under one attention, named so that any rank can build it."""

    attention: AttentionMode
    length: int
    depth_percent: float
    sample: int
    sample_hash: str


class Samples:
    """Builds samples by name: a pure function of (seed, length, depth, sample)."""

    def __init__(self, text: NeedleText, haystack: NDArray[np.int64], seed: int) -> None:
        self.tokenizer = text.tokenizer
        self._text = text
        self._haystack = haystack
        self._seed = seed

    def build(self, length: int, depth_percent: float, sample: int) -> NeedleSample:
        return build_niah_sample(
            self._text, self._haystack, length=length, depth_percent=depth_percent, seed=self._seed, index=sample
        )

    def jobs(
        self, lengths: Sequence[int], depths: Sequence[float], samples: int, attentions: Sequence[AttentionMode]
    ) -> list[Job]:
        """Every job of the grid; the samples of one length and attention follow one another, ready to be packed."""
        jobs: list[Job] = []
        for length in lengths:
            names = [(depth, i) for depth in depths for i in range(samples)]
            hashes = [hashlib.sha256(self.build(length, *name).tokens.tobytes()).hexdigest()[:16] for name in names]
            for attention in attentions:
                jobs.extend(Job(attention, length, *name, digest) for name, digest in zip(names, hashes, strict=True))
        return jobs


def check_grid(lengths: Sequence[int], depths: Sequence[float], samples: int) -> None:
    wrong = [length for length in lengths if length < 1]
    outside = [depth for depth in depths if not 0 <= depth <= 100]
    if not lengths or not depths or samples < 1 or wrong or outside:
        raise ConfigError(
            "the needle grid is not usable",
            where="niah.lengths, niah.depths, niah.samples",
            got=f"lengths {list(lengths)}, depths {list(depths)}, {samples} samples",
            allowed="lengths >= 1, depths from 0 to 100 percent, at least one sample",
            fix="correct the grid in [niah] or on the command line",
        )


def share_rows(jobs: Sequence[Job], row_tokens: int) -> list[list[Job]]:
    """Jobs that share a row: one attention, one length, at most max(1, row_tokens // length) samples."""
    groups: list[list[Job]] = []
    for job in jobs:
        last = groups[-1] if groups else []
        same = bool(last) and (last[0].attention, last[0].length) == (job.attention, job.length)
        if same and len(last) < max(1, row_tokens // job.length):
            last.append(job)
        else:
            groups.append([job])
    return groups


def pack_samples(samples: Sequence[NeedleSample], *, sample_id: int = 0) -> Row:
    """One row whose documents are the samples, in order, without padding."""
    rows = [sample.to_row() for sample in samples]
    bounds = np.cumsum([0, *(len(row.tokens_S) for row in rows)])
    return Row(
        tokens_S=np.concatenate([row.tokens_S for row in rows]),
        labels_S=np.concatenate([row.labels_S for row in rows]),
        loss_mask_S=np.concatenate([row.loss_mask_S for row in rows]),
        cu_seqlens=tuple(int(bound) for bound in bounds),
        source="niah",
        sample_id=sample_id,
    )
